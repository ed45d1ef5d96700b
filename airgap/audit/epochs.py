"""Key epochs: which key of a log may sign which size (docs/design/audit.md, 5).

A `key.rotate` record ends an epoch: it is the last record of its head, and that head is signed by
the old key and by the new one. A head of size n counts only under the key whose epoch holds n.
Epochs are ranges of sequence numbers and never times, so a stolen old key signs nothing later and
a new one rewrites nothing earlier.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from airgap.audit.checkpoint import (
    TOKEN,
    Head,
    LogKey,
    Ring,
    Signer,
    Vkey,
    load_log_key,
    load_private,
    load_ring,
    parse_vkey,
    private_pem,
    vkey_path,
    write_new,
)
from airgap.audit.disk import Disk
from airgap.audit.record import Record
from airgap.audit.token_key import TokenKey, destroy_reference, pin_path
from policy.errors import RefusedError

USE_LOG: Final = "log"


@dataclass(frozen=True, slots=True)
class Rotation:
    """From the head of `size` on, which covers the `key.rotate` record, `vkey` signs."""

    size: int
    vkey: Vkey


class Epochs:
    """The keys of one log with the sizes that each holds."""

    def __init__(self, first: Vkey | None, rotations: Sequence[Rotation] = ()) -> None:
        """`first` is None where nobody knows the oldest key; its heads are then not judged."""
        self.rotations = tuple(rotations)
        self._keys = (first, *(rotation.vkey for rotation in rotations))
        self._starts = (0, *(rotation.size for rotation in rotations))

    def holder(self, size: int) -> Vkey | None:
        """Return the key whose epoch holds `size`; the closing head belongs to the old one."""
        found = self._keys[0]
        for start, key in zip(self._starts, self._keys, strict=True):
            if start < size:
                found = key
        return found

    @property
    def ring(self) -> Ring | None:
        """All keys that are known; None when none is."""
        known = tuple(key for key in self._keys if key is not None)
        return Ring(known) if known else None

    def require(self, head: Head) -> None:
        """Return if a key signed the head in whose epoch it lies; RefusedError `audit.epoch`."""
        holder = self.holder(head.size)
        if holder is None or holder.key_id in head.signers:
            return
        raise RefusedError(
            "audit.epoch",
            f"a head of size {head.size} is the affair of key {holder.key_id.hex()}, "
            f"it is signed by {', '.join(key.hex() for key in head.signers):.60}",
            hint="a key signs only the records of its own epoch: treat the head as forged",
        )


def align(ring: Ring, rotations: Sequence[Rotation]) -> tuple[Epochs, str]:
    """Return the epochs of a log, and in words where they contradict the keys that are trusted.

    A ring may begin with a later key than the log did, and may end with an earlier one: what
    follows is vouched for by the closing heads. But every key of it must have had its epoch.
    """
    named = [str(rotation.vkey) for rotation in rotations]
    first = str(ring.keys[0])
    begin = named.index(first) + 1 if first in named else 0
    for offset, key in enumerate(ring.keys[1:]):
        at = begin + offset
        found = named[at] if at < len(named) else "none"
        if found != str(key):
            return Epochs(ring.keys[0] if begin == 0 else None, rotations), (
                f"epoch {at + 1} with key {key.key_id.hex()}, which is trusted; "
                f"found {found.split('+')[1] if '+' in found else found}"
            )
    return Epochs(ring.keys[0] if begin == 0 else None, rotations), ""


def find_rotation(record: Record, origin: str) -> Rotation | None:
    """Return the change of the log's own key that a record states, None for any other record.

    Raises:
        RefusedError: `audit.epoch`; the next key is none of this log.

    """
    data = record.get("data", {})
    if record["kind"] != "key.rotate" or data.get("use") != USE_LOG:
        return None
    try:
        vkey = parse_vkey(str(data.get("next", "")).encode())
    except RefusedError as error:
        raise RefusedError("audit.epoch", f"record {record['seq']}: {error.message}") from error
    if vkey.name != origin:
        raise RefusedError(
            "audit.epoch", f"record {record['seq']} hands over to a key of {vkey.name!r:.80}"
        )
    return Rotation(record["seq"] + 1, vkey)


# -- key files ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """The private key, its verifier keys, and beside them the next key while one is replaced.

    Whatever moment a crash takes, one of the two keys is the one that the log expects: the next
    key is durable before the record that names it, and the old one goes after that record.
    """

    path: Path

    @property
    def following(self) -> Path:
        """Where the next key waits."""
        return self.path.with_suffix(".next.pem")

    def load(self, disk: Disk) -> tuple[LogKey, LogKey | None]:
        """Return the present key and the next one, if a change was begun.

        Raises:
            RefusedError: `audit.key`; a file is none of ours, or the keys do not fit the ring.
            FaultError: `audit.key`; a file cannot be read.

        """
        ring = load_ring(vkey_path(self.path))
        if not self.following.exists():
            return load_log_key(self.path), None
        waiting = load_private(self.following)
        if Vkey.of(ring.name, waiting.public_key()).key_id == ring.newest.key_id:
            disk.rename(self.following, self.path)  # `finish` was cut short by a crash.
            disk.sync_folder(self.path.parent)
            return load_log_key(self.path), None
        return load_log_key(self.path), LogKey.of(ring.name, waiting, ring.keys)

    def prepare(self, key: LogKey, into: TokenKey | None = None) -> LogKey:
        """Make the next key, durable and in nobody's use yet: where the present one is.

        `into` is one in a token, made beforehand, that shall follow instead.
        """
        self.abandon()
        private: Signer
        if into is not None or not isinstance(key.private, Ed25519PrivateKey):
            in_token = into or cast("TokenKey", key.private).next(len(key.ring.keys))
            private, content = in_token, f"{in_token.uri}\n".encode()
            pin = pin_path(self.path)
            if not pin.exists():
                write_new(pin, in_token.pin + b"\n", 0o400, shared=True)
        else:
            private = made = Ed25519PrivateKey.generate()
            content = private_pem(made)
        write_new(self.following, content, 0o400, shared=True)
        return LogKey.of(key.vkey.name, private, key.ring.keys)

    def finish(self, following: LogKey, disk: Disk) -> None:
        """Put the next key in its place; the old one is overwritten and gone."""
        disk.put(vkey_path(self.path), str(following.ring).encode(), mode=0o444)
        self._overwrite(disk)
        disk.rename(self.following, self.path)
        disk.sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Forget a next key that no record names."""
        self._destroy(self.following)
        self.following.unlink(missing_ok=True)

    def _destroy(self, path: Path) -> None:
        """Destroy the key in a token that a key file names."""
        if path.is_file() and (content := path.read_bytes()).startswith(TOKEN):
            destroy_reference(path, content)

    def _overwrite(self, disk: Disk) -> None:
        """Destroy the old key: in its token, or by zeros, which no file system promises to obey."""
        self._destroy(self.path)
        with contextlib.suppress(OSError):
            self.path.chmod(0o600)
            fd = disk.open(self.path, os.O_WRONLY)
            try:
                disk.pwrite(fd, bytes(self.path.stat().st_size), 0)
                disk.fsync(fd)
            finally:
                os.close(fd)
