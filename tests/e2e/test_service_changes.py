"""What changes under a daemon that serves: revocation, rules, dates, releases, ends of all kinds.

Every change is one that the real commands make, on a daemon with a sealed worker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from datetime import UTC, datetime, timedelta

import pytest
from enclave_harness import needs_namespaces, needs_root
from policy_cases import pack_text, rule
from service_lab import (
    ADA,
    SIGNERS,
    Person,
    ada,
    lab_of,
    long_run,
    must,
    place_of,
    repack,
    run,
    status,
    wait_for,
)

from airgap.install import Store
from airgap.service import client
from airgap.site_rules import ENDING, sign_file
from bundle.keys import load_signer
from bundle.rollback import sign_rollback

pytestmark = [needs_root, needs_namespaces]
FAST = {"drain_s": 2.0, "restart_s": [0.0, 0.1], "wait_s": 30.0}


@pytest.fixture(scope="module")
def second(road, tmp_path_factory):
    """A second release of the line, of the same files."""
    out = tmp_path_factory.mktemp("second") / "second.agb"
    (folder,) = (road.lab / "store" / "installed").iterdir()
    epoch = Store(road.lab / "store").get(folder.name).manifest.epoch
    repack(road, out, version="1.1.0", epoch=epoch + 1)
    return out


@pytest.fixture
def lab(road):
    with lab_of(road) as copy:
        yield copy


@pytest.fixture
def place(lab):
    with place_of(lab) as running:
        yield running


def revoke(capsys, staging, lab, tmp_path, digest):
    """Enrol who may revoke, sign a list on the staging side and bring both into the lab."""
    out, keys = tmp_path / "revocations.json", staging / "keys"
    words = ("--person", "rex", "--role", "revocation")
    must(capsys, "keys", "new", "revocation", *words, "--root", staging)
    public, root = keys / "revocation.pub.json", keys / "root.pem"
    must(capsys, "trust", "add", public, "--key", root, "--root", staging)
    must(capsys, "trust", "import", staging / "trust" / "root.json", "--root", lab)
    must(
        *(capsys, "revoke", "create", "-o", out, "--reason", "it answers wrongly"),
        *("--bundle", digest, "--key", keys / "revocation.pem", "--root", staging),
    )
    must(capsys, "trust", "import-revocations", out, "--root", lab)


def test_a_revoked_release_answers_no_more_nor_what_was_under_way(
    place, lab, road, tmp_path, capsys
):
    place.start(patience=FAST)
    digest = road.installed["digest"]
    assert ada(place)["rows"]
    staging = shutil.copytree(road.staging, tmp_path / "staging")
    slow = long_run(place)
    revoke(capsys, staging, lab, tmp_path, digest)
    assert ada(place)["code"] == "trust.revoked"  # the next
    assert slow.result()["code"] == "trust.revoked"  # and the one under way
    assert place.outcomes()[-1] == (ADA, "refused", "trust.revoked")
    wait_for(lambda: place.worker() is None, "the end of the worker")
    assert status(place)["why"]["code"] == "trust.revoked"
    last = place.records("denial")[-1]
    assert (last["err"]["code"], last["actor"]["uid"]) == ("trust.revoked", ADA)
    assert not place.records("enclave.incident")
    assert place.stop() == 0
    place.verify()
    with pytest.raises(AssertionError, match=r"trust\.revoked"):  # and never again
        place.start()


def enrol_policy(capsys, staging, lab):
    """Enrol who signs rules, and bring the root into the lab; returns her key."""
    words = ("--person", "pat", "--role", "policy", "--root", staging)
    must(capsys, "keys", "new", "pat", *words)
    public, root = staging / "keys" / "pat.pub.json", staging / "keys" / "root.pem"
    must(capsys, "trust", "add", public, "--key", root, "--root", staging)
    must(capsys, "trust", "import", staging / "trust" / "root.json", "--root", lab)
    return load_signer(staging / "keys" / "pat.pem")


def put_rules(lab, signer, content):
    """Bring a signed pack into the lab: the signature first, as it has to be."""
    issued = datetime.now(UTC).replace(microsecond=0)
    path = lab / "policy" / "mine.yaml"
    path.parent.mkdir(exist_ok=True)
    signed = sign_file(content, path.name, signer, author=None, issued=issued)
    path.with_name(path.name + ENDING).write_bytes(signed.to_bytes())
    path.write_bytes(content)
    return path


@pytest.mark.soak
def test_facts_rules_and_dates_count_from_the_next_decision_on(place, lab, road, tmp_path, capsys):
    place.start(patience=FAST)
    assert ada(place)["rows"]
    site = (lab / "site.toml").read_text()

    (lab / "site.toml").write_text(site.replace(f"uid = {ADA} ", "uid = 41414 "))
    assert ada(place)["code"] == "site.person"
    assert place.records("denial")[-1]["err"]["code"] == "site.person"

    (lab / "site.toml").write_text(site + "\n[limits]\nsamples = 1\n")
    assert ada(place)["code"] == "request.limit"
    (lab / "site.toml").write_text(site[: len(site) // 2])  # nothing is guessed
    refused = ada(place)["code"]
    assert refused.startswith("site.")
    (lab / "site.toml").write_text(site)
    assert ada(place)["rows"]

    rules = lab / "policy" / "mine.yaml"
    rules.parent.mkdir(exist_ok=True)
    rules.write_text("a pack that nobody has signed")
    assert ada(place)["code"] == "policy.signature"
    rules.unlink()
    slow = long_run(place)
    (lab / "site.toml").write_text(site.replace("markings = []", 'markings = ["CUI"]', 1))
    assert slow.result()["code"].startswith("policy.")  # decided again with the facts of now
    assert place.outcomes()[-1][1:] == ("refused", place.outcomes()[-1][2])
    (lab / "site.toml").write_text(site)
    assert ada(place)["rows"]
    assert len(place.records("policy.load")) > 2

    signer = enrol_policy(capsys, shutil.copytree(road.staging, tmp_path / "staging"), lab)
    slow = long_run(place)
    rules = put_rules(lab, signer, pack_text(rule(id="SITE-1"), pack_id="mine"))
    assert ada(place)["code"] == "policy.denied"  # of a project that is active
    assert slow.result()["code"] == "policy.denied"
    assert place.records("denial")[-1]["decision"]["rule"] == "SITE-1"
    rules.unlink()
    assert ada(place)["rows"]
    assert not place.records("enclave.incident")
    assert len({r["data"]["digest"] for r in place.records("model.load")}) == 1


@pytest.mark.soak
def test_a_date_that_passes_counts_at_once(place, lab, road, tmp_path, capsys):
    site = (lab / "site.toml").read_text()
    lines = [line for line in site.splitlines() if not line.startswith("as_of")]
    (lab / "site.toml").write_text("\n".join(lines))
    assert len(lines) < len(site.splitlines())
    place.start(patience=FAST)
    assert ada(place)["rows"]
    place.days.write_text("270")  # her training ends, and the release is valid still
    found = ada(place)
    assert found["code"].startswith("policy."), found
    place.days.write_text("0")
    assert ada(place)["rows"]

    signer = enrol_policy(capsys, shutil.copytree(road.staging, tmp_path / "staging"), lab)
    begins = (datetime.now(UTC) + timedelta(days=30)).date()
    comes = rule(id="SITE-2", valid=f'[{{from: "{begins}", to: null}}]')
    rules = put_rules(lab, signer, pack_text(comes, pack_id="mine"))
    assert ada(place)["rows"]
    place.days.write_text("40")  # the rule is in force from the day that it says
    assert ada(place)["code"] == "policy.denied"
    assert place.records("denial")[-1]["decision"]["rule"] == "SITE-2"
    place.days.write_text("0")
    rules.unlink()
    slow = long_run(place)
    place.days.write_text("4000")
    assert slow.result()["code"] == "trust.expired"
    assert ada(place)["code"] == "trust.expired"
    assert place.outcomes()[-1] == (ADA, "refused", "trust.expired")
    place.days.write_text("0")  # a clock that was wrong: it serves again by itself
    wait_for(lambda: "rows" in ada(place), "an answer")


def release_of(answer):
    return answer["run"]["model"] if "run" in answer else answer["code"]


def roll_back(capsys, road, lab, path):
    """Let two people approve the way back to the first release, and go it."""
    store = Store(lab / "store")
    target = store.get("logos-ref-tiny-1.0.0")
    mark = store.floors().epochs[target.manifest.bundle_id]
    people = [load_signer(road.staging / "keys" / f"{name}.pem") for name in SIGNERS[1:]]
    now = datetime.now(UTC)
    signed = sign_rollback(target.manifest, mark, "it answers wrongly", people, now=now)
    path.write_bytes(signed.to_bytes())
    must(capsys, "rollback", "logos-ref-tiny-1.0.0", "--approval", path, "--root", lab)


def test_a_newer_release_is_taken_over_and_rolled_back_under_load(
    place, road, second, capsys, tmp_path
):
    lab = place.lab
    place.start(patience={**FAST, "drain_s": 600.0})
    old = ada(place)
    assert place.told()["serves"].endswith("1.0.0")
    held = {"inputs": {"smiles": "OCCSCCO"}, "options": {"n": 2, "seed": 4}}
    assert run(place, ADA, project="route-design", **held).result()["code"] == "policy.held"
    slow = long_run(place, n=60)
    done = must(capsys, "update", second, "--root", lab)
    assert done.document["service"]["takes_over"]
    assert done.document["service"]["serves"].endswith("1.0.0")
    wait_for(lambda: place.told()["state"] == "changing", "the change")
    waits = run(place, ADA, project="route-design")
    assert (
        slow.result()["run"]["model"] == old["run"]["model"] == "logos-ref-tiny 1.0.0"
    )  # where it began
    assert waits.result()["run"]["model"] == "logos-ref-tiny 1.1.0"
    assert status(place)["bundle"] == done.document["digest"]
    (hold,) = Person(ADA, lambda: client.holds(place.socket)).result()
    fetched = Person(ADA, lambda: client.fetch(place.socket, hold["reference"], {}, print))
    assert fetched.result()["code"] == "hold.model"  # it was held of the other release
    load = place.records("model.load")[-1]["data"]
    assert load["previous"] == road.installed["digest"]
    assert (load["digest"], load["result"]) == (done.document["digest"], "complete")

    roll_back(capsys, road, lab, tmp_path / "back.json")
    wait_for(lambda: release_of(ada(place)) == "logos-ref-tiny 1.0.0", "the old release")
    assert place.records("model.load")[-1]["data"]["previous"] == done.document["digest"]
    assert not place.records("enclave.incident")
    assert place.stop() == 0
    place.verify()


@pytest.mark.soak
def test_sighup_starts_a_new_pair_and_a_release_that_may_not_run_is_not_taken(
    place, lab, second, capsys
):
    place.start(patience=FAST)
    before = place.worker()
    place.process.send_signal(signal.SIGHUP)
    wait_for(lambda: place.worker() not in {None, before}, "another worker")
    assert ada(place)["rows"]
    load = place.records("model.load")[-1]
    assert (load["data"]["reason"], load["data"]["result"]) == ("asked for", "complete")

    worker = wait_for(place.worker)
    must(capsys, "update", second, "--root", lab)
    wait_for(lambda: place.told()["serves"].endswith("1.1.0"))
    folder = Store(lab / "store").current().folder
    file = next(path for path in (folder / "payload").rglob("*.onnx"))
    whole = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(whole[:-1] + b"x")
    place.process.send_signal(signal.SIGHUP)
    wait_for(lambda: status(place)["why"], "the refusal")
    assert status(place)["why"]["code"] == "start.digest"
    assert ada(place)["rows"]  # the pair that was proven goes on
    assert place.records("model.load")[-1]["err"]["code"] == "start.digest"
    assert worker
    file.write_bytes(whole)
    assert place.stop() == 0


@pytest.mark.soak
def test_a_request_that_does_not_end_in_time_has_a_last_word_and_a_record(place):
    place.start(patience=FAST)
    slow = long_run(place)
    place.process.send_signal(signal.SIGTERM)
    assert slow.result()["code"] == "service.draining"
    assert place.process.wait(60) == 0
    assert place.outcomes()[-1] == (ADA, "failed", "service.draining")
    assert place.records()[-1]["kind"] == "shutdown"
    place.verify()


@pytest.mark.soak
def test_a_second_sigterm_ends_at_once_and_the_log_is_whole(place):
    place.start()  # 600 seconds of patience
    slow = long_run(place)
    place.process.send_signal(signal.SIGTERM)
    wait_for(lambda: refused(place) == "service.absent", "the end of the socket")
    place.process.send_signal(signal.SIGTERM)
    assert slow.result()["code"] == "service.draining"
    assert place.process.wait(60) == 0
    assert place.outcomes()[-1] == (ADA, "failed", "service.draining")
    place.verify()


def refused(place):
    return ada(place).get("code")


@pytest.mark.soak
def test_after_a_kill_the_log_goes_on_and_says_what_was_open(place):
    place.start()
    slow = long_run(place)
    worker = wait_for(place.worker)
    place.kill()
    assert slow.result()["code"] == "service.absent"
    wait_for(lambda: not alive(worker), "the end of the worker")
    size = len(place.records())
    place.start()
    assert ada(place)["rows"]
    assert place.outcomes()[-2:] == [(ADA, "unknown", None), (ADA, "complete", None)] or [
        found[1] for found in place.outcomes()[-2:]
    ] == ["unknown", "complete"]
    assert "recovery" in {record["kind"] for record in place.records()[size:]}
    assert place.stop() == 0
    place.verify()


def alive(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.soak
def test_workers_that_keep_ending_are_started_later_each_time_and_then_not_at_all(place):
    place.start(patience={**FAST, "ends": 4, "restart_s": [0.0, 0.2]})
    for _ in range(3):
        os.kill(wait_for(place.worker), signal.SIGKILL)
        pid = place.worker()
        wait_for(lambda pid=pid: place.worker() not in {None, pid}, "another worker")
    os.kill(wait_for(place.worker), signal.SIGKILL)
    wait_for(lambda: status(place)["state"] == "refusing", "the end of starts")
    assert ada(place)["code"] == "service.failed"
    incidents = place.records("enclave.incident")
    assert [r["data"].get("signal") for r in incidents] == [9, 9, 9, 9, None]
    assert "4 ends" in incidents[-1]["data"]["reason"]
    seals = len(place.records("enclave.seal"))
    time.sleep(1.5)
    assert len(place.records("enclave.seal")) == seals  # nothing is tried any more
    place.process.send_signal(signal.SIGHUP)
    wait_for(lambda: status(place)["serving"], "a pair by request")
    assert ada(place)["rows"]
    assert place.stop() == 0
    place.verify()


@pytest.mark.soak
def test_one_daemon_serves_a_tree(place, lab):
    place.start()
    with place_of(lab) as other, pytest.raises(AssertionError, match=r"service\.locked"):
        other.start()
    assert ada(place)["rows"]
