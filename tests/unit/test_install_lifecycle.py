"""After an install: a release returns, one becomes the default, one goes; kills at any point."""

import json
import os
import random
import shutil
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import kills
import lab_trees
import pytest
from lab_trees import run

from airgap.audit import load_ring, verify_log
from airgap.audit.layout import read_lines
from airgap.cli.install import bundle_document
from airgap.cli.install import list_view as releases_view
from airgap.cli.report import installed as names_of_installed
from airgap.cli.revoke import list_view
from airgap.install import Store, verify_installed
from airgap.install.standing import find_bar, require_clock, require_standing
from airgap.serve.session import find_installed
from airgap.service.presence import Presence
from bundle import archive, keys, rollback
from bundle.source import PlainFile
from bundle.transit import new_transit_key
from bundle.trust import load_trust
from policy.errors import RefusedError
from policy.terms import Digest


@pytest.fixture(scope="module")
def staging(tmp_path_factory):
    return lab_trees.make_staging(tmp_path_factory.mktemp("staging"))


@pytest.fixture(scope="module")
def releases(staging):
    """Two releases of one line, and one of another."""
    return (
        lab_trees.make_sealed(staging, staging / "one.agb", epoch=1),
        lab_trees.make_sealed(staging, staging / "two.agb", epoch=2),
        lab_trees.make_sealed(staging, staging / "other.agb", epoch=1, line="other-line"),
    )


@pytest.fixture(scope="module")
def started(staging, releases, tmp_path_factory):
    """A lab that has the first release."""
    root = lab_trees.make_lab(staging, tmp_path_factory.mktemp("lab") / "tree")
    assert run("install", releases[0], "--root", root) == 0
    return root


@pytest.fixture
def lab(started, tmp_path):
    """A copy of that lab; every test has its own."""
    root = tmp_path / "tree"
    shutil.copytree(started, root, symlinks=True)
    return root


def digest_of(path):
    source = PlainFile(path)
    try:
        return Digest.of(archive.read_head(source).manifest)
    finally:
        source.close()


def records(root):
    return [
        json.loads(line)
        for path in sorted((root / "audit" / "log" / "seg").iterdir())
        for line in read_lines(path)
    ]


def acts(root):
    return [
        (r["kind"], r["phase"], r.get("data", {}).get("result"))
        for r in records(root)
        if r["kind"].startswith("admin.") and r["kind"] != "admin.trust"
    ]


def verdict_of(root, **more):
    return verify_log(root / "audit", vkey=load_ring(root / "keys" / "audit.vkey"), **more)


def holds(root):
    """The log verifies; without an anchor from outside that is all that can be said."""
    found = verdict_of(root)
    return found.code in {"", "audit.unknown"} and not any(
        finding.level == "tampered" for finding in found.findings
    )


def approve(lab, staging, name, *, signers=("alice", "bob"), mark=None, folder=None):
    """Sign the approval of a rollback and return its file."""
    store = Store(lab / "store")
    target = store.get(name)
    mark = mark or store.floors().epochs[target.manifest.bundle_id]
    people = [keys.load_signer(staging / "keys" / f"{each}.pem") for each in signers]
    signed = rollback.sign_rollback(
        target.manifest, mark, "release 2 answers wrongly", people, now=datetime.now(UTC)
    )
    path = (folder or lab.parent) / "approval.json"
    path.write_bytes(signed.to_bytes())
    return path


# -- update -----------------------------------------------------------------------------------


def test_an_update_is_a_newer_release_of_a_line_that_is_here(lab, releases, call):
    _, two, other = releases
    status, done = call("update", two, "--root", lab)
    assert status == 0
    assert done["previous"] == str(digest_of(releases[0]))
    store = Store(lab / "store")
    assert store.current().digest == digest_of(two) == store.active("tiny-line")
    assert len(store.list()) == 2
    assert acts(lab)[-2:] == [
        ("admin.update", "intent", None),
        ("admin.update", "outcome", "complete"),
    ]
    status, refused = call("update", other, "--root", lab)
    assert (status, refused["code"]) == (1, "install.update")
    assert Store(lab / "store").current().digest == digest_of(two)
    assert acts(lab)[-1] == ("admin.update", "outcome", "refused")
    assert holds(lab)


