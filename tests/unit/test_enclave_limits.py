"""A poor start: low limits, stale folders, closed folders, ids that are nobody's."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from enclave_harness import NAMESPACES, ROOT, needs_namespaces, needs_root, run_as
from enclave_plans import FACTS

from airgap.enclave import SealSpec, fixture, launcher, plan, process, reading, seal
from policy.errors import FaultError

# -- limits ---------------------------------------------------------------------------------------

UNDER = """
import json, resource, sys, time
from airgap.enclave import SealSpec, launch
from policy.errors import AirgapError
name, value = sys.argv[1], int(sys.argv[2])
resource.setrlimit(getattr(resource, name), (value, value))
started = time.monotonic()
try:
    with launch(SealSpec(profile="worker", program="airgap.enclave.guest:create")) as enclave:
        found = ["", enclave.rung, ""]
except AirgapError as error:
    found = [error.code, error.message, error.hint]
print(json.dumps([*found, time.monotonic() - started]))
"""


def start_under(name, value):
    done = subprocess.run(
        [sys.executable, "-c", UNDER, name, str(value)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_namespaces
@pytest.mark.parametrize("files", [12, 20, 63, 64, 300, process.DESCRIPTORS - 1])
def test_a_low_limit_on_files_is_a_clear_refusal_at_once(files):
    code, message, hint, seconds = start_under("RLIMIT_NOFILE", files)
    assert code == "enclave.limits"
    assert f"may open {files} files (ulimit -n)" in message
    assert "ulimit -n 1024" in hint
    assert seconds < 10


@needs_namespaces
def test_the_least_limit_on_files_is_enough_for_probe_and_seal():
    code, rung, _, _ = start_under("RLIMIT_NOFILE", process.DESCRIPTORS)
    assert (code, rung) == ("", "A" if NAMESPACES else "B")


@needs_namespaces
def test_a_low_limit_on_memory_is_told_without_a_trace():
    code, message, hint, _ = start_under("RLIMIT_DATA", 30_000_000)
    assert code in {"enclave.worker", "enclave.probe"}  # the broker's own thread, or the probe's
    assert "Traceback" not in message
    assert hint


TRACE = "Traceback (most recent call last):\n  File 'x', line 1, in <module>\nMemoryError: no\n"


def test_last_words_hold_no_trace():
    assert process.last_words(TRACE) == "; its last words: 'MemoryError: no'"
    assert process.last_words("killed\n") == "; its last words: 'killed\\n'"
    assert process.last_words(" \n") == ""
    assert len(process.last_words("x" * 10_000)) < 500


def test_a_thread_that_cannot_start_is_a_fault(monkeypatch):
    import threading

    def refuse(_):
        raise RuntimeError("can't start new thread")

    assert process.start_thread(lambda: None, "x").name == "x"
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(FaultError) as caught:
        process.start_thread(lambda: None, "x")
    assert caught.value.code == "enclave.worker"


def test_a_probe_takes_what_the_hard_limit_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        fixture.raise_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, process.DESCRIPTORS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- folders of probes that were killed -----------------------------------------------------------


def test_only_folders_of_dead_probes_of_this_user_are_removed(tmp_path):
    dead = subprocess.Popen(["/bin/true"])
    dead.wait()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    stale = tmp_path / f"{fixture.FOLDER}{dead.pid}-abc"
    (stale / "shared").mkdir(parents=True)
    (stale / "link").symlink_to(outside)
    mine = tmp_path / f"{fixture.FOLDER}{os.getpid()}-abc"
    mine.mkdir()
    link = tmp_path / f"{fixture.FOLDER}{dead.pid}-link"
    link.symlink_to(outside)
    file = tmp_path / f"{fixture.FOLDER}{dead.pid}-file"
    file.write_text("")
    other = tmp_path / f"{fixture.FOLDER}x-abc"
    other.mkdir()
    reused = tmp_path / f"{fixture.FOLDER}{os.getpid()}-old"
    reused.mkdir()
    os.utime(reused, (1, 1))  # older than the process that has its number now
    if ROOT:
        foreign = tmp_path / f"{fixture.FOLDER}{dead.pid}-foreign"
        foreign.mkdir()
        os.chown(foreign, 4711, 4711)
    fixture.remove_stale(tmp_path)
    assert not stale.exists()
    assert not reused.exists()
    assert (outside / "kept").exists()
    for path in (mine, link, file, other):
        assert path.exists(), path
    assert not ROOT or foreign.exists()


def test_the_start_of_a_process_is_read():
    assert abs(reading.started_at(os.getpid()) - time.time()) < 7200
    assert reading.started_at(1) <= reading.started_at(os.getpid())


KILLED = """
import json, os, signal, threading, time
from pathlib import Path
from airgap.enclave import host, twin
parent = Path("/tmp")  # a probe has an environment of its own
facts = host.survey()
def probe():
    twin.probe_rung("A", None, facts, None, fresh=True)
