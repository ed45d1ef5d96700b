"""The environments of the program: which are needed, how large, and how old ones go."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import bundles
import kills
import pytest
from test_bootstrap_main import house_for

from airgap.audit import load_ring, verify_log
from airgap.audit.layout import Layout, read_lines
from airgap.cli import invoke
from airgap.cli.runtimes import program_document, program_rows, wheels_rows
from airgap.demo import site_toml
from airgap.install import Store
from airgap.install.runtimes import (
    DONE,
    ID_LENGTH,
    find_prefix,
    find_runtimes,
    remove_runtimes,
    runtime_of,
)
from bundle.manifest import canonical
from bundle.scan.wheelhouse import list_path
from bundle.staging import bootstrap_main
from policy.errors import CODES, FaultError, RefusedError

ACTIVE, OLD, OLDER = "a" * ID_LENGTH, "b" * ID_LENGTH, "c" * ID_LENGTH


def environment(prefix, name, *, whole=True):
    place = prefix / "runtimes" / name
    (place / "bin").mkdir(parents=True)
    (place / "lib" / "deep").mkdir(parents=True)
    (place / "lib" / "deep" / "module.py").write_bytes(b"x" * 100_000)
    shutil.copyfile(shutil.which("sleep"), place / "bin" / "python")
    (place / "bin" / "python").chmod(0o755)
    if whole:
        (place / DONE).write_text('{"list": ""}\n')
    return place


@pytest.fixture
def prefix(tmp_path):
    place = tmp_path / "program"
    for name in (ACTIVE, OLD, OLDER):
        environment(place, name)
    (place / "bin").symlink_to(f"runtimes/{ACTIVE}/bin")
    return place


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "site.toml").write_text(site_toml(os.getuid()))
    return root


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return house_for(tmp_path_factory.mktemp("house"))


def install_release(store, house, tmp_path):
    """Put the manifest of a release with wheels where an installed one lies."""
    manifest = bundles.make_bundle(
        tmp_path / "x.agb",
        members=[*bundles.make_members(), *house.members],
        runtimes=house.runtimes,
    )
    raw = canonical(manifest)
    place = store.installed / hashlib.sha256(raw).hexdigest() / "META"
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(raw)
    return manifest


def names(prefix):
    return sorted(path.name for path in (prefix / "runtimes").iterdir())


def remove(prefix, store, *ids, log=None, processes=Path("/proc")):
    log = [] if log is None else log

    def audit(*words):
        log.append(words)
        return len(log)

    return remove_runtimes(prefix, ids, store=store, audit=audit, processes=processes)


def refused(code, call, *words, **named):
    with pytest.raises((RefusedError, FaultError)) as caught:
        call(*words, **named)
    assert caught.value.code == code
    assert code in CODES
    return caught.value.message


def test_the_file_that_tells_a_whole_one_is_the_installer_s():
    assert bootstrap_main.DONE == DONE


def test_each_is_told_with_its_size_and_what_needs_it(prefix, tmp_path):
    found = {each.id: each for each in find_runtimes(prefix, Store(tmp_path / "store"))}
    assert set(found) == {ACTIVE, OLD, OLDER}
    assert [each.id for each in found.values() if each.needs] == [ACTIVE]
    assert all(100_000 < each.size < 1_000_000 and each.whole for each in found.values())
    assert find_runtimes(tmp_path / "absent", Store(tmp_path / "store")) == ()


def test_only_what_nothing_needs_is_removed(prefix, tmp_path):
    store, log = Store(tmp_path / "store"), []
    done = remove(prefix, store, log=log)
    assert [each.runtime.id for each in done] == [OLD, OLDER]
    assert names(prefix) == [ACTIVE]
    assert [words[1:] for words in log] == [("intent", ""), ("outcome", "complete")] * 2
    assert remove(prefix, store) == ()


def test_a_name_that_is_needed_or_not_there_removes_nothing(prefix, tmp_path):
    store = Store(tmp_path / "store")
    message = refused("install.needed", remove, prefix, store, OLD, ACTIVE)
    assert "points to it" in message
    for absent in ("d" * ID_LENGTH, "", "..", f"../runtimes/{OLD}", "bin"):
        refused("store.missing", remove, prefix, store, OLD, absent)
    assert names(prefix) == [ACTIVE, OLD, OLDER]
    assert [each.runtime.id for each in remove(prefix, store, OLD, OLD)] == [OLD]


def test_one_that_a_process_runs_from_is_needed(prefix, tmp_path):
    store = Store(tmp_path / "store")
    with subprocess.Popen([prefix / "runtimes" / OLD / "bin" / "python", "60"]) as child:
        found = {each.id: each.needs for each in find_runtimes(prefix, store)}
        assert found[OLD] == (f"process {child.pid} runs from it",)
        refused("install.needed", remove, prefix, store, OLD)
        assert [each.runtime.id for each in remove(prefix, store)] == [OLDER]
        child.kill()
    assert [each.runtime.id for each in remove(prefix, store)] == [OLD]


def test_one_that_an_installed_release_brought_is_needed_until_that_goes(prefix, tmp_path, house):
    store = Store(tmp_path / "store")
    manifest = install_release(store, house, tmp_path)
    brought = manifest.find(list_path(manifest.runtimes[0])).sha256[:ID_LENGTH]
    assert runtime_of(manifest) == (brought,)
    environment(prefix, brought)
    assert "brought it" in refused("install.needed", remove, prefix, store, brought)
    assert [each.runtime.id for each in remove(prefix, store)] == [OLD, OLDER]
    shutil.rmtree(store.installed)
    assert [each.runtime.id for each in remove(prefix, store)] == [brought]


def test_a_release_that_came_with_another_program_says_where_that_is(prefix, tmp_path, house):
    manifest = install_release(Store(tmp_path / "store"), house, tmp_path)
    (brought,) = runtime_of(manifest)
    here = prefix / "runtimes" / ACTIVE
    assert "not on this host any more" in wheels_rows(manifest, here)[0][1]
    environment(prefix, brought)
    assert str(prefix / "runtimes" / brought) in wheels_rows(manifest, here)[0][1]
    assert wheels_rows(manifest, prefix / "runtimes" / brought) == []
    assert wheels_rows(manifest) == []  # a checkout was installed by nobody
    bare = manifest.model_copy(update={"runtimes": ()})
    assert wheels_rows(bare, here) == []


def test_a_store_that_cannot_tell_what_is_installed_removes_nothing(prefix, tmp_path):
    store = Store(tmp_path / "store")
    place = store.installed / ("0" * 64) / "META"
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(b"{}")
    refused("start.digest", remove, prefix, store)
    assert names(prefix) == [ACTIVE, OLD, OLDER]


def test_what_killed_installers_and_removals_left_goes_too(prefix, tmp_path):
    store = Store(tmp_path / "store")
    environment(prefix, "d" * ID_LENGTH, whole=False)
    environment(prefix, f".{OLD}.removed")
    found = {each.id: each.whole for each in find_runtimes(prefix, store)}
    assert found["d" * ID_LENGTH] is False
    assert found[f".{OLD}.removed"] is False
    remove(prefix, store)
    assert names(prefix) == [ACTIVE]


def test_a_link_among_them_is_neither_told_nor_followed(prefix, tmp_path):
    elsewhere = environment(tmp_path / "other", "e" * ID_LENGTH)
    (prefix / "runtimes" / "link").symlink_to(elsewhere)
    (prefix / "runtimes" / OLD / "lib" / "out").symlink_to(elsewhere)
    remove(prefix, Store(tmp_path / "store"))
    assert (elsewhere / DONE).is_file()
    assert (prefix / "runtimes" / "link").is_symlink()


def test_what_bears_no_id_is_somebody_else_s(prefix, tmp_path):
    """`--prefix` may name any folder by mistake, and others have a folder of that name as well."""
    for name in (
        "linux-x64",
        "A" * ID_LENGTH,
        "a" * 15,
        f".{OLD}",
        f"{OLD}.removed",
        "g" * ID_LENGTH,
    ):
        environment(prefix, name)
    before = set(names(prefix))
    remove(prefix, Store(tmp_path / "store"))
    assert before - set(names(prefix)) == {OLD, OLDER}


def as_link(prefix, elsewhere):
    (prefix / "runtimes").rename(elsewhere)
    (prefix / "runtimes").symlink_to(elsewhere)


def open_to_all(prefix, _):
    (prefix / "runtimes").chmod(0o777)


def of_another(prefix, _):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(prefix, 65534, 65534)


@pytest.mark.parametrize("spoil", [as_link, open_to_all, of_another])
def test_nothing_is_deleted_where_others_could_exchange_it(prefix, tmp_path, spoil):
    spoil(prefix, tmp_path / "elsewhere")
    before = names(prefix)
    refused("host.io", remove, prefix, Store(tmp_path / "store"))
    assert names(prefix) == before


def test_an_installer_at_work_is_waited_for_by_nobody(prefix, tmp_path):
    number = os.open(prefix, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        refused("host.state", remove, prefix, Store(tmp_path / "store"))
    finally:
        os.close(number)
    refused("host.io", remove, prefix / "absent", Store(tmp_path / "store"))
    assert names(prefix) == [ACTIVE, OLD, OLDER]


def test_the_program_finds_where_it_was_installed(prefix):
    assert find_prefix(prefix / "runtimes" / OLD) == prefix
    assert find_prefix(Path(sys.prefix)) is None
    (prefix / "runtimes" / OLD / DONE).unlink()
    assert find_prefix(prefix / "runtimes" / OLD) is None


# -- the command ----------------------------------------------------------------------------------


def call(capsys, *words):
    capsys.readouterr()
    status = invoke([*map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def holds(root):
    ring = load_ring(root / "keys" / "audit.vkey")
    found = verify_log(root / "audit", vkey=ring)
    return not any(each.level == "tampered" for each in found.findings)


def test_the_command_lists_and_removes_on_record(prefix, tree, capsys):
    words = ("runtimes", "--prefix", prefix, "--root", tree)
    status, told = call(capsys, *words)
    assert (status, len(told["runtimes"])) == (0, 3)
    assert invoke(list(map(str, words))) == 0
    said = capsys.readouterr().out
    assert "points to it" in said
    assert said.count("nothing needs it") == 2
    status, told = call(capsys, *words, "--remove")
    assert (status, [each["id"] for each in told["runtimes"]]) == (0, [OLD, OLDER])
    records = [
        json.loads(line)
        for line in read_lines(Layout(tree / "audit").segment(0))
        if b"admin.remove" in line
    ]
    assert [(r["phase"], r["data"].get("result")) for r in records] == [
        ("intent", None),
        ("outcome", "complete"),
    ] * 2
    assert records[0]["data"]["object"] == f"environment {OLD}"
    assert records[0]["req"] == records[1]["req"] != records[2]["req"]
    assert holds(tree)
    assert call(capsys, *words, "--remove")[1]["runtimes"] == []
    assert call(capsys, *words, ACTIVE)[1]["code"] == "usage.argument"
    assert call(capsys, *words, "--remove", ACTIVE)[1]["code"] == "install.needed"
    assert call(capsys, "runtimes", "--root", tree)[1]["code"] == "usage.argument"
    assert names(prefix) == [ACTIVE]


def test_the_status_tells_what_could_go(prefix, tree):
    """As the installed program sees itself: its own environment is one of those below a prefix."""
    store = Store(tree / "store")
    found = [each.as_document() for each in find_runtimes(prefix, store)]
    rows = program_rows({"prefix": str(prefix), "runtimes": found})
    assert rows[0] == ("program", f"{prefix}, environments of {rows[0][1].split()[-2]} MiB")
    assert [row[1][:ID_LENGTH] for row in rows[1:]] == [OLD, OLDER]
    assert program_rows({"prefix": "p", "code": "host.io", "error": "why"}) == [("program", "why")]
    assert program_rows(None) == []
    assert program_document(store) is None  # this one runs from a checkout


@pytest.mark.parametrize("points", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_a_kill_at_any_point_leaves_a_program_that_runs(prefix, tree, tmp_path, points):
    aside, chance = tmp_path / "aside", random.Random("kills of runtimes")
    shutil.copytree(prefix, aside, symlinks=True)

    def fresh():
        shutil.rmtree(prefix)
        shutil.copytree(aside, prefix, symlinks=True)

    words = ("runtimes", "--remove", "--prefix", prefix, "--root", tree)
    total = kills.operations(words, tmp_path)
    assert names(prefix) == [ACTIVE]
    assert total > 30
    first = 1 if points > 3 else total // 2  # where the environments go
    for point in sorted(chance.sample(range(first, total + 1), points)):
        fresh()
        assert kills.run_killed(words, point, tmp_path) in {-signal.SIGKILL, 0}
        assert ((prefix / "bin").resolve() / "python").is_file()
        for each in find_runtimes(prefix, Store(tree / "store")):
            if each.whole:  # not a file of it is missing
                assert (each.path / "lib" / "deep" / "module.py").stat().st_size == 100_000
        assert holds(tree)
        assert invoke(list(map(str, words))) == 0
        assert names(prefix) == [ACTIVE], point
        assert holds(tree)
