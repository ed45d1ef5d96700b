"""The channel matrix: on every rung, as root and as an ordinary user, nothing gets out.

Receivers in a network namespace of our own are the ground truth; nothing leaves this machine.
"""

from __future__ import annotations

import pytest
from enclave_harness import needs_namespaces, run_as, starters

from airgap.enclave import probe, twin

PROBE = """
from airgap.enclave import host, twin
print(json.dumps(twin.probe_rung(ARGUMENTS[0], None, host.survey(), None)))
"""
DOCTOR = """
import os, subprocess
os.environ["COLUMNS"] = "80"
from airgap.cli.app import dispatch
import contextlib, io, pathlib, tempfile
folder = tempfile.mkdtemp()
page = io.StringIO()
with contextlib.redirect_stdout(page):
    import airgap.cli.common
    airgap.cli.common.stdout.file = page
    status = dispatch(["doctor", "--root", folder])
lines = [line.rstrip() for line in page.getvalue().splitlines()]
small = 10 < len(lines) <= 24 and max(map(len, lines)) <= 80
kept = [p.name for p in pathlib.Path(folder, "enclave").glob("probe-*.json")]
print(json.dumps({"status": status, "kept": len(kept), "screen": small}))
"""
RUNGS = ["A", "U", "B", "C"]

# What a control must have leaked over on any Linux that runs this: the matrix says something.
LEAKS = set(probe.CORE) & set(twin.HEARD)


@pytest.fixture(scope="module")
def reports():
    made = {}

    def report(starter, rung):
        if (starter, rung) not in made:
            made[starter, rung] = run_as(starter, PROBE, rung)
        return made[starter, rung]

    return report


@needs_namespaces
@pytest.mark.parametrize("starter", starters())
@pytest.mark.parametrize("rung", RUNGS)
def test_nothing_gets_out(starter, rung, reports):
    report = reports(starter, rung)
    verdict = twin.judge(report)
    assert verdict.sealed, verdict.reason
    assert verdict.sealed_heard == 0
    assert verdict.sealed_open == 0
    assert set(report["received"]["control"]) >= LEAKS
    assert report["own_network"], "the fixture had no network namespace of its own"
    assert report["foreign_abi"] == 31


@needs_namespaces
@pytest.mark.parametrize("starter", starters())
@pytest.mark.parametrize("rung", ["A", "U", "B"])
@pytest.mark.parametrize("name", list(probe.CHANNELS))
def test_channel(starter, rung, name, reports):
    report = reports(starter, rung)
    control, state = report["control"][name], {}
    for phase in ("stage1", "stage2", "convert"):
        state[phase] = report[phase][name]
        assert name not in report["received"][phase], f"{name} leaked in {phase}"
        assert state[phase][0] == "BLOCKED", f"{name} is open in {phase}"
    # Where not even the control could, the kernel lacks the channel, or its settings do.
    if control[0] != "OPEN":
        assert control[1] in probe.ABSENT, control
    elif name in twin.HEARD:
        assert name in report["received"]["control"]


@needs_namespaces
@pytest.mark.parametrize("starter", starters()[-1:])
def test_doctor_proves_this_host_and_keeps_the_result(starter):
    assert run_as(starter, DOCTOR) == {"status": 0, "kept": 3, "screen": True}
