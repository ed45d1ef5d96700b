"""Trust policies, C2SP tlog-policy: which logs, which witnesses, and how many of them.

The policy comes from whoever verifies, never from the folder under test. A cosignature is
`cosignature/v1` of C2SP tlog-cosignature, by Ed25519 (docs/design/audit.md, 6).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature

from airgap.audit.checkpoint import COSIGNATURE, Checkpoint, Vkey, parse_vkey
from airgap.audit.disk import open_plain
from policy.errors import FaultError, RefusedError

MAX_POLICY: Final = 65_536
MAX_NAMES: Final = 256
_TIME: Final = 8  # bytes before the signature
_MAX_TIME: Final = 2**63 - 1
_SPACE: Final = re.compile("[ \t]+")
_NUMBER: Final = re.compile("[1-9][0-9]{0,4}")


@dataclass(frozen=True, slots=True)
class Cosignature:
    """A cosignature that holds: this witness saw this checkpoint as consistent at that time."""

    witness: Vkey
    time: int  # seconds since 1970, UTC, by the clock of the witness
    signature: bytes  # 64 bytes


@dataclass(frozen=True, slots=True)
class Group:
    """At least `needed` of `members`, each a witness or a group."""

    needed: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """A trust policy. `quorum` names a witness or a group; empty where none is needed."""

    logs: tuple[Vkey, ...]
    witnesses: dict[str, Vkey]
    groups: dict[str, Group]
    quorum: str

    def cosigners(self, checkpoint: Checkpoint) -> dict[str, Cosignature]:
        """Return the witnesses, by their name in this policy, whose cosignature holds.

        Raises:
            RefusedError: `audit.note`; a cosignature of a known witness does not hold.

        """
        found = {}
        for name, vkey in self.witnesses.items():
            cosignature = find_cosignature(checkpoint, vkey)
            if cosignature is not None:
                found[name] = cosignature
        return found

    def require(self, checkpoint: Checkpoint) -> dict[str, Cosignature]:
        """Return the cosigners if they are a quorum.

        Raises:
            RefusedError: `audit.quorum`, or `audit.note` for a cosignature that does not hold.

        """
        found = self.cosigners(checkpoint)
        if self.quorum and not self._holds(self.quorum, found):
            names = ", ".join(sorted(found)) or "nobody"
            raise RefusedError(
                "audit.quorum",
                f"the policy asks for {self.quorum!r:.60}; {names:.120} cosigned",
                hint="bring the cosignatures that are missing, or use the policy of this site",
            )
        return found

    def _holds(self, name: str, found: dict[str, Cosignature]) -> bool:
        group = self.groups.get(name)
        if group is None:
            return name in found
        return sum(self._holds(member, found) for member in group.members) >= group.needed


def cosigned_text(checkpoint: Checkpoint, time: int) -> bytes:
    """Return what a witness signs at `time`, seconds since 1970."""
    return f"cosignature/v1\ntime {time}\n".encode() + checkpoint.text


def find_cosignature(checkpoint: Checkpoint, witness: Vkey) -> Cosignature | None:
    """Return the newest cosignature of a witness on a checkpoint, None if there is none.

    Raises:
        RefusedError: `audit.note`; one in its name does not hold.

    """
    best: Cosignature | None = None
    for name, blob in checkpoint.signatures:
        if name != witness.name or blob[:4] != witness.key_id:
            continue
        if len(blob) != 4 + _TIME + 64:
            raise _bad(witness)
        (time,) = struct.unpack(">Q", blob[4 : 4 + _TIME])
        signature = blob[4 + _TIME :]
        try:
            if time > _MAX_TIME:
                raise _bad(witness)
            witness.public.verify(signature, cosigned_text(checkpoint, time))
        except InvalidSignature:
            raise _bad(witness) from None
        if best is None or time > best.time:
            best = Cosignature(witness, time, signature)
    return best


def load_policy(path: Path) -> Policy:
    """Read a policy file; RefusedError `audit.policy`, FaultError `host.io` when unreadable."""
    try:
        with open_plain(path) as file:
            content = file.read(MAX_POLICY + 1)
    except OSError as error:
        raise FaultError(
            "host.io", f"cannot read {path}: {error.strerror}", hint="check the path"
        ) from error
    return parse_policy(content)


def parse_policy(content: bytes) -> Policy:
    """Return the policy in a tlog-policy text.

    Raises:
        RefusedError: `audit.policy`, with the line.

    """
    if len(content) > MAX_POLICY or (content and not content.endswith(b"\n")):
        raise _malformed(0, f"{len(content)} bytes; lines end with a newline")
    if any((byte < 0x20 and byte not in b"\t\n") or byte == 0x7F for byte in content):  # noqa: PLR2004
        raise _malformed(0, "a control character")
    reader = _Reader()
    for number, line in enumerate(content.decode("utf-8", "surrogateescape").split("\n")[:-1], 1):
        words = [word for word in _SPACE.split(line) if word]
        if words and not words[0].startswith("#"):
            reader.take(number, words)
    if reader.quorum is None:
        raise _malformed(0, "no quorum line")
    return Policy(tuple(reader.logs), reader.witnesses, reader.groups, reader.quorum)


class _Reader:
    """Takes the lines of a policy in order: names are defined before they are used."""

    def __init__(self) -> None:
        self.logs: list[Vkey] = []
        self.witnesses: dict[str, Vkey] = {}
        self.groups: dict[str, Group] = {}
        self.quorum: str | None = None
        self._used: set[str] = set()

    def take(self, number: int, words: list[str]) -> None:
        """Take one line that is neither empty nor a comment."""
        word, rest = words[0], words[1:]
        if word == "log" and len(rest) in {1, 2}:
            self._log(number, rest[0])
        elif word == "witness" and len(rest) in {2, 3}:
            self._witness(number, rest[0], rest[1])
        elif word == "group" and len(rest) >= 3:  # noqa: PLR2004 - name, how many, one member
            self._group(number, rest[0], rest[1], rest[2:])
        elif word == "quorum" and len(rest) == 1:
            if self.quorum is not None:
                raise _malformed(number, "a second quorum line")
            self.quorum = "" if rest[0] == "none" else self._known(number, rest[0])
        else:
            raise _malformed(number, "expected log, witness, group or quorum with its words")

    def _log(self, number: int, text: str) -> None:
        vkey = _vkey(number, text)
        if any(_same_key(vkey, other) for other in self.logs):
            raise _malformed(number, "a log's key stands twice")
        self.logs.append(vkey)

    def _witness(self, number: int, name: str, text: str) -> None:
        self._new(number, name)
        vkey = _vkey(number, text, COSIGNATURE)
        if any(_same_key(vkey, other) for other in self.witnesses.values()):
            raise _malformed(number, "a witness's key stands twice")
        self.witnesses[name] = vkey

    def _group(self, number: int, name: str, needed: str, members: list[str]) -> None:
        self._new(number, name)
        for member in members:
            if member in self._used:
                raise _malformed(number, f"{member!r:.60} is a member twice")
            self._used.add(self._known(number, member))
        counts = {"any": 1, "all": len(members)}
        count = counts.get(needed) or (int(needed) if _NUMBER.fullmatch(needed) else 0)
        if not 1 <= count <= len(members):
            raise _malformed(number, f"{needed!r:.20} of {len(members)} members")
        self.groups[name] = Group(count, tuple(members))

    def _new(self, number: int, name: str) -> None:
        if name in self.witnesses or name in self.groups or name == "none":
            raise _malformed(number, f"the name {name!r:.60} stands already")
        if len(self.witnesses) + len(self.groups) >= MAX_NAMES:
            raise _malformed(number, f"more than {MAX_NAMES} names")

    def _known(self, number: int, name: str) -> str:
        if name not in self.witnesses and name not in self.groups:
            raise _malformed(number, f"{name!r:.60} is not defined above")
        return name


def _vkey(number: int, text: str, kind: int = 1) -> Vkey:
    try:
        return parse_vkey(text.encode("utf-8", "surrogateescape"), kind)
    except RefusedError as error:
        raise _malformed(number, error.message) from error


def _same_key(one: Vkey, other: Vkey) -> bool:
    return one.public.public_bytes_raw() == other.public.public_bytes_raw()


def _malformed(number: int, message: str) -> RefusedError:
    place = f"line {number}: " if number else ""
    return RefusedError(
        "audit.policy",
        f"the trust policy: {place}{message}",
        hint="write it as C2SP tlog-policy: log, witness, group and quorum lines",
    )


def _bad(witness: Vkey) -> RefusedError:
    return RefusedError("audit.note", f"a cosignature of {witness.name!r:.80} does not hold")
