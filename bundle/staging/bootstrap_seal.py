"""The first half of `install.sh`: the bundle on its medium, and who signed it, by openssl alone.

The standard library and openssl, before any wheel is believed. It reads a bundle or a set of
volumes, follows the trust roots from the one whose fingerprint a person typed, and counts the
people whose signatures hold. It writes in a temporary folder only; FORMAT.md sections 8 to 10, 14
and 23. `installer_text` puts it before `bootstrap_main`, in one file.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

HEAD = ("META/envelope.dsse.json", "META/trust.json", "META/manifest.json", "META/chunks.bin")
LIMITS = (131_072, 2 << 20, 4 << 20, 16 << 20)
BLOCK, ALIGN, CHUNK = 512, 4096, 4 << 20
ROOT_TYPE = "application/vnd.airgap.root+json"
SEAL_TYPE = "application/vnd.in-toto+json"
SEAL_PREDICATE = "https://airgap.invalid/seal/v1"
APPROVAL_PREDICATE = "https://airgap.invalid/approval/v1"
OFFICES = {"root", "builder", "policy", "revocation"}
# What stands before the raw key in a SubjectPublicKeyInfo.
PREFIX = {
    "ed25519": "302a300506032b6570032100",
    "ecdsa-p384": "3076301006072a8648ce3d020106052b81040022036200",
    "ml-dsa-87": "30820a32300b060960864801650304031303820a2100",
}
NUMBERED = re.compile(r"(?P<stem>.+\.agb)\.(?P<number>[0-9]{3})")


class Stop(Exception):  # noqa: N818 - it is a refusal or a fault, as its status says
    """Nothing was changed; `status` is 1 for a refusal and 3 for a fault."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint


def refuse(code: str, message: str, hint: str = "") -> Stop:
    """Return a refusal: understood, and the answer is no."""
    return Stop(1, code, message, hint)


def fault(code: str, message: str, hint: str = "") -> Stop:
    """Return a fault: it could not be found out."""
    return Stop(3, code, message, hint)


# -- the medium -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Some bytes of a file."""

    start: int
    size: int


