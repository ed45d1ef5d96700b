"""The catalogue of attacks on a bundle: each row alters a real one and names the code it meets.

SECURITY.md lists these rows. `tests/attack/test_bundle_attacks.py` first shows that the untouched
bundle passes, then that each row is refused with exactly this code. Rows of `archive.*`,
`manifest.*`, `bom.*` and `scan.*` are put together again with a true tree and true signatures, so
that the named check, and not the seal, has to find the alteration.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import bundles
from bundles import Forge

from bundle import archive, envelope, tar
from bundle.canonical import canonical_json
from bundle.evidence import summary
from bundle.fields import format_time
from bundle.write import Member

BLOCK = 512
CHUNK = 4 * 1024 * 1024
# Where the fields of a ustar header begin.
FIELDS = {"name": 0, "mode": 100, "uid": 108, "size": 124, "mtime": 136, "kind": 156, "link": 157}
FIELDS["uname"] = 265


@dataclass(frozen=True)
class Attack:
    """One row. `alter` gets the good bundle's bytes and returns the attacker's."""

    name: str
    code: str
    alter: Callable[[bytes], bytes]


ATTACKS: list[Attack] = []


def attack(name: str, code: str) -> Callable[[Callable[[bytes], bytes]], Callable[[bytes], bytes]]:
    def add(alter: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        ATTACKS.append(Attack(name, code, alter))
        return alter

    return add


def forged(name: str, code: str) -> Callable[[Callable[[Forge], Any]], Callable[[Forge], Any]]:
    """Take the bundle apart, let `change` alter it, and seal it again with trusted keys."""

    def add(change: Callable[[Forge], Any]) -> Callable[[Forge], Any]:
        def alter(good: bytes) -> bytes:
            forge = Forge.of(good)
            made = change(forge)
            return made if isinstance(made, bytes) else forge.assemble()

        ATTACKS.append(Attack(name, code, alter))
        return change

    return add


# -- tools of an attacker ---------------------------------------------------------------------


def head_of(raw: bytes) -> dict[str, tuple[int, int]]:
    """Return start of data and size of the four members of the head."""
    places, position = {}, 0
    for path, _ in archive.HEAD:
        if raw[position + 156 : position + 157] == b"x":
            position += BLOCK + int(raw[position + 124 : position + 135], 8)
        size = int(raw[position + 124 : position + 135], 8)
        places[path] = (position + BLOCK, size)
        position += BLOCK + size + -size % BLOCK
    places["body"] = (position, len(raw) - position)
    return places


def set_checksum(block: bytearray) -> bytes:
    """Make a tar header's checksum true."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def flip(raw: bytes, at: int, bit: int = 1) -> bytes:
    out = bytearray(raw)
    out[at] ^= bit
    return bytes(out)


def layout_of(forge: Forge) -> tar.Layout:
    return tar.Layout([(e["path"], e["size"]) for e in forge.manifest["files"]])


def header_at(forge: Forge, path: str) -> int:
    """Return where the ustar header of a body file begins."""
    return entry_of(forge, path)["offset"] - BLOCK


def entry_of(forge: Forge, path: str) -> dict[str, Any]:
    return next(e for e in forge.manifest["files"] if e["path"] == path)


def edit_header(forge: Forge, path: str, **fields: bytes) -> None:
    """Change fields of a body file's header and mend its checksum."""
    at = header_at(forge, path)
    block = bytearray(forge.body[at : at + BLOCK])
    for name, value in fields.items():
        start = FIELDS[name]
        block[start : start + len(value)] = value
    forge.body[at : at + BLOCK] = set_checksum(block)


def with_payload_file(forge: Forge, path: str, content: bytes) -> None:
    """Replace the content of a file and rebuild body, layout, sums and digests truthfully."""
    rebuild(forge, {path: content})


