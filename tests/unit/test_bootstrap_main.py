"""`install.sh`: the seal is checked before anything runs; a refusal leaves the host as it was."""

import ast
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta

import bundles
import cnsa2
import pytest
import wheel_index

from bundle import trust
from bundle.manifest import Runtime
from bundle.media import open_medium
from bundle.scan.wheelhouse import list_path, list_text
from bundle.split import split as split_medium
from bundle.staging import bootstrap_main
from bundle.staging.bootstrap import WheelFacts, build_wheels, installer_text
from bundle.staging.wheelhouse import collect, parse_target
from bundle.write import Member
from policy.errors import CODES

HOST = f"linux-x86_64-cp3{sys.version_info.minor}-glibc2.17"
FACTS = WheelFacts("runtime", "1.0", bundles.CREATED, bundles.NOW + timedelta(days=99), 1)
PRINT = str(bundles.make_trust().fingerprint)

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is missing")


def house_for(folder, target=HOST):
    index, work = folder / "index", folder / "work"
    for place in (index, work):
        place.mkdir(parents=True)
    wheel_index.make_wheel(index, "pydantic", "2.14.3")
    wheel_index.repack_pip(index)
    own = wheel_index.make_wheel(
        folder,
        "airgap",
        "0.1.0",
        ("pydantic>=2",),
        files={
            "airgap/packaging/constraints.txt": (
                f"pydantic==2.14.3\npip=={wheel_index.PIP}\n".encode()
            ),
            "airgap/standin.py": wheel_index.PROGRAM.encode(),
            "airgap-0.1.0.dist-info/entry_points.txt": (
                b"[console_scripts]\nairgap = airgap.standin:main\n"
            ),
        },
    )
    return collect([parse_target(target)], "cpu", work, own=own, pip=wheel_index.OnePip(index))


def sealed(house, out, *approvers, facts=FACTS):
    build_wheels(house, out, facts, trust=bundles.make_trust(), signer=bundles.signer("builder"))
    for name in approvers or ("alice", "bob"):
        wheel_index.approve(out, name)
    return out


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return house_for(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def medium(tmp_path_factory, house):
    folder = tmp_path_factory.mktemp("medium")
    sealed(house, folder / "good.agb")
    (folder / "install.sh").write_bytes(installer_text())
    return folder


def install(tmp_path, bundle, *words, now=bundles.NOW, fingerprint=PRINT):
    given = ["--bundle", str(bundle), "--prefix", str(tmp_path / "program")]
    given += ["--root", str(tmp_path / "tree"), *words]
    given += ["--fingerprint", fingerprint] if fingerprint else []
    return bootstrap_main.main(given, now)


def split(bundle, folder, *, volume_size):
    folder.mkdir()
    medium = open_medium(bundle)
    try:
        return split_medium(medium, folder, volume_size=volume_size)
    finally:
        medium.close()


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in str(path)
    }


def refused(capsys, tmp_path, code, *words, bundle, changed=False, **named):
    before = tree(tmp_path)
    capsys.readouterr()
    status = install(tmp_path, bundle, *words, **named)
    said = capsys.readouterr().err
    assert said.splitlines()[0].split() in (["refused", code], ["fault", code]), said
    assert status in {1, 3}
    assert code in CODES
    assert said.rstrip().endswith("nothing was changed")
    if not changed:
        assert tree(tmp_path) == before
    return said


# -- the good way ---------------------------------------------------------------------------------


