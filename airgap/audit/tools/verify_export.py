#!/usr/bin/env python3
"""Judge an export of an airgap usage log with public keys alone.

  verify_export.py EXPORT --vkey FILE [--export-key FILE] [--anchors PATH]... [--memory DIR] [--json]

One file; needs Python 3.9 or later and the package `cryptography`. It shares no code with airgap.
--vkey        verifier keys of the log, one a line, oldest first (audit.vkey of the host)
--export-key  the two public keys of the exporting host (export.pub); both signatures are asked for
--anchors     receipts (.tlog-proof), checkpoints, or lines `origin size root`, kept elsewhere
--memory      folder where this reader remembers number and head of the last export of each log
Exit 0 good, 1 tampered, 2 usage, 3 cannot tell. Not judged here, but by `airgap audit verify`:
what may stand in a single field of a record (the schema; form, chain and order are judged),
cosignatures, and derived rows other than JSON lines.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import stat
import sys

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SEGMENT, WIDTH, MAX_LINE, MAX_NOTE, MAX_MANIFEST = 65_536, 256, 16_384, 131_072, 1 << 26
MAX_INTEGER = 2**53 - 1
PREFIX = b"airgap-audit-export/1\n"
MANIFEST_KEYS = {
    "format", "origin", "number", "first", "size", "root", "since", "rows", "rows_file",
    "payloads", "files",
}  # fmt: skip
ROWS = {"jsonl", "csv", "ocsf", "rfc5424", "cef", "hec"}
ESCAPED = re.compile(r'(?:[^\\]|\\["\\])*')
OBJECTS = ("actor", "decision", "in", "out", "tok", "err", "data")
REQUIRED = {"v", "seq", "prev", "ts", "mono_ns", "boot", "host", "inst", "kind", "phase"}
PRINTABLE = re.compile(b"[ -~]*")
EXITS = {"good": 0, "tampered": 1, "cannot tell": 3}
CODES = {"good": "", "tampered": "audit.tampered", "cannot tell": "audit.unknown"}


class Tampered(Exception):
    """Something contradicts: check, place, what was found."""


class Unknown(Exception):
    """Nothing contradicts, and something is missing that would be needed."""


def bad(check, place, found=""):
    raise Tampered(f"{check}, {place}" + (f": {found}" if found else ""))


# -- hashes, notes, keys ---------------------------------------------------------------------


def sha256(data):
    return hashlib.sha256(data).digest()


def node(left, right):
    return sha256(b"\x01" + left + right)


def unbase64(text, length=None):
    raw = base64.b64decode(text, validate=True)
    if base64.b64encode(raw).decode() != text or (length and len(raw) != length):
        raise ValueError("not canonical base64")
    return raw


def included(leaf, index, size, proof, root):
    """RFC 9162, 2.1.3.2."""
    if index >= size:
        return False
    fn, sn, found = index, size - 1, leaf
    for each in proof:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            found = node(each, found)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            found = node(found, each)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and found == root


def consistent(old, new, proof, old_root, new_root):
    """RFC 9162, 2.1.4.2."""
    if old == new:
        return not proof and old_root == new_root
    path = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    if not 0 < old < new or not path:
        return False
    fn, sn = old - 1, new - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    one = two = path[0]
    for each in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            one, two = node(each, one), node(each, two)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            two = node(two, each)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and one == old_root and two == new_root


class Vkey:
    """A verifier key `<name>+<key id>+<base64 of type and key>`."""

    def __init__(self, text):
        self.text = text
        self.name, key_id, body = text.split("+", 2)
        raw = unbase64(body, 33)
        self.id = sha256(self.name.encode() + b"\n" + raw)[:4]
        if raw[0] != 1 or key_id != self.id.hex() or not self.name:
            raise ValueError("not an Ed25519 verifier key")
        self.public = Ed25519PublicKey.from_public_bytes(raw[1:])


class Note:
    """A checkpoint: origin, size, root, and signatures that nobody has judged yet."""

    def __init__(self, content):
        if len(content) > MAX_NOTE:
            raise ValueError("a note that is too long")
        text, blank, tail = content.decode().rpartition("\n\n")
        lines = tail.split("\n")
        if not blank or len(lines) < 2 or lines.pop() or len(lines) > 24:
            raise ValueError("not a signed note")
        if any(ch < " " and ch != "\n" for ch in content.decode()):
            raise ValueError("a control character")
        self.origin, size, root = text.split("\n")
        if not re.fullmatch("0|[1-9][0-9]{0,15}", size) or not self.origin:
            raise ValueError("a size or origin that is none")
        self.size, self.root = int(size), unbase64(root, 32)
        self.text = (text + "\n").encode()
        self.signatures = []
        for line in lines:
            dash, name, blob = line.split(" ")
            raw = unbase64(blob)
            if dash != "\u2014" or len(raw) <= 4:
                raise ValueError("a signature line that is none")
            self.signatures.append((name, raw[:4], raw[4:]))

    def signers(self, keys):
        """Return the ids of known keys that signed; a bad signature of one rejects the note."""
        known, found = {key.id: key for key in keys}, []
        if self.origin != keys[0].name:
            raise ValueError(f"origin {self.origin!r:.80}")
        for name, key_id, signature in self.signatures:
            if key_id in known and name == known[key_id].name:
                try:
                    known[key_id].public.verify(signature, self.text)
                except InvalidSignature:
                    raise ValueError(f"the signature of key {key_id.hex()} is bad") from None
                found.append(key_id)
        if not found:
            raise ValueError("signed by no key that is known")
        return found


class Epochs:
    """Which key may sign a head of which size."""

    def __init__(self, ring, rotations):
        named = [key.text for _, key in rotations]
        begin = named.index(ring[0].text) + 1 if ring[0].text in named else 0
        for offset, key in enumerate(ring[1:]):
            if named[begin + offset : begin + offset + 1] != [key.text]:
                bad("key epoch", "log/seg", f"no epoch of the trusted key {key.id.hex()}")
        self.chain = [(0, None if begin else ring[0]), *rotations]
        self.keys = [key for _, key in self.chain if key]

    def holder(self, size):
        return [key for start, key in self.chain if start < size or start == 0][-1]

    def require(self, note, place):
        try:
            signers = note.signers(self.keys)
        except ValueError as error:
            bad("signature", place, str(error))
        holder = self.holder(note.size)
        if holder is not None and holder.id not in signers:
            bad("key epoch", place, f"size {note.size} is the affair of key {holder.id.hex()}")
        return signers


# -- the export as files ---------------------------------------------------------------------


def read(path, limit):
    """Return a plain file; links and pipes are refused."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            bad("files", path, "not a plain file")
        content = file.read(limit + 1)
    if len(content) > limit:
        bad("files", path, f"more than {limit} bytes")
    return content


