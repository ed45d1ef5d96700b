"""What a backup is: one encrypted file that proves itself to whoever holds the log's public key.

    META/backup.json      the log's record of this backup, and the proof that it lies in the log
    META/inventory.json   digest and mode of every file beside the log; the record names its digest
    files/...             those files, in the order of the inventory
    audit/...             the log up to the head of the proof, which verifies by itself

The whole is encrypted, since it holds private keys (FORMAT.md 16), and for whoever has a
recipient's public key anything can be encrypted. So nothing large is parsed on the file's own word:
the first document is small; the inventory is parsed when it is the one that a signed head of the
log vouches for; the files of the log have no list at all, each one follows its own header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from airgap.audit.log import MAX_OBJECT
from airgap.audit.receipt import MAX_RECEIPT
from airgap.audit.record import MAX_LINE
from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Count, Document, Instant, Sha256Hex
from bundle.manifest import first_problem, require_paths
from policy.errors import RefusedError

CODE: Final = "backup.format"
HEAD: Final = "META/backup.json"
INVENTORY: Final = "META/inventory.json"
# A record of this kind has 2 kB, a receipt of our own heads 5 kB.
HEAD_LIMIT: Final = 1 << 16
INVENTORY_LIMIT: Final = MAX_OBJECT  # the log keeps it as an object
KIND: Final = "admin.backup"
# What another host would not take over: locks, probes, engines of a GPU, installs half done.
LEFT_OUT: Final = ("enclave/", "engines/", "store/quarantine/", "store/verify/", "store/lock")
_LOG_NAME: Final = re.compile(r"(?!.{94})[A-Za-z0-9_-][\w.-]*(?:/[A-Za-z0-9_-][\w.-]*)*", re.ASCII)

Mode = Annotated[int, Field(ge=0, le=0o777)]


class Item(Document):
    """A file beside the log."""

    path: str
    size: Count
    mode: Mode
    sha256: Sha256Hex


class Inventory(Document):
    """`META/inventory.json`: the log holds its digest."""

    format: Literal["airgap-backup-inventory/1"] = "airgap-backup-inventory/1"
    created: Instant
    releases: bool
    files: tuple[Item, ...]
    links: dict[str, str]

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))


class Head(Document):
    """`META/backup.json`: `record` is a line of the log, `proof` its receipt (C2SP tlog-proof)."""

    format: Literal["airgap-backup/2"] = "airgap-backup/2"
    record: Annotated[str, Field(max_length=MAX_LINE)]
    proof: Annotated[str, Field(max_length=MAX_RECEIPT)]
    inventory_size: Annotated[int, Field(ge=1, le=INVENTORY_LIMIT)]

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))


def parse_head(raw: bytes) -> Head:
    """Turn untrusted bytes into the first document: RefusedError `backup.format`."""
    found: Head = _parse(Head, raw, HEAD_LIMIT)
    return found


def parse_inventory(raw: bytes) -> Inventory:
    """Turn bytes that the log vouches for into an inventory: RefusedError `backup.format`."""
    found: Inventory = _parse(Inventory, raw, INVENTORY_LIMIT)
    try:
        require_names([item.path for item in found.files], found.links)
    except RefusedError as error:
        raise RefusedError(CODE, f"the backup: {error.message}") from error
    for name in [*(item.path for item in found.files), *found.links]:
        if name.startswith(("audit/", *LEFT_OUT)) or name == "audit":
            raise RefusedError(CODE, f"the backup: {name!r:.100} has no place in a tree")
    for name, target in found.links.items():
        if not stays(target):
            raise RefusedError(CODE, f"the backup: the link {name!r:.100} leads away")
    return found


def require_names(names: Sequence[str], links: Mapping[str, str]) -> None:
    """Refuse names and targets of links that cannot be written again as they are."""
    require_paths([*names, *links])
    for text in [*names, *links, *links.values()]:
        if not text.isprintable():  # a byte that is no UTF-8 is not, either
            raise RefusedError("manifest.paths", f"{text!r:.80} holds odd characters")


def names_log_file(name: str) -> bool:
    """Tell whether a file of a log may be called that, `audit/` left out: it leads nowhere else."""
    return _LOG_NAME.fullmatch(name) is not None


def stays(target: str) -> bool:
    """Tell whether a link leads to something beside or below it, by a name that can be written."""
    return bool(target) and not target.startswith("/") and ".." not in target.split("/")


def _parse(kind: type[Any], raw: bytes, limit: int) -> Any:
    parse_canonical(raw, code=CODE, what="the backup", limit=limit)
    try:
        found = kind.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError(CODE, f"the backup: {first_problem(error)}") from error
    if found.to_bytes() != raw:
        raise RefusedError(CODE, "the backup writes a field in another form")
    return found
