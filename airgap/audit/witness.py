"""Witnesses by media: C2SP tlog-witness requests and cosignatures as files (design 6).

The log writes a request (old size, consistency proof, checkpoint). A second person's machine
checks that its own last head is a beginning of the new one, stores the new head durably, and only
then signs. What comes back is an anchor of the log.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from airgap.audit.checkpoint import (
    COSIGNATURE,
    MAX_NOTE,
    Checkpoint,
    Ring,
    Signer,
    Vkey,
    load_private,
    parse_checkpoint,
    parse_ring,
    parse_vkey,
    private_pem,
    signature_line,
    strict_hash,
    verify_checkpoint,
    write_new,
)
from airgap.audit.disk import Disk, open_plain
from airgap.audit.quorum import cosigned_text
from bundle.merkle import empty_root, verify_consistency
from policy.errors import FaultError, RefusedError

MAX_REQUEST: Final = MAX_NOTE + 8_192
MAX_PROOF: Final = 63
_OLD: Final = re.compile("old (0|[1-9][0-9]{0,15})")
_MAX_STATE: Final = 8_192


@dataclass(frozen=True, slots=True)
class Request:
    """A request to cosign a checkpoint that continues a tree of `old` records."""

    old: int
    proof: tuple[bytes, ...]
    checkpoint: Checkpoint

    def as_text(self) -> str:
        """Return the body that tlog-witness specifies."""
        lines = "".join(f"{base64.b64encode(h).decode()}\n" for h in self.proof)
        return f"old {self.old}\n{lines}\n{self.checkpoint.note}"


def parse_request(content: bytes) -> Request:
    """Read a request that nobody trusts; RefusedError `audit.witness` or `audit.note`."""
    if len(content) > MAX_REQUEST:
        raise _refused(f"a request of {len(content)} bytes")
    head, blank, note = content.partition(b"\n\n")
    try:
        first, *lines = head.decode("ascii").split("\n")
        proof = tuple(strict_hash(line) for line in lines)
    except (UnicodeDecodeError, ValueError) as error:
        raise _refused(f"the request is malformed: {error!s:.60}") from None
    old = _OLD.fullmatch(first)
    if not blank or old is None or len(proof) > MAX_PROOF:
        raise _refused("expected `old N`, at most 63 hashes, an empty line and a checkpoint")
    return Request(int(old[1]), proof, parse_checkpoint(note))


@dataclass(frozen=True, slots=True)
class Witness:
    """A witness's folder: its key, the logs that it knows, and the last head of each."""

    folder: Path
    vkey: Vkey
    private: Signer

    @classmethod
    def create(cls, folder: Path, name: str) -> Self:
        """Make the key of a witness; its vkey goes into the policies of the logs' readers.

        Raises:
            RefusedError: `audit.key`; the name is unusable, or there is a key already.

        """
        private = Ed25519PrivateKey.generate()
        vkey = parse_vkey(str(Vkey.of(name, private.public_key(), COSIGNATURE)).encode(), 4)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_new(folder / "witness.vkey", f"{vkey}\n".encode(), 0o444)
        write_new(folder / "witness.pem", private_pem(private), 0o400)
        return cls(folder, vkey, private)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the key of a witness; raises as `load_log_key`."""
        private = load_private(folder / "witness.pem")
        text = _read(folder / "witness.vkey", _MAX_STATE)
        vkey = parse_vkey(text.strip(), COSIGNATURE)
        if Vkey.of(vkey.name, private.public_key(), COSIGNATURE).key_id != vkey.key_id:
            raise RefusedError("audit.key", f"{folder}: the key is not the one of witness.vkey")
        return cls(folder, vkey, private)

    def trust(self, ring: Ring) -> None:
        """Know a log by its verifier keys, or learn the keys that it has had since."""
        with self._held():
            path = self._place(ring.name, "vkey")
            if path.exists():
                known = parse_ring(_read(path, 1 << 16))
                if ring.keys[: len(known.keys)] != known.keys:
                    raise _refused(f"{ring.name!r:.80} is known by other keys")
            disk = Disk()
            disk.make_folder(path.parent)
            disk.put(path, str(ring).encode())

    def cosign(self, request: Request, now: int) -> str:
        """Return the checkpoint with this witness's cosignature, once the new head is stored.

        Args:
            request: Parsed and untrusted.
            now: Seconds since 1970, by this machine's clock.

        Raises:
            RefusedError: `audit.witness`, the log is unknown, the old size is another one than this
                witness has, or an older key signs again; `audit.note`, bad signature;
                `merkle.proof`, the new head does not continue the old.

        """
        checkpoint = request.checkpoint
        with self._held():
            ring = self._known(checkpoint.origin)
            head = verify_checkpoint(checkpoint, ring)
            ids = [key.key_id for key in ring.keys]
            epoch = max(ids.index(signer) for signer in head.signers)
            size, root, last_epoch = self._last(checkpoint.origin)
            if request.old != size:
                raise RefusedError(
                    "audit.witness",
                    f"this witness has seen {size} records of the log, the request begins "
                    f"at {request.old}",
                    hint=f"make the request again with --old {size}",
                )
            if head.size < size:
                raise _refused(f"a head of {head.size} records after one of {size}: rolled back")
            if epoch < last_epoch:
                raise _refused("a key signs that the log has replaced: treat the head as forged")
            verify_consistency(size, head.size, root, head.root, request.proof)
            self._store(checkpoint.origin, head.size, head.root, epoch)
            signature = self.private.sign(cosigned_text(checkpoint, now))
        return checkpoint.note + signature_line(self.vkey, now.to_bytes(8, "big") + signature)

    # -- state -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Let one process of this witness work at a time: check, store and sign are one step."""
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _place(self, origin: str, suffix: str) -> Path:
        name = re.sub(r"[^A-Za-z0-9.-]", "_", origin)
        return self.folder / "logs" / f"{name}.{suffix}"

    def _known(self, origin: str) -> Ring:
        path = self._place(origin, "vkey")
        ring = parse_ring(_read(path, 1 << 16)) if path.is_file() else None
        if ring is None or ring.name != origin:
            raise RefusedError(
                "audit.witness",
                f"this witness does not know the log {origin!r:.80}",
                hint="airgap audit witness trust VKEY, after comparing the key with its owner",
            )
        return ring

    def _last(self, origin: str) -> tuple[int, bytes, int]:
        path = self._place(origin, "json")
        if not path.exists():
            return 0, empty_root(), 0
        try:
            entry = json.loads(_read(path, _MAX_STATE))
            head = entry[origin]
            return int(head["size"]), strict_hash(head["root"]), int(head["epoch"])
        except (ValueError, KeyError, TypeError) as error:
            raise FaultError(
                "audit.witness",
                f"the last head in {path} cannot be read: {error!s:.60}",
                hint="bring the witness's folder back from its backup",
            ) from error

    def _store(self, origin: str, size: int, root: bytes, epoch: int) -> None:
        head = {"epoch": epoch, "root": base64.b64encode(root).decode(), "size": size}
        entry = {origin: head}
        Disk().put(self._place(origin, "json"), json.dumps(entry).encode() + b"\n")


def merge_notes(one: str, other: str) -> str:
    """Return a note with the signature lines of both; RefusedError if the texts differ."""
    text, _, lines = one.rpartition("\n\n")
    same, _, more = other.rpartition("\n\n")
    if text != same:
        raise RefusedError("audit.note", "two notes that are to be joined differ in their text")
    known = lines.splitlines(keepends=True)
    return f"{text}\n\n" + "".join(
        [*known, *(line for line in more.splitlines(keepends=True) if line not in known)]
    )


def _read(path: Path, limit: int) -> bytes:
    try:
        with open_plain(path) as file:
            return file.read(limit)
    except OSError as error:
        raise FaultError(
            "host.io", f"cannot read {path}: {error.strerror}", hint="check the path"
        ) from error


def _refused(message: str) -> RefusedError:
    return RefusedError(
        "audit.witness",
        message,
        hint="keep the request as evidence and ask the log's owner; nothing was cosigned",
    )