def rebuild(
    forge: Forge,
    changed: dict[str, bytes],
    *,
    added: dict[str, tuple[str, bytes]] | None = None,
    sums: bool = True,
    bom: bool = True,
) -> None:
    """Lay the body out anew from its files, as a careless signer with the real tools would."""
    files = {
        e["path"]: (e, bytes(forge.body[e["offset"] : e["offset"] + e["size"]]))
        for e in forge.manifest["files"]
    }
    for path, content in changed.items():
        files[path] = (files[path][0], content)
    for path, (role, content) in (added or {}).items():
        entry = {"path": path, "role": role, "media_type": "application/octet-stream"}
        files[path] = ({**entry, "derived_from": []}, content)
    if bom and "META/sbom/bom.cdx.json" not in changed:
        members = [
            Member(path, content, "config")
            for path, (_, content) in files.items()
            if path.startswith("payload/")
        ]
        path = "META/sbom/bom.cdx.json"
        files[path] = (files[path][0], bundles.make_bom(members))
    ordered = sorted(files, key=sort_key)
    digests = {path: hashlib.sha256(files[path][1]).hexdigest() for path in ordered}
    if sums:
        text = archive.sums_text([(p, digests[p]) for p in ordered if p != "META/SHA256SUMS"])
        files["META/SHA256SUMS"] = (files["META/SHA256SUMS"][0], text)
        digests["META/SHA256SUMS"] = hashlib.sha256(text).hexdigest()
    layout = tar.Layout([(path, len(files[path][1])) for path in ordered])
    body = bytearray()
    entries = []
    for index, path in enumerate(ordered):
        entry, content = files[path]
        body += layout.gap(index) + content
        entries.append(
            {
                **entry,
                "size": len(content),
                "offset": layout.offsets[index],
                "sha256": digests[path],
            }
        )
    body += layout.gap(len(ordered))
    forge.body = body
    forge.manifest["files"] = entries


def sort_key(path: str) -> tuple[int, bytes]:
    groups = ["META/SHA256SUMS", "META/report.json", "META/attest/", "META/evidence/"]
    groups += ["META/sbom/", "META/policy/", "META/vectors/", "payload/"]
    rank = next((i for i, g in enumerate(groups) if path.startswith(g)), len(groups))
    return rank, path.encode()


GRAPHS = f"payload/{bundles.MODEL}/graphs.json"
CONFIG = f"payload/{bundles.MODEL}/config.json"
ONNX = f"payload/{bundles.MODEL}/model.onnx"
WEIGHTS = f"payload/{bundles.MODEL}/model.onnx_data"
TOKENIZER = f"payload/{bundles.MODEL}/tokenizer.json"

# -- no bundle at all -------------------------------------------------------------------------

attack("empty file", "archive.truncated")(lambda _: b"")
attack("noise", "archive.header")(lambda _: hashlib.shake_256(b"noise").digest(1 << 20))
attack("short noise", "archive.header")(lambda _: b"\x7fELF\x02\x01\x01")
attack("text", "archive.header")(lambda _: b"not a bundle\n" * 100)
attack("zeros", "archive.header")(lambda _: bytes(1 << 20))
attack("a plain tar of another tool", "archive.header")(lambda _: plain_tar())


def plain_tar() -> bytes:
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("META/envelope.dsse.json")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"{}\n"))
    return out.getvalue()


# -- truncation and extension -----------------------------------------------------------------


@attack("cut inside the first header", "archive.truncated")
def _(good: bytes) -> bytes:
    return good[:300]


@attack("cut after the envelope", "archive.truncated")
def _(good: bytes) -> bytes:
    return good[: BLOCK + archive.ENVELOPE_SIZE]


@attack("cut inside the manifest", "archive.truncated")
def _(good: bytes) -> bytes:
    return good[: head_of(good)[archive.MANIFEST][0] + 100]


@attack("cut inside an extended header (CVE-2026-11972)", "archive.truncated")
def _(good: bytes) -> bytes:
    start = head_of(good)[archive.CHUNKS][0]
    return good[: start - BLOCK - 200]


@attack("cut between head and body", "archive.truncated")
def _(good: bytes) -> bytes:
    return good[: head_of(good)["body"][0]]


@attack("cut inside the body", "archive.truncated")
def _(good: bytes) -> bytes:
    return good[: head_of(good)["body"][0] + 100_000]


@attack("last byte cut", "archive.truncated")
def _(good: bytes) -> bytes:
    return good[:-1]


@attack("a byte appended", "archive.trailing")
def _(good: bytes) -> bytes:
    return good + b"\0"


@attack("a second archive appended", "archive.trailing")
def _(good: bytes) -> bytes:
    return good + good


# -- head -------------------------------------------------------------------------------------


@attack("head reordered: trust after manifest", "archive.order")
def _(good: bytes) -> bytes:
    places = head_of(good)
    trust, manifest = places[archive.TRUST], places[archive.MANIFEST]
    a = good[trust[0] - BLOCK : manifest[0] - BLOCK]
    end = manifest[0] + manifest[1] + -manifest[1] % BLOCK
    b = good[manifest[0] - BLOCK : end]
    return good[: trust[0] - BLOCK] + b + a + good[end:]


