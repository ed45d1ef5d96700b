"""What commands share by which named people sign: options, the key, and the typed confirmation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import stderr
from policy.errors import RefusedError

if TYPE_CHECKING:
    from policy.terms import Digest

DOCUMENT_LIMIT = 64 * 1024 * 1024  # bytes of the filed document

REASON = typer.Option("--reason", help="Why, in your words.")
EXPIRES = typer.Option("--expires", formats=["%Y-%m-%d"], help="First day it no longer counts.")

Key = Annotated[str, typer.Option("--key", help="Your private key: a file, or a name in keys/.")]
Reason = Annotated[str, REASON]
Confirm = Annotated[
    str | None, typer.Option("--confirm", help="What you would type: the project's id.")
]
Passphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line opens the key.")
]
Filed = Annotated[
    Path | None, typer.Option("--document", help="The memo on file; its digest is kept.")
]


def signer_of(key: str, passphrase_file: Path | None, tree: Path) -> Any:
    """Open a person's private key: a file, or a name in keys/ of the tree; two of a cnsa2 name."""
    from bundle.keyring import open_signers
    from bundle.keys import read_passphrase

    return open_signers([key], tree / "keys", passphrase=read_passphrase(passphrase_file))


def document_digest(path: Path | None) -> Digest | None:
    """The digest of the filed document."""
    from bundle.keys import read_limited
    from policy.terms import Digest

    if path is None:
        return None
    content = read_limited(path, DOCUMENT_LIMIT, code="policy.approval", what="the document")
    return Digest.of(content)


def require_typed(words: str, project: str, confirm: str | None, *, code: str) -> None:
    """Show what will be signed and have the project's id typed; RefusedError `code` otherwise."""
    stderr.print(words, markup=False, soft_wrap=True)
    if confirm is None and sys.stdin.isatty():
        stderr.print(f"Type {project!r} to sign, anything else to stop: ", end="")
        confirm = sys.stdin.readline()
    if (confirm or "").strip() != project:
        raise RefusedError(
            code,
            "nothing was signed: the confirmation is not the project's id",
            hint=f"read it, then add: --confirm {project}",
        )
