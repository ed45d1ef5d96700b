"""Ctrl-C in each long step: exit 130, nothing half-written, nobody left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest_road import PINS, SNAPSHOT

PROGRAM = [sys.executable, "-I", str(Path(sys.executable).with_name("airgap"))]


def interrupt(argv, seconds, cwd):
    """Start a command in a session of its own, send SIGINT to all of it as a terminal would.

    Returns the exit status, what it printed, and the processes that it had at that moment.
    """
    child = subprocess.Popen(
        [*PROGRAM, *map(str, argv)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    time.sleep(seconds)
    family = descendants(child.pid)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGINT)
    text = child.communicate(timeout=60)[0].decode()
    return child.returncode, text, family


def table():
    """Return (pid, start time) -> parent pid of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                found[int(entry.name), fields[19]] = int(fields[1])
    return found


def descendants(pid):
    """Return (pid, start time) of everything below `pid`."""
    parents = table()
    family, grown = {pid}, True
    while grown:
        below = {key[0] for key, parent in parents.items() if parent in family}
        grown = not below <= family
        family |= below
    return {key for key in parents if key[0] in family - {pid}}


def arguments(road, tmp_path):
    return {
        "inspect": ("inspect", SNAPSHOT),
        "build": (
            *("build", SNAPSHOT, "-o", tmp_path / "x.agb", "--name", "logos-ref-tiny"),
            *("--version", "1.0.0", "--key", road.staging / "keys" / "builder.pem", "--pin", PINS),
            *("--origin", "local:logos-ref-tiny", "--supplier", "airgap project"),
            *("--jurisdiction", "none", "--modality", "molecule", "--root", road.staging),
        ),
        "verify": ("verify", road.bundle, "--root", road.lab),
        "install": ("install", road.bundle, "--root", tmp_path / "lab"),
        "run": (
            *("run", "material", "-n", "2000", "--project", "route-design"),
            *("--html", tmp_path / "r.html", "--root", tmp_path / "lab"),
        ),
        "doctor": ("doctor", "--root", road.lab),
        "audit verify": ("audit", "verify", "--root", road.lab),
        "demo": ("demo", "--out", tmp_path / "demo", "--source", SNAPSHOT),
    }


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("inspect", 0.35),
        ("build", 1.0),
        ("build", 4.0),
        ("build", 9.0),
        ("verify", 0.4),
        ("install", 0.5),
        ("run", 0.7),
        ("run", 2.5),
        ("doctor", 0.6),
        ("audit verify", 0.4),
        ("demo", 6.0),
    ],
)
def test_ctrl_c_ends_cleanly(road, tmp_path, name, seconds):
    lab = tmp_path / "lab"
    if name == "install":
        lab.mkdir(mode=0o700)
        shutil.copy(road.lab / "site.toml", lab)
        shutil.copytree(road.lab / "trust", lab / "trust")
    elif name == "run":
        shutil.copytree(road.lab, lab, symlinks=True)
    status, text, family = interrupt(arguments(road, tmp_path)[name], seconds, tmp_path)
    # 0 where the machine was faster than the finger; 3 is the verdict of a log without an anchor
    assert status in ({0, 3, 130} if name == "audit verify" else {0, 130}), text
    assert "Traceback" not in text
    time.sleep(0.3)
    assert not family & table().keys()
    left = {path.name for path in tmp_path.iterdir()} - {"lab", "demo"}
    kept = {".x.agb.work"} if name == "build" else set()  # what the next build goes on from
    assert left <= ({"x.agb", "r.html"} if status == 0 else kept)
    if name in {"run", "install"}:  # the log closed the intent; the next command works
        done = subprocess.run(
            [*PROGRAM, "audit", "verify", "--root", lab, "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in {0, 3}, done.stdout