@attack("chunks before the manifest", "archive.order")
def _(good: bytes) -> bytes:
    places = head_of(good)
    at = places[archive.MANIFEST][0] - BLOCK
    chunks_end = places["body"][0]
    manifest_end = places[archive.MANIFEST]
    end = manifest_end[0] + manifest_end[1] + -manifest_end[1] % BLOCK
    return good[:at] + good[end:chunks_end] + good[at:end] + good[chunks_end:]


@attack("manifest of 5 MiB", "archive.limit")
def _(good: bytes) -> bytes:
    at = head_of(good)[archive.MANIFEST][0] - BLOCK
    block = bytearray(good[at : at + BLOCK])
    block[124:136] = b"%011o\0" % (5 << 20)
    return good[:at] + set_checksum(block) + b" " * (5 << 20) + good[at + BLOCK :]


@attack("head member is a symbolic link", "archive.type")
def _(good: bytes) -> bytes:
    at = head_of(good)[archive.TRUST][0] - BLOCK
    block = bytearray(good[at : at + BLOCK])
    block[156:157] = b"2"
    return good[:at] + set_checksum(block) + good[at + BLOCK :]


@attack("head member under another name", "archive.name")
def _(good: bytes) -> bytes:
    at = head_of(good)[archive.TRUST][0] - BLOCK
    block = bytearray(good[at : at + BLOCK])
    block[:15] = b"META/trusT.json"
    return good[:at] + set_checksum(block) + good[at + BLOCK :]


@attack("bad header checksum", "archive.header")
def _(good: bytes) -> bytes:
    return flip(good, 150)


@attack("negative size", "archive.header")
def _(good: bytes) -> bytes:
    block = bytearray(good[:BLOCK])
    block[124:136] = b"-0000000001\0"
    return set_checksum(block) + good[BLOCK:]


@attack("base-256 size", "archive.header")
def _(good: bytes) -> bytes:
    block = bytearray(good[:BLOCK])
    block[124:136] = b"\x80" + b"\0" * 8 + b"\x02\0\0"
    return set_checksum(block) + good[BLOCK:]


@attack("non-zero padding in the head", "archive.padding")
def _(good: bytes) -> bytes:
    start, size = head_of(good)[archive.MANIFEST]
    assert size % BLOCK
    return flip(good, start + size)


@attack("extended header of the chunk list lies", "archive.header")
def _(good: bytes) -> bytes:
    at = head_of(good)[archive.CHUNKS][0] - 2 * BLOCK
    return flip(good, at - 3)


# -- body, re-treed and re-sealed -------------------------------------------------------------


def _typed(name: str, kind: bytes) -> None:
    @forged(name, "archive.type")
    def _(forge: Forge) -> None:
        edit_header(forge, CONFIG, kind=kind)


_typed("symbolic link", b"2")
_typed("hard link", b"1")
_typed("character device", b"3")
_typed("block device", b"4")
_typed("folder entry", b"5")
_typed("fifo", b"6")
_typed("contiguous file", b"7")
_typed("GNU sparse file", b"S")
_typed("GNU long name", b"L")
_typed("GNU long link", b"K")
_typed("pax global header", b"g")


@forged("hard link through a symbolic link (CVE-2026-11940)", "archive.type")
def _(forge: Forge) -> None:
    edit_header(forge, CONFIG, kind=b"2", link=b"/etc")
    edit_header(forge, GRAPHS, kind=b"1", link=CONFIG.encode() + b"/passwd")


@forged("parent path, in the tar only", "archive.name")
def _(forge: Forge) -> None:
    edit_header(forge, CONFIG, name=b"payload/../../etc/x\0".ljust(100, b"\0"))


@forged("absolute path, in the tar only", "archive.name")
def _(forge: Forge) -> None:
    edit_header(forge, CONFIG, name=b"/etc/x".ljust(100, b"\0"))


@forged("duplicate member", "archive.name")
def _(forge: Forge) -> None:
    edit_header(forge, GRAPHS, name=CONFIG.encode().ljust(100, b"\0"))


@forged("size differs from the manifest", "archive.header")
def _(forge: Forge) -> None:
    edit_header(forge, CONFIG, size=b"%011o\0" % 1)


@forged("set-uid mode", "archive.header")
def _(forge: Forge) -> None:
    edit_header(forge, CONFIG, mode=b"0004777\0")


@forged("owner, time", "archive.header")
def _(forge: Forge) -> None:
    edit_header(forge, CONFIG, uid=b"0000001\0", mtime=b"00000000001\0")


