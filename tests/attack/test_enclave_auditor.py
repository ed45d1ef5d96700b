"""The auditor's page, run for real: each command of it against a live sealed worker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from enclave_harness import HERE, needs_namespaces, needs_root

from airgap.enclave import filters, plan
from airgap.enclave.profiles import PROFILES

PAGE = (HERE.parent / "docs" / "auditor.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = next(block for block in BLOCKS if "/proc/$P/status" in block).strip().splitlines()
AIRGAP = [sys.executable, "-I", str(Path(sys.executable).with_name("airgap"))]
pytestmark = [needs_namespaces, needs_root]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Hold a worker open by the command, as an auditor does; yields its evidence and the tree."""
    root = tmp_path_factory.mktemp("tree")
    process = subprocess.Popen(
        [*AIRGAP, "enclave", "hold", "--seconds", "60", "--json", "--root", str(root)],
        stdout=subprocess.PIPE,
        text=True,
    )
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            break
    yield json.loads(text), root
    process.send_signal(2)
    process.wait(20)
    process.stdout.close()


def run(command, pid):
    """Run a command of the page in a shell."""
    tool = re.sub(r"^nsenter -t \$P -n ", "", command).split()[0]
    if tool != "airgap" and shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    folder = Path(shutil.which("airgap") or sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", command],
        env={"P": str(pid), "PATH": f"{Path(sys.executable).parent}:{folder}:{os.environ['PATH']}"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return done.stdout.strip().splitlines(), done.returncode


def status(lines, _):
    found = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    assert found["NoNewPrivs"] == ["1"]
    assert found["Seccomp"] == ["2"]
    assert found["Seccomp_filters"] == ["2"]
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(found[name][0], 16) == 0
    assert len(set(found["Uid"])) == 1
    assert found["Uid"][0] != "0"


def namespaces(lines, _):
    own = [str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("net", "pid", "mnt", "ipc")]
    assert len(lines) == 5
    assert not set(lines[:4]) & set(own)


def link(lines, _):
    assert len(lines) == 1
    assert lines[0].split()[:2] == ["lo", "DOWN"]


def nothing(lines, _):
    assert lines == []


def kernel_rows(lines, _):
    assert all(line.startswith("nl UNCONN") for line in lines), lines


def descriptors(lines, _):
    found = dict(re.findall(r"(\d+) -> (\S+)", "\n".join(lines)))
    assert {n: target.partition(":")[0] for n, target in found.items()} == {
        "0": "/dev/null",
        "1": "/dev/null",
        "2": "pipe",
        "3": "pipe",
        "4": "pipe",
    }


def mounts(lines, _):
    found = {line.split()[0]: line.split()[1].split(",") for line in lines}
    writable = {point for point, options in found.items() if "ro" not in options}
    assert writable == {"/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"}
    assert "ro" in found["/"]


def environment(lines, _):
    built = plan.built_environment(threads=2) | dict(PROFILES["worker"].environment)
    assert dict(line.split("=", 1) for line in lines) == built


def limits(lines, _):
    for name in ("Max core file size", "Max file size"):
        line = next(line for line in lines if line.startswith(name))
        assert line.removeprefix(name).split()[:2] == ["0", "0"]


def live_filters(lines, _):
    assert [(line.split(":")[0], line.split()[-1]) for line in lines] == [
        ("index 0", "stage1"),
        ("index 1", "stage2"),
    ]
    assert filters.digest(filters.stage1()) in lines[0]


def published(lines, _):
    assert lines[0].split()[0] == filters.digest(filters.stage1())


def records(lines, pid):
    if not lines:
        pytest.skip("this kernel log shows no denied call: auditd takes them, or the rate is over")
    assert all("syscall=" in line and "pid=" in line for line in lines)
    assert pid > 1


EXPECTED = {
    "status": status,
    "/ns/net": namespaces,
    "ip -br link": link,
    "ip -4 route": nothing,
    "ss -Hanp": kernel_rows,
    "/fd": descriptors,
    "mountinfo": mounts,
    "environ": environment,
    "limits": limits,
    "enclave filters": live_filters,
    "sha256sum": published,
    "dmesg": records,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_answers_as_the_page_says(command, held):
    document, _ = held
    if document["rung"] != "A":
        pytest.skip(f"this host reaches rung {document['rung']}; the page is of rung A")
    (check,) = [check for name, check in EXPECTED.items() if name in command]
    pid = document["proc"]["pid"]
    lines, code = run(command, pid)
    check(lines, pid)
    if "dmesg" not in command:
        assert code == 0


def test_every_expectation_has_its_command():
    assert len(COMMANDS) == len(EXPECTED)
    for name in EXPECTED:
        assert sum(name in command for command in COMMANDS) == 1


def test_the_pid_of_a_running_worker_is_listed(held):
    document, root = held
    done = subprocess.run(
        [*AIRGAP, "enclave", "show", "--json", "--root", str(root)],
        capture_output=True,
        text=True,
        check=True,
    )
    (found,) = json.loads(done.stdout)["running"]
    assert found["proc"] == document["proc"]


def test_the_filters_of_another_process_are_no_match_or_not_told(held):
    del held
    done = subprocess.run(
        [*AIRGAP, "enclave", "filters", "--pid", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found.get("code") == "enclave.evidence" or found["filters"] == []


def test_the_probe_of_the_page_runs_as_it_stands_there(tmp_path):
    source = next(block for block in BLOCKS if "def prepare" in block)
    path = tmp_path / "my_probe.py"
    path.write_text(source)
    for stage, errno in (("1", 13), ("2", 1)):
        done = subprocess.run(
            [*AIRGAP, "enclave", "audit", "--probe", str(path), "--stage", stage, "--json"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
        )
        found = json.loads(done.stdout)
        assert (done.returncode, found["verdict"], found["outcome"]) == (0, "SEALED/A", "exited")
        assert found["output"].startswith(f"[Errno {errno}]")
        assert "OPEN" not in found["output"]
