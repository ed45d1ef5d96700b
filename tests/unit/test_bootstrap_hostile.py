"""`install.sh` runs wheels of the bundle, so it must refuse all that the program itself refuses.

Each attack is a release that the complete verification refuses; before anything of it runs, the
installer does too. `--accelerator cuda` ends the good way cheaply: seal and times have held then.
"""

import io
import os
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import bundles
import pytest
from test_bootstrap_main import FACTS, house_for, install, refused
from test_bootstrap_main import sealed as wheels

from airgap.install import Store
from bundle import approval, envelope, rollback, trust
from bundle.archive import read_head
from bundle.medium import overwrite
from bundle.revocation import LIST_TYPE, EpochFloor, RevocationDocument
from bundle.root import next_version
from bundle.source import PlainFile
from bundle.statement import approved_by, parse_statement
from bundle.tar import BLOCK
from bundle.verify import open_bundle
from policy.errors import AirgapError
from policy.terms import Digest

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is missing")
ROOTS = bundles.make_trust()
STRICT = bundles.make_trust(required_roles=("isso",))
PAST_THE_SEAL = ("install.target", "--accelerator", "cuda")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return house_for(tmp_path_factory.mktemp("house"))


def make(path: Path, house, *, roots=ROOTS, **more):
    members = [*bundles.make_members(), *house.members]
    bundles.make_bundle(path, roots=roots, members=members, runtimes=house.runtimes, **more)
    return path


def seal_of(path):
    source = PlainFile(path)
    try:
        return envelope.parse_seal(read_head(source).envelope)
    finally:
        source.close()


def put(path, sealed):
    overwrite(path, BLOCK, sealed.to_padded())


def say(path, person, *, role, signers=None, **changes):
    """Return the statement of a person about this seal, somewhat changed."""
    sealed = seal_of(path)
    about = approved_by(parse_statement(sealed.payload), sealed.payload)
    made = approval.with_approval(
        replace(sealed, statements=()),
        replace(about, **changes),
        [bundles.signer(name) for name in signers or (person,)],
        person=person,
        roles=(role,),
        approved=bundles.NOW,
    )
    return made.statements[0]


def same_verdict(capsys, tmp_path, path, code, roots):
    """Hold the program and the installer against each other; `code` is empty where both accept."""
    (tmp_path / "a").mkdir(exist_ok=True)
    if not code:
        open_bundle(path, roots, now=bundles.NOW).close()
        code, *words = PAST_THE_SEAL
    else:
        with pytest.raises(AirgapError) as caught:
            open_bundle(path, roots, now=bundles.NOW)
        assert caught.value.code == code
        words = []
    print_ = str(roots.fingerprint)
    return refused(capsys, tmp_path / "a", code, *words, bundle=path, fingerprint=print_)


BOBS = {
    "of the seal": (lambda p: [say(p, "bob", role="isso")], ""),
    "in another role": (lambda p: [say(p, "bob", role="approver")], "seal.role"),
    "taken away": (lambda _: [], "seal.threshold"),
    "signed by another": (
        lambda p: [say(p, "bob", role="isso", signers=("alice",))],
        "seal.threshold",
    ),
    "signed by a stranger": (
        lambda p: [say(p, "bob", role="isso", signers=("mallory",))],
        "seal.threshold",
    ),
    "of another draft": (lambda p: [say(p, "bob", role="isso", payload=b"{}")], "seal.threshold"),
    "of another bundle": (
        lambda p: [say(p, "bob", role="isso", manifest_sha256="0" * 64)],
        "seal.threshold",
    ),
    "of another report": (
        lambda p: [say(p, "bob", role="isso", report_digest="sha256:" + "0" * 64)],
        "seal.threshold",
    ),
    "with another end": (
        lambda p: [say(p, "bob", role="isso", expires=bundles.NOW)],
        "seal.threshold",
    ),
    "with an office": (lambda p: [say(p, "bob", role="builder")], "seal.threshold"),
    "with a role not held": (
        lambda p: [say(p, "alice", role="isso"), say(p, "bob", role="approver")],
        "seal.threshold",
    ),
    "noise beside a good one": (lambda p: [b"{", say(p, "bob", role="isso")], ""),
}


@pytest.mark.parametrize(("statements", "code"), BOBS.values(), ids=BOBS.keys())
def test_who_approved_as_what_counts_before_anything_runs(
    tmp_path, house, capsys, statements, code
):
    path = make(tmp_path / "x.agb", house, roots=STRICT, attested=True)
    found = statements(path)
    if not any(b'"person":"alice"' in envelope.parse_envelope(f).payload for f in found if f[1:]):
        found.append(say(path, "alice", role="approver"))
    put(path, seal_of(path).with_statements(found))
    same_verdict(capsys, tmp_path, path, code, STRICT)