@forged("owner name", "archive.header")
def _(forge: Forge) -> None:
    edit_header(forge, CONFIG, uname=b"root")


@forged("bad checksum in the body", "archive.header")
def _(forge: Forge) -> None:
    forge.body[header_at(forge, CONFIG) + 149] ^= 1


def _record(name: str, old: bytes, new: bytes) -> None:
    @forged(name, "archive.header")
    def _(forge: Forge) -> None:
        at = forge.body.index(old)
        forge.body[at : at + len(old)] = new


_record("comment smuggles bytes", b"comment=ppp", b"comment=evi")
_record("unlisted pax key", b"comment=ppppppppp", b"SCHILY.xattr.x=pp")
_record("pax size record", b" comment=ppp", b" size=00000p")
_record("pax path record", b" comment=ppppp", b" path=/etc/pwd")


@forged("pax length lies", "archive.header")
def _(forge: Forge) -> None:
    at = forge.body.index(b" comment=")
    forge.body[at - 1] = ord("9") if forge.body[at - 1] != ord("9") else ord("8")


@forged("pax record without newline", "archive.header")
def _(forge: Forge) -> None:
    at = forge.body.index(b"p\n")
    forge.body[at + 1] = ord("p")


@forged("non-zero padding in the body, sealed", "archive.padding")
def _(forge: Forge) -> None:
    entry = entry_of(forge, CONFIG)
    forge.body[entry["offset"] + entry["size"]] = 1


@forged("non-zero end, sealed", "archive.padding")
def _(forge: Forge) -> None:
    forge.body[-1] = 1


@attack("non-zero padding in the body, not sealed", "chunk.leaf")
def _(good: bytes) -> bytes:
    return flip(good, len(good) - 1)


@forged("unlisted member", "manifest.layout")
def _(forge: Forge) -> None:
    entry = entry_of(forge, TOKENIZER)
    end = entry["offset"] + entry["size"]
    end += -end % BLOCK
    extra = tar.header_blocks("payload/tiny/extra", 0, end, ends_at=0)
    forge.body[end:end] = extra
    forge.body += bytes(-len(forge.body) % 4096)


@forged("listed file missing", "manifest.layout")
def _(forge: Forge) -> None:
    last = forge.manifest["files"][-1]
    start = header_at(forge, last["path"])
    del forge.body[start : start + 4096]
    forge.body += bytes(-len(forge.body) % 4096)


@forged("offsets overlap", "manifest.layout")
def _(forge: Forge) -> None:
    entry_of(forge, GRAPHS)["offset"] = entry_of(forge, CONFIG)["offset"]


@forged("data unaligned", "manifest.layout")
def _(forge: Forge) -> None:
    entry_of(forge, GRAPHS)["offset"] += 512


@forged("size of a file edited", "manifest.layout")
def _(forge: Forge) -> None:
    entry_of(forge, WEIGHTS)["size"] += 4096


@forged("SHA256SUMS disagree", "manifest.layout")
def _(forge: Forge) -> None:
    entry = entry_of(forge, "META/SHA256SUMS")
    text = bytes(forge.body[entry["offset"] : entry["offset"] + entry["size"]])
    rebuild(forge, {"META/SHA256SUMS": text.replace(b"a", b"b", 1)}, sums=False)


# -- chunks -----------------------------------------------------------------------------------


def _chunk(number: int) -> None:
    @attack(f"one bit of chunk {number} flipped", "chunk.leaf")
    def _(good: bytes) -> bytes:
        return flip(good, head_of(good)["body"][0] + number * CHUNK + 70_001, 0x10)


_chunk(0)
_chunk(1)


@attack("one leaf changed", "chunk.root")
def _(good: bytes) -> bytes:
    return flip(good, head_of(good)[archive.CHUNKS][0])


@forged("a leaf dropped", "chunk.root")
def _(forge: Forge) -> None:
    forge.leaves = forge.true_leaves()[:-1]


@forged("a leaf added", "chunk.root")
def _(forge: Forge) -> None:
    forge.leaves = [*forge.true_leaves(), bytes(32)]


@forged("leaves swapped", "chunk.root")
def _(forge: Forge) -> None:
    forge.leaves = forge.true_leaves()[::-1]


@forged("an inner node offered as the only leaf", "chunk.root")
def _(forge: Forge) -> None:
    left, right = forge.true_leaves()
    forge.leaves = [hashlib.sha256(b"\x01" + left + right).digest()]


# -- seal -------------------------------------------------------------------------------------


