"""Three verifiers on one table of attacks: `airgap audit import`, one in Python, one in Go.

They share no code. On a good export all say 0; on an attack each that covers it says the same.
"""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import audit_logs as logs
import pytest
from audit_exports import GO_PATH, TOOLS, VERIFY, Case, export_of, go_verifier

from airgap.audit import Actor
from airgap.audit.export.importing import Memory
from airgap.audit.export.manifest import file_entry
from airgap.audit.export.sign import ExportKey
from policy.errors import FaultError

__all__ = ["go_verifier"]  # a fixture

SEG, JOURNAL = "log/seg/00000000.jsonl", "log/checkpoints.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a log that changed its key once, its receipts, and its second export."""
    folder = tmp_path_factory.mktemp("base")
    receipt = logs.write_log(folder, 150)[-1]
    logs.keep(receipt, folder / "anchors/early.tlog-proof")
    with logs.open_log(folder) as log:
        log.rotate_key(Actor("ada"))
        receipts = [logs.infer(log) for _ in range(20)]
    logs.keep(receipts[3], folder / "anchors/late.tlog-proof")
    export_of(folder, folder / "out", since=100)
    return folder


@pytest.fixture
def case(base, tmp_path):
    return Case(Path(shutil.copytree(base, tmp_path / "case")))


# -- what an attacker does -------------------------------------------------------------------


def sign_again(case):
    """With the stolen export key: let the manifest list what is there, and sign it."""
    path = case.out / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = [
        file_entry(case.out, p.relative_to(case.out).as_posix()).model_dump()
        for p in sorted(case.out.rglob("*"))
        if p.is_file() and not p.name.startswith("manifest.")
    ]
    sign_manifest(case, manifest)


def sign_manifest(case, manifest):
    sign_text(case, json.dumps(manifest).encode())


def sign_text(case, content):
    (case.out / "manifest.json").write_bytes(content)
    (case.out / "manifest.sig").write_bytes(case.key.sign(content))


def edit(name, change, *, signed=True):
    """Change the bytes of one file; with the stolen export key unless `signed` is False."""

    def act(case):
        path = case.out / name
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert path.read_bytes() != before
        if signed:
            sign_again(case)

    return act


def lines(change, name=SEG):
    def on_bytes(content):
        found = content.splitlines(keepends=True)
        change(found)
        return b"".join(found)

    return edit(name, on_bytes)


def at(seq, old, new):
    def change(found):
        assert old in found[seq]
        found[seq] = found[seq].replace(old, new, 1)

    return lines(change)


def swap(found):
    found[9], found[10] = found[10], found[9]


def relinked(case):
    """Another person in one record, every later `prev` recomputed."""
    import hashlib

    path = case.out / SEG
    found = path.read_bytes().splitlines()
    found[9] = found[9].replace(b'"jdoe"', b'"evil"')
    for seq in range(10, len(found)):
        record = json.loads(found[seq])
        record["prev"] = hashlib.sha256(b"\0" + found[seq - 1]).hexdigest()
        found[seq] = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(b"".join(line + b"\n" for line in found))
    sign_again(case)


def drop(pattern, *, signed=True):
    def act(case):
        next(p for p in sorted(case.out.glob(pattern)) if p.is_file()).unlink()
        if signed:
            sign_again(case)

    return act


def add(name, *, signed=True):
    def act(case):
        path = case.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 32)
        if signed:
            sign_again(case)

    return act


def one(pattern):
    """Flip a bit in the first file that matches."""

    def act(case):
        path = next(p for p in sorted(case.out.glob(pattern)) if p.is_file())
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        sign_again(case)

    return act


def link(case):
    path = case.out / "log/checkpoint"
    path.rename(case.folder / "elsewhere")
    path.symlink_to(case.folder / "elsewhere")


def listed(path):
    def act(case):
        manifest = json.loads((case.out / "manifest.json").read_text())
        manifest["files"][0]["path"] = path
        sign_manifest(case, manifest)

    return act


def manifest(**fields):
    def act(case):
        sign_manifest(case, json.loads((case.out / "manifest.json").read_text()) | fields)

    return act


def manifest_without(name):
    def act(case):
        document = json.loads((case.out / "manifest.json").read_text())
        del document[name]
        sign_manifest(case, document)

    return act


