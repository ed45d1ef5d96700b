"""The second part of `install.sh`: who signed the bundle, by openssl alone.

The standard library and openssl, before any wheel is believed. It follows the trust roots from the
one whose fingerprint a person typed, and counts the people whose signatures hold; FORMAT.md
sections 8 to 10, 18, 22 and 23.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bundle.staging.bootstrap_medium import HEAD, Stop, decode, open_plain, parse, refuse

HELD_LIMIT = 2 << 20  # bytes of a root or list that the host holds

ROOT_TYPE = "application/vnd.airgap.root+json"
SEAL_TYPE = "application/vnd.in-toto+json"
ROLLBACK_TYPE = "application/vnd.airgap.rollback+json"
SEAL_PREDICATE = "https://airgap.invalid/seal/v1"
APPROVAL_PREDICATE = "https://airgap.invalid/approval/v1"
OFFICES = {"root", "builder", "policy", "revocation"}
# What stands before the raw key in a SubjectPublicKeyInfo.
PREFIX = {
    "ed25519": "302a300506032b6570032100",
    "ecdsa-p384": "3076301006072a8648ce3d020106052b81040022036200",
    "ml-dsa-87": "30820a32300b060960864801650304031303820a2100",
}


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
        held = []
        for path in found:
            with open_plain(path) as stream:
                held.append(parse(stream.read(HELD_LIMIT).strip(), str(path)))
        return held

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


def require_epoch(
    tree: Path,
    manifest: Mapping[str, Any],
    digest: str,
    approval: Path | None,
    approved: Callable[[Mapping[str, Any], tuple[int, str]], bool],
) -> None:
    """Refuse a release that is older than one that this host has had, but for a signed approval.

    Args:
        tree: It remembers the newest epoch of each line.
        manifest: Sealed.
        digest: Of the manifest, `sha256:...`.
        approval: The file, FORMAT.md section 21.
        approved: Whether an envelope approves of going back below that mark.

    Raises:
        Stop: `trust.epoch`, `trust.rollback`.

    """
    state, line = tree / "store" / "state.json", manifest["bundle_id"]
    if not os.path.lexists(state):
        return
    with open_plain(state) as stream:
        marks = parse(stream.read(HELD_LIMIT), str(state)).get("marks", {})
    if line not in marks:
        return
    mark = (int(marks[line]["epoch"]), str(marks[line]["bundle"]))
    if manifest["epoch"] > mark[0] or (manifest["epoch"], digest) == mark:
        return
    if manifest["epoch"] == mark[0] or approval is None:
        raise refuse(
            "trust.epoch",
            f"{line}: this host has had epoch {mark[0]} ({mark[1]}); this is epoch "
            f"{manifest['epoch']} ({digest})",
            "carry a newer release; an older one needs --approval FILE: airgap trust rollback-sign",
        )
    with open_plain(approval) as stream:
        envelope = parse(stream.read(HELD_LIMIT).strip(), approval.name)
    if not approved(envelope, mark):
        raise refuse(
            "trust.rollback",
            f"{approval.name} does not approve of epoch {manifest['epoch']} on this host, today, "
            "by enough people",
            "airgap trust rollback-sign: for this release and the mark that this host names",
        )


def approves_rollback(
    envelope: Mapping[str, Any],
    mark: tuple[int, str],
    head: Mapping[str, bytes],
    *,
    root: Mapping[str, Any],
    judge: Judge,
    host: Held,
    now: str,
) -> bool:
    """Tell whether enough people signed that this release may come back; FORMAT.md section 21."""
    manifest = parse(head[HEAD[2]], HEAD[2])
    digest = f"sha256:{hashlib.sha256(head[HEAD[2]]).hexdigest()}"
    seal = parse(decode(parse(head[HEAD[0]].rstrip(b" "), HEAD[0])["payload"]), "the seal")
    lists = [parse(head[HEAD[1]], HEAD[1]).get("revocations"), host.revocations]
    revoked = set().union(*(listed_as_revoked(each) for each in lists))
    keyids = judge.signers(envelope, root, ROLLBACK_TYPE) - revoked
    said = parse(decode(envelope["payload"]), "the approval")
    mine = {"bundle": digest, "bundle_id": manifest["bundle_id"], "epoch": manifest["epoch"]}
    same = all(said[name] == value for name, value in mine.items())
    if not same or said["above"] != {"epoch": mark[0], "bundle": mark[1]}:
        return False
    mldsa = judge.knows_mldsa
    signed = people_of(root, keyids, said["issued"], mldsa=mldsa)
    signed &= people_of(root, keyids, now, mldsa=mldsa)
    signed -= revoked | {seal["predicate"]["builder"]}
    roles = {who: set(root["people"][who]["roles"]) - OFFICES for who in signed}
    approvers = [who for who in signed if roles[who]]
    rule = root["thresholds"]["seal"]
    held = set().union(*(roles[who] for who in approvers))
    enough = len(approvers) >= rule["people"] and set(rule["required_roles"]) <= held
    return enough and said["issued"] <= now < said["expires"]


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
