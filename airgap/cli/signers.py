"""The options with which a person signs: key files by path or name, or keys in a token."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from airgap.cli.common import root_folder

if TYPE_CHECKING:
    from bundle.keys import Signer

Keys = Annotated[
    list[str],
    typer.Option(
        "--key",
        help="Private key: a file, a name in keys/ of the tree, or a pkcs11: URI; repeatable. "
        "A name of the profile cnsa2 stands for both keys.",
    ),
]
Passphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line opens the key.")
]
PinFile = Annotated[
    Path | None, typer.Option("--pin-file", help="Its first line is the PIN of the token.")
]


@dataclass(frozen=True)
class Signing:
    """With which keys a person signs."""

    key: Keys
    passphrase_file: Passphrase = None
    pin_file: PinFile = None

    def open(self, root: Path | None) -> tuple[Signer, ...]:
        """Open what `--key` names."""
        from bundle.keyring import open_signers
        from bundle.keys import read_passphrase

        return open_signers(
            self.key,
            root_folder(root) / "keys",
            passphrase=read_passphrase(self.passphrase_file),
            pin=read_passphrase(self.pin_file),
        )


@dataclass(frozen=True)
class RootSigning(Signing):
    """The same; without `--key` the key called `root`."""

    key: Keys = field(default_factory=lambda: ["root"])
