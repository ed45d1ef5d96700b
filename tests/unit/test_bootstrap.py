"""`airgap bootstrap`: verified first, then each thing once; a second run writes nothing."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import bundles
import pytest
from test_bootstrap_main import FACTS, house_for, sealed

from airgap.audit.layout import Layout, read_lines
from airgap.bootstrap import Wish, bootstrap
from airgap.cli import invoke
from airgap.demo import site_toml
from airgap.host_setup import Places, Program, packaged
from bundle.media import Help
from bundle.rollback import sign_rollback
from bundle.trust import load_trust
from bundle.verify import open_bundle
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

PRINT = bundles.make_trust().fingerprint
YEARS = timedelta(days=4 * 365)
WIDE = replace(FACTS, expires=bundles.NOW + YEARS)  # the log stamps with the true time


class Told:
    """Stands for the programs that are run; keeps what it was asked."""

    def __init__(self, status=0, document=None, doctor=(0, {"verdict": "SEALED/A"})):
        self.asked, self.status, self.document = [], status, document or {}
        self.doctor = doctor

    def own(self, *words):
        self.asked.append(words)
        if words[0] == "doctor":
            return self.doctor
        return self.status, self.document

    def foreign(self, *argv):
        self.asked.append(argv)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return house_for(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def medium(tmp_path_factory, house):
    folder = tmp_path_factory.mktemp("medium")
    sealed(house, folder / "wheels.agb", facts=WIDE)
    bundles.make_bundle(folder / "model.agb", expires=bundles.NOW + YEARS)
    (folder / "site.toml").write_text(site_toml(os.getuid()))
    return folder


def set_up(tmp_path, bundle, *, program=None, system=False, now=None, fingerprint=PRINT, **wish):
    host = tmp_path / "host"
    host.mkdir(exist_ok=True)
    return bootstrap(
        Wish(bundle, fingerprint, transcript="before\n", **wish),
        Places(tmp_path / "program", tmp_path / "tree", system, host),
        now=now or datetime.now(UTC),
        more=Help(),
        program=program or Told(),
    )


def snapshot(folder):
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in sorted(folder.rglob("*"))
    }


def records(tmp_path):
    layout = Layout(tmp_path / "tree" / "audit")
    return [json.loads(line) for line in read_lines(layout.segment(0)) if line.strip()]


def refused(code, *words, **named):
    with pytest.raises((RefusedError, FaultError)) as caught:
        set_up(*words, **named)
    assert caught.value.code == code, caught.value.message


def test_a_new_host_gets_trust_site_and_a_record_with_the_transcript(tmp_path, medium):
    done = set_up(tmp_path, medium / "wheels.agb", site=medium / "site.toml")
    assert load_trust(tmp_path / "tree" / "trust").fingerprint == PRINT
    assert (tmp_path / "tree" / "site.toml").read_bytes() == (medium / "site.toml").read_bytes()
    outcome = next(r for r in records(tmp_path) if r["seq"] == done.record)
    assert (outcome["kind"], outcome["phase"]) == ("admin.bootstrap", "outcome")
    assert outcome["data"]["result"] == "complete"
    name = outcome["data"]["evidence"].removeprefix("sha256:")
    kept = next(path for path in (tmp_path / "tree" / "audit").rglob(f"*{name[2:]}*"))
    assert kept.read_text().startswith("before\n")
    assert "verified: sha256:" in kept.read_text()


def test_a_host_that_cannot_seal_is_set_up_and_refused_with_the_whole_reason(tmp_path, medium):
    reason, step = f"no {'namespace ' * 90}end", f"sysctl {'x' * 900} end"
    rung = {"name": "B", "sealed": False, "code": "enclave.namespaces", "reason": reason}
    found = {"verdict": "REFUSED", "rungs": [rung], "advice": [step]}
    done = set_up(tmp_path, medium / "wheels.agb", program=Told(doctor=(1, found)))
    assert done.changed
    assert "doctor: REFUSED" in done.lines
    assert f"doctor: rung B: enclave.namespaces: {reason}" in done.lines
    assert f"doctor: to raise it: {step}" in done.lines
    assert done.refusal.code == done.as_document()["refused"] == "enclave.rung"
    assert "airgap doctor --root" in done.refusal.hint
    outcome = next(r for r in records(tmp_path) if r["seq"] == done.record)
    assert (outcome["data"]["result"], outcome["err"]["code"]) == ("refused", "enclave.rung")


def test_a_second_run_changes_nothing(tmp_path, medium):
    first = set_up(tmp_path, medium / "wheels.agb", site=medium / "site.toml", system=True)
    assert first.changed
    before = snapshot(tmp_path)
    again = set_up(tmp_path, medium / "wheels.agb", site=medium / "site.toml", system=True)
    assert again.changed == []
    assert again.record is None
    assert snapshot(tmp_path) == before


def test_a_medium_that_was_exchanged_since_install_sh_checked_it_is_refused(tmp_path, medium):
    path = medium / "wheels.agb"
    refused("seal.subject", tmp_path, path, digest=Digest.of(b"another release"))
    assert not (tmp_path / "tree").exists()
    with open_bundle(path, bundles.make_trust(), now=datetime.now(UTC)) as found:
        digest = found.digest
    assert set_up(tmp_path, path, digest=digest).changed


def test_a_folder_of_the_host_that_cannot_be_written_is_found_before_anything_changes(
    tmp_path, medium
):
    place = tmp_path / "host/etc/systemd/system"
    place.parent.mkdir(parents=True)
    place.write_text("in the way")
    refused("host.io", tmp_path, medium / "wheels.agb", system=True)
    assert not (tmp_path / "tree").exists()
    place.unlink()
    assert set_up(tmp_path, medium / "wheels.agb", system=True).changed


def test_an_older_bundle_of_wheels_comes_back_by_approval_alone(tmp_path, medium, house):
    newer = sealed(house, tmp_path / "two.agb", facts=replace(WIDE, epoch=2, version="2.0"))
    assert set_up(tmp_path, newer).changed
    assert "runtime, epoch 2: as it was" in set_up(tmp_path, newer).lines
    refused("trust.epoch", tmp_path, medium / "wheels.agb")
    now = datetime.now(UTC)
    with open_bundle(newer, bundles.make_trust(), now=now) as found:
        mark = (2, found.digest)
    with open_bundle(medium / "wheels.agb", bundles.make_trust(), now=now) as found:
        people = [bundles.signer(name) for name in ("alice", "bob")]
        signed = sign_rollback(found.manifest, mark, "2 does not start", people, now=now)
    done = set_up(tmp_path, medium / "wheels.agb", approval=signed)
    assert "runtime, epoch 1: as it was" in done.lines  # the mark never falls
    assert set_up(tmp_path, newer).lines


def test_without_site_facts_there_is_a_form_to_fill_in(tmp_path, medium):
    done = set_up(tmp_path, medium / "wheels.agb")
    assert any("a form to fill in" in text for text in done.changed)
    assert set_up(tmp_path, medium / "wheels.agb").changed == []


def test_the_system_gets_units_with_the_true_places(tmp_path, medium):
    host = tmp_path / "host"
    for name in ("etc/apparmor.d", "run/systemd/system"):
        (host / name).mkdir(parents=True)
    program = Told()
    set_up(tmp_path, medium / "wheels.agb", system=True, program=program)
    unit = (host / "etc/systemd/system/airgap-audit.service").read_text()
    assert f"ExecStart={tmp_path}/program/bin/airgap" in unit
    assert f"--root {tmp_path}/tree" in unit
    profile = (host / "etc/apparmor.d/airgap").read_text()
    assert f"profile airgap {tmp_path}/program/runtimes/*/bin/python3" in profile
    assert (host / "etc/sysusers.d/airgap.conf").is_file()
    assert ("systemctl", "daemon-reload") in program.asked
    assert (packaged() / "systemd").is_dir()


def test_a_model_is_admitted_by_the_ordinary_command(tmp_path, medium):
    program = Told(document={"decision": "sha256:d"})
    done = set_up(
        tmp_path,
        medium / "wheels.agb",
        model=medium / "model.agb",
        project="p",
        program=program,
        volumes=(medium,),
    )
    words = program.asked[0]
    assert words[:2] == ("install", str(medium / "model.agb"))
    assert words[words.index("--project") + 1] == "p"
    assert "--volume" in words
    assert any("admitted" in text for text in done.changed)
    assert done.refusal is None


def test_a_model_that_is_not_admitted_leaves_the_rest_and_is_on_record(tmp_path, medium):
    program = Told(1, {"code": "policy.denied", "error": "no", "hint": "ask"})
    done = set_up(tmp_path, medium / "wheels.agb", model=medium / "model.agb", program=program)
    assert done.refusal.code == "policy.denied"
    assert done.as_document()["refused"] == "policy.denied"
    outcome = next(r for r in records(tmp_path) if r["seq"] == done.record)
    assert outcome["data"]["result"] == "refused"
    assert outcome["err"]["code"] == "policy.denied"


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("trust.clock", {"now": bundles.NOW - timedelta(days=365)}),
        ("trust.expired", {"now": bundles.NOW + YEARS}),
        ("trust.fingerprint", {"fingerprint": type(PRINT)("sha256", bytes(32))}),
        ("store.missing", {"model": "wheels.agb"}),
        ("site.toml", {"site": "wheels.agb"}),
        ("host.io", {"site": "absent"}),
    ],
)
def test_a_refusal_writes_nothing(tmp_path, medium, code, named):
    places = {"model": medium, "site": medium}
    wish = {k: places[k] / v if k in places else v for k, v in named.items()}
    before = snapshot(tmp_path)
    refused(code, tmp_path, medium / "wheels.agb", **wish)
    assert {k for k in snapshot(tmp_path) if k != "host"} == set(before)


def test_too_few_signatures_are_refused_here_too(tmp_path, house):
    sealed(house, tmp_path / "half.agb", "alice", facts=WIDE)
    refused("seal.threshold", tmp_path, tmp_path / "half.agb")
    assert not (tmp_path / "tree").exists()


def test_site_facts_that_are_there_are_never_replaced(tmp_path, medium):
    set_up(tmp_path, medium / "wheels.agb", site=medium / "site.toml")
    other = tmp_path / "other.toml"
    other.write_text((medium / "site.toml").read_text() + "\n# changed\n")
    refused("site.exists", tmp_path, medium / "wheels.agb", site=other)


def test_the_command_prints_lines_and_one_document(tmp_path, medium, capsys):
    text, result = tmp_path / "t.txt", tmp_path / "r.json"
    text.write_text("before")
    words = [
        *("bootstrap", medium / "wheels.agb", "--fingerprint", PRINT, "--prefix", tmp_path / "p"),
        *("--root", tmp_path / "tree", "--transcript", text, "--result", result),
    ]
    assert invoke([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "verified: sha256:" in said
    assert "on record: audit log, record" in said
    assert json.loads(result.read_text())["refused"] == ""
    assert invoke([*map(str, words[:-4]), "--transcript", str(tmp_path / "no")]) == 3


def test_the_medium_gets_the_installer_and_its_digests(tmp_path, medium):
    from airgap.install.medium import write_medium

    named = {"trust": bundles.make_trust(), "now": bundles.NOW, "more": Help()}
    made = write_medium(medium / "wheels.agb", tmp_path, **named)
    assert set(made) == {"install.sh"}
    (tmp_path / "SHA256SUMS.alice.sig").write_bytes(b"sig")
    assert write_medium(medium / "wheels.agb", tmp_path, **named) == made
    assert (tmp_path / "SHA256SUMS").read_text() == f"{made['install.sh']}  install.sh\n"
    with pytest.raises(RefusedError) as caught:
        write_medium(medium / "model.agb", tmp_path, **named)
    assert caught.value.code == "store.missing"
    with pytest.raises(FaultError):
        write_medium(medium / "wheels.agb", tmp_path / "absent", **named)


@pytest.mark.parametrize("name", ["a\n" + "0" * 64 + "  install.sh", "a\\b", "-", "a\udcff", "a\r"])
def test_a_name_that_would_write_its_own_line_is_not_listed(tmp_path, medium, name):
    from airgap.install.medium import write_medium

    named = {"trust": bundles.make_trust(), "now": bundles.NOW, "more": Help()}
    (tmp_path / "two words.txt").write_text("x")
    assert "two words.txt" in write_medium(medium / "wheels.agb", tmp_path, **named)
    before = (tmp_path / "SHA256SUMS").read_bytes()
    (tmp_path / name).write_text("x")
    with pytest.raises(RefusedError) as caught:
        write_medium(medium / "wheels.agb", tmp_path, **named)
    assert caught.value.code == "archive.type"
    assert (tmp_path / "SHA256SUMS").read_bytes() == before


def test_programs_give_their_document_or_their_last_words():
    good = Program(("/bin/sh", "-c", "echo '{\"a\": 1}'"))
    assert good.own("x") == (0, {"a": 1})
    bad = Program(("/bin/sh", "-c", "echo broken >&2; exit 3"))
    assert bad.own("x") == (3, {"error": "broken"})
    good.foreign("true")
    with pytest.raises(FaultError):
        good.foreign("/bin/sh", "-c", "exit 1")


def test_wheels_alone_are_nothing_to_admit(tmp_path, medium, capsys):
    set_up(tmp_path, medium / "wheels.agb", site=medium / "site.toml")
    words = ["install", str(medium / "wheels.agb"), "--root", str(tmp_path / "tree"), "--json"]
    assert invoke(words) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "store.missing"
    assert list((tmp_path / "tree" / "store" / "quarantine").iterdir()) == []