def test_from_a_split_bundle_to_a_program_and_again_without_a_change(tmp_path, medium, capfd):
    discs = tmp_path / "discs"
    split(medium / "good.agb", discs, volume_size=2 * bundles.CHUNK_SIZE)
    volumes = sorted(discs.iterdir())
    assert [path.name for path in volumes] == ["good.agb.001"]
    program = tmp_path / "program"
    (program / "runtimes" / ("0" * 16)).mkdir(parents=True, mode=0o755)
    assert install(tmp_path, volumes[0]) == 0
    assert "note: 1 older beside it" in capfd.readouterr().out
    link = program / "bin"
    assert link.is_symlink()
    done = subprocess.run(
        [link.resolve() / "python", "-I", "-c", "import airgap, pydantic; print(airgap.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(program / "runtimes") in done.stdout
    said = (tmp_path / "tree" / "set-up").read_text()
    assert "approved by: alice, bob" in said
    assert "trust root: version" in said
    before = tree(tmp_path)
    capfd.readouterr()
    assert install(tmp_path, discs) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert tree(tmp_path) == before
    # a file of the program that was changed is not taken for the sealed one
    package = next(program.glob("runtimes/*/lib/python3*/site-packages/airgap/standin.py"))
    package.write_text("changed")
    assert install(tmp_path, volumes[0]) == 1
    assert "install.digest" in capfd.readouterr().err


def test_the_script_asks_for_the_fingerprint_and_needs_no_environment(tmp_path, medium):
    done = subprocess.run(
        ["sh", medium / "install.sh", "--python", sys.executable, "--bundle", medium / "good.agb",
         "--prefix", tmp_path / "p", "--root", tmp_path / "t"],
        input="sha256:" + "0" * 64 + "\n",
        env={"HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Type the fingerprint" in done.stderr
    assert "refused trust.fingerprint" in done.stderr
    assert not (tmp_path / "p").exists()


def test_the_script_has_no_finding_of_shellcheck(medium):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", medium / "install.sh"], check=True)


def test_the_script_refuses_an_old_python_and_a_missing_one(tmp_path, medium):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in (old, tmp_path / "none"):
        done = subprocess.run(
            ["sh", medium / "install.sh", "--python", name, "--bundle", "x"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3
        assert "install.target" in done.stderr
        assert "nothing was changed" in done.stderr


def test_a_program_that_refuses_leaves_nothing(tmp_path, medium, monkeypatch):
    monkeypatch.setenv("HOME", "/refused")  # the stand-in refuses then, like a revoked bundle
    assert install(tmp_path, medium / "good.agb") == 1
    assert tree(tmp_path) == {}


def test_the_script_is_one_program_in_which_no_name_stands_twice(medium):
    text = (medium / "install.sh").read_text()
    assert text.count("from __future__") == 1
    assert not re.search(r"^(import|from) (bundle|policy|airgap)", text, re.MULTILINE)
    assert "@PROGRAM@" not in text
    program = text.partition("3<<'END_OF_PROGRAM'\n")[2].partition("\nEND_OF_PROGRAM")[0]
    names = [
        name
        for node in ast.parse(program).body
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.col_offset == 0]
            if isinstance(node, ast.Assign | ast.AnnAssign)
            else []
        )
    ]
    assert len(names) > 80
    assert sorted(names) == sorted(set(names))


@pytest.mark.soak
def test_an_installer_that_is_killed_anywhere_is_gone_on_with(tmp_path, medium, house):
    wide = replace(FACTS, expires=bundles.NOW + timedelta(days=4 * 365))  # by the true clock
    bundle = sealed(house, tmp_path / "x.agb", facts=wide)
    argv = ["sh", medium / "install.sh", "--python", sys.executable]
    argv += ["--bundle", bundle, "--prefix", tmp_path / "p", "--root", tmp_path / "t"]
    argv += ["--fingerprint", PRINT]
    link, chance = tmp_path / "p" / "bin", random.Random(20260630)
    for _ in range(30):
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True) as child:
            time.sleep(chance.uniform(0.05, 4.0))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        if link.is_symlink():  # whole, or not there
            subprocess.run([link.resolve() / "python", "-I", "-c", "import airgap"], check=True)
            shutil.rmtree(tmp_path / "p")
            shutil.rmtree(tmp_path / "t", ignore_errors=True)
    subprocess.run(argv, check=True)
    assert link.is_symlink()
    assert len(list((tmp_path / "p" / "runtimes").iterdir())) == 1


# -- refusals -------------------------------------------------------------------------------------


def test_a_wrong_fingerprint(tmp_path, medium, capsys):
    good = medium / "good.agb"
    refused(capsys, tmp_path, "trust.fingerprint", bundle=good, fingerprint="sha256:" + "1" * 64)
    refused(capsys, tmp_path, "trust.fingerprint", bundle=good, fingerprint="sha256:12")


def test_one_approver_is_too_few_and_the_builder_is_none(tmp_path, house, capsys):
    refused(capsys, tmp_path / "a", "seal.threshold", bundle=sealed_in(tmp_path, house, "alice"))


def sealed_in(tmp_path, house, *approvers, facts=FACTS):
    (tmp_path / "a").mkdir(exist_ok=True)
    return sealed(house, tmp_path / "x.agb", *approvers, facts=facts)


def test_times(tmp_path, medium, capsys):
    good, year = medium / "good.agb", timedelta(days=365)
    refused(capsys, tmp_path, "trust.clock", bundle=good, now=bundles.NOW - year)
    refused(capsys, tmp_path, "trust.expired", bundle=good, now=bundles.NOW + timedelta(days=100))
    refused(capsys, tmp_path, "trust.root", bundle=good, now=bundles.NOW + 10 * year)


def test_the_accelerator_must_be_there(tmp_path, medium, capsys):
    refused(capsys, tmp_path, "install.target", "--accelerator", "cuda", bundle=medium / "good.agb")


def test_a_missing_volume_is_named(tmp_path, house, capsys):
    (tmp_path / "a").mkdir()
    wide = Member("payload/tiny/LICENSE", b"free\n" * 10**6, "document", "text/plain")
    members = bundles.make_members(extra=(wide,))
    members[5] = Member(  # the bill of materials lists all
        "META/sbom/bom.cdx.json",
        bundles.make_bom([*(m for m in members if m.path.startswith("payload/")), *house.members]),
        "sbom",
        "application/json",
    )
    bundle = tmp_path / "x.agb"
    bundles.make_bundle(bundle, members=[*members, *house.members], runtimes=house.runtimes)
    discs = tmp_path / "discs"
    split(bundle, discs, volume_size=2 * bundles.CHUNK_SIZE)
    volumes = sorted(discs.iterdir())
    assert len(volumes) > 2
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    volumes[1].rename(moved / volumes[1].name)
    said = refused(capsys, tmp_path / "a", "volume.missing", bundle=volumes[0])
    assert volumes[1].name in said
    # a further place has it: it goes on to the next check
    said = refused(
        capsys, tmp_path / "a", "trust.clock", "--volume", str(moved), bundle=discs,
        now=bundles.NOW - timedelta(days=365),
    )  # fmt: skip
    other = sealed(house, tmp_path / "y.agb")
    split(other, tmp_path / "others", volume_size=2 * bundles.CHUNK_SIZE)
    shutil.copy(tmp_path / "others" / "y.agb.001", discs / volumes[1].name)
    refused(capsys, tmp_path / "a", "volume.set", bundle=volumes[0])


def test_a_wheel_on_the_medium_that_was_replaced_is_refused_before_pip(
    tmp_path, medium, capsys, house
):
    (tmp_path / "a").mkdir()
    raw = bytearray((medium / "good.agb").read_bytes())
    for wheel in house.wheels:
        found = wheel.path.read_bytes()
        at = bytes(raw).index(found)
        bad = bytearray(raw)
        bad[at + len(found) // 2] ^= 1
        (tmp_path / "bad.agb").write_bytes(bad)
        said = refused(capsys, tmp_path / "a", "install.wheel", bundle=tmp_path / "bad.agb")
        assert wheel.path.name in said


def test_a_list_that_was_changed_on_the_medium_is_refused(tmp_path, medium, capsys):
    (tmp_path / "a").mkdir()
    raw = (medium / "good.agb").read_bytes()
    lines = raw.replace(b"pydantic==2.14.3 --hash", b"pydantic==2.14.4 --hash")
    (tmp_path / "bad.agb").write_bytes(lines)
    refused(capsys, tmp_path / "a", "install.wheel", bundle=tmp_path / "bad.agb")


LISTS = {
    "a wheel that is not there": lambda found: {**found, "rich": ("1", "0" * 64)},
    "a wheel less": lambda found: {k: v for k, v in found.items() if k != "pydantic"},
}


@pytest.mark.parametrize("alter", LISTS.values(), ids=LISTS.keys())
def test_a_list_that_names_other_wheels_is_refused_though_it_is_signed(
    tmp_path, house, capsys, alter
):
    (tmp_path / "a").mkdir()
    runtime = house.runtimes[0]
    found = {w.name: (w.version, w.sha256) for w in house.wheels}
    raw = list_text(Runtime(**runtime.model_dump()), alter(found))
    members = [
        replace(m, source=raw, sha256=None) if m.path == list_path(runtime) else m
        for m in house.members
    ]
    bundle = tmp_path / "x.agb"
    bundles.make_bundle(
        bundle, members=[*bundles.make_members(), *members], runtimes=house.runtimes
    )
    refused(capsys, tmp_path / "a", "install.wheel", bundle=bundle)


@contextlib.contextmanager
def as_user():
    """Act as nobody for a while where root runs the tests: root is denied nothing."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


BROKEN = {
    "empty": (lambda _: b"", "archive.header"),
    "cut in the head": (lambda raw: raw[:9000], "archive.truncated"),
    "noise": (lambda _: bytes(range(256)) * 40, "archive.header"),
    "cut in the body": (lambda raw: raw[: len(raw) // 2], "archive.truncated"),
    "another member first": (
        lambda raw: raw.replace(b"META/envelope.dsse.json", b"META/envelope.dsse.jsom", 1),
        "archive.header",
    ),
    "a payload of another type": (
        lambda raw: raw.replace(
            b"application/vnd.in-toto+json", b"application/vnd.in-toto+jsom", 1
        ),
        "seal.type",
    ),
    "no signature": (lambda raw: raw.replace(b'"keyid":"', b'"keyie":"', 1), "manifest.schema"),
    "no JSON": (lambda raw: raw.replace(b'{"payload"', b'["payload"', 1), "seal.malformed"),
}


@pytest.mark.parametrize(("alter", "code"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_bundle(tmp_path, medium, capsys, alter, code):
    (tmp_path / "a").mkdir()
    (tmp_path / "bad.agb").write_bytes(alter((medium / "good.agb").read_bytes()))
    refused(capsys, tmp_path / "a", code, bundle=tmp_path / "bad.agb")


def test_other_things_than_bundles(tmp_path, medium, capsys):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "x.agb.enc")
    refused(capsys, tmp_path / "a", "transit.key", bundle=tmp_path / "x.agb.enc")
    refused(capsys, tmp_path / "a", "host.io", bundle=tmp_path / "absent.agb")
    refused(capsys, tmp_path / "a", "volume.missing", bundle=tmp_path / "a")
    refused(capsys, tmp_path / "a", "host.io", bundle=medium / "good.agb", fingerprint="/absent/f")


def test_words_that_mean_nothing(capsys):
    with pytest.raises(SystemExit) as caught:
        bootstrap_main.main(["--bundle"])
    assert caught.value.code == 2
    capsys.readouterr()


# -- roots ----------------------------------------------------------------------------------------


def test_a_typed_root_leads_to_newer_ones_and_a_host_needs_no_fingerprint_twice(
    tmp_path, house, capfd
):
    roots = bundles.make_trust()
    first = str(roots.documents[0].fingerprint)
    assert len(roots.documents) > 1
    bundle = sealed(house, tmp_path / "x.agb")
    assert install(tmp_path, bundle, fingerprint=first) == 0
    trust.save_trust(roots, tmp_path / "tree" / "trust")
    assert install(tmp_path, bundle, fingerprint="") == 0
    assert "nothing to do" in capfd.readouterr().out


def test_a_root_that_its_people_did_not_sign_is_refused(tmp_path, medium, capsys):
    (tmp_path / "a").mkdir()
    raw = (medium / "good.agb").read_bytes()
    start = raw.index(b'{"format":"airgap-trust/1"')
    at = raw.index(b'"sig":"', start) + 12
    bad = bytearray(raw)
    bad[at] = ord("A") if bad[at] != ord("A") else ord("B")
    (tmp_path / "bad.agb").write_bytes(bad)
    first = str(bundles.make_trust().documents[0].fingerprint)
    refused(capsys, tmp_path / "a", "trust.chain", bundle=tmp_path / "bad.agb", fingerprint=first)


# -- the profile with two keys a person ------------------------------------------------------------


def test_both_signatures_of_a_person_or_what_this_openssl_can_check(tmp_path, house, capsys):
    (tmp_path / "a").mkdir()
    members = [*bundles.make_members(), *house.members]
    bundle, print_ = tmp_path / "x.agb", str(cnsa2.make_cnsa2_trust().fingerprint)
    given = {"members": members, "runtimes": house.runtimes}
    early = bundles.NOW - timedelta(days=365)
    cnsa2.make_cnsa2_bundle(bundle, **given)
    refused(capsys, tmp_path / "a", "trust.clock", bundle=bundle, fingerprint=print_, now=early)
    only_ml = [pair[0] for pair in map(cnsa2.pair, cnsa2.PEOPLE)]
    cnsa2.make_cnsa2_bundle(bundle, signers=only_ml, **given)
    refused(capsys, tmp_path / "a", "seal.threshold", bundle=bundle, fingerprint=print_)
    plain = sealed(house, tmp_path / "y.agb")
    refused(capsys, tmp_path / "a", "trust.fingerprint", bundle=plain, fingerprint=print_)