def started():
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    return thread
thread = started()
def own():
    for path in parent.glob(f"airgap-probe-*"):
        try:
            status = Path(f"/proc/{path.name.split('-')[2]}/status").read_text()
        except OSError:
            continue
        if f"PPid:\\t{os.getpid()}\\n" in status:
            return path
while not (left := own()):
    if not thread.is_alive():  # it was over between two looks: once more
        thread = started()
    time.sleep(0.005)
os.kill(int(left.name.split("-")[2]), signal.SIGKILL)
thread.join()
after = left.exists()
probe()
print(json.dumps([after, left.exists()]))
"""


@needs_namespaces
def test_a_probe_that_was_killed_leaves_nothing_behind_after_the_next():
    assert run_as("user", KILLED) == [True, False]


# -- who and where --------------------------------------------------------------------------------


def test_a_uid_that_is_nobodys_is_refused_by_name():
    facts = replace(FACTS, uid=0)
    assert plan.identity_of(facts, 61200)[0] == [61200, 61200]
    for uid in (0, facts.overflow_uid):
        with pytest.raises(plan.PlanError, match=f"uid would be {uid}"):
            plan.identity_of(facts, uid)


def test_one_reason_for_all_rungs_is_said_once():
    facts = replace(FACTS, uid=FACTS.overflow_uid)
    spec = SealSpec(profile="worker", program="x:y")
    with pytest.raises(seal.SealRefused) as caught:
        seal.climb(spec, facts, lambda *_: None)
    assert caught.value.code == "enclave.rung"
    assert caught.value.message.count("unknown owners") == 1


CLOSED = """
import tempfile
from pathlib import Path
from airgap.enclave import launcher
folder = Path(tempfile.mkdtemp()) / "closed"
folder.mkdir(mode=0o755)
(folder / "file").write_text("")
first = launcher.closed_above(str(folder / "file"))
folder.chmod(0)
second = launcher.closed_above(str(folder / "file"))
print(json.dumps([first, second, str(folder)]))
"""


@needs_root
def test_the_closed_folder_is_named():
    first, second, folder = run_as("user", CLOSED)
    assert first is None
    assert second == folder
    assert launcher.closed_above("/usr/bin/env") is None


@needs_root
@pytest.mark.skipif(
    os.access("/root", os.X_OK) and Path("/root").stat().st_mode & 1 == 1, reason="open"
)
def test_a_source_below_a_closed_folder_is_refused_with_the_folder():
    if not plan.interpreter().startswith("/root/"):
        pytest.skip("this interpreter does not lie in root's home")
    with pytest.raises(seal.SealRefused) as caught:
        seal.launch(SealSpec(profile="worker", program="x:y", rung="B", min_rung="B"))
    assert caught.value.code == "enclave.files"
    assert "the folder '/root' is closed to it" in caught.value.message
    assert "outside of closed folders" in caught.value.hint