def signed(name: str, code: str, *signers: str, **more: Any) -> None:
    @forged(name, code)
    def _(forge: Forge) -> None:
        forge.signers = signers
        for key, value in more.items():
            setattr(forge, key, value)


signed("no signature", "seal.threshold")
signed("one signature of two", "seal.threshold", "builder", "alice")
signed("the builder alone", "seal.threshold", "builder")
signed("an unknown key alone", "seal.threshold", "mallory")
signed("an unknown key beside one approver", "seal.threshold", "builder", "alice", "mallory")
signed("one person, two keys", "seal.people", "builder", "alice", "alice2")
signed("the builder did not sign", "seal.role", "alice", "bob")
signed("another builder signed", "seal.role", "carol", "alice", "bob")


@forged("the builder approves", "seal.people")
def _(forge: Forge) -> None:
    forge.signers = ("carol", "alice")
    forge.builder = "carol"


@forged("an approver is named as the builder", "seal.role")
def _(forge: Forge) -> None:
    forge.signers = ("builder", "alice", "bob", "carol")
    forge.builder = "alice"


def enveloped(name: str, code: str) -> Callable[[Callable[[dict], Any]], Any]:
    """Alter the parsed envelope; what is returned as bytes stands as it is."""

    def add(change: Callable[[dict], Any]) -> Any:
        def alter(good: bytes) -> bytes:
            value = json.loads(good[BLOCK : BLOCK + archive.ENVELOPE_SIZE])
            made = change(value)
            raw = made if isinstance(made, bytes) else canonical_json(value)
            padded = raw.ljust(archive.ENVELOPE_SIZE, b" ")[: archive.ENVELOPE_SIZE]
            return good[:BLOCK] + padded + good[BLOCK + archive.ENVELOPE_SIZE :]

        ATTACKS.append(Attack(name, code, alter))
        return change

    return add


@enveloped("signatures stripped", "seal.threshold")
def _(value: dict) -> None:
    value["signatures"] = []


@enveloped("payload edited", "seal.threshold")
def _(value: dict) -> None:
    raw = bytearray(envelope.decode_base64(value["payload"]))
    raw[-20] ^= 1
    value["payload"] = envelope.encode_base64(bytes(raw))


@enveloped("one signature twice", "seal.malformed")
def _(value: dict) -> None:
    value["signatures"].append(value["signatures"][0])


@enveloped("one signature under two key ids", "seal.threshold")
def _(value: dict) -> None:
    alice = bundles.signer("alice").public_key.keyid
    bob = bundles.signer("bob").public_key.keyid
    by_id = {s["keyid"]: s for s in value["signatures"]}
    by_id[bob]["sig"] = by_id[alice]["sig"]


@enveloped("signatures out of order", "seal.malformed")
def _(value: dict) -> None:
    value["signatures"].reverse()


@enveloped("payload type swapped", "seal.type")
def _(value: dict) -> None:
    value["payloadType"] = "text/plain"


@enveloped("payload is a number", "seal.malformed")
def _(value: dict) -> None:
    value["payload"] = 7


@enveloped("a field is missing", "seal.malformed")
def _(value: dict) -> None:
    del value["payloadType"]


@enveloped("an extra field", "seal.malformed")
def _(value: dict) -> None:
    value["note"] = ""


@enveloped("base64 with unused bits", "seal.malformed")
def _(value: dict) -> None:
    sig = value["signatures"][0]["sig"]
    assert sig.endswith("==")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value["signatures"][0]["sig"] = sig[:-3] + letters[letters.index(sig[-3]) ^ 1] + "=="


@enveloped("JSON nested 10,000 deep", "seal.malformed")
def _(_value: dict) -> bytes:
    return b"[" * 10_000 + b"]" * 10_000


@enveloped("a tail that is no space", "seal.malformed")
def _(value: dict) -> bytes:
    return canonical_json(value).ljust(archive.ENVELOPE_SIZE - 1, b" ") + b"\n"


@enveloped("leading space", "seal.malformed")
def _(value: dict) -> bytes:
    return b" " + canonical_json(value)


@enveloped("keys in another order", "seal.malformed")
def _(value: dict) -> bytes:
    return json.dumps(dict(reversed(value.items())), separators=(",", ":")).encode()


def stated(name: str, code: str) -> Callable[[Callable[[dict], Any]], Any]:
    """Alter the statement and sign it with trusted keys."""

    def add(change: Callable[[dict], Any]) -> Any:
        @forged(name, code)
        def _(forge: Forge) -> None:
            statement = forge.make_statement(canonical_json(forge.sealed_manifest()))
            change(statement)
            forge.statement = statement

        return change

    return add


