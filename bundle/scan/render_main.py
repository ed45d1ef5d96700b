"""The child that renders one chat template under limits: standard input in, nothing out.

`python -I -B render_main.py OUTPUT_LIMIT`. Exit 0: rendered within the limit; 3: the template
raised; 4: too much output. The kernel ends it when it takes more time or memory than below.
"""

from __future__ import annotations

import resource
import sys

CPU_SECONDS = 5
MEMORY = 512 * 1024 * 1024
CONVERSATION = [
    {"role": "system", "content": "You are a model."},
    {"role": "user", "content": "C1CCCCC1"},
    {"role": "assistant", "content": "CCO"},
    {"role": "user", "content": "again"},
]


class Refusal(Exception):  # noqa: N818 - the template's own way to say no
    """A template called `raise_exception`; that is its right."""


def main(limit: int) -> int:
    """Render standard input in a sandbox and count what comes out."""
    for kind, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (value, value))
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415 - under the limits

    def refuse(message: str) -> None:
        raise Refusal(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=lambda _: "2026-01-01")
    size = 0
    try:
        template = environment.from_string(sys.stdin.read())
        pieces = template.generate(
            messages=CONVERSATION,
            add_generation_prompt=True,
            tools=None,
            bos_token="<bos>",  # noqa: S106 - a token of text
            eos_token="<eos>",  # noqa: S106 - same
        )
        for piece in pieces:
            size += len(piece)
            if size > limit:
                return 4
    except Refusal:
        return 0
    except Exception as error:  # noqa: BLE001 - whatever it raises, the template does not work
        sys.stderr.write(f"{type(error).__name__}: {error!s:.200}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
