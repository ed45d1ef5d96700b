"""A backup of a tree whose daemon answers: made, killed, and restored as a lab of its own.

Real daemon, real sealed worker, the real command in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from enclave_harness import needs_namespaces, needs_root
from service_lab import ADA, AIRGAP, JOB, SEED, Person, ada, lab_of, place_of, wait_for

from airgap.audit import load_ring, verify_log
from airgap.audit.query import read_records
from airgap.serve import Job
from airgap.service import client
from bundle.transit import new_transit_key
from policy.errors import AirgapError

pytestmark = [needs_root, needs_namespaces]
LARGE = 256 << 20  # of a file in the tree, so that a backup takes a while


@pytest.fixture
def lab(road):
    with lab_of(road) as copy:
        yield copy


@pytest.fixture
def place(lab):
    with place_of(lab) as running:
        yield running


@pytest.fixture
def media():
    """A folder with the key pair of who may restore."""
    with tempfile.TemporaryDirectory(prefix="airgap-media-", dir="/var/tmp") as folder:
        new_transit_key(Path(folder), "officer")
        yield Path(folder)


def back_up(lab, media, out):
    words = [AIRGAP, "backup", "-o", out, "--to", media / "officer.transit.pub.json", "--json"]
    return subprocess.Popen(
        [*words, "--root", lab], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def done(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err[-2000:])
    return json.loads(out)


def bring_back(lab, media, file, root, *anchors):
    words = [AIRGAP, "restore", file, "--vkey", lab / "keys" / "audit.vkey", "--json"]
    words += ["--transit-key", media / "officer.transit.pem", "--root", root]
    for anchor in anchors:
        words += ["--anchors", anchor]
    found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    return found.returncode, json.loads(found.stdout)


def large(lab):
    path = lab / "zz" / "large"
    path.parent.mkdir()
    with path.open("wb") as stream:
        stream.truncate(LARGE)


@contextlib.contextmanager
def at_work(running):
    """Let Ada ask again and again; yields a reader of when each began and how long it took.

    One at a time: two is all that she may have, and a place is free a moment after its answer.
    """
    with tempfile.TemporaryDirectory(prefix="airgap-asked-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o777)
        job = Job(JOB["task"], JOB["inputs"], "route-design", {"n": 2, "seed": SEED})

        def act():
            with (folder / "told").open("w") as told:
                while not (folder / "stop").exists():
                    begun = time.monotonic()
                    try:
                        client.run(running.socket, job, {}, lambda *_: None)
                        code = ""
                    except AirgapError as error:
                        code = error.code
                    told.write(f"{begun} {time.monotonic() - begun} {code}\n")
                    told.flush()

        def took():
            path = folder / "told"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            found = [tuple(line.split()) for line in lines if line.endswith("\n")]
            assert all(len(each) == 2 for each in found), [e for e in found if len(e) > 2]
            return [(float(begun), float(each)) for begun, each in found]

        asking = Person(ADA, act)
        try:
            yield took
        finally:
            (folder / "stop").touch()
            asking.result()
        took()


def test_a_backup_under_load_is_a_lab_of_its_own_and_nobody_waits(place, lab, media, tmp_path):
    place.start()
    assert ada(place)["rows"]
    large(lab)
    with at_work(place) as took:
        wait_for(lambda: len(took()) > 8, "answers before")
        before = max(each for _, each in took())
        begun = time.monotonic()
        told = done(back_up(lab, media, media / "lab.backup"))
        ended = time.monotonic()
        during = [each for at, each in took() if begun <= at <= ended]
        wait_for(lambda: took()[-1][0] > ended, "an answer after")
    print(f"backup: {ended - begun:.1f} s; slowest answer {before:.2f} s before, {max(during):.2f}")
    assert len(during) > 1
    assert max(during) < before + 5.0  # what a person would call waiting
    assert place.stop() == 0
    place.verify()
    head = tmp_path / "head"
    head.write_text(told["head"])
    ring = load_ring(lab / "keys" / "audit.vkey")
    assert verify_log(lab / "audit", vkey=ring, anchors=[head]).verdict == "good"

    with tempfile.TemporaryDirectory(prefix="airgap-second-", dir="/var/tmp") as folder:
        second = Path(folder) / "lab"
        status, found = bring_back(lab, media, media / "lab.backup", second, head)
        assert (status, found["records"], found["verdict"]["verdict"]) == (
            0,
            told["records"],
            "good",
        )
        with place_of(second) as again:
            again.start()
            assert ada(again)["rows"]
            assert again.stop() == 0
            again.verify()
        assert verify_log(second / "audit", vkey=ring, anchors=[head]).verdict == "good"
        # What was under way at that head was closed as unknown; all that ended before stands.
        kept = read_records(second / "audit")
        assert list(kept)[: told["records"]] == list(read_records(lab / "audit"))[: told["records"]]
        # And the other one has gone on: whoever has a newer head is told.
        newest = shutil.copy(lab / "audit" / "log" / "checkpoint", tmp_path / "newest")
        status, refused = bring_back(
            lab, media, media / "lab.backup", Path(folder) / "third", Path(newest)
        )
        assert (status, refused["code"]) == (1, "backup.log")
        assert os.listdir(folder) == ["lab"]  # noqa: PTH208 - hidden names too


def test_a_backup_that_is_killed_leaves_a_whole_file_or_none_and_the_daemon_serves(
    place, lab, media
):
    place.start()
    large(lab)
    out, chance = media / "lab.backup", random.Random(SEED)
    begun = time.monotonic()
    done(back_up(lab, media, out))
    whole, took = out.stat(), time.monotonic() - begun
    for number in range(6):
        if number == 3:
            out.unlink()
        process = back_up(lab, media, out)
        time.sleep(took * chance.random())
        process.kill()
        process.communicate()
        assert ada(place)["rows"], number
        if number < 3:
            assert out.stat().st_size >= whole.st_size
        elif out.exists():
            assert process.returncode == 0
        left = {path.name for path in media.iterdir()} - {out.name}
        assert left <= {
            "officer.transit.pem", "officer.transit.pub.json", f".{out.name}.partial"
        }  # fmt: skip
    done(back_up(lab, media, out))
    assert not (media / f".{out.name}.partial").exists()
    assert place.stop() == 0
    place.verify()
    with tempfile.TemporaryDirectory(prefix="airgap-second-", dir="/var/tmp") as folder:
        assert bring_back(lab, media, out, Path(folder) / "lab")[0] == 0


def test_a_daemon_that_is_killed_during_a_backup_comes_back_and_nothing_false_is_left(
    place, lab, media, tmp_path
):
    place.start()
    assert ada(place)["rows"]
    large(lab)
    out = media / "lab.backup"
    process = back_up(lab, media, out)
    wait_for((media / f".{out.name}.partial").exists, "the copy")
    place.kill()
    text, _ = process.communicate(timeout=300)
    told = json.loads(text)
    assert process.returncode == 3, told
    assert told["code"] == "audit.service"  # that it is complete could not be put on record
    place.start()
    assert ada(place)["rows"]
    assert place.stop() == 0
    place.verify()
    if out.exists():  # then it is whole: its head was signed, and the log goes on from there
        root = tmp_path / "second"
        assert bring_back(lab, media, out, root)[0] == 0
    begins = [r for r in place.records("admin.backup") if "result" not in r["data"]]
    assert len(begins) == 1


def test_a_lab_whose_daemon_is_stopped_is_backed_up_as_before(place, lab, media):
    place.start()
    assert ada(place)["rows"]
    assert place.stop() == 0
    told = done(back_up(lab, media, media / "lab.backup"))
    with tempfile.TemporaryDirectory(prefix="airgap-second-", dir="/var/tmp") as folder:
        status, found = bring_back(lab, media, media / "lab.backup", Path(folder) / "lab")
        assert (status, found["records"]) == (0, told["records"])