def manifest_text(old, new):
    """Write the manifest in another form, and sign that."""

    def act(case):
        content = (case.out / "manifest.json").read_bytes()
        assert old in content
        sign_text(case, content.replace(old, new, 1))

    return act


def signatures(change):
    def act(case):
        path = case.out / "manifest.sig"
        document = json.loads(path.read_text())
        change(document["signatures"])
        path.write_text(json.dumps(document))

    return act


def flipped(scheme):
    def change(found):
        raw = bytearray(base64.b64decode(found[scheme]))
        raw[40] ^= 1
        found[scheme] = base64.b64encode(raw).decode()

    return signatures(change)


def other_export_key(case):
    other = ExportKey.create(case.folder / "other/export.pem")
    content = (case.out / "manifest.json").read_bytes()
    (case.out / "manifest.sig").write_bytes(other.sign(content))


def forked(inferences, *, number=3):
    """With both keys stolen: another history, with all its heads, signed as it must be."""

    def act(case):
        with logs.open_log(case.folder / "fork") as log:
            for _ in range(150):
                logs.infer(log, person="eve")
        shutil.copy(case.folder / "keys/audit.pem", case.folder / "fork/unused.pem")
        if inferences > 150:
            with logs.open_log(case.folder / "fork") as log:
                for _ in range(inferences - 150):
                    logs.infer(log, person="eve")
        shutil.copytree(case.folder / "keys", case.folder / "fork/keys", dirs_exist_ok=True)
        (case.folder / "keys/audit.vkey").chmod(0o600)
        (case.folder / "keys/audit.vkey").write_text(f"{logs.vkey()}\n")
        shutil.rmtree(case.out)
        export_of(case.folder / "fork", case.out, number=number)

    return act


def bad_signature(content):
    """A second signature line of the known key, which does not hold."""
    line = content.splitlines(keepends=True)[-1]
    dash, name, blob = line.decode().split(" ")
    raw = bytearray(base64.b64decode(blob))
    raw[30] ^= 1
    return content.replace(line, f"{dash} {name} {base64.b64encode(raw).decode()}\n".encode())


def first_heads(found):
    del found[1]
    found.insert(0, found.pop(3))