def test_a_second_update_to_the_same_release_changes_nothing_in_the_store(lab, releases, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    before = Store(lab / "store").state()
    status, done = call("update", releases[1], "--root", lab)
    assert (status, done["copied"]) == (0, False)
    after = Store(lab / "store").state()
    assert (after.marks, after.active) == (before.marks, before.active)
    assert Store(lab / "store").unfinished() == ()


def test_an_older_release_is_no_update(lab, releases, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    status, refused = call("update", releases[0], "--root", lab)
    assert (status, refused["code"]) == (1, "trust.epoch")


# -- rollback and switch ----------------------------------------------------------------------


def test_a_rollback_needs_an_approval_of_this_release_on_this_host(lab, staging, releases, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    one = digest_of(releases[0])
    status, refused = call("switch", one, "--root", lab)
    assert (status, refused["code"]) == (1, "trust.rollback")
    assert acts(lab)[-1] == ("admin.rollback", "outcome", "refused")
    alone = approve(lab, staging, str(one), signers=("alice",))
    status, refused = call("rollback", one, "--approval", alone, "--root", lab)
    assert (status, refused["code"]) == (1, "trust.rollback")
    elsewhere = approve(lab, staging, str(one), mark=(7, Digest.of(b"another host")))
    status, refused = call("rollback", one, "--approval", elsewhere, "--root", lab)
    assert (status, refused["code"]) == (1, "trust.rollback")
    assert Store(lab / "store").current().digest == digest_of(releases[1])
    signed = approve(lab, staging, str(one))
    status, done = call("rollback", one, "--approval", signed, "--root", lab)
    assert (status, done["approvers"]) == (0, ["alice", "bob"])
    store = Store(lab / "store")
    assert store.current().digest == one == store.active("tiny-line")
    assert store.floors().epochs["tiny-line"] == (2, digest_of(releases[1]))  # it never falls
    last = [r for r in records(lab) if r["kind"] == "admin.rollback"][-1]
    assert last["data"]["result"] == "complete"
    kept = lab / "audit/log/objects"
    statement = kept / last["data"]["evidence"][7:9] / last["data"]["evidence"][7:]
    assert json.loads(statement.read_bytes())["reason"] == "release 2 answers wrongly"
    assert holds(lab)


def test_after_a_rollback_the_newer_release_is_one_switch_away(lab, staging, releases, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    one = str(digest_of(releases[0]))
    signed = approve(lab, staging, one)
    assert call("rollback", one, "--approval", signed, "--root", lab)[0] == 0
    # The name alone means the active release; its default can be taken away and given back.
    assert Store(lab / "store").get("tiny-line").digest == Digest.parse(one)
    assert call("install", releases[2], "--root", lab)[0] == 0
    assert Store(lab / "store").current().digest == digest_of(releases[2])
    assert call("switch", "tiny-line", "--root", lab)[0] == 0
    assert str(Store(lab / "store").current().digest) == one
    two = str(digest_of(releases[1]))
    assert call("switch", two, "--root", lab)[0] == 0
    assert str(Store(lab / "store").current().digest) == two


def test_an_older_release_returns_from_its_medium_by_approval(lab, staging, releases, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    one = str(digest_of(releases[0]))
    signed = approve(lab, staging, one)
    assert call("remove", one, "--root", lab)[0] == 0
    assert call("install", releases[0], "--root", lab)[1]["code"] == "trust.epoch"
    status, done = call("rollback", releases[0], "--approval", signed, "--root", lab)
    assert (status, done["digest"]) == (0, one)
    assert Store(lab / "store").floors().epochs["tiny-line"][0] == 2
    assert acts(lab)[-1] == ("admin.rollback", "outcome", "complete")


def test_a_revoked_release_never_comes_back(lab, staging, releases, tmp_path, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    one = str(digest_of(releases[0]))
    signed = approve(lab, staging, one)
    elsewhere = tmp_path / "staging"
    shutil.copytree(staging, elsewhere)
    why = ("--reason", "its weights were altered", "--key", "reva", "-o", lab.parent / "list")
    assert call("revoke", "create", "--bundle", one, *why, "--root", elsewhere)[1]["complete"]
    assert run("trust", "import-revocations", lab.parent / "list", "--root", lab) == 0
    status, refused = call("rollback", one, "--approval", signed, "--root", lab)
    assert (status, refused["code"]) == (1, "trust.revoked")
    # it lies on disk, and both views of the tree mark it
    barred = {each["digest"]: each["barred"] for each in call("list", "--root", lab)[1]["bundles"]}
    assert barred.pop(one)["code"] == "trust.revoked"
    assert set(barred.values()) == {None}
    (alarm,) = call("status", "--root", lab)[1]["alarms"]
    assert "trust.revoked" in alarm


def test_a_release_whose_time_is_over_is_marked(lab):
    bundle = Store(lab / "store").current()
    trust, end = load_trust(lab / "trust"), bundle.manifest.expires
    before = end - timedelta(seconds=1)
    assert find_bar(bundle, None, before) is None
    assert find_bar(bundle, None, end).code == "trust.expired"
    barred = find_bar(bundle, trust, end)
    assert barred.code == "trust.expired"
    item = bundle_document(bundle, current=True) | {"active": True}
    item["barred"] = {"code": barred.code, "error": barred.message}
    assert "\n  EXPIRED: " in releases_view([item])


def test_an_altered_release_is_no_target(lab, staging, releases, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    one = Store(lab / "store").get(str(digest_of(releases[0])))
    signed = approve(lab, staging, str(one.digest))
    target = next(one.folder.rglob("model.onnx_data"))
    target.chmod(0o644)
    target.write_bytes(b"x" * target.stat().st_size)
    status, refused = call("rollback", one.digest, "--approval", signed, "--root", lab)
    assert (status, refused["code"]) == (1, "start.digest")
    assert Store(lab / "store").current().digest == digest_of(releases[1])


def test_a_damaged_release_is_told_and_hinders_no_other(lab, releases, call, capsys):
    assert call("update", releases[1], "--root", lab)[0] == 0
    assert call("install", releases[2], "--root", lab)[0] == 0
    one, two, other = (digest_of(each) for each in releases)
    store = Store(lab / "store")
    place = store.installed / two.hex / "META" / "manifest.json"
    place.chmod(0o644)
    place.write_bytes(b"{}")

    for name, digest in ((one.hex, one), ("tiny-line-1.0", one), ("other-line", other)):
        assert find_installed(lab, name).digest == digest
        status, told = call("inspect", name, "--root", lab)
        assert (status, told["bundle"]) == (0, str(digest)), told
        (alarm,) = (each for each in told["alarms"] if each.startswith("start.digest"))
        assert two.hex in alarm
    # Itself it is refused, and so is the name that means it: none answers in its place.
    for name in (str(two), two.hex, "tiny-line-2.0", "tiny-line"):
        with pytest.raises(RefusedError) as caught:
            store.get(name)
        assert caught.value.code == "start.digest", name
    told = call("inspect", "tiny-line", "--root", lab)[1]
    assert (told["code"], "install the bundle again" in told["hint"]) == ("start.digest", True)
    assert set(names_of_installed(lab)) == {str(one), str(other)}
    elsewhere = shutil.copytree(store.installed / one.hex, lab / "aside" / one.hex)
    with pytest.raises(RefusedError):
        store.get(str(elsewhere))
    listed = call("list", "--root", lab)[1]
    assert {each["digest"] for each in listed["bundles"]} == {str(one), str(other)}
    assert [(each["digest"], each["code"]) for each in listed["damaged"]] == [
        (str(two), "start.digest")
    ]
    status, told = call("status", "--root", lab)
    assert (told["installed"], told["current"]["digest"]) == (2, str(other))
    assert any(two.hex in each for each in told["alarms"])
    assert run("list", "--root", lab) == 0
    assert "DAMAGED: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "trust.rollback"),
        (b"{}", "trust.rollback"),
        (b'{"payload":"e30=","payloadType":"x","signatures":[]}', "seal.type"),
        (b"\xff" * 64, "trust.rollback"),
        (b"x" * 200_000, "trust.rollback"),
    ],
)
def test_what_is_no_approval(content, code, lab, releases, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    path = lab.parent / "approval"
    path.write_bytes(content)
    one = digest_of(releases[0])
    status, refused = call("rollback", one, "--approval", path, "--root", lab)
    assert (status, refused["code"]) == (1, code)


# -- a whole line, below an epoch -----------------------------------------------------------------


def test_releases_below_a_revoked_epoch_neither_return_nor_install_nor_start(
    lab, staging, releases, tmp_path, call
):
    """`revoke create --below`, from the site to a host: rollback, install and start are refused."""
    one = str(digest_of(releases[0]))
    site, list_ = tmp_path / "site", tmp_path / "list"
    shutil.copytree(staging, site)
    why = ("--reason", "a hole in the first release", "--key", "reva", "--root", site)
    for wrong in ("tiny-line", "tiny-line:", ":2", "tiny-line:two", "tiny-line:-1"):
        status, told = call("revoke", "create", f"--below={wrong}", *why, "-o", list_)
        assert (status, told["code"]) == (2, "usage.argument")
    for wrong in ("tiny-line:0", "Tiny Line:2", f"tiny-line:{2**60}"):
        status, told = call("revoke", "create", "--below", wrong, *why, "-o", list_)
        assert (status, told["code"]) == (1, "trust.revocation"), wrong
    assert not list_.exists()
    # the release that answers is the one below: it does not start any more
    old = tmp_path / "old"
    shutil.copytree(lab, old, symlinks=True)
    assert call("update", releases[1], "--root", lab)[0] == 0
    signed = approve(lab, staging, one)
    trusted = load_trust(old / "trust")
    assert require_standing(Store(old / "store").current(), trusted, now=datetime.now(UTC)) == ()

    below = ("--below", "tiny-line:2", "--below", "tiny-line:1")
    assert call("revoke", "create", *below, *why, "-o", list_)[1]["complete"]
    assert "tiny-line below 2  a hole" in list_text(site)
    for root in (lab, old):
        assert run("trust", "import-revocations", list_, "--root", root) == 0
    status, told = call("rollback", one, "--approval", signed, "--root", lab)
    assert (status, told["code"]) == (1, "trust.revoked")
    status, told = call("switch", one, "--root", lab)
    assert status == 1
    assert Store(lab / "store").current().digest == digest_of(releases[1])
    trusted = load_trust(lab / "trust")
    assert require_standing(Store(lab / "store").current(), trusted, now=datetime.now(UTC)) == ()
    with pytest.raises(RefusedError) as caught:
        require_standing(
            Store(old / "store").current(), load_trust(old / "trust"), now=datetime.now(UTC)
        )
    assert caught.value.code == "trust.revoked"
    status, told = call("run", "retrosynthesis", "--smiles", "CCO", "--root", old)
    assert (status, told["code"]) == (1, "trust.revoked")
    # a host that never saw the line takes the newer one alone, and other lines as before
    new = lab_trees.make_lab(staging, tmp_path / "new")
    assert run("trust", "import-revocations", list_, "--root", new) == 0
    status, told = call("install", releases[0], "--root", new)
    assert (status, told["code"]) == (1, "trust.revoked")
    assert Store(new / "store").list() == ()
    assert call("install", releases[1], "--root", new)[0] == 0
    assert call("install", releases[2], "--root", new)[0] == 0
    # the list never lets them return
    why = ("--reason", "x", "--key", "reva", "--root", site, "-o", tmp_path / "second")
    assert call("revoke", "create", "--below", "tiny-line:1", *why)[1]["complete"]
    assert "tiny-line below 2  a hole" in list_text(site)
    assert holds(lab)


def list_text(root):
    listed = load_trust(root / "trust").revocations
    return list_view(listed.document)


# -- what the host has seen is taken away -------------------------------------------------------


def test_an_older_folder_of_trust_is_missed_at_each_start_and_act(
    lab, staging, releases, tmp_path, call
):
    """The list that revokes is taken out, and root cannot make the host forget it by that alone."""
    site, list_ = tmp_path / "site", tmp_path / "list"
    shutil.copytree(staging, site)
    assert call("update", releases[1], "--root", lab)[0] == 0
    shutil.copytree(lab / "trust", tmp_path / "older")
    two = str(digest_of(releases[1]))
    why = ("--reason", "its weights were altered", "--key", "reva", "-o", list_, "--root", site)
    assert call("revoke", "create", "--bundle", two, *why)[1]["complete"]
    assert run("trust", "import-revocations", list_, "--root", lab) == 0
    started = ("run", "retrosynthesis", "--smiles", "CCO", "--root", lab)
    assert call(*started)[1]["code"] == "trust.revoked"
    shutil.rmtree(lab / "trust")
    shutil.copytree(tmp_path / "older", lab / "trust")
    for words in (
        started,
        ("switch", two, "--root", lab),
        ("install", releases[1], "--root", lab),
        ("verify", releases[1], "--root", lab),
    ):
        status, told = call(*words)
        assert (status, told["code"]) == (1, "trust.revocation"), words
    # the state goes too: what was seen is lost, and a store with releases does not go on
    (lab / "store" / "state.json").unlink()
    for words in (started, ("switch", two, "--root", lab), ("install", releases[0], "--root", lab)):
        status, told = call(*words)
        assert (status, told["code"]) == (1, "store.state"), words
    assert Store(lab / "store").current().digest == digest_of(releases[1])
    # the log still tells: a list was taken over, by whom and when
    taken = [r for r in records(lab) if r["kind"] == "admin.trust" and r["phase"] == "outcome"]
    assert taken
    assert holds(lab)


# -- remove -----------------------------------------------------------------------------------


def test_what_answers_by_default_is_not_removed_by_the_way(lab, releases, call):
    status, refused = call("remove", "tiny-line", "--root", lab)
    assert (status, refused["code"]) == (1, "store.active")
    assert Store(lab / "store").current() is not None
    mine, other = (
        lab / "engines" / name / "fp32" for name in (digest_of(releases[0]).hex, "0" * 64)
    )
    for folder in (mine, other):
        (folder / "files").mkdir(parents=True)
    status, done = call("remove", "tiny-line", "--default", "--root", lab)
    assert status == 0
    assert (mine.parent.exists(), other.exists()) == (False, True)  # built for this release alone
    assert [each["version"] for each in done["bundles"]] == ["1.0"]
    store = Store(lab / "store")
    assert (store.current(), store.list(), store.unfinished()) == (None, (), ())
    assert store.floors().epochs["tiny-line"][0] == 1  # what was here is not forgotten
    assert acts(lab)[-1] == ("admin.remove", "outcome", "complete")
    assert call("install", releases[0], "--root", lab)[0] == 0
    assert holds(lab)


def test_one_wrong_name_removes_nothing(lab, releases, call):
    assert call("update", releases[1], "--root", lab)[0] == 0
    status, refused = call("remove", digest_of(releases[0]), "nothing", "--root", lab)
    assert (status, refused["code"]) == (1, "store.missing")
    assert len(Store(lab / "store").list()) == 2


def test_remove_all_keeps_what_an_auditor_needs(lab, staging, call):
    shutil.copyfile(staging / "keys" / "alice.pem", lab / "keys" / "alice.pem")
    (lab / "enclave").mkdir(exist_ok=True)
    (lab / "engines").mkdir()
    (lab / "mine.txt").write_text("not ours")
    assert call("remove", "--all", "--root", lab)[1]["code"] == "usage.argument"
    assert call("remove", "--all", "--keep-audit", "tiny-line", "--root", lab)[0] == 2
    assert Store(lab / "store").current() is not None
    size = verdict_of(lab).size
    new_transit_key(lab.parent, "h")
    daemon = Presence(lab)
    daemon.tell({"serves": "tiny-line"})
    status, refused = call("remove", "--all", "--keep-audit", "--root", lab)
    assert (status, refused["code"]) == (1, "service.locked")
    assert str(os.getpid()) in refused["error"]
    assert refused["hint"].startswith("stop it first")
    words = ("-o", lab.parent / "b", "--to", lab.parent / "h.transit.pub.json")
    assert call("backup", *words, "--root", lab)[0] == 0  # which takes nothing away
    daemon.close()
    assert Store(lab / "store").current() is not None
    status, done = call("remove", "--all", "--keep-audit", "--root", lab)
    assert status == 0
    names = {path.name for path in lab.iterdir()}
    assert names == {Path(path).name for path in done["kept"]}
    assert {"audit", "keys", "trust", "site.toml", "mine.txt"} <= names
    assert not names & {"store", "enclave", "holds", "engines"}
    assert not (lab / "keys" / "alice.pem").exists()
    assert verdict_of(lab).size > size
    assert holds(lab)
    assert acts(lab)[-1] == ("admin.remove", "outcome", "complete")


# -- kills ------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["install", "update", "rollback", "remove"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new(act, lab, staging, releases, tmp_path):
    """Ten random points of each act: the store answers with one of the two, the log verifies."""
    one, two = digest_of(releases[0]), digest_of(releases[1])
    words, old, new = {
        "install": (("install", releases[2]), one, digest_of(releases[2])),
        "update": (("update", releases[1]), one, two),
        "rollback": (("rollback", str(one), "--approval", tmp_path / "approval.json"), two, one),
        "remove": (("remove", str(one)), two, two),
    }[act]
    if act in {"rollback", "remove"}:
        assert run("update", releases[1], "--root", lab) == 0
        approve(lab, staging, str(one), folder=tmp_path)
    trial = tmp_path / "trial"

    def fresh():
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(lab, trial, symlinks=True)

    fresh()
    total = kills.operations((*words, "--root", trial), tmp_path)
    assert total > 50
    assert Store(trial / "store").current().digest == new
    chosen = random.Random(f"kills of {act}").sample(range(1, total + 1), 10)
    ends = set()
    for point in sorted(chosen):
        fresh()
        ended = kills.run_killed((*words, "--root", trial), point, tmp_path)
        assert ended in {-signal.SIGKILL, 0}, (point, ended)
        store = Store(trial / "store")
        found = store.current()
        assert found.digest in {old, new}, point
        verify_installed(found.folder)
        ends.add(found.digest)
        assert holds(trial), point
        again = run(*words, "--root", trial)
        if act == "remove" and again != 0:  # it had gone already
            assert one not in {item.digest for item in store.list()}
        else:
            assert again == 0, point
        assert Store(trial / "store").current().digest == new
        assert holds(trial), point
    assert ends <= {old, new}


def test_what_a_killed_removal_left_is_taken_by_the_next(lab, releases):
    assert run("update", releases[1], "--root", lab) == 0
    store = Store(lab / "store")
    left = store.quarantine / f"{digest_of(releases[0]).hex}.removed"
    source = store.installed / digest_of(releases[0]).hex
    source.chmod(0o700)
    source.rename(left)  # where a kill after the rename leaves it
    assert run("install", releases[2], "--root", lab) == 0
    assert run("remove", str(digest_of(releases[1])), "--root", lab) == 0
    assert not left.exists()


def test_a_clock_before_what_the_host_has_seen_starts_nothing(tmp_path):
    store, seen = Store(tmp_path / "store"), datetime(2026, 11, 24, 12, tzinfo=UTC)
    require_clock(store, seen)
    with store.locked():
        store.note_time(seen)
    require_clock(store, seen)
    with pytest.raises(RefusedError) as refused:
        require_clock(store, seen - timedelta(seconds=1))
    assert refused.value.code == "trust.clock"