def read_member(stream: BinaryIO, at: int, limit: int) -> tuple[str, Span, int]:
    """Return name and span of the tar member whose headers begin at `at`, and where it ends."""
    stream.seek(at)
    block, size = stream.read(BLOCK), None
    if block[156:157] == b"x" and len(block) == BLOCK:
        length = _octal(block[124:136])
        records = stream.read(-(-length // BLOCK) * BLOCK)[:length]
        found = re.search(rb"(?:^|\n)\d+ size=(\d{1,15})\n", records)
        size = int(found[1]) if found else None
        at += BLOCK + -(-length // BLOCK) * BLOCK
        block = stream.read(BLOCK)
    plain = block[156:157] == b"0" and block[257:263] == b"ustar\0"
    total = sum(block[:148]) + sum(block[156:]) + 8 * 32
    if len(block) != BLOCK or not plain or _octal(block[148:155]) != total:
        raise refuse("archive.header", f"byte {at:,} is no header of a bundle")
    size = _octal(block[124:136]) if size is None else size
    if size > limit:
        raise refuse("archive.limit", f"a member of {size:,} bytes, where {limit:,} are allowed")
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    return name, Span(at + BLOCK, size), at + BLOCK + -(-size // BLOCK) * BLOCK


def read_head(path: Path) -> tuple[dict[str, bytes], int]:
    """Return the four members of the head of a bundle or volume, and where the head ends."""
    found: dict[str, bytes] = {}
    with open_plain(path) as stream:
        at = 0
        for wanted, limit in zip(HEAD, LIMITS, strict=True):
            name, span, at = read_member(stream, at, limit)
            if name != wanted:
                raise refuse("archive.order", f"{path}: {name!r:.80} stands for {wanted}")
            stream.seek(span.start)
            found[name] = stream.read(span.size)
            if len(found[name]) != span.size:
                raise refuse("archive.truncated", f"{path} ends within {name}")
    return found, -(-at // ALIGN) * ALIGN


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file; a pipe or device is refused."""
    try:
        with path.open("rb", buffering=0) as stream:
            if not path.is_file():
                raise refuse("archive.type", f"{path} is not a plain file")
            yield stream
    except OSError as error:
        raise fault("host.io", f"{path} cannot be read: {error.strerror}") from error


@dataclass
class Medium:
    """A bundle where it lies: one file, or a set of volumes."""

    head: dict[str, bytes]
    pieces: list[tuple[Path, Span]]  # in order; spans of the body
    per_piece: int  # bytes of the body in a full piece

    def read(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield bytes of the body."""
        while size > 0:
            number, within = divmod(offset, self.per_piece)
            if number >= len(self.pieces):
                raise refuse("archive.truncated", "the body ends too early")
            path, span = self.pieces[number]
            take = min(size, span.size - within, 1 << 20)
            with open_plain(path) as stream:
                stream.seek(span.start + within)
                part = stream.read(max(take, 0))
            if not part:
                raise refuse("archive.truncated", f"{path} ends too early", "copy it again")
            offset, size = offset + len(part), size - len(part)
            yield part


def open_medium(path: Path, places: Iterable[Path]) -> Medium:
    """Open a bundle, a volume or a folder with volumes.

    Raises:
        Stop: `volume.missing`, `volume.set`, `archive.*`, `host.io`.

    """
    if path.suffix == ".enc":
        raise refuse(
            "transit.key",
            f"{path.name} is encrypted, and this host has no key yet",
            "carry the installer as a plain bundle: it holds public programs only",
        )
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if NUMBERED.fullmatch(each.name))
        stems = {NUMBERED.fullmatch(name)["stem"] for name in names}  # type: ignore[index]
        plain = sorted(path.glob("*.agb"))
        if len(stems) + len(plain) != 1:
            raise refuse(
                "volume.missing", f"{path} holds {len(stems) + len(plain)} bundles, not one",
                "name the bundle, or any of its volumes",
            )  # fmt: skip
        path = plain[0] if plain else path / names[0]
    named = NUMBERED.fullmatch(path.name)
    if named is None:
        head, start = read_head(path)
        size = path.stat().st_size - start
        return Medium(head, [(path, Span(start, size))], max(size, 1))
    return _open_set(named["stem"], [path.parent, *places])


def _open_set(stem: str, places: Iterable[Path]) -> Medium:
    """Find the data volumes of a set and check that they have one head."""
    found: dict[int, Path] = {}
    for place in places:
        for path in sorted(place.glob(f"{glob_escape(stem)}.[0-9][0-9][0-9]")):
            found.setdefault(int(path.suffix[1:]), path)
    first: dict[str, bytes] = {}
    facts: dict[str, int] = {}
    pieces: dict[int, tuple[Path, Span]] = {}
    for number, path in sorted(found.items()):
        head, start = read_head(path)
        with open_plain(path) as stream:
            name, span, at = read_member(stream, start, ALIGN)
            stream.seek(span.start)
            told = parse(stream.read(span.size), "META/volume.json")
            if head != (first or head):
                raise refuse("volume.set", f"{path} is of another set than {found[min(found)]}")
            if number > told["count"]:
                continue  # parity: the program itself can use it, this part cannot
            body, span, _ = read_member(stream, at, 1 << 62)
        first, facts = first or head, facts or told
        same = {k: told[k] for k in ("set", "count", "chunks")}
        wanted = {k: facts[k] for k in same}
        odd = name != "META/volume.json" or body != f"VOLUME/body.{number:03}"
        if odd or same != wanted or told["index"] != number:
            raise refuse("volume.order", f"{path} lies about its place in the set")
        pieces[number] = (path, span)
    count = facts.get("count", 1)
    missing = [f"{stem}.{n:03}" for n in range(1, count + 1) if n not in pieces]
    if missing:
        raise refuse(
            "volume.missing",
            f"of {count} volumes {len(missing)} are missing: {', '.join(missing)[:200]}",
            "bring them, or name further places with --volume DIR",
        )
    return Medium(first, [pieces[n] for n in range(1, count + 1)], facts["chunks"] * CHUNK)


# -- who signed -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Verifies signatures with openssl, in a folder of its own."""

    openssl: str
    work: Path

    @property
    def knows_mldsa(self) -> bool:
        """Whether this openssl verifies ML-DSA: 3.5 and later do."""
        done = subprocess.run(
            [self.openssl, "list", "-signature-algorithms"], capture_output=True, check=False
        )
        return b"ML-DSA-87" in done.stdout

    def signers(self, envelope: Mapping[str, Any], root: Mapping[str, Any], kind: str) -> set[str]:
        """Return the key ids of `root` whose signatures over the envelope hold."""
        payload = decode(envelope["payload"])
        if envelope["payloadType"] != kind:
            raise refuse("seal.type", f"a document of type {envelope['payloadType']!r:.80}")
        head = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode()
        (self.work / "message").write_bytes(head + payload)
        found = set()
        for item in envelope["signatures"][:64]:
            key = root["keys"].get(item["keyid"])
            if key is not None and self._holds(item["keyid"], key, decode(item["sig"])):
                found.add(item["keyid"])
        return found

    def _holds(self, keyid: str, key: Mapping[str, str], signature: bytes) -> bool:
        scheme = key["scheme"]
        der = bytes.fromhex(PREFIX.get(scheme, "")) + decode(key["public"])
        if scheme not in PREFIX or hashlib.sha256(der).hexdigest() != keyid:
            return False
        (self.work / "key").write_bytes(der)
        (self.work / "signature").write_bytes(signature)
        key_words = ["-pubin", "-inkey", "key", "-keyform", "DER"]
        if scheme == "ecdsa-p384":
            argv = ["dgst", "-sha384", "-verify", "key", "-keyform", "DER"]
            argv += ["-signature", "signature", "message"]
        else:
            argv = ["pkeyutl", "-verify", *key_words, "-rawin", "-in", "message"]
            argv += ["-sigfile", "signature"]
        done = subprocess.run(
            [self.openssl, *argv], cwd=self.work, capture_output=True, check=False
        )
        return done.returncode == 0


def people_of(root: Mapping[str, Any], keyids: set[str], at: str, *, mldsa: bool) -> set[str]:
    """Return the enrolled people who signed, as the profile of the root counts.

    In `cnsa2` both of a person's signatures count as one; where this openssl does not know ML-DSA
    the P-384 one stands here, and the program checks the other before it believes anything.
    """
    wanted = [{"ed25519", "ecdsa-p384"}]
    if root["profile"] == "cnsa2":
        wanted = [{"ecdsa-p384"}, {"ml-dsa-87"}] if mldsa else [{"ecdsa-p384"}]
    found = set()
    for who, person in root["people"].items():
        schemes = {root["keys"][keyid]["scheme"] for keyid in person["keys"] if keyid in keyids}
        until = person.get("valid_to")
        enrolled = person["valid_from"] <= at and (until is None or at < until)
        if enrolled and all(schemes & each for each in wanted):
            found.add(who)
    return found


@dataclass(frozen=True)
class Held:
    """What a host that was set up before holds: roots, oldest first, and whom it revokes."""

    roots: list[dict[str, Any]] = field(default_factory=list)  # envelopes
    revocations: dict[str, Any] | None = None  # an envelope

    @property
    def fingerprint(self) -> str | None:
        """That of the oldest root."""
        return hashlib.sha256(decode(self.roots[0]["payload"])).hexdigest() if self.roots else None


def read_held(root: Path) -> Held:
    """Read the trust that a tree holds; nothing of it is believed to be on any medium."""

    def numbered(kind: str) -> list[dict[str, Any]]:
        found = [p for p in (root / "trust").glob(f"*.{kind}.json") if p.name[0] in "123456789"]
        found.sort(key=lambda path: int(path.name.partition(".")[0]))
        return [parse(path.read_bytes().strip(), str(path)) for path in found]

    lists = numbered("revocations")
    return Held(numbered("root"), lists[-1] if lists else None)


def follow_roots(
    chain: Mapping[str, Any], anchor: str, judge: Judge, host: Held = Held()
) -> dict[str, Any]:
    """Return the newest root, which the one with the fingerprint `anchor` leads to.

    A host that holds roots goes on from them: a medium that was made before somebody was retired
    cannot bring her back.

    Raises:
        Stop: `trust.fingerprint`, `trust.chain`.

    """
    known = {parse(decode(e["payload"]), "a root")["version"]: e["payload"] for e in host.roots}
    newer = []
    for each in chain["roots"]:
        version = parse(decode(each["payload"]), "the trust root")["version"]
        if known.get(version, each["payload"]) != each["payload"]:
            raise refuse("trust.chain", f"this host holds another root of version {version}")
        if version > max(known, default=0):
            newer.append(each)
    roots = [*host.roots, *newer]
    payloads = [decode(each["payload"]) for each in roots]
    prints = [hashlib.sha256(payload).hexdigest() for payload in payloads]
    if anchor not in prints:
        raise refuse(
            "trust.fingerprint",
            f"no trust root of this bundle has the fingerprint sha256:{anchor}",
            "compare it with what `airgap trust show` prints on the staging host",
        )
    mldsa = judge.knows_mldsa
    held: dict[str, Any] | None = None
    first = 0 if host.roots else prints.index(anchor)
    for number in range(first, len(roots)):
        new = parse(payloads[number], "the trust root")
        # Whom this host revokes makes no further root; those that it holds already stay.
        gone = listed_as_revoked(host.revocations) if number >= len(host.roots) else set()
        for judging in ([] if held is None else [held]) + [new]:
            keyids = judge.signers(roots[number], judging, ROOT_TYPE) - gone
            signed = people_of(judging, keyids, new["issued"], mldsa=mldsa) - gone
            people = {who for who in signed if "root" in judging["people"][who]["roles"]}
            if len(people) < judging["thresholds"]["root"]["people"]:
                raise refuse("trust.chain", f"root {new['version']} lacks signatures")
        if held is not None and (
            new["version"] != held["version"] + 1
            or new["issued"] < held["issued"]
            or (held["profile"] == "cnsa2" and new["profile"] != "cnsa2")
        ):
            raise refuse("trust.chain", f"root {new['version']} does not follow the one before it")
        held = new
    if held is None:
        raise refuse("trust.chain", "the bundle carries no trust root")
    return held


def verify_seal(
    head: Mapping[str, bytes], root: Mapping[str, Any], judge: Judge, host: Held = Held()
) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest that enough people approved, and who they are.

    Raises:
        Stop: `seal.*`, `trust.revoked`, `manifest.*`.

    """
    envelope = parse(head[HEAD[0]].rstrip(b" "), HEAD[0])
    keyids = judge.signers(envelope, root, SEAL_TYPE)
    statement = parse(decode(envelope["payload"]), "the seal")
    if statement.get("predicateType") != SEAL_PREDICATE:
        raise refuse("seal.type", "the signed document is no seal")
    seal, subject = statement["predicate"], statement["subject"][0]["digest"]["sha256"]
    if seal["profile"] != root["profile"]:
        raise refuse("seal.profile", f"{seal['profile']}, where {root['profile']} is demanded")
    if hashlib.sha256(head[HEAD[2]]).hexdigest() != subject:
        raise refuse("seal.subject", "the manifest is not the one that was signed")
    manifest = parse(head[HEAD[2]], HEAD[2])
    lists = [parse(head[HEAD[1]], HEAD[1]).get("revocations"), host.revocations]
    revoked = set().union(*(listed_as_revoked(each) for each in lists))
    keyids -= revoked
    mldsa = judge.knows_mldsa
    signed = people_of(root, keyids, seal["created"], mldsa=mldsa) - revoked
    roles = {who: set(root["people"][who]["roles"]) - OFFICES for who in signed}
    if "approvals" in seal:  # then a person approves in her own words only
        if seal["approvals"] != "attested":
            raise refuse("seal.malformed", f"approvals of the kind {seal['approvals']!r:.80}")
        said = approvals_of(envelope, statement, root, judge, revoked)
        roles = {who: said.get(who, set()) for who in signed}
    builder = seal["builder"]
    approvers = sorted(who for who in signed - {builder} if roles[who])
    rule = root["thresholds"]["seal"]
    if len(approvers) < rule["people"]:
        raise refuse(
            "seal.threshold",
            f"{len(approvers)} of {rule['people']} required approvers' signatures hold",
            "have the release signed on the staging host",
        )
    lacking = set(rule["required_roles"]) - set().union(*(roles[who] for who in approvers))
    if lacking or builder not in signed or "builder" not in root["people"][builder]["roles"]:
        raise refuse("seal.role", f"{', '.join(sorted(lacking)) or 'the builder'} did not sign")
    files = {entry["sha256"] for entry in manifest["files"]}
    if revoked & (files | {f"sha256:{subject}"}):
        raise refuse("trust.revoked", "the bundle, or a file in it, is on a revocation list")
    line, epoch = manifest["bundle_id"], manifest["epoch"]
    if any(epoch < lowest_epoch(each, line) for each in lists):
        raise refuse("trust.revoked", f"a revocation list names epoch {epoch} of {line}")
    return manifest, approvers


def approvals_of(
    envelope: Mapping[str, Any],
    statement: Mapping[str, Any],
    root: Mapping[str, Any],
    judge: Judge,
    revoked: set[str],
) -> dict[str, set[str]]:
    """Return the roles in which people say that they approve this seal; what does not hold is none.

    FORMAT.md 22.3: who is named has signed, with roles of hers, and means this seal.
    """
    seal, found = statement["predicate"], dict[str, set[str]]()
    wanted = {
        "seal": f"sha256:{hashlib.sha256(decode(envelope['payload'])).hexdigest()}",
        "report_digest": seal["report_digest"],
        "expires": seal["expires"],
    }
    subject = statement["subject"][0]["digest"]["sha256"]
    mldsa = judge.knows_mldsa
    for text in envelope.get("statements", [])[:16]:
        with contextlib.suppress(Stop, KeyError, TypeError, ValueError, IndexError, AttributeError):
            inner = parse(decode(text), "an approval")
            keyids = judge.signers(inner, root, SEAL_TYPE) - revoked
            said = parse(decode(inner["payload"]), "an approval")
            who, roles = said["predicate"]["person"], set(said["predicate"]["roles"])
            if (
                said["predicateType"] == APPROVAL_PREDICATE
                and who in people_of(root, keyids, seal["created"], mldsa=mldsa)
                and roles <= set(root["people"][who]["roles"]) - OFFICES
                and [each["digest"]["sha256"] for each in said["subject"]] == [subject]
                and all(said["predicate"][name] == value for name, value in wanted.items())
            ):
                found.setdefault(who, roles)
    return found


def listed_as_revoked(entry: Mapping[str, Any] | None) -> set[str]:
    """Return all identifiers of a revocation list, in its envelope, that a bundle or host carries.

    Nobody has verified it here, and it needs no belief: it can only make this part refuse more.
    """
    if entry is None:
        return set()
    document = parse(decode(entry["payload"]), "the revocation list")
    kinds = ("keys", "people", "bundles", "models", "files", "wheels")
    return {name for kind in kinds for name in document.get(kind, {})}


def lowest_epoch(entry: Mapping[str, Any] | None, line: str) -> int:
    """Return the lowest epoch of a line that a revocation list leaves."""
    if entry is None:
        return 0
    floors = parse(decode(entry["payload"]), "the revocation list").get("epochs", {})
    return int(floors[line]["below"]) if line in floors else 0


def require_time(now: str, root: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Refuse a clock before what has happened, and a root or release that is not in force."""
    floor = max(root["issued"], manifest["created"])
    if now < floor:
        raise refuse(
            "trust.clock",
            f"the clock of this host says {now}, but {floor} has been",
            "set the clock of this host, then run it again",
        )
    if now >= root["expires"]:
        raise refuse("trust.root", f"the trust root expired at {root['expires']}")
    if now < manifest["not_before"]:
        raise refuse("trust.time", f"the release holds from {manifest['not_before']} on")
    if now >= manifest["expires"]:
        raise refuse(
            "trust.expired", f"the release expired at {manifest['expires']}",
            "carry a newer release here",
        )  # fmt: skip


# -- helpers -----------------------------------------------------------------------------------


def parse(raw: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object; a duplicate key or another form is refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise refuse("seal.malformed", f"{what}: {error!s:.120}") from error
    if not isinstance(value, dict):
        raise refuse("seal.malformed", f"{what} is no object")
    return value


def decode(text: object) -> bytes:
    """Return the bytes of base64 of the one allowed form."""
    try:
        return base64.b64decode(str(text), validate=True)
    except ValueError as error:
        raise refuse("seal.malformed", "base64 with another form") from error


def glob_escape(text: str) -> str:
    """Return text without a meaning for glob."""
    return re.sub(r"([*?[])", r"[\1]", text)


def _octal(field_: bytes) -> int:
    digits = field_.rstrip(b"\0 ")
    if not re.fullmatch(b"[0-7]{1,12}", digits):
        raise refuse("archive.header", "a number of a header is none")
    return int(digits, 8)