def test_one_person_with_two_keys_is_one_in_statements_too(tmp_path, house, capsys):
    path = make(tmp_path / "x.agb", house, signers=("builder", "alice", "alice2"), attested=True)
    made = [say(path, "alice", role="approver"), say(path, "alice", role="approver",
                                                     signers=("alice2",))]  # fmt: skip
    put(path, seal_of(path).with_statements(made))
    (tmp_path / "a").mkdir()
    with pytest.raises(AirgapError):
        open_bundle(path, ROOTS, now=bundles.NOW)
    refused(capsys, tmp_path / "a", "seal.threshold", bundle=path)


@pytest.mark.parametrize("attested", [True, False])
def test_the_word_attested_cannot_be_taken_out_or_put_in(tmp_path, house, capsys, attested):
    path = make(tmp_path / "x.agb", house, attested=attested)
    sealed = seal_of(path)
    word = b'"approvals":"attested",'
    payload = (
        sealed.payload.replace(word, b"")
        if attested
        else sealed.payload.replace(b'"predicate":{', b'"predicate":{' + word)
    )
    assert payload != sealed.payload
    put(path, replace(sealed, payload=payload))
    same_verdict(capsys, tmp_path, path, "seal.threshold", ROOTS)


# -- a host that was set up before ----------------------------------------------------------------


def hold(tmp_path, roots):
    trust.save_trust(roots, tmp_path / "a" / "tree" / "trust")


def test_a_medium_from_before_cannot_bring_back_who_was_retired(tmp_path, house, capsys):
    path = make(tmp_path / "x.agb", house)
    hold(tmp_path, ROOTS)
    same_verdict(capsys, tmp_path, path, "", ROOTS)
    document = ROOTS.document
    bob = document.people["bob"].model_copy(update={"valid_to": bundles.CREATED})
    later = trust.append_root(
        ROOTS,
        next_version(document, now=bundles.CREATED, people={**document.people, "bob": bob}),
        [bundles.signer("root")],
    )
    hold(tmp_path, later)
    with pytest.raises(AirgapError) as caught:
        open_bundle(path, later, now=bundles.NOW)
    assert caught.value.code == "seal.threshold"
    for typed in (str(ROOTS.fingerprint), "", str(later.fingerprint)):
        refused(capsys, tmp_path / "a", "seal.threshold", bundle=path, fingerprint=typed)


def test_another_root_of_the_same_version_is_refused(tmp_path, house, capsys):
    path = make(tmp_path / "x.agb", house)
    hold(tmp_path, STRICT)
    refused(capsys, tmp_path / "a", "trust.chain", bundle=path, fingerprint="")
    refused(capsys, tmp_path / "a", "trust.chain", bundle=path)


def test_a_damaged_root_of_the_host_is_no_root(tmp_path, house, capsys):
    path = make(tmp_path / "x.agb", house)
    hold(tmp_path, ROOTS)
    place = max((tmp_path / "a" / "tree" / "trust").glob("*.root.json"))
    place.write_bytes(b"{")
    refused(capsys, tmp_path / "a", "seal.malformed", bundle=path)


REVOKED = {
    "a person": ({"people": {"bob": "left"}}, "seal.threshold"),
    "a key": (
        {"keys": {bundles.signer("alice").public_key.keyid: "lost"}},
        "seal.threshold",
    ),
    "older epochs of the line": (
        {"epochs": {"tiny-line": EpochFloor(below=2, reason="a hole")}},
        "trust.revoked",
    ),
    "the epoch itself stays": (
        {"epochs": {"tiny-line": EpochFloor(below=1, reason="a hole")}},
        "",
    ),
    "another line": ({"epochs": {"line": EpochFloor(below=9, reason="a hole")}}, ""),
}


@pytest.mark.parametrize(("entries", "code"), REVOKED.values(), ids=REVOKED.keys())
def test_what_the_list_of_the_host_revokes_never_runs(tmp_path, house, capsys, entries, code):
    roots = bundles.make_trust()
    path = make(tmp_path / "x.agb", house)
    document = RevocationDocument(
        version=1,
        issued=bundles.CREATED,
        next_update=bundles.NOW + timedelta(days=30),
        **entries,
    )
    signed = envelope.sign_statement(document.to_bytes(), LIST_TYPE, bundles.signer("root"))
    hold(tmp_path, roots)
    (tmp_path / "a" / "tree" / "trust" / "1.revocations.json").write_bytes(signed.to_bytes())
    words = PAST_THE_SEAL if not code else (code,)
    refused(capsys, tmp_path / "a", *words, bundle=path)