ATTACKS = {
    # Without any key.
    "T43 file dropped": drop("log/tile/0/*", signed=False),
    "T43 file added": add("log/extra", signed=False),
    "T43 record changed": edit(SEG, lambda c: c.replace(b"jdoe", b"evil", 1), signed=False),
    "T43 segment cut": edit(SEG, lambda c: c[:-9], signed=False),
    "T49 symlink": link,
    "no manifest": lambda case: (case.out / "manifest.json").unlink(),
    "manifest is not JSON": edit("manifest.json", lambda _: b"[]", signed=False),
    "manifest changed": edit(
        "manifest.json", lambda c: c.replace(b'"number": 2', b'"number": 9'), signed=False
    ),
    "T44 no signatures": lambda case: (case.out / "manifest.sig").unlink(),
    "T44 signatures malformed": edit("manifest.sig", lambda _: b"[]", signed=False),
    "T44 no ML-DSA signature": signatures(lambda found: found.pop("ml-dsa-87")),
    "T44 no Ed25519 signature": signatures(lambda found: found.pop("ed25519")),
    "T44 Ed25519 signature changed": flipped("ed25519"),
    "T44 ML-DSA signature changed": flipped("ml-dsa-87"),
    "T44 signed by another key": other_export_key,
    # With the stolen export key.
    "T1 record changed": at(9, b'"jdoe"', b'"evil"'),
    "T2 record deleted": lines(lambda found: found.pop(9)),
    "T3 record inserted": lines(lambda found: found.insert(9, found[20])),
    "T4 two records reordered": lines(swap),
    "T5 last record twice": lines(lambda found: found.append(found[-1])),
    "T6 changed and relinked": relinked,
    "T8 spaces": at(9, b'","', b'", "'),
    "T9 key twice": at(9, b'"v":1', b'"v":1,"v":1'),
    "T10 float": at(10, b'"seq":10', b'"seq":10.0'),
    "T10 non-ASCII": at(9, b'"jdoe"', '"jdo\u00e9"'.encode()),
    "T10 too long": at(9, b'"jdoe"', b'"' + b"j" * 17_000 + b'"'),
    "T11 tail deleted": lines(lambda found: found.pop()),
    "T13 half a record": edit(SEG, lambda c: c + b'{"actor":'),
    "T16 segment deleted": drop(SEG),
    "T16 segment renamed": lambda case: (
        (case.out / SEG).rename(case.out / "log/seg/00000001.jsonl"), sign_again(case),
    ),
    "T16 a file among the segments": add("log/seg/00000000.jsonl.gz"),
    "T22 bad signature of the head": edit("log/checkpoint", bad_signature),
    "T22 checkpoint is no note": edit("log/checkpoint", lambda _: b"x"),
    "T43 object changed": one("log/objects/*/*"),
    "T43 object dropped": drop("log/objects/*/*"),
    "T43 tile changed": one("log/tile/0/000"),
    "T43 tile dropped": drop("log/tile/0/000"),
    "T43 tile of no record": add("log/tile/0/005"),
    "T43 bundle changed": one("log/tile/entries/000"),
    "T43 bundle dropped": drop("log/tile/entries/000"),
    "T45 row changed": edit("records.jsonl", lambda c: c.replace(b"jdoe", b"evil", 1)),
    "T45 row missing": edit("records.jsonl", lambda c: c[: c.rindex(b"{", 0, -900)]),
    "T45 row added": edit("records.jsonl", lambda c: c + b"{}\n"),
    "T48 manifest of another size": manifest(size=5),
    "T48 manifest of more records than there can be": manifest(size=1 << 64),
    "T48 manifest of another log": manifest(origin="lab.example/audit/ffff"),
    "T48 manifest that begins later": manifest(first=65_536),
    "T48 manifest with more after it": lambda case: sign_text(
        case, (case.out / "manifest.json").read_bytes() + b"01"
    ),
    "T48 manifest in UTF-16": lambda case: sign_text(
        case, (case.out / "manifest.json").read_bytes().decode().encode("utf-16")
    ),
    "T48 manifest with a key twice": manifest_text(b"{", b'{"size": 5,'),
    "T48 manifest with a key in capitals": manifest_text(b'"number"', b'"NUMBER"'),
    "T48 manifest with a field less": manifest_without("since"),
    "T48 manifest with a null": manifest(payloads=None),
    "T48 manifest of rows of no form": manifest(rows="none", rows_file="records.none"),
    "T44 signatures in another base64": signatures(
        lambda found: found.__setitem__("ed25519", found["ed25519"] + "\n")
    ),
    "T49 .. in a path": listed("log/../../x"),
    "T49 absolute path": listed("/etc/passwd"),
    "journal without its last head": lines(lambda found: found.pop(), JOURNAL),
    "journal reordered": lines(first_heads, JOURNAL),
    "journal with a line of garbage": lines(lambda found: found.insert(3, b"{}\n"), JOURNAL),
    "journal with another root": lines(
        lambda found: found.__setitem__(3, found[3].replace(b"\\n4\\n", b"\\n5\\n")), JOURNAL
    ),
    "consistency proof for another size": edit(
        "since.tlog-witness", lambda c: c.replace(b"old 100", b"old 101")
    ),
    "consistency proof cut": lines(lambda found: found.pop(1), "since.tlog-witness"),
    "consistency proof dropped": drop("since.tlog-witness"),
    # With both keys stolen: what anchors show.
    "T18 rolled back": forked(150),
    "T20 larger fork": forked(400),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_t50_three_verifiers_say_tampered_of_every_attack(case, name, request):
    ATTACKS[name](case)
    assert case.ours() == 1
    assert case.python() == 1
    if shutil.which("go") and GO_PATH.is_dir():
        program = request.getfixturevalue("go_verifier")
        assert case.go(program) == 1


@pytest.mark.parametrize("rows", ["jsonl", "csv", "ocsf"])
def test_t50_three_verifiers_say_good_of_a_good_export(case, go_verifier, rows):
    shutil.rmtree(case.out)
    export_of(case.folder, case.out, rows=rows, since=100)
    assert (case.ours(), case.python(), case.go(go_verifier)) == (0, 0, 0)


def test_t50_without_an_anchor_all_three_cannot_tell_and_remember_the_first(case, go_verifier):
    def all_three(**how):
        return case.ours(**how), case.python(**how), case.go(go_verifier, **how)

    assert all_three(anchors=False) == (3, 3, 3)
    export_of(case.folder, case.folder / "next", number=3)
    shutil.rmtree(case.out)
    (case.folder / "next").rename(case.out)
    assert all_three(anchors=False) == (0, 0, 0)  # what they remember is an anchor
    assert all_three(anchors=False) == (1, 1, 1)  # T48: the same export again


GOOD_LINE = {
    "actor": {"name": "a"}, "boot": "b", "decision": {"id": "sha256:0"}, "host": "lab1",
    "inst": "i", "kind": "boot", "mono_ns": "1", "phase": "single", "prev": "0", "seq": 0,
    "ts": "t", "v": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"host": None}, {"v": 2}, {"v": True}, {"v": "1"}, {"actor": "a"}, {"data": None},
        {"tok": []}, {"decision": {}}, {"decision": {"id": None}}, {"host": "\u00e9"},
        {"host": "\ud800"}, {"host": "\u2028"}, {"host": "\b"}, {"host": "\x7f"}, {"host": "\n"},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_that_readers_would_take_in_two_ways_is_refused(change):
    def line(record):
        return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()

    odd = GOOD_LINE | {"host": 'a"b\\c'}
    for good in (GOOD_LINE, odd):
        assert VERIFY.parse_record(line(good)) == good
    with pytest.raises(ValueError, match=r"field|version|decision|escape|ASCII"):
        VERIFY.parse_record(line(GOOD_LINE | change))


def test_t48_the_memory_of_each_is_that_of_the_others(case, go_verifier):
    assert case.python(memory="shared") == 0
    assert case.ours(memory="shared") == 1
    assert case.go(go_verifier, memory="shared") == 1
    memory = Memory(case.folder / "shared", logs.ORIGIN)
    assert memory.number == 2
    (case.folder / "shared" / memory.head.with_suffix(".number").name).write_text("x")
    with pytest.raises(FaultError):
        case.ours(memory="shared")


def test_a_fork_that_only_the_memory_contradicts_is_tampered(case, go_verifier):
    assert (case.ours(), case.python(), case.go(go_verifier)) == (0, 0, 0)
    forked(400)(case)
    assert case.ours(anchors=False) == 1
    assert case.python(anchors=False) == 1
    assert case.go(go_verifier, anchors=False) == 1


def test_an_anchor_of_another_log_or_unreadable_says_nothing(case, go_verifier):
    for path in (case.folder / "anchors").iterdir():
        path.write_text("x")
    assert (case.ours(), case.python(), case.go(go_verifier)) == (3, 3, 3)


def test_usage_and_plain_words(case, go_verifier, capsys, tmp_path):
    assert (
        VERIFY.main([str(tmp_path / "none"), "--vkey", str(case.folder / "keys/audit.vkey")]) == 2
    )
    assert VERIFY.main([str(case.out), "--vkey", str(case.out / "manifest.json")]) == 2
    assert (
        subprocess.run(
            [go_verifier, tmp_path / "none"], check=False, capture_output=True
        ).returncode
        == 2
    )
    capsys.readouterr()
    assert VERIFY.main([str(case.out)]) == 3
    assert "cannot tell: signature: no verifier key was given" in capsys.readouterr().out


def test_the_tools_travel_in_a_folder_of_their_own(tmp_path, capsys):
    import hashlib

    import typer

    from airgap.cli import audit_exports

    app = typer.Typer()
    group = typer.Typer()
    audit_exports.register(group)
    app.add_typer(group, name="audit")
    app(args=["audit", "tools", "--out", str(tmp_path / "tools")], standalone_mode=False)
    capsys.readouterr()
    sums = (tmp_path / "tools/SHA256SUMS").read_text().splitlines()
    for line in sums:
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "tools" / name).read_bytes()).hexdigest() == digest
    for name in ("verify_export.py", "verify_export.go"):
        assert (tmp_path / "tools" / name).read_bytes() == (TOOLS / name).read_bytes()
