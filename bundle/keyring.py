"""Where a person's keys are: a file, a name in a folder of keys, or an object in a token.

A person of the profile `cnsa2` signs with two keys, so every answer is a tuple.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bundle.keys import Signer, load_signer, pair_names
from bundle.token import names_token, open_token


def key_paths(name: str, folder: Path) -> tuple[Path, ...]:
    """Return the files that a path, or a name in `folder`, stands for; two for a pair."""
    path = Path(name).expanduser()
    if "/" in name or path.exists():
        return (path,)
    stem = name.removesuffix(".pem")
    single = folder / f"{stem}.pem"
    pair = tuple(folder / f"{each}.pem" for each in pair_names(stem))
    return pair if not single.exists() and all(each.exists() for each in pair) else (single,)


def open_signers(
    names: Iterable[str], folder: Path, *, passphrase: bytes = b"", pin: bytes = b""
) -> tuple[Signer, ...]:
    """Open the keys that a person names.

    Args:
        names: Paths, names in `folder`, or `pkcs11:` URIs.
        folder: `keys/` of the tree.
        passphrase: Opens encrypted files.
        pin: Opens tokens.

    Raises:
        RefusedError: `trust.keyfile`, `trust.token`.
        FaultError: `host.io`, `host.extra`.

    """
    found: list[Signer] = []
    for name in names:
        if names_token(name):
            found.append(open_token(name, pin))
        else:
            found += [load_signer(path, passphrase) for path in key_paths(name, folder)]
    return tuple(found)