@stated("a signed approval used as the seal", "seal.type")
def _(value: dict) -> None:
    value["predicateType"] = "https://airgap.invalid/approval/v1"


@stated("profile of another kind", "seal.profile")
def _(value: dict) -> None:
    value["predicate"]["profile"] = "cnsa2"


@stated("seal with an extra field", "seal.malformed")
def _(value: dict) -> None:
    value["predicate"]["waiver"] = True


@stated("seal of another manifest", "seal.subject")
def _(value: dict) -> None:
    value["subject"][0]["digest"]["sha256"] = "0" * 64


@stated("seal of another body", "seal.subject")
def _(value: dict) -> None:
    value["subject"][1]["digest"]["rfc6962-sha256"] = "0" * 64


@stated("seal promises a later expiry than the manifest", "seal.subject")
def _(value: dict) -> None:
    value["predicate"]["expires"] = "2030-01-01T00:00:00Z"


@stated("seal names another report", "seal.subject")
def _(value: dict) -> None:
    value["predicate"]["report_digest"] = "sha256:" + "0" * 64


@attack("manifest swapped for that of another sealed bundle", "seal.subject")
def _(good: bytes) -> bytes:
    other = Forge.of(good)
    other.manifest["version"] = "9.9"
    theirs = other.assemble()
    mine, size = head_of(good)[archive.MANIFEST]
    start, length = head_of(theirs)[archive.MANIFEST]
    assert size == length
    return good[:mine] + theirs[start : start + length] + good[mine + size :]


# -- manifest ---------------------------------------------------------------------------------


def raw_manifest(name: str, code: str, change: Callable[[bytes], bytes]) -> None:
    @forged(name, code)
    def _(forge: Forge) -> None:
        forge.raw_manifest = change(canonical_json(forge.sealed_manifest()))


raw_manifest("manifest with whitespace", "manifest.canonical", lambda m: m + b"\n")
raw_manifest(
    "manifest with reordered keys",
    "manifest.canonical",
    lambda m: json.dumps(
        dict(reversed(json.loads(m).items())), separators=(",", ":"), ensure_ascii=False
    ).encode(),
)
raw_manifest(
    "manifest with a duplicate key", "manifest.canonical", lambda m: b'{"epoch":1,' + m[1:]
)
for _text in ("9223372036854775808", "9007199254740992", "1e400", "1.0", "NaN", "-0"):
    raw_manifest(
        f"manifest with epoch {_text}",
        "manifest.canonical",
        lambda m, t=_text: m.replace(b'"epoch":1', b'"epoch":' + t.encode()),
    )
raw_manifest(
    "manifest with an explicit null",
    "manifest.canonical",
    lambda m: m.replace(b'"body"', b'"base":null,"body"'),
)
raw_manifest("manifest is a list", "manifest.schema", lambda _: b"[]")
raw_manifest(
    "manifest is no UTF-8", "manifest.canonical", lambda m: m.replace(b"tests", b"te\xffts")
)


def field(name: str, code: str) -> Callable[[Callable[[dict], Any]], Any]:
    def add(change: Callable[[dict], Any]) -> Any:
        @forged(name, code)
        def _(forge: Forge) -> None:
            change(forge.manifest)

        return change

    return add


@field("unknown field", "manifest.schema")
def _(m: dict) -> None:
    m["trusted"] = True


@field("future format", "manifest.version")
def _(m: dict) -> None:
    m["format"] = "airgap-bundle/2"


@field("no models", "manifest.schema")
def _(m: dict) -> None:
    m["models"] = []


@field("another chunk size", "manifest.schema")
def _(m: dict) -> None:
    m["body"]["chunk_size"] = 8 * 1024 * 1024


@field("a model of another name", "manifest.schema")
def _(m: dict) -> None:
    m["models"][0]["id"] = "other"


@field("evidence that is not listed", "manifest.schema")
def _(m: dict) -> None:
    m["evidence"] = [
        {
            "kind": "oms",
            "path": "META/evidence/none",
            "sha256": "0" * 64,
            "subject": "x",
            "summary": "x",
        }
    ]


@field("text with a bidirectional override", "manifest.schema")
def _(m: dict) -> None:
    m["models"][0]["intended_use"] = "safe \u202eelbissimrep"


