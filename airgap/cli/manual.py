"""`airgap explain CODE`, and `airgap manual`: man pages, completion, and a page for each code.

All of it is made from the program that is installed, so it can be read where there is no network,
and cannot tell of another version.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from airgap.cli.common import Json, show
from airgap.cli.rooms import ROOMS
from airgap.cli.steps import usual_step
from policy.errors import CODES, FaultError, UsageError

EXITS = (
    ("0", "done; yes"),
    ("1", "refused: understood, and the answer is no"),
    ("2", "wrong use of the command"),
    ("3", "a fault: it could not be found out, or not be done"),
    ("4", "1 or 2, and the document of --json could not be written"),
    ("130", "interrupted"),
)
SHELLS = {"bash": "airgap.bash", "zsh": "_airgap", "fish": "airgap.fish"}
_WORDS = {Path: "PATH", int: "NUMBER", float: "NUMBER"}
_PACKAGES = ("policy", "bundle", "airgap")
_CODE = re.compile(r"`([a-z]+\.[a-z0-9_-]+)`|`\.([a-z0-9_-]+)`")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("explain")(explain)
    app.command("manual")(manual)


def explain(
    code: Annotated[
        str | None, typer.Argument(help="As a refusal prints it, for example trust.epoch.")
    ] = None,
    *,
    json: Json = False,
) -> None:
    """Say what a code means, how things stand after it, and what to do; without CODE list all."""
    if code is None:
        document = {"format": "airgap/codes/1", "codes": dict(sorted(CODES.items()))}
        width = max(map(len, CODES))
        show(document, "\n".join(f"{c:<{width}}  {CODES[c]}" for c in sorted(CODES)), json=json)
        return
    page = _page(code)
    show({"format": "airgap/code/1", **page.as_document()}, page.as_text(), json=json)


def manual(
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder, made when it is missing.")],
    json: Json = False,
) -> None:
    """Write man pages, shell completion and a page for each error code below a folder.

    man/man1/*.1, completion/{airgap.bash,_airgap,airgap.fish}, errors/CODE.md.
    """
    try:
        counts = {
            "man": _write_man(out / "man" / "man1"),
            "completion": _write_completion(out / "completion"),
            "errors": _write_errors(out / "errors"),
        }
    except OSError as error:
        raise FaultError(
            "host.io", f"{str(error.filename)!r:.160} cannot be written: {error.strerror}"
        ) from error
    document = {"format": "airgap/manual/1", "folder": str(out), **counts}
    text = "\n".join(
        (
            f"{counts['man']} pages in {out / 'man'}: man -M {out / 'man'} airgap",
            f"completion of {counts['completion']} shells in {out / 'completion'}",
            f"{counts['errors']} pages in {out / 'errors'}",
        )
    )
    show(document, text, json=json)


# -- a code -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page:
    """All that can be said of a code."""

    code: str
    meaning: str
    checked: str
    after: str
    step: str
    read: str
    raised: tuple[tuple[str, str], ...]  # (function, first line of its docstring)

    def as_document(self) -> dict[str, Any]:
        """Return the page as JSON."""
        return {
            "code": self.code,
            "meaning": self.meaning,
            "checked": self.checked,
            "after": self.after,
            "next_step": self.step,
            "read": self.read,
            "raised": [{"function": name, "does": does} for name, does in self.raised],
        }

    def as_text(self) -> str:
        """Return the page for a terminal."""
        parts = [
            f"{self.code}: {self.meaning}",
            _filled("checked", self.checked),
            _filled("after it", self.after),
            _filled("next step", f"{self.step}. The message itself may say it more exactly."),
            _filled("read", self.read),
        ]
        if self.raised:
            lines = "\n".join(f"  {name}: {does}" for name, does in self.raised)
            parts.append(f"raised by\n{lines}")
        return "\n\n".join(parts)

    def as_markdown(self) -> str:
        """Return the page for a folder of pages."""
        raised = "".join(f"- `{name}`: {does}\n" for name, does in self.raised)
        return (
            f"# `{self.code}`\n\n{self.meaning[:1].upper()}{self.meaning[1:]}.\n\n"
            f"**What was checked.** {self.checked}\n\n"
            f"**How things stand.** {self.after}\n\n"
            f"**Next step.** {self.step}. The message itself may say it more exactly.\n\n"
            f"**Read on.** {self.read}\n" + (f"\n**Raised by**\n\n{raised}" if raised else "")
        )


def _page(code: str) -> Page:
    if code not in CODES:
        near = difflib.get_close_matches(code, CODES, n=3)
        raise UsageError(
            "usage.argument",
            f"there is no code {code!r:.40}" + (f"; did you mean {', '.join(near)}?" * bool(near)),
            hint="airgap explain lists all codes",
        )
    room = ROOMS[code.partition(".")[0]]
    return Page(
        code,
        CODES[code],
        room.checked,
        room.after,
        usual_step(code),
        room.read,
        _raisers().get(code, ()),
    )


@functools.cache  # it reads every source file
def _raisers() -> dict[str, tuple[tuple[str, str], ...]]:
    """Return for each code the public functions whose docstring says that they raise it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for package in _PACKAGES:
        folder = Path(inspect.getfile(__import__(package))).parent
        for path in sorted(folder.rglob("*.py")):
            module = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
            for name, text in _docstrings(ast.parse(path.read_bytes())):
                for code in _codes_of(text.partition("Raises:")[2]):
                    first = text.partition("\n")[0].rstrip(".")
                    found.setdefault(code, []).append((f"{module}.{name}", first))
    return {code: tuple(places) for code, places in found.items()}


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text and "Raises:" in text:
                yield node.name, text


def _codes_of(text: str) -> Iterator[str]:
    """Yield codes in a docstring; `.reason` after `room.reason` is of the same room."""
    room, seen = "", set[str]()
    for whole, reason in _CODE.findall(text):
        room = whole.partition(".")[0] or room
        code = whole or f"{room}.{reason}"
        if code in CODES and code not in seen:
            seen.add(code)
            yield code


def _filled(label: str, text: str, width: int = 78) -> str:
    first = f"{label:<11}"
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * len(first))


# -- pages ------------------------------------------------------------------------------------


def _write_errors(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for code in CODES:
        (folder / f"{code}.md").write_text(_page(code).as_markdown(), "utf-8")
    lines = "".join(f"| [`{code}`]({code}.md) | {CODES[code]} |\n" for code in sorted(CODES))
    index = f"# Error codes\n\n| code | means |\n|---|---|\n{lines}"
    (folder / "README.md").write_text(index, "utf-8")
    return len(CODES)


def _write_completion(folder: Path) -> int:
    from typer._completion_shared import get_completion_script

    folder.mkdir(parents=True, exist_ok=True)
    for shell, name in SHELLS.items():
        script = get_completion_script(
            prog_name="airgap", complete_var="_AIRGAP_COMPLETE", shell=shell
        )
        (folder / name).write_text(script.rstrip("\n") + "\n", "utf-8")
    return len(SHELLS)


def _write_man(folder: Path) -> int:
    from airgap.cli.app import build

    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for words, command in _commands(("airgap",), typer.main.get_command(build())):
        (folder / f"{'-'.join(words)}.1").write_text(_man(words, command), "utf-8")
        count += 1
    return count


def _commands(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _commands((*words, name), child)


def _man(words: tuple[str, ...], command: Any) -> str:
    """Return the page of a command in the macros of man(7)."""
    name = "-".join(words)
    first, _, rest = inspect.cleandoc(command.help or "").partition("\n\n")
    first = " ".join(first.split())
    children = getattr(command, "commands", {})
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    lines = [
        f'.TH "{_roff(name.upper())}" "1" "" "airgap {version("airgap")}" "airgap"',
        ".SH NAME",
        f"{_roff(name)} \\- {_roff(first.rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_roff(' '.join(words))}",
        *(["[\\fIOPTIONS\\fR]"] if options else []),
        *(f"\\fI{_roff(_metavar(each))}\\fR" for each in arguments),
        *(["\\fICOMMAND\\fR [\\fIARGUMENTS\\fR]"] if children else []),
        ".SH DESCRIPTION",
        _roff(first),
        *(f".PP\n{_roff(' '.join(part.split()))}" for part in _paragraphs(rest)),
    ]
    lines += _section(
        "COMMANDS",
        [
            (f".BR {_roff('-'.join((*words, child_name)))} (1)", _said(child.help))
            for child_name, child in children.items()
            if not child.hidden
        ],
    )
    lines += _section(
        "ARGUMENTS", [(f"\\fI{_roff(_metavar(p))}\\fR", p.help or "") for p in arguments]
    )
    lines += _section("OPTIONS", [(_option(p), p.help or "") for p in options])
    lines += _section("EXIT STATUS", [(f".B {status}", means) for status, means in EXITS])
    lines += [".SH SEE ALSO", "\\fBairgap explain\\fR \\fICODE\\fR says what a refusal means."]
    if len(words) > 1:
        lines.append(f".BR {_roff('-'.join(words[:-1]))} (1)")
    return "\n".join(lines) + "\n"


def _section(title: str, entries: list[tuple[str, str]]) -> list[str]:
    """Return a section of tagged paragraphs: (tag in roff, plain text)."""
    lines = [f".SH {title}"] if entries else []
    for tag, text in entries:
        lines += [".TP", tag, _roff(text)]
    return lines


def _said(text: str | None) -> str:
    """Return the first paragraph of a help text in one line."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def _paragraphs(text: str) -> list[str]:
    return [part for part in text.split("\n\n") if part.strip()]


def _metavar(argument: Any) -> str:
    word = argument.metavar or (argument.name or "").upper()
    return word if argument.required or word.startswith("[") else f"[{word}]"


def _option(option: Any) -> str:
    names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in (*option.opts, *option.secondary_opts))
    flag = option.is_flag or option.count
    annotation = option.type_descriptor.annotation
    kinds = get_args(annotation) or (annotation,)  # `list[Path]` is a Path, repeated
    word = option.metavar or next((_WORDS[kind] for kind in kinds if kind in _WORDS), "TEXT")
    return names if flag else f"{names} \\fI{_roff(word)}\\fR"


def _roff(text: str) -> str:
    """Return text as roff prints it: hyphens as such, no line that is a request."""
    safe = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{safe}" if safe.startswith((".", "'")) else safe