def check_signatures(folder, manifest, export_key, notes):
    """Judge both signatures before anything of the manifest is read."""
    try:
        content = read(os.path.join(folder, "manifest.sig"), 32_768)
    except FileNotFoundError:
        content = b""
    if export_key is None:
        notes.append("manifest: its signatures were not checked: no export key was given")
        return
    blocks = re.findall(b"-----BEGIN [^-]+-----[^-]+-----END [^-]+-----\n?", export_key)
    if len(blocks) != 2:
        raise Unknown("the export key file does not hold two public keys")
    key_id = hashlib.sha256(export_key).hexdigest()
    try:
        document = json.loads(content.decode(), object_pairs_hook=no_pair_twice)
        if set(document) != {"format", "key", "signatures"} or document["key"] != key_id:
            bad("manifest signature", "manifest.sig", "of another key, or malformed")
        if document["format"] != "airgap-audit-signatures/1":
            bad("manifest signature", "manifest.sig", "another format")
        found = {k: unbase64(v) for k, v in document["signatures"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        bad("manifest signature", "manifest.sig", "malformed or missing")
    if set(found) != {"ed25519", "ml-dsa-87"}:
        bad("manifest signature", "manifest.sig", f"signed by {sorted(found)}, both are required")
    unable = False
    for block in blocks:
        try:
            key = serialization.load_pem_public_key(block)
        except (UnsupportedAlgorithm, ValueError):
            unable = True  # this build of cryptography has no ML-DSA
            continue
        scheme = "ed25519" if isinstance(key, Ed25519PublicKey) else "ml-dsa-87"
        try:
            key.verify(found.pop(scheme), PREFIX + manifest)
        except (InvalidSignature, KeyError):
            bad("manifest signature", "manifest.sig", f"the {scheme} signature does not hold")
    if unable or found:
        notes.append("manifest: this build of `cryptography` cannot check ml-dsa-87")
        raise Unknown("the ml-dsa-87 signature of the manifest cannot be checked here")


def parse_manifest(content):
    try:
        manifest = json.loads(content.decode(), object_pairs_hook=no_pair_twice)
        if set(manifest) != MANIFEST_KEYS or manifest["format"] != "airgap-audit-export/1":
            raise ValueError("another format")
        for name, least in (("number", 1), ("first", 0), ("size", 1)):
            if type(manifest[name]) is not int or manifest[name] < least:
                raise ValueError(name)
        for name, kind in (("origin", str), ("rows", str), ("payloads", bool), ("files", list)):
            if type(manifest[name]) is not kind:
                raise ValueError(name)
        since = manifest["since"]
        if since is not None and (set(since) != {"size", "root"} or type(since["size"]) is not int):
            raise ValueError("since")
        unbase64(manifest["root"], 32)
        if manifest["rows"] not in ROWS or len(manifest["origin"]) > 200:
            raise ValueError("rows of an unknown form, or an origin that is too long")
        files = {}
        for each in manifest["files"]:
            if set(each) != {"path", "bytes", "sha256", "sha384"} or each["path"] in files:
                raise ValueError("a file twice, or malformed")
            if type(each["bytes"]) is not int:
                raise ValueError("bytes")
            parts = each["path"].split("/")
            if not re.fullmatch("[A-Za-z0-9_./-]{1,200}", each["path"]) or {"", ".", ".."} & set(
                parts
            ):
                raise ValueError(f"path {each['path']!r:.60}")
            files[each["path"]] = each
        if manifest["rows_file"] != f"records.{manifest['rows']}":
            raise ValueError("rows_file")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        bad("manifest", "manifest.json", f"{error!s:.80}")
    return manifest, files


def check_files(folder, files):
    """Every file is listed, a plain file, and has its length and both digests."""
    there = set()
    for place, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            relative = os.path.relpath(path, folder)
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                bad("manifest", relative, "a link or special file")
            if stat.S_ISREG(mode):
                there.add(relative)
    there -= {"manifest.json", "manifest.sig"}
    for name in sorted(there ^ set(files)):
        bad("manifest", name, "not listed" if name in there else "listed and not there")
    for name, entry in files.items():
        one, two, size = hashlib.sha256(), hashlib.sha384(), 0
        with open(os.path.join(folder, name), "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                one.update(block)
                two.update(block)
                size += len(block)
        if (size, one.hexdigest(), two.hexdigest()) != (
            entry["bytes"], entry["sha256"], entry["sha384"],
        ):  # fmt: skip
            bad("manifest", name, "other content than its digests say")


# -- records ---------------------------------------------------------------------------------


def no_pair_twice(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def whole(text):
    if text == "-0" or abs(int(text)) > MAX_INTEGER:
        raise ValueError("a number that is not allowed")
    return int(text)


def no_number(text):
    raise ValueError(f"the number {text}")


DECODER = json.JSONDecoder(
    object_pairs_hook=no_pair_twice,
    parse_int=whole,
    parse_float=no_number,
    parse_constant=no_number,
)


def parse_record(line):
    if len(line) > MAX_LINE or not PRINTABLE.fullmatch(line):
        raise ValueError("too long, or not printable ASCII")
    text = line.decode()
    if "\\" in text and not ESCAPED.fullmatch(text):
        raise ValueError("an escape of another character than a quote or a backslash")
    record = DECODER.decode(text)
    if json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False) != text:
        raise ValueError("not in canonical form")
    if not isinstance(record, dict) or any(record.get(name) is None for name in REQUIRED):
        raise ValueError("a field is missing")
    if any(not isinstance(record.get(name, {}), dict) for name in OBJECTS):
        raise ValueError("a field that must be an object is none")
    if type(record["v"]) is not int or record["v"] != 1:
        raise ValueError("a record of another version")
    if "decision" in record and not record["decision"].get("id"):
        raise ValueError("a decision without its record")
    return record


def tile_name(index, width=WIDTH):
    name = f"{index % 1000:03d}"
    while index >= 1000:
        index //= 1000
        name = f"x{index % 1000:03d}/{name}"
    return name if width == WIDTH else f"{name}.p/{width}"


class Tree:
    """An RFC 6962 tree as it grows; compares every tile that it completes."""

    def __init__(self, folder):
        self.folder, self.size, self.peaks, self.rows, self.seen = folder, 0, [], [], set()

    def add(self, leaf):
        count, top = self.size, leaf
        while count & 1:
            top, count = node(self.peaks.pop(), top), count >> 1
        self.peaks.append(top)
        self.size += 1
        self._tile(0, leaf)

    def root(self):
        found = self.peaks[-1] if self.peaks else sha256(b"")
        for peak in reversed(self.peaks[:-1]):
            found = node(peak, found)
        return found

    def _tile(self, level, value):
        if level == len(self.rows):
            self.rows.append([])
        row = self.rows[level]
        row.append(value)
        if len(row) == WIDTH:
            self._compare(level, row)
            while len(row) > 1:
                row = [node(row[i], row[i + 1]) for i in range(0, len(row), 2)]
            self.rows[level] = []
            self._tile(level + 1, row[0])

    def _compare(self, level, row):
        index = (self.size - 1) // WIDTH ** (level + 1)
        name = f"{level}/{tile_name(index, len(row))}"
        self.seen.add(name)
        try:
            found = read(os.path.join(self.folder, name), 32 * WIDTH)
        except FileNotFoundError:
            bad("tile", f"log/tile/{name}", "nothing")
        if found != b"".join(row):
            bad("tile", f"log/tile/{name}", "other hashes than the records have")

    def finish(self):
        for level, row in enumerate(self.rows):
            if row:
                index = self.size // WIDTH ** (level + 1)
                name = f"{level}/{tile_name(index, len(row))}"
                self.seen.add(name)
                if read(os.path.join(self.folder, name), 32 * WIDTH) != b"".join(row):
                    bad("tile", f"log/tile/{name}", "other hashes than the records have")


class Lines:
    """The pass over all records: lines, chain, pairs, tree, journal, bundles, rows."""

    def __init__(self, folder, manifest, wanted):
        self.folder, self.manifest, self.wanted = folder, manifest, wanted
        self.log = os.path.join(folder, "log")
        self.tree = Tree(os.path.join(self.log, "tile"))
        self.roots, self.leaves, self.rotations, self.closing = {}, {}, [], {}
        self.previous, self.notes = None, []  # the log before, if this one was begun in its place
        self.parts = {}  # by request: number, bytes and commitment of its newest chunk
        self.open, self.cited, self.sealed, self.purged = {}, set(), {}, set()
        self.prev, self.bundle, self.bundles = "0" * 64, [], set()
        self.journal = self._journal()
        self.head, self.last_head = next(self.journal, None), None
        self.heads = {}  # (epoch, id of the first signer) -> size
        self.rows = None
        if manifest["rows"] == "jsonl":
            self.rows = open(os.path.join(folder, manifest["rows_file"]), "rb")

    def _journal(self):
        with open(os.path.join(self.log, "checkpoints.jsonl"), "rb") as file:
            for line in iter(lambda: file.readline(2 * MAX_NOTE), b""):
                try:
                    entry = json.loads(line)
                    if json.dumps({"note": entry["note"]}).encode() + b"\n" != line:
                        raise ValueError("not a line with one note")
                    yield Note(entry["note"].encode())
                except (ValueError, TypeError, AttributeError, KeyError) as error:
                    bad("head journal", "log/checkpoints.jsonl", f"{error!s:.80}")

    def run(self):
        first = self.manifest["first"]
        if first % SEGMENT:
            bad("manifest", "manifest.json", "does not begin at a segment")
        kept = self._kept()
        for index in range(first // WIDTH):
            name = f"log/tile/0/{tile_name(index)}"
            tile = read(os.path.join(self.folder, name), 32 * WIDTH)
            if len(tile) != 32 * WIDTH:
                bad("tile", name, "not whole")
            for at in range(0, len(tile), 32):
                leaf, seq = tile[at : at + 32], self.tree.size
                if seq in kept:
                    if sha256(b"\0" + kept[seq][1]) != leaf:
                        bad("record", "log/kept.jsonl", f"record {seq} is another one")
                    self._obey(kept[seq][0])
                self._grow(leaf)
        names = sorted(os.listdir(os.path.join(self.log, "seg")))
        if names != [f"{first // SEGMENT + i:08d}.jsonl" for i in range(len(names))]:
            bad("segment", "log/seg", "a segment is missing or has another name")
        for number, name in enumerate(names):
            with open(os.path.join(self.log, "seg", name), "rb") as file:
                for line in iter(lambda: file.readline(MAX_LINE + 2), b""):
                    self._line(line, f"log/seg/{name}")
            if number < len(names) - 1 and self.tree.size % SEGMENT:
                bad("segment", f"log/seg/{name}", "not whole")
        self._finish()

    def _kept(self):
        path, found = os.path.join(self.log, "kept.jsonl"), {}
        if os.path.exists(path):
            with open(path, "rb") as file:
                for line in iter(lambda: file.readline(MAX_LINE + 2), b""):
                    try:
                        record = parse_record(line[:-1])
                    except ValueError as error:
                        bad("record", "log/kept.jsonl", str(error))
                    found[record["seq"]] = (record, line[:-1])
        return found

    def _line(self, raw, place):
        seq, line = self.tree.size, raw[:-1]
        if raw[-1:] != b"\n":
            bad("record", place, f"record {seq} is torn or too long")
        try:
            record = parse_record(line)
        except (ValueError, RecursionError) as error:
            bad("record", place, f"record {seq}: {error!s:.80}")
        if record["seq"] != seq:
            bad("sequence", place, f"record {seq} says {record['seq']}")
        if record["prev"] != self.prev:
            bad("chain", place, f"record {max(0, seq - 1)} is not the one that {seq} follows")
        leaf = sha256(b"\0" + line)
        self._obey(record)
        self._pair(record, seq, place)
        self.bundle.append(len(line).to_bytes(2, "big") + line)
        if self.rows is not None:
            head = json.dumps(
                {"leaf": leaf.hex(), "origin": self.manifest["origin"]},
                separators=(",", ":"), ensure_ascii=False,
            )  # fmt: skip
            row = f'{head[:-1]},"record":'.encode() + line + b',"seq":%d}\n' % seq
            if self.rows.readline(len(row) + 1) != row:
                bad("rows", self.manifest["rows_file"], f"record {seq} has another row")
        self._grow(leaf)
        if self.tree.size % WIDTH == 0:
            self._bundle()

    def _obey(self, record):
        data = record.get("data", {})
        if record["kind"] == "key.rotate" and data.get("use") == "log":
            try:
                key = Vkey(data["next"])
                if key.name != self.manifest["origin"]:
                    raise ValueError("of another log")
            except (ValueError, KeyError) as error:
                bad("key epoch", "log/seg", f"record {record['seq']}: {error!s:.60}")
            self.rotations.append((record["seq"] + 1, key))
        if record["kind"] == "spill.purge" and record["phase"] == "intent":
            self.purged.add(data.get("payload"))
        if record["kind"] == "boot" and record["seq"] == 0 and "previous" in data:
            self.previous = Previous(data["previous"])
            who = f"{data.get('person_1', '?')} and {data.get('person_2', '?')}"
            self.notes.append(f"log before: begun by {who} in place of {data['previous']}")
        self.cited |= {data[k] for k in ("evidence", "screen", "settings") if k in data}
        self.cited |= {record["decision"]["id"]} if "decision" in record else set()
        for side in ("in", "out"):
            if "sealed" in record.get(side, ()):
                self.sealed[record[side]["sealed"]] = record["seq"]

    def _pair(self, record, seq, place):
        phase, req, kind = record["phase"], record.get("req"), record["kind"]
        if phase == "event":
            return
        known = self.open.get(req)
        if phase == "intent" and known is not None:
            bad("pairing", place, f"record {seq}: a second intent of {req}")
        if phase == "intent":
            self.open[req] = kind
        elif (known is None and not self.manifest["first"]) or known not in (None, kind):
            bad("pairing", place, f"record {seq}: {kind} {phase} without its intent")
        self._chunk(record, seq, place)
        if phase == "outcome":
            self.open.pop(req, None)

    def _chunk(self, record, seq, place):
        """Chunks are numbered and grow; the outcome commits to what the last of them did."""
        req, out = record["req"], record.get("out", {})
        before, judged = self.parts.get(req), req in self.open or not self.manifest["first"]
        said = (out.get("bytes"), out.get("commit"))
        if record["phase"] == "chunk":
            expected, least = (before[0] + 1, before[1]) if before else (0, 0)
            if (judged or before) and (record.get("part") != expected or not said[0] > least):
                bad("chunks", place, f"record {seq}: chunk {expected} was due")
            self.parts[req] = (record["part"], *said)
        elif record["phase"] == "outcome":
            self.parts.pop(req, None)
            if before and out and said != before[1:]:
                bad("chunks", place, f"record {seq}: another output than that of its chunks")

    def _grow(self, leaf):
        seq = self.tree.size
        self.tree.add(leaf)
        self.prev, size = leaf.hex(), self.tree.size
        if seq in self.wanted:
            self.leaves[seq] = leaf
        if size in self.wanted or size == self.manifest["size"]:
            self.roots[size] = self.tree.root()
        while self.head is not None and self.head.size <= size:
            head = self.head
            if (head.origin, head.signatures[0][0], head.size, head.root) != (
                self.manifest["origin"], self.manifest["origin"], size, self.tree.root(),
            ):  # fmt: skip
                bad("head journal", "log/checkpoints.jsonl", f"another root at size {head.size}")
            signer = head.signatures[0][1]
            closes = bool(self.rotations) and self.rotations[-1][0] == size
            self.heads.setdefault((len(self.rotations) - closes, signer), size)
            if closes:
                self.closing[size] = head
            self.last_head, self.head = head, next(self.journal, None)

    def _bundle(self):
        index = (self.tree.size - 1) // WIDTH
        name = f"entries/{tile_name(index, len(self.bundle))}"
        self.bundles.add(name)
        content = b"".join(self.bundle)
        try:
            found = read(os.path.join(self.log, "tile", name), len(content))
        except FileNotFoundError:
            bad("entry bundle", f"log/tile/{name}", "nothing")
        if found != content:
            bad("entry bundle", f"log/tile/{name}", "other lines")
        self.bundle.clear()

    def _finish(self):
        if self.bundle:
            self._bundle()
        try:
            self.tree.finish()
        except FileNotFoundError as error:
            bad("tile", str(error.filename), "nothing")
        base = os.path.join(self.log, "tile")
        for place, _, names in os.walk(base):
            for name in names:
                relative = os.path.relpath(os.path.join(place, name), base)
                if relative not in self.tree.seen | self.bundles:
                    bad("tile", f"log/tile/{relative}", "of records that are not there")
        if self.head is not None:
            bad("head journal", "log/checkpoints.jsonl", f"a head of size {self.head.size}")
        if self.rows is not None and self.rows.read(1):
            bad("rows", self.manifest["rows_file"], "more rows than records")
        for kind, digests in (("objects", self.cited), ("sealed", self.sealed)):
            for digest in sorted(digests):
                name = str(digest)[7:]
                path = os.path.join(self.log, kind, name[:2], name)
                try:
                    found = hashlib.sha256(read(path, 1 << 30)).hexdigest()
                except FileNotFoundError:
                    gone = kind == "sealed" and (
                        digest in self.purged or not self.manifest["payloads"]
                    )
                    if gone:
                        continue
                    found = "nothing"
                if found != name:
                    bad(kind, f"log/{kind}/{name[:2]}/{name}", found)


# -- anchors and memory ----------------------------------------------------------------------


class Previous:
    """What a log says of the one before: `origin size root`, or an origin without a head."""

    def __init__(self, text):
        self.origin, size, root = [*text.split(" "), "0", ""][:3] if text else ("", "", "")
        if text not in (self.origin, f"{self.origin} {size} {root}") or not size.isdecimal():
            bad("log before", "record 0", f"{text!r:.80}")
        self.size, self.root = int(size), unbase64(root, 32) if root else None


class Anchor:
    """A head from outside: a receipt, a signed note, or a line `origin size root`."""

    def __init__(self, content, name):
        self.name, self.note, self.leaf, self.index, self.proof = name, None, None, None, ()
        short = re.fullmatch(
            rb"([!-*,-~]{1,200}) (0|[1-9][0-9]{0,15}) ([A-Za-z0-9+/]{43}=)\s*", content
        )
        if short:
            self.origin, self.size = short[1].decode(), int(short[2])
            self.root = unbase64(short[3].decode(), 32)
            return
        if content.startswith(b"c2sp.org/tlog-proof@v1\n"):
            head, _, content = content.partition(b"\n\n")
            lines = head.decode("ascii").split("\n")
            if not lines[1].startswith("extra ") or not lines[2].startswith("index "):
                raise ValueError("a receipt without leaf hash or index")
            self.leaf, self.index = unbase64(lines[1][6:], 32), int(lines[2][6:])
            self.proof = [unbase64(line, 32) for line in lines[3:]]
        self.note = Note(content)
        self.origin, self.size, self.root = self.note.origin, self.note.size, self.note.root

    def agrees(self, lines, epochs):
        """Whether it was compared and holds; Tampered, or Unknown where it says nothing."""
        place, before = f"anchor {self.name}", lines.previous
        if before is not None and self.origin == before.origin != epochs.keys[0].name:
            self._earlier(before, lines, place)
            return False
        if self.origin != epochs.keys[0].name:
            raise Unknown(f"{place}: of another log")
        if self.note is not None:
            try:
                self.note.signers(epochs.keys)
            except ValueError as error:
                raise Unknown(f"{place}: {error}") from None
            epochs.require(self.note, place)
        if self.index is not None and not included(
            self.leaf, self.index, self.size, self.proof, self.root
        ):
            raise Unknown(f"{place}: its inclusion proof does not hold")
        if self.size > lines.tree.size:
            bad("rollback", place, f"{lines.tree.size} records, {self.size} were there before")
        if lines.roots.get(self.size) != self.root:
            bad("root", place, f"another root at size {self.size}")
        if self.index is not None and lines.leaves.get(self.index) != self.leaf:
            bad("receipt", place, f"record {self.index} is another one")
        return self.size > 0

    def _earlier(self, before, lines, place):
        """Hold a head of the log before against what this one says of it."""
        if self.size > before.size:
            raise Unknown(
                f"lost records: {place} covers {self.size} records of the log before, which is said"
                f" to end at {before.size}"
            )
        if self.size == before.size and self.root != before.root:
            bad("root", place, f"another root of the log before at size {self.size}")
        lines.notes.append(f"log before: {place} is judged with that log")


def read_anchors(paths, unknown):
    found = []
    for path in paths:
        files = (
            sorted(os.path.join(path, n) for n in os.listdir(path))
            if os.path.isdir(path)
            else [path]
        )
        for each in files:
            try:
                found.append(Anchor(read(each, MAX_NOTE + 8_192), os.path.basename(each)))
            except (ValueError, IndexError, Tampered) as error:
                unknown.append(f"anchor {os.path.basename(each)}: {error!s:.80}")
    return found


class Memory:
    """What this reader took last of each log: `<id>.head` is an anchor, `<id>.number` a number."""

    def __init__(self, folder, origin):
        self.base = os.path.join(folder, hashlib.sha256(origin.encode()).hexdigest()[:16])
        os.makedirs(folder, mode=0o700, exist_ok=True)

    def head(self):
        path = f"{self.base}.head"
        return Anchor(read(path, 1_024), "memory") if os.path.exists(path) else None

    def number(self):
        path = f"{self.base}.number"
        return int(read(path, 32)) if os.path.exists(path) else 0

    def store(self, manifest):
        """Head first: a crash between the two lets the same export in again, and no older one."""
        for name, text in (
            ("head", f"{manifest['origin']} {manifest['size']} {manifest['root']}\n"),
            ("number", f"{manifest['number']}\n"),
        ):
            with open(f"{self.base}.{name}.new", "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{self.base}.{name}.new", f"{self.base}.{name}")


# -- the verdict -----------------------------------------------------------------------------


def check_since(folder, manifest, head):
    if manifest["since"] is None:
        return
    since, place = manifest["since"], "since.tlog-witness"
    try:
        first, _, note = read(os.path.join(folder, place), 2 * MAX_NOTE).partition(b"\n\n")
        old, *proof = first.decode("ascii").split("\n")
        request = Note(note)
        good = (
            old == f"old {since['size']}"
            and (request.size, request.root) == (head.size, head.root)
            and consistent(
                since["size"], head.size, [unbase64(p, 32) for p in proof],
                unbase64(since["root"], 32), head.root,
            )
        )  # fmt: skip
    except (OSError, ValueError) as error:
        bad("consistency", place, f"{error!s:.80}")
    if not good:
        bad("consistency", place, "the earlier tree is no beginning of this one")


def check_heads(lines, epochs, head):
    epochs.require(head, "log/checkpoint")
    if lines.last_head is None or lines.last_head.size != head.size:
        bad("head journal", "log/checkpoints.jsonl", "does not end with the checkpoint")
    epochs.require(lines.last_head, "log/checkpoints.jsonl")
    for (_, signer), size in lines.heads.items():
        holder = epochs.holder(size)
        if holder is not None and signer != holder.id:
            bad("key epoch", "log/checkpoints.jsonl", f"size {size} signed by {signer.hex()}")
    for size, key in lines.rotations:
        if size > head.size:
            continue
        note = lines.closing.get(size)
        if note is None or key.id not in epochs.require(note, "log/checkpoints.jsonl"):
            bad("key epoch", "log/checkpoints.jsonl", f"size {size} lacks the next key's signature")


def judge(folder, ring, export_key, anchor_paths, memory_folder, result):
    unknown, notes = result["unknown"], result["notes"]
    try:
        content = read(os.path.join(folder, "manifest.json"), MAX_MANIFEST)
    except FileNotFoundError:
        bad("manifest", "manifest.json", "nothing: this is no export")
    try:
        check_signatures(folder, content, export_key, notes)
    except Unknown as error:
        unknown.append(str(error))
    manifest, files = parse_manifest(content)
    check_files(folder, files)
    result.update({name: manifest[name] for name in ("origin", "number", "first", "size")})
    try:
        head = Note(read(os.path.join(folder, "log", "checkpoint"), MAX_NOTE))
    except (ValueError, FileNotFoundError) as error:
        bad("checkpoint", "log/checkpoint", str(error))
    said = (manifest["origin"], manifest["size"], unbase64(manifest["root"], 32))
    if said != (head.origin, head.size, head.root):
        bad("manifest", "manifest.json", "speaks of another head than the checkpoint")
    check_since(folder, manifest, head)
    anchors = read_anchors(anchor_paths, unknown)
    memory = Memory(memory_folder, manifest["origin"]) if memory_folder else None
    if memory is not None:
        if memory.number() >= manifest["number"]:
            bad("replay", "manifest.json", f"export {manifest['number']} after {memory.number()}")
        anchors += [memory.head()] if memory.head() else []
    wanted = {anchor.size for anchor in anchors} | {anchor.index for anchor in anchors}
    lines = Lines(folder, manifest, wanted)
    lines.run()
    if lines.tree.size != head.size:
        bad("size", "log/seg", f"{lines.tree.size} records, {head.size} are signed")
    if lines.tree.root() != head.root:
        bad("root", "log/checkpoint", "another root than the records have")
    if ring is None:
        unknown.append("signature: no verifier key was given")
        return
    epochs = Epochs(ring, [each for each in lines.rotations if each[0] <= head.size])
    check_heads(lines, epochs, head)
    if lines.previous is not None and memory is not None:
        old = Memory(memory_folder, lines.previous.origin).head()
        anchors += [old] if old and lines.previous.origin != manifest["origin"] else []
    compare(anchors, lines, epochs, result)
    result["root"] = manifest["root"]
    notes += lines.notes
    doubts = [text for text in unknown if not text.startswith("lost records")]
    if memory is not None and not doubts and export_key is not None:
        memory.store(manifest)
        result["remembered"] = True
    if not result["anchors"]:
        unknown.append("anchor: no outside head to compare this log with")


def compare(anchors, lines, epochs, result):
    """Hold each head from outside against the log."""
    for anchor in anchors:
        try:
            if anchor.agrees(lines, epochs):
                result["anchors"] += 1
                result["anchored_size"] = max(result["anchored_size"], anchor.size)
        except Unknown as error:
            result["unknown"].append(str(error))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export")
    parser.add_argument("--vkey")
    parser.add_argument("--export-key")
    parser.add_argument("--anchors", action="append", default=[])
    parser.add_argument("--memory")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    result = {
        "verdict": "", "origin": "", "number": 0, "first": 0, "size": 0, "root": "",
        "anchored_size": 0, "anchors": 0, "remembered": False, "unknown": [], "notes": [],
        "tampered": [],
    }  # fmt: skip
    try:
        ring = export_key = None
        if args.vkey:
            ring = [Vkey(line) for line in read(args.vkey, 16_384).decode().split("\n") if line]
            if not ring or len({key.name for key in ring}) > 1:
                raise ValueError("keys of several logs, or none")
        if args.export_key:
            export_key = read(args.export_key, 32_768)
        if not os.path.isdir(args.export):
            raise ValueError(f"no folder {args.export}")
    except (OSError, ValueError, Tampered) as error:
        print(f"usage: {error}", file=sys.stderr)
        return 2
    try:
        judge(args.export, ring, export_key, args.anchors, args.memory, result)
    except Tampered as error:
        result["tampered"].append(str(error))
    except FileNotFoundError as error:  # an export is whole, or it is none
        result["tampered"].append(f"files, {error.filename}: nothing")
    except OSError as error:
        result["unknown"].append(f"read: {error.filename}: {error.strerror}")
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        result["tampered"].append(f"record: of a form that no writer makes ({error!s:.80})")
    word = "tampered" if result["tampered"] else "cannot tell" if result["unknown"] else "good"
    result.update(verdict=word, code=CODES[word], exit=EXITS[word])
    if args.json:
        print(json.dumps(result, indent=1, sort_keys=True))
    else:
        print(f"{word}: {result['origin']}, {result['size']} records, export {result['number']},"
              f" anchored to {result['anchored_size']} by {result['anchors']}")  # fmt: skip
        if result["remembered"]:
            print(f"remembered in {args.memory}")
        for level in ("tampered", "unknown", "notes"):
            for text in result[level]:
                print(f"{'cannot tell' if level == 'unknown' else level}: {text}")
    return result["exit"]


if __name__ == "__main__":
    sys.exit(main())