def as_delta(good: bytes, base: bytes) -> bytes:
    """Return a sealed delta on the bundle `base` in which everything travels."""
    forge = Forge.of(good)
    forge.manifest["base"] = {
        "bundle_id": "tiny-line",
        "manifest_digest": f"sha256:{hashlib.sha256(base).hexdigest()}",
    }
    full = forge.assemble()
    files = [forge.body[e["offset"] : e["offset"] + e["size"]] for e in forge.manifest["files"]]
    new = b"".join(bytes(each) for each in files)
    start, size = head_of(full)[archive.MANIFEST]
    facts = {
        "format": "airgap-delta/1",
        "base": forge.manifest["base"]["manifest_digest"],
        "result": f"sha256:{hashlib.sha256(full[start : start + size]).hexdigest()}",
        "new": len(new),
        "files": [
            {"path": e["path"], "runs": [{"size": e["size"]}] if e["size"] else []}
            for e in forge.manifest["files"]
        ],
    }
    raw = canonical_json(facts)
    layout = tar.Layout([("META/delta.json", len(raw)), ("DELTA/new.bin", len(new))])
    head = full[: head_of(full)["body"][0]]
    return head + layout.gap(0) + raw + layout.gap(1) + new + layout.gap(2)


attack("a delta without its base", "delta.base")(lambda good: as_delta(good, b"another"))


def named(name: str, path: str) -> None:
    @forged(f"hostile name: {name}", "manifest.paths")
    def _(forge: Forge) -> None:
        rebuild(forge, {}, added={path: ("document", b"x")})


named("newline", f"payload/{bundles.MODEL}/a\nb")
named("right-to-left override", f"payload/{bundles.MODEL}/a\u202eb")
named("device", f"payload/{bundles.MODEL}/NUL.onnx")
named("device with space", f"payload/{bundles.MODEL}/con .txt")
named("trailing dot", f"payload/{bundles.MODEL}/a.")
named("trailing space", f"payload/{bundles.MODEL}/a ")
named("backslash", f"payload/{bundles.MODEL}/a\\b")
named("drive", f"payload/{bundles.MODEL}/c:x")
named("parent", f"payload/{bundles.MODEL}/../x")
named("dot", f"payload/{bundles.MODEL}/./x")
named("empty component", f"payload/{bundles.MODEL}//x")
named("absolute", "/etc/passwd")
named("outside all groups", "META/manifest.json")
named("NFD", f"payload/{bundles.MODEL}/e\u0301")
named("256 bytes", "payload/" + "/".join(["d" * 60] * 4) + "/xxxxxx")
named("long component", f"payload/{bundles.MODEL}/" + "d" * 129)
named("file beside a folder of its name", CONFIG + "/x")
named("case twin", CONFIG.replace("config", "CONFIG"))
named("folder case twin", f"payload/{bundles.MODEL.upper()}/x")


# -- time and order of releases ---------------------------------------------------------------


@field("expired", "trust.expired")
def _(m: dict) -> None:
    m["expires"] = format_time(bundles.NOW)


@field("not yet valid", "trust.time")
def _(m: dict) -> None:
    m["not_before"] = format_time(bundles.NOW + timedelta(seconds=1))


@field("created before the signers were enrolled", "seal.threshold")
def _(m: dict) -> None:
    m["created"] = format_time(bundles.ENROLLED - timedelta(days=1))


# -- trust ------------------------------------------------------------------------------------


def chained(name: str, code: str) -> Callable[[Callable[[dict], Any]], Any]:
    def add(change: Callable[[dict], Any]) -> Any:
        @forged(name, code)
        def _(forge: Forge) -> None:
            value = json.loads(forge.trust)
            made = change(value)
            forge.trust = made if isinstance(made, bytes) else canonical_json(value)

        return change

    return add


@chained("the bundle brings its own anchor", "trust.chain")
def _(value: dict) -> None:
    from bundle import trust as t

    theirs = t.new_root(
        bundles.public("root").model_copy(update={"person": "mallory"}),
        bundles.signer("root"),
        now=bundles.ENROLLED,
    )
    value["roots"] = json.loads(t.chain_document(theirs))["roots"]


@chained("a gap in the chain of roots", "trust.chain")
def _(value: dict) -> None:
    del value["roots"][2]


@chained("a newer root signed by nobody known", "trust.chain")
def _(value: dict) -> None:
    value["roots"].append(next_root("mallory"))


@chained("a newer root whose payload is noise", "trust.root")
def _(value: dict) -> None:
    root = dict(value["roots"][-1])
    root["payload"] = envelope.encode_base64(b"{}")
    value["roots"].append(root)