def test_a_wheel_that_the_host_revokes_never_runs(tmp_path, house, capsys):
    path = make(tmp_path / "x.agb", house)
    document = RevocationDocument(
        version=1,
        issued=bundles.CREATED,
        next_update=bundles.NOW + timedelta(days=30),
        wheels={house.wheels[0].sha256: "telemetry"},
    )
    signed = envelope.sign_statement(document.to_bytes(), LIST_TYPE, bundles.signer("root"))
    hold(tmp_path, ROOTS)
    (tmp_path / "a" / "tree" / "trust" / "1.revocations.json").write_bytes(signed.to_bytes())
    refused(capsys, tmp_path / "a", "trust.revoked", bundle=path)


# -- places ---------------------------------------------------------------------------------------


def as_link(place, elsewhere):
    place.symlink_to(elsewhere)


def open_to_all(place, _):
    place.mkdir()
    place.chmod(0o777)


def of_another(place, _):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    place.mkdir()
    os.chown(place, 65534, 65534)


@pytest.mark.parametrize("inner", ["", "runtimes"])
@pytest.mark.parametrize("spoil", [as_link, open_to_all, of_another])
def test_a_prefix_in_which_others_could_change_the_program(tmp_path, house, capsys, spoil, inner):
    path = make(tmp_path / "x.agb", house)
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "a" / "program"
    place.mkdir(parents=True, mode=0o755)
    refused(capsys, tmp_path / "a", *PAST_THE_SEAL, bundle=path)
    if inner:
        place /= inner
    else:
        place.rmdir()
    spoil(place, tmp_path / "elsewhere")
    refused(capsys, tmp_path / "a", "host.io", bundle=path)
    assert list((tmp_path / "elsewhere").iterdir()) == []


PLANTED = {
    "a module": "sitecustomize.py",
    "a path file": "zz.pth",
    "beside a package": "airgap/more.py",
    "a compiled module without a source": "airgap/__pycache__/more.cpython-311.pyc",
    "one in place of a module": "evil.pyc",
}


def test_a_file_that_no_wheel_brought_is_refused_in_the_next_run(tmp_path, house, capsys):
    path = wheels(house, tmp_path / "x.agb")
    assert install(tmp_path / "a", path) == 0
    assert install(tmp_path / "a", path) == 0
    packages = next((tmp_path / "a").glob("program/runtimes/*/lib/python3*/site-packages"))
    for name in PLANTED.values():
        (packages / name).write_bytes(b"")
        refused(capsys, tmp_path / "a", "install.digest", bundle=path)
        (packages / name).unlink()
    (packages / "airgap" / "linked").symlink_to(tmp_path)
    refused(capsys, tmp_path / "a", "install.digest", bundle=path)
    (packages / "airgap" / "linked").unlink()
    assert install(tmp_path / "a", path) == 0


@pytest.mark.parametrize("typed", ["", "\n", "sha256:12\n", "0" * 64 + "\n", "../../x\n"])
def test_a_fingerprint_that_is_typed_wrong_changes_nothing(
    tmp_path, house, capsys, monkeypatch, typed
):
    path = make(tmp_path / "x.agb", house)
    (tmp_path / "a").mkdir()
    for _ in range(3):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert install(tmp_path / "a", path, fingerprint="") == 1
        said = capsys.readouterr().err.splitlines()
        assert said[1] == "refused trust.fingerprint"
        assert said[3].startswith("next step: ")
        assert said[-1] == "nothing was changed"
        assert list((tmp_path / "a").iterdir()) == []


# -- an older bundle of wheels --------------------------------------------------------------------

FORTNIGHT = timedelta(days=14)
APPROVALS = {
    "by two people": ({}, ""),
    "by one": ({"signers": ("alice",)}, "trust.rollback"),
    "by one and the builder": ({"signers": ("alice", "builder")}, "trust.rollback"),
    "by one and a stranger": ({"signers": ("alice", "mallory")}, "trust.rollback"),
    "by one with two keys": ({"signers": ("alice", "alice2")}, "trust.rollback"),
    "for another mark": ({"mark": (3, Digest.of(b"another host"))}, "trust.rollback"),
    "for the digest of another host": ({"mark": (2, Digest.of(b"another host"))}, "trust.rollback"),
    "of yesterday": ({"now": bundles.NOW - FORTNIGHT}, "trust.rollback"),
    "of tomorrow": ({"now": bundles.NOW + timedelta(days=1)}, "trust.rollback"),
    "for another release": ({"other": True}, "trust.rollback"),
}


