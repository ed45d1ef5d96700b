"""What every command shares: options, output, and the one place where errors become exits."""

from __future__ import annotations

import errno
import json as jsonlib
import os
import pwd
import re
import sys
from pathlib import Path
from textwrap import TextWrapper
from typing import Annotated, Any

import typer
from rich.text import Text

from airgap.cli.steps import next_step
from airgap.cli.streams import Screen, is_utf8, lost
from policy.errors import AirgapError, FaultError

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

Root = Annotated[
    Path | None,
    typer.Option(
        "--root",
        help="Folder that holds site.toml, trust/, policy/, store/, audit/ and keys/. "
        "Default: the user's data folder.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

# Text is never markup: what comes from a bundle must not colour, hide or link anything.
stdout = Screen(highlight=False, soft_wrap=True, markup=False, emoji=False)
stderr = Screen(stderr=True, highlight=False, markup=False, emoji=False)


def root_folder(root: Path | None) -> Path:
    """Return the tree of this user, `--root` or `$XDG_DATA_HOME/airgap`; it need not exist yet."""
    if root is not None:
        return root.expanduser().absolute()
    base = os.environ.get("XDG_DATA_HOME", "")
    home = Path(base) if base.startswith("/") else Path.home() / ".local" / "share"
    return home / "airgap"


def account_name() -> str:
    """Name of the account that runs this process; its number where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet; FaultError `host.io`."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise FaultError(
            "host.io", f"cannot write {path}: {error.strerror}", hint="name a new file"
        ) from error


def show(document: dict[str, Any], text: Any, *, json: bool) -> None:
    """Print the result: `document` with `--json`, else `text` (a string or a rich object)."""
    if json:
        write_json(document, sort_keys=True)
    else:
        words = isinstance(text, str)
        shown = folded(visible(text), stdout) if words else text
        stdout.print(shown, soft_wrap=words or not stdout.is_terminal)


def write_json(document: dict[str, Any], *, sort_keys: bool = False) -> bool:
    """Write one document to standard output, in ASCII where that is not UTF-8.

    Where it cannot be written, standard error says so, the exit status becomes another one
    (`streams.told`), and False is returned.

    Raises:
        BrokenPipeError: The reader has gone away.

    """
    text = jsonlib.dumps(
        document, indent=1, ensure_ascii=not is_utf8(sys.stdout), sort_keys=sort_keys
    )
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        lost.append(error)
        code = document.get("code")
        of = f" (code {code})" if isinstance(code, str) and code else ""
        _print_words(
            FaultError(
                "host.space" if error.errno == errno.ENOSPC else "host.io",
                f"the document{of} could not be written to standard output: {error.strerror}",
                hint="send standard output to a place that takes it, then run the command again",
            )
        )
        return False
    return True


def show_error(error: AirgapError, *, json: bool) -> None:
    """Print a refusal or fault: to standard output as JSON, else to standard error in words.

    A document that cannot be written is told in words as well: a code is never lost.
    """
    try:
        if json and write_json(error_document(error)):
            return
    except BrokenPipeError as gone:
        lost.append(gone)
    _print_words(error)


def _print_words(error: AirgapError) -> None:
    word = {1: "refused", 2: "usage", 3: "fault"}[error.exit_status]
    head = Text.assemble((word, "bold red"), " ", (error.code, "bold"))
    stderr.print(head, soft_wrap=True)
    for words in (error.message, f"next step: {next_step(error)}"):
        stderr.print(folded(visible(words), stderr), markup=False, soft_wrap=True)


def error_document(error: AirgapError) -> dict[str, Any]:
    """Return what `--json` prints of an error."""
    return {
        "code": error.code,
        "error": error.message,
        "hint": next_step(error),
        "exit": error.exit_status,
    }


def folded(text: str, screen: Screen) -> str:
    """Break lines between words where people read them; digests and paths stay whole."""
    if not screen.is_terminal:
        return text
    fold = TextWrapper(screen.width - 2, break_long_words=False, break_on_hyphens=False)
    fold.replace_whitespace = fold.drop_whitespace = False
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= screen.width:
            lines.append(line)
            continue
        first, *more = fold.wrap(line)
        lines += [first.rstrip(), *(f"  {each.strip()}" for each in more)]
    return "\n".join(lines)


def visible(text: str) -> str:
    """Return text for a terminal: signs that would move its cursor or turn it stand as escapes."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)
