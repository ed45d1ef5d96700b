"""A held request and its released answer at the daemon: one's own, and no right on any file."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from enclave_harness import needs_namespaces, needs_root
from service_lab import ADA, BEN, Person, ada, lab_of, must, place_of, run, status

from airgap import cli
from airgap.service import client

pytestmark = [needs_root, needs_namespaces]
THIODIGLYCOL = {"smiles": "OCCSCCO"}  # a route to it is held for named people


@pytest.fixture
def place(road):
    with lab_of(road) as lab, place_of(lab) as running:
        site = (lab / "site.toml").read_text()  # its fixed day lies before any release of today
        (lab / "site.toml").write_text(site.replace("as_of = ", "# as_of = "))
        yield running.start()


def command(uid, *words):
    """Run a command as an account without a right on the tree."""

    def act():
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            ended = cli.invoke([str(word) for word in words])
        return [ended, printed.getvalue(), errors.getvalue()]

    return Person(uid, act).result()


def enrol(capsys, staging, lab):
    """Enrol who releases, and bring the root into the lab while the daemon serves."""
    for name, role in (("eve", "ehs"), ("xia", "export_control")):
        words = ("--person", name, "--role", role, "--root", staging)
        must(capsys, "keys", "new", name, *words)
        public, root = staging / "keys" / f"{name}.pub.json", staging / "keys" / "root.pem"
        must(capsys, "trust", "add", public, "--key", root, "--root", staging)
        must(capsys, "trust", "import", staging / "trust" / "root.json", "--root", lab)


def test_a_person_fetches_her_released_answer_through_the_socket(place, road, capsys, tmp_path):
    lab, socket = place.lab, place.socket
    asked = {"inputs": THIODIGLYCOL, "options": {"n": 2, "seed": 4}}
    held = run(place, ADA, project="route-design", **asked).result()
    assert held["code"] == "policy.held"
    (hold,) = Person(ADA, lambda: client.holds(socket)).result()
    reference = hold["reference"]
    assert reference in held["message"]
    assert (hold["state"], "rules" in hold, hold["person"]) == ("held", False, "ada")

    # Others have none, and learn nothing of hers: the same words for hers as for one that is none.
    assert Person(BEN, lambda: client.holds(socket)).result() == []
    told = [
        Person(BEN, lambda name=name: client.fetch(socket, name, {}, print)).result()
        for name in (reference, reference.rpartition("#")[0] + "#9999")
    ]
    assert [each["code"] for each in told] == ["hold.missing"] * 2
    assert told[0]["message"].replace(reference, "X") == told[1]["message"].replace(
        reference.rpartition("#")[0] + "#9999", "X"
    )
    assert {r["actor"]["uid"] for r in place.records("denial")[-2:]} == {BEN}

    staging = shutil.copytree(road.staging, tmp_path / "staging")
    enrol(capsys, staging, lab)
    memo = tmp_path / "memo.txt"
    memo.write_text("seen by the board")
    day = (datetime.now(UTC) + timedelta(days=5)).date()
    words = ("--reason", "seen by the board", "--expires", day, "--document", memo)
    for name, more in (("eve", words), ("xia", ())):
        key = staging / "keys" / f"{name}.pem"
        done = must(
            *(capsys, "hold", "release", reference, "--key", key),
            *("--confirm", "route-design", *more, "--root", lab),
        )
    assert done.document["state"].startswith("released until")  # with the daemon's log

    ended, text, _ = command(ADA, "hold", "list", "--socket", socket)
    assert (ended, "released until" in text) == (0, True)
    number = reference.rpartition("#")[2]
    ended, text, errors = command(ADA, "hold", "fetch", number, "--socket", socket, "--json")
    assert ended == 0, text + errors
    answer = json.loads(text)
    assert (answer["hold"], answer["run"]["seed"]) == (reference, 4)
    assert answer["rows"]
    (row,) = Person(ADA, lambda: client.holds(socket)).result()
    assert row["state"].startswith("answered as")
    last = place.records("inference")[-1]
    assert (last["actor"]["uid"], last["actor"]["auth"]) == (ADA, "peercred")
    assert last["data"]["result"] == "complete"
    ended, text, _ = command(BEN, "hold", "fetch", number, "--socket", socket, "--json")
    assert (ended, json.loads(text)["code"]) == (1, "hold.missing")
    assert ada(place)["rows"]
    assert status(place)["running"] == 0
    must(capsys, "audit", "export", "-o", tmp_path / "export", "--root", lab)
    place.verify()