@pytest.fixture(scope="module")
def line(tmp_path_factory, house):
    """Two releases of wheels, and a third with the epoch of the first."""
    folder = tmp_path_factory.mktemp("line")
    for name, epoch in (("one", 1), ("two", 2), ("other", 1)):
        wheels(house, folder / f"{name}.agb", facts=replace(FACTS, epoch=epoch, version=name))
    return folder


def manifest_of(path):
    with open_bundle(path, ROOTS, now=bundles.NOW) as sealed:
        return sealed.manifest


def approve(line, place, *, signers=("alice", "bob"), mark=None, now=bundles.NOW, other=False):
    newer, older = manifest_of(line / "two.agb"), manifest_of(line / "one.agb")
    signed = rollback.sign_rollback(
        manifest_of(line / "other.agb") if other else older,
        mark or (2, newer.digest),
        "release 2 does not start",
        [bundles.signer(name) for name in signers],
        now=now,
        valid_for=timedelta(days=7),
    )
    place.write_bytes(signed.to_bytes() + b"\n")
    return signed


def seen(tmp_path, line):
    """Let the host have had the second release."""
    (tmp_path / "a").mkdir(exist_ok=True)
    store, newer = Store(tmp_path / "a" / "tree" / "store"), manifest_of(line / "two.agb")
    assert store.note_release(newer, newer.digest)
    assert not store.note_release(manifest_of(line / "one.agb"), newer.digest)
    return store.floors()


def test_an_older_bundle_of_wheels_needs_the_approval_of_as_many_as_its_seal(
    tmp_path, line, capsys
):
    here = tmp_path / "a"
    here.mkdir()
    refused(capsys, here, *PAST_THE_SEAL, bundle=line / "one.agb")
    floors = seen(tmp_path, line)
    refused(capsys, here, *PAST_THE_SEAL, bundle=line / "two.agb")
    said = refused(capsys, here, "trust.epoch", bundle=line / "one.agb")
    assert str(floors.epochs["runtime"][1]) in said
    for name, (changes, code) in APPROVALS.items():
        place = tmp_path / "approval"
        signed = approve(line, place, **changes)
        words = ("--approval", str(place))
        if code:
            with pytest.raises(AirgapError) as caught:
                open_bundle(
                    line / "one.agb", ROOTS, now=bundles.NOW, floors=floors, rollback=signed
                )
            assert caught.value.code == code, name
            refused(capsys, here, code, *words, bundle=line / "one.agb")
        else:
            open_bundle(
                line / "one.agb", ROOTS, now=bundles.NOW, floors=floors, rollback=signed
            ).close()
            refused(capsys, here, *PAST_THE_SEAL, *words, bundle=line / "one.agb")
    for content in (b"", b"{", b"{}", b"[]", b"\xff"):
        place.write_bytes(content)
        said = refused(capsys, here, *WRONG_FORM[content], *words, bundle=line / "one.agb")
    refused(capsys, here, "host.io", "--approval", str(here / "no"), bundle=line / "one.agb")


WRONG_FORM = {
    b"": ("seal.malformed",),
    b"{": ("seal.malformed",),
    b"{}": ("manifest.schema",),
    b"[]": ("seal.malformed",),
    b"\xff": ("seal.malformed",),
}


def test_two_bundles_of_one_epoch_are_never_exchanged(tmp_path, line, house, capsys):
    floors = seen(tmp_path, line)
    twin = wheels(house, tmp_path / "twin.agb", facts=replace(FACTS, epoch=2, version="twin"))
    with pytest.raises(AirgapError) as caught:
        open_bundle(twin, ROOTS, now=bundles.NOW, floors=floors)
    assert caught.value.code == "trust.epoch"
    approve(line, tmp_path / "approval")
    words = ("--approval", str(tmp_path / "approval"))
    refused(capsys, tmp_path / "a", "trust.epoch", *words, bundle=twin)


def test_no_approval_brings_back_a_revoked_epoch(tmp_path, line, capsys):
    seen(tmp_path, line)
    approve(line, tmp_path / "approval")
    words = ("--approval", str(tmp_path / "approval"))
    refused(capsys, tmp_path / "a", *PAST_THE_SEAL, *words, bundle=line / "one.agb")
    hold(tmp_path, ROOTS)
    document = RevocationDocument(
        version=1,
        issued=bundles.CREATED,
        next_update=bundles.NOW + timedelta(days=30),
        epochs={"runtime": EpochFloor(below=2, reason="a hole")},
    )
    signed = envelope.sign_statement(document.to_bytes(), LIST_TYPE, bundles.signer("root"))
    place = tmp_path / "a" / "tree" / "trust" / "1.revocations.json"
    place.write_bytes(signed.to_bytes())
    refused(capsys, tmp_path / "a", "trust.revoked", *words, bundle=line / "one.agb")