@chained("trust.json with an extra field", "trust.chain")
def _(value: dict) -> None:
    value["anchors"] = []


@chained("trust.json with whitespace", "trust.chain")
def _(value: dict) -> bytes:
    return json.dumps(value).encode()


@chained("trust.json without roots", "trust.chain")
def _(value: dict) -> None:
    value["roots"] = []


def next_root(*signers: str, **changes: Any) -> dict[str, Any]:
    """Return version n+1 of the tests' root, changed and signed by whom the attacker has."""
    from bundle import trust as t

    document = bundles.make_trust().document.model_copy(
        update={"version": bundles.make_trust().version + 1, **changes}
    )
    made = envelope.Envelope(document.to_bytes(), t.ROOT_TYPE, ())
    for name in signers:
        made = envelope.add_signature(made, bundles.signer(name))
    return json.loads(made.to_bytes())


# -- contents, sealed by a careless signer ----------------------------------------------------


def contained(name: str, code: str, path: str, content: bytes) -> None:
    @forged(name, code)
    def _(forge: Forge) -> None:
        rebuild(forge, {path: content})


contained("auto_map in the config", "scan.config", CONFIG, b'{"auto_map": {"A": "x.B"}}')
contained("graphs.json of another graph", "scan.graphs", GRAPHS, b"{}")
contained("tokenizer that is none", "scan.tokenizer", TOKENIZER, b"[]")


@forged("BOM differs from the files", "bom.mismatch")
def _(forge: Forge) -> None:
    entry = entry_of(forge, "META/sbom/bom.cdx.json")
    text = bytes(forge.body[entry["offset"] : entry["offset"] + entry["size"]])
    old = entry_of(forge, CONFIG)["sha256"].encode()
    rebuild(forge, {"META/sbom/bom.cdx.json": text.replace(old, old[::-1])}, bom=False)


@forged("BOM missing", "bom.mismatch")
def _(forge: Forge) -> None:
    files = [e for e in forge.manifest["files"] if e["role"] != "sbom"]
    keep = {e["path"]: bytes(forge.body[e["offset"] : e["offset"] + e["size"]]) for e in files}
    forge.manifest["files"] = files
    rebuild(forge, keep, bom=False)


@forged("pickle weights beside the graph", "scan.pickle")
def _(forge: Forge) -> None:
    path = f"payload/{bundles.MODEL}/pytorch_model.bin"
    rebuild(forge, {}, added={path: ("document", b"\x80\x02.")})


@forged("script beside the graph", "scan.role")
def _(forge: Forge) -> None:
    path = f"payload/{bundles.MODEL}/modeling.py"
    rebuild(forge, {}, added={path: ("document", b"import os\n")})


def with_level(name: str, code: str, claimed: str, summed_up: str | None) -> None:
    """Claim a level of provenance, with a sealed summary that says another one, or with none."""

    @forged(name, code)
    def _(forge: Forge) -> None:
        forge.manifest["models"][0]["provenance_level"] = claimed
        if summed_up is None:
            return
        entries = [e for e in forge.manifest["files"] if e["path"].startswith("payload/")]
        raw = summary.statement(
            resource="local:tiny@r1",
            subjects={e["path"]: e["sha256"] for e in entries},
            inputs={e["path"]: e["sha256"] for e in forge.manifest["evidence"]},
            level=summed_up,
            moment=bundles.CREATED,
            policy=[],
        )
        rebuild(forge, {}, added={summary.PATH: ("attestation", raw)})


with_level("a level without a summary", "evidence.summary", "L3", None)
with_level("level inflated: the summary says less", "evidence.level", "L3", "L1")
with_level("level inflated: no evidence of its kind", "evidence.level", "L3", "L3")
with_level("level 4 without provenance of a build", "evidence.level", "L4", "L4")


def random_flips(good: bytes, count: int, seed: int) -> list[tuple[int, bytes]]:
    """Return altered copies, each with one bit flipped, spread over head and body."""
    places = head_of(good)
    found = []
    for number in range(count):
        digest = hashlib.sha256(b"%d/%d" % (seed, number)).digest()
        word = int.from_bytes(digest[:8])
        low, size = places["body"] if number % 2 else (0, places["body"][0])
        at = low + word % size
        found.append((at, flip(good, at, 1 << digest[9] % 8)))
    return found


def huge_sparse(path: os.PathLike[str]) -> None:
    """Make a file of 1 TiB without a byte in it."""
    with open(path, "wb") as stream:  # noqa: PTH123 - a path of any kind
        stream.truncate(1 << 40)
