"""The units under a systemd of their own: installed, started, asked, stopped, killed, taken away.

`python tests/live_systemd.py --demo demo-out --work build/live-systemd` boots a Debian root with
python3, openssl and systemd alone (`machines.py`), installs from a split bundle on a read-only
mount with `sh install.sh --system`, and looks at what the kernel and systemd say is in force: not
at what a unit file asks for. Where no machine can boot it says so and ends with 77.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import bare_roots
import machines
from bare_roots import CACHE, REPOSITORY, SKIPPED, make_medium, make_root
from machines import Machine, booted

PACKAGES = ("python3", "openssl", "systemd", "systemd-sysv")
AIRGAP, TREE, SOCKET = "/opt/airgap/bin/airgap", "/var/lib/airgap", "/run/airgap-broker.sock"
SECRET = "CC(=O)Nc1ccc(O)cc1"  # what a person asks about: it belongs in no journal
SERVICES = ("airgap.service", "airgap-audit.service")
# What `systemd-analyze security` may say at most: 0.0 is the best.
EXPOSURE = {"airgap.service": 4.5, "airgap-audit.service": 1.0, "airgap-doctor.service": 6.0}
SITE = """
[service]
socket = "/run/airgap-broker.sock"

[audit]
socket = "/run/airgap/audit.sock"

[[person]]
id = "lars"
name = "Lars Lab"
uid = 0
roles = ["administrator"]
projects = ["route-design"]
training_until = 2027-06-30
us_person = true
affiliations = []
"""
ROLES = """
[[grant]]
group = "chemists"
roles = ["principal_investigator"]
projects = ["route-design"]
"""


NOT_CONFINING = ("Type", "NotifyAccess", "ExecStart", "ExecReload", "Restart", "RestartSec")
NOT_CONFINING += ("RuntimeDirectory", "RuntimeDirectoryMode", "Description", "Documentation")
NOT_CONFINING += ("Requires", "After", "Also", "WantedBy", "TimeoutStartSec", "TimeoutStopSec")
NOT_CONFINING += ("RemainAfterExit", "KillMode")
# The probe must find these open without any option, or its other findings would prove nothing.
# A virtual machine may withhold these capabilities, and a control group the share of real time.
MAY_LACK = {"raise a limit", "renice", "be real-time"}
IN_FORCE = {
    "NoNewPrivs": "1",
    "Seccomp": "2",
    "Umask": "0077",
    **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16),
}
# What a person is told whose request is under way when a service is killed.
CUT_OFF = {"airgap.service": "service.absent", "airgap-audit.service": "audit.service"}
START = "systemctl enable --now airgap-audit.service airgap.socket airgap.service"
WHERE = f"--project route-design --socket {SOCKET}"
NODES = "touch /tmp/seen-by-all; mknod /dev/tty9 c 4 9; mknod /dev/kmsg c 1 11"
UNDER_WAY_S = 2.0  # from the connection to the worker, by far
# Records of a year ago, so that there is a segment to prune: written by the log's own account.
PAST = """
import sys
from pathlib import Path
from airgap.audit import AuditLog, Clock, Event

class Past(Clock):
    def wall_ns(self):
        return super().wall_ns() - 400 * 86_400 * 10**9

tree, size = Path(sys.argv[1]), int(sys.argv[2])
event = Event("verify.result", data={"verdict": "good", "size": 1, "anchored": 0})
with AuditLog.open(tree / "audit", key=tree / "keys" / "audit.pem", clock=Past()) as log:
    while log.size < size:
        for _ in range(500):
            log._submit(event, None, None)
        log.append(event)
"""
SEGMENT = 65_536
PAPER_SETTINGS = """
set -eu
mount -t tmpfs paper /proc/sys
file=/etc/sysctl.d/60-airgap.conf
grep '^[a-z]' $file | while read -r name _ value; do
    mkdir -p /proc/sys/$(dirname $(echo $name | tr . /))
    : > /proc/sys/$(echo $name | tr . /)
done
/lib/systemd/systemd-sysctl $file
grep '^[a-z]' $file | while read -r name _ value; do
    test "$(cat /proc/sys/$(echo $name | tr . /))" = "$value"
done
"""
# What a unit's options leave open of the tries of `unit_probe.py`. "rooted" is the unit without
# its account and its bounding set: then each of the other options has to hold alone.
LOG_AND_NAME = ("read /proc/kmsg", "set the host's name")
ANYBODY = {"speak Unix sockets", "see more than processes", "write the tree"}
LAUNCHES = ANYBODY | {"map writable code", "make a user namespace", "mount a /proc in a namespace"}
LAUNCHES |= {"speak IP", "speak netlink", "see processes of others"}
AS_ROOT = {"make a UTS namespace"}
EITHER = {"see processes of others"}  # which systemd hides from root as well, or does not
OPEN = {
    # Left open for it: the launcher makes namespaces, and the probe's control must be able to leak.
    ("airgap.service", "as it is"): LAUNCHES,
    # Its account alone keeps it from these: their options would cover a part of /proc.
    ("airgap.service", "rooted"): LAUNCHES | AS_ROOT | {"set a kernel setting", *LOG_AND_NAME},
    ("airgap-audit.service", "as it is"): ANYBODY,
    ("airgap-audit.service", "rooted"): ANYBODY,
    # Root with twelve capabilities, as a request that root starts.
    ("airgap-doctor.service", "as it is"): LAUNCHES | AS_ROOT,
    ("airgap-doctor.service", "rooted"): LAUNCHES | AS_ROOT,
}


def main() -> int:
    """Make a medium and a root, boot, look; exits with the first failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="what `airgap demo` left")
    parser.add_argument("--work", type=Path, required=True, help="a folder to work in; cleared")
    parser.add_argument("--medium", type=Path, help="where the medium is, or is made and stays")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--airgap", type=Path, default=REPOSITORY, help="source that is installed")
    parser.add_argument("--transcript", type=Path, help="where to write what was typed and said")
    options = parser.parse_args()
    reason = bare_roots.reason_to_skip(*machines.TOOLS) or machines.reason_to_skip()
    if reason:
        print(f"live-systemd: SKIPPED, {reason}")
        return SKIPPED
    # Ctrl-C and a polite kill both unwind: the machine ends, and its control groups go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work, typed = options.work.absolute(), list[str]()
    machines.clear(work)
    work.mkdir(parents=True)
    disc = (options.medium or work / "disc").absolute()
    make_medium(options.demo.absolute(), disc, options.airgap.absolute())
    root = work / "root"
    if not make_root(root, options.cache, PACKAGES):
        print("live-systemd: SKIPPED, debootstrap reached no mirror and none is kept")
        return SKIPPED
    started = time.monotonic()
    try:
        for steps in (FIRST_DAY, AFTER_A_POWER_CUT):
            with booted(root, disc) as machine:
                lab = Lab(machine, typed, options.demo.absolute() / "staging" / "keys")
                for step in steps:
                    begun = time.monotonic()
                    step(lab)
                    print(f"live-systemd: {step.__name__}: {time.monotonic() - begun:.1f} s")
                    sys.stdout.flush()
    finally:
        if options.transcript is not None:
            options.transcript.write_text("\n".join(typed))
        machines.clear(work)
    print(f"live-systemd: all held after {time.monotonic() - started:.0f} s")
    return 0


class Lab:
    """A booted machine, and what was typed there."""

    def __init__(self, machine: Machine, typed: list[str], keys: Path) -> None:
        self.machine, self.typed = machine, typed
        self.keys = keys  # of the people of the staging host

    def type(self, line: str, *, user: str = "", status: int = 0, stdin: str = "") -> str:
        """Run a line of shell as a person would, and expect how it ends."""
        done = self.machine.run("sh", "-c", line, user=user, stdin=stdin)
        self.typed += [f"{'$' if user else '#'} {line}", done.said]
        if done.status != status:
            log = self.machine.run("journalctl", "--no-pager", "-n", "25", "-u", "airgap*").said
            raise AssertionError(f"{line}: ended with {done.status}\n{done.said}\n{log}")
        return done.said

    def wait(self, what: str, holds: Callable[[], bool], limit: float = 60.0) -> None:
        """Wait until something holds."""
        until = time.monotonic() + limit
        while not holds():
            if time.monotonic() > until:
                log = self.machine.run("journalctl", "--no-pager", "-n", "40").said
                raise AssertionError(f"{what}: not within {limit:.0f} s\n{log}")
            time.sleep(0.2)

    def ask(self, user: str, *, status: int = 0, n: int = 4, more: str = "") -> dict:
        """Let a person ask the daemon."""
        line = f"{AIRGAP} run retrosynthesis --smiles '{SECRET}' -n {n} {WHERE}{more} --json"
        return json.loads(self.type(line, user=user, status=status))

    def main_pid(self, unit: str) -> int:
        """Return the main process of a unit, as the machine counts; 0 where there is none."""
        return int(self.machine.show(unit, "MainPID")["MainPID"])

    def try_ask(self, user: str, n: int) -> dict:
        """Let a person ask, whatever comes of it."""
        line = f"{AIRGAP} run retrosynthesis --smiles '{SECRET}' -n {n} {WHERE} --json"
        return json.loads(self.machine.run("sh", "-c", line, user=user).said)

    @contextmanager
    def held_up(self, user: str) -> Iterator[Future[dict]]:
        """Let a person ask while the worker is stopped, so that her request is under way.

        The worker goes on when the block ends, where it is still there.
        """
        (worker,) = [each for each in self.sealed() if each["profile"] == "worker"]
        pid = self.machine.pid_outside(worker["proc"]["pid"])
        with ThreadPoolExecutor() as pool:
            os.kill(pid, signal.SIGSTOP)
            try:
                asked = pool.submit(self.try_ask, user, 4)
                self.wait("her connection", self.connected)
                time.sleep(UNDER_WAY_S)
                assert not asked.done(), f"it ended at once: {str(asked.result())[:500]}"
                yield asked
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def connected(self) -> bool:
        """Tell whether a connection at the broker's socket is open."""
        said = self.machine.good("cat", "/proc/net/unix")
        return any(" 03 " in line and line.endswith(SOCKET) for line in said.splitlines())

    def verify(self, name: str) -> None:
        """Export the log and verify it with the public key, back to a receipt that a person has."""
        receipt, folder = f"/home/ada/{name}.tlog-proof", f"/root/{name}"
        self.ask("ada", more=f" --receipt {receipt}")
        self.type(f"{AIRGAP} audit export -o {folder} --root {TREE}")
        vkey = f"{TREE}/keys/audit.vkey"
        self.type(f"{AIRGAP} audit verify {folder} --vkey {vkey} --anchors {receipt}")

    def probe(self, name: str, text: str, *, rooted: bool) -> dict:
        """Run `unit_probe.py` under the options of a unit and return what it found."""
        options = [line for line in text.splitlines() if "=" in line and line[:1] != "#"]
        own = ("User", "Group", "CapabilityBoundingSet") if rooted else ()
        kept = [line for line in options if line.split("=")[0] not in (*own, *NOT_CONFINING)]
        unit, said = "probe.service", "/run/probe.json"
        lines = ["[Unit]", f"Description={name}", "[Service]", "Type=oneshot", *kept]
        network = self.machine.good("readlink", "/proc/1/ns/net").strip()
        place = "audit" if "User=airgap-audit" in text else "holds"
        lines += [f"Environment=PROBE_PLACE={TREE}/{place} PROBE_NETWORK={network}"]
        lines += [f"StandardOutput=truncate:{said}"]
        lines += ["ExecStart=/usr/bin/python3 -I /opt/unit_probe.py"]
        self.machine.good("tee", f"/run/systemd/system/{unit}", stdin="\n".join(lines) + "\n")
        self.machine.good("systemctl", "daemon-reload")
        self.machine.good("systemctl", "restart", unit)
        return json.loads(self.machine.good("cat", said))

    def sealed(self) -> list[dict]:
        """Return the sealed processes that run."""
        line = f"{AIRGAP} enclave show --root {TREE} --json"
        found = json.loads(self.machine.good("sh", "-c", line))
        return found["running"]


def installs(lab: Lab) -> None:
    """From the medium: accounts, units, the log's service, the model; again, and nothing."""
    machine = lab.machine
    facts = (machine.medium / "site.toml").read_text()
    facts = re.sub(r"(?m)^uid = 0 .*$", 'account = "ada"', facts)
    machine.file("/root/site.toml").write_text(facts + SITE)
    fingerprint = (machine.medium / "fingerprint").read_text()
    line = "sh /media/disc/install.sh --bundle /media/disc --system"
    line += " --site /root/site.toml --model /media/disc/media/model.agb"
    said = lab.type(line, stdin=fingerprint)
    assert "admitted: logos-ref-tiny" in said, said
    assert f"next: {START}" in said, said
    assert "nothing to do" in lab.type(line, stdin=fingerprint)
    lab.type(f"{AIRGAP} doctor --system --root {TREE}")


def serves(lab: Lab) -> None:
    """People, roles, and the daemon: ready when the worker is sealed, and not before."""
    machine = lab.machine
    lab.type("groupadd chemists")
    lab.type("useradd --create-home --groups airgap-users,chemists ada")
    lab.type("useradd --create-home --groups airgap-users ben")
    lab.type("useradd --create-home eve")
    machine.file("/etc/airgap/roles.toml").write_text(ROLES)
    lab.type(f"{AIRGAP} roles lint --root {TREE}")
    lab.type(START)
    rungs = [each["rung"] for each in lab.sealed()]  # both sealed, and proven, before it is ready
    print(f"live-systemd: ready with rungs {rungs}")
    assert rungs == (["A", "A"] if namespaces_for_users() else ["B", "B"]), rungs
    lab.type("systemctl status --no-pager --lines=4 airgap.service airgap.socket airgap-audit")
    lab.ask("ada")


def namespaces_for_users() -> bool:
    """Tell whether this kernel lets an account without rights make a user namespace and use it."""
    settings = Path("/proc/sys")
    restricted = settings / "kernel/apparmor_restrict_unprivileged_userns"
    most = int((settings / "user/max_user_namespaces").read_text())
    return most > 0 and not (restricted.exists() and restricted.read_text().strip() == "1")


def activates(lab: Lab) -> None:
    """The daemon is started by the first connection; who may not is refused, with a code."""
    machine = lab.machine
    machine.good("systemctl", "stop", "airgap.service")
    assert machine.show("airgap.service", "ActiveState")["ActiveState"] == "inactive"
    assert lab.ask("ada")["summary"]["n"] == 4
    assert machine.show("airgap.service", "ActiveState")["ActiveState"] == "active"
    assert lab.ask("ben", status=1)["code"] == "site.person"
    absent = lab.ask("eve", status=3)
    assert absent["code"] == "service.absent", absent
    assert "Permission denied" in absent["error"], absent


def confines(lab: Lab) -> None:
    """What the options of the units are worth: tried under each, alone and as root, and as is."""
    machine = lab.machine
    shutil.copy(REPOSITORY / "tests" / "unit_probe.py", machine.file("/opt/unit_probe.py"))
    machine.file("/usr/lib/modules").mkdir(exist_ok=True)  # a bare root has none to hide
    machine.good("sh", "-c", NODES)
    control = lab.probe("control", "[Service]\n", rooted=True)["tries"]
    lacking = {name for name, came in control.items() if came != "open"} - MAY_LACK
    assert not lacking, f"not even without options: {lacking}"
    for unit in (*SERVICES, "airgap-doctor.service"):
        text = machine.good("systemctl", "cat", unit)
        for kind in ("as it is", "rooted"):
            found = lab.probe(f"{unit}, {kind}", text, rooted=kind == "rooted")
            beside = MAY_LACK | (EITHER if kind == "rooted" else set())
            left = {name for name, came in found["tries"].items() if came == "open"} - beside
            print(f"live-systemd: {unit}, {kind}: open: {', '.join(sorted(left))}")
            differs = left ^ (OPEN[unit, kind] - beside)
            assert not differs, (unit, kind, differs, found["tries"])
        if unit not in SERVICES:
            continue
        own = Path(f"/proc/{machine.pid_outside(lab.main_pid(unit))}")
        status = dict(line.split(":\t", 1) for line in (own / "status").read_text().splitlines())
        for name, value in IN_FORCE.items():
            assert status[name] == value, (unit, name, status[name])
        assert "0" not in status["Uid"].split(), status["Uid"]
        if unit == "airgap.service":  # a covered /proc costs rung A, under newer systemd at once
            points = [line.split()[4] for line in (own / "mountinfo").read_text().splitlines()]
            assert not [point for point in points if point.startswith("/proc/")], points
        limits = (own / "limits").read_text()
        assert re.search(r"(?m)^Max core file size +0 +0 ", limits), limits
        assert (own / "ns/net").readlink() != Path(f"/proc/{machine.pid}/ns/net").readlink()
        said = machine.good("systemd-analyze", "security", "--no-pager", unit)
        score = float(re.findall(r"Overall exposure level for \S+: ([0-9.]+)", said)[0])
        print(f"live-systemd: {unit}: exposure {score}, at most {EXPOSURE[unit]}")
        assert score <= EXPOSURE[unit], said


def drains(lab: Lab) -> None:
    """A stop waits for the request under way and its answer; nobody is cut off."""
    machine = lab.machine
    with ThreadPoolExecutor() as pool:
        with lab.held_up("ada") as asked:
            stopped = pool.submit(machine.good, "systemctl", "stop", "airgap.service")
            time.sleep(UNDER_WAY_S)
            assert not stopped.done(), "the stop did not wait"
            state = machine.show("airgap.service", "ActiveState")["ActiveState"]
            assert state == "deactivating", state
        assert asked.result()["summary"]["n"] == 4
        stopped.result()
    assert machine.show("airgap.service", "Result")["Result"] == "success"
    machine.good("systemctl", "start", "airgap.service")
    before = lab.main_pid("airgap.service")
    machine.good("systemctl", "reload", "airgap.service")
    assert lab.main_pid("airgap.service") == before
    lab.ask("ada")
    machine.good("systemctl", "restart", "airgap.service")
    assert lab.main_pid("airgap.service") not in {0, before}
    lab.ask("ada")


def comes_back(lab: Lab) -> None:
    """Killed daemon and killed log: both come back, nothing sealed is left, the log holds."""
    machine = lab.machine
    for unit in SERVICES:
        before, sealed = lab.main_pid(unit), [each["proc"]["pid"] for each in lab.sealed()]
        with lab.held_up("ada") as asked:
            machine.good("systemctl", "kill", "--signal=KILL", "--kill-whom=main", unit)
        code = asked.result().get("code", "answered")
        print(f"live-systemd: {unit} killed: who asked was told {code}")
        assert code == CUT_OFF[unit], code
        lab.wait(f"{unit} again", lambda u=unit, b=before: lab.main_pid(u) not in {0, b})
        lab.wait("an answer", lambda: "code" not in lab.try_ask("ada", 2))
        if unit == "airgap.service":
            left = {each["proc"]["pid"] for each in lab.sealed()} & set(sealed)
            assert not left, f"sealed processes outlived their broker: {left}"
        assert int(machine.show(unit, "NRestarts")["NRestarts"]) >= 1
    lab.verify("export-1")


def backs_up(lab: Lab) -> None:
    """A backup while people ask, by root; restored beside, it is the log up to its head."""
    machine = lab.machine
    lab.type(f"{AIRGAP} keys transit officer --root /root/officer")
    before = [lab.main_pid(unit) for unit in SERVICES]
    line = f"{AIRGAP} backup -o /root/lab.backup --to /root/officer/keys/officer.transit.pub.json"
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(lab.try_ask, "ada", 4) for _ in range(3)]
        done = json.loads(lab.type(f"{line} --root {TREE} --json"))
        answers = [each.result() for each in asked]
    assert all("code" not in each for each in answers), answers
    assert [lab.main_pid(unit) for unit in SERVICES] == before, "something was started again"
    owned = machine.good("find", f"{TREE}/audit", "!", "-user", "airgap-audit")
    assert owned == "", owned
    machine.file("/root/head").write_text(done["head"])
    line = f"{AIRGAP} restore /root/lab.backup --vkey {TREE}/keys/audit.vkey --anchors /root/head"
    line += " --transit-key /root/officer/keys/officer.transit.pem --root /root/second --json"
    found = json.loads(lab.type(line))
    assert (found["records"], found["verdict"]["verdict"]) == (done["records"], "good"), found
    owned = machine.good("find", "/root/second/audit", "!", "-user", "airgap-audit")
    assert owned == "", owned
    lab.type("rm -r /root/second /root/lab.backup")
    lab.verify("export-4")


def says_restart(lab: Lab) -> None:
    """What a daemon reads once is told when it changes, with the step; the step mends it."""
    machine = lab.machine
    site = machine.file(f"{TREE}/site.toml")
    lab.type(f"{AIRGAP} audit payload-key /root/holder/isso.pem")
    lab.type(f"install -m 0644 /root/holder/isso.pub {TREE}/keys/payloads.pub")
    text = site.read_text()
    site.write_text(text.replace("[audit]\n", '[audit]\npayloads = "sealed"\n', 1))
    lab.wait("the word of it", lambda: "RESTART" in machine.good(AIRGAP, "status", "--root", TREE))
    said = lab.type(f"{AIRGAP} status --root {TREE}")
    assert "[audit] payloads" in said, said
    for unit in SERVICES:
        lab.wait(
            "the status", lambda u=unit: "payloads" in machine.show(u, "StatusText")["StatusText"]
        )
    lab.type("systemctl restart airgap-audit airgap")
    assert "RESTART" not in lab.type(f"{AIRGAP} status --root {TREE}")


def prunes_and_purges(lab: Lab) -> None:
    """Root drops an old segment and one payload of the log that airgap-audit owns and serves."""
    machine = lab.machine
    lab.ask("ada")
    shown = machine.good(AIRGAP, "audit", "show", "--kind", "inference", "--json", "--root", TREE)
    records = json.loads(shown)["records"]
    seq = [each["seq"] for each in records if "sealed" in each.get("in", {})][-1]
    for name in ("isso", "compliance"):
        shutil.copy(lab.keys / f"{name}.pem", machine.file(f"/root/{name}.pem"))
        machine.file(f"/root/{name}.pem").chmod(0o600)

    def act(out: str, words: str) -> None:
        line = f"{AIRGAP} audit act {words} --reason 'in the test' --key /root/isso.pem"
        lab.type(f"{line} -o {out} --root {TREE}")
        lab.type(f"{AIRGAP} audit countersign {out} --key /root/compliance.pem --root {TREE}")

    act("/root/purge", f"purge --record {seq} --side in")
    lab.type(f"{AIRGAP} audit purge /root/purge --root {TREE}")

    machine.good("systemctl", "stop", "airgap.socket", "airgap", "airgap-audit")
    machine.file("/opt/past.py").write_text(PAST)
    python = "$(ls /opt/airgap/runtimes/*/bin/python | head -1)"
    fill = f"setpriv --reuid airgap-audit --regid airgap --clear-groups {python} -I /opt/past.py"
    machine.good("sh", "-c", f"{fill} {TREE} {SEGMENT + 10}")
    machine.good("systemctl", "start", "airgap-audit", "airgap.socket", "airgap")
    lab.verify("export-5")
    lab.type(f"{AIRGAP} audit witness init /root/w1 --name isso.example/w1")
    lab.type(f"{AIRGAP} audit witness trust /root/w1 {TREE}/keys/audit.vkey")
    lab.type(f"{AIRGAP} audit witness request -o /root/request --root {TREE}")
    lab.type(f"{AIRGAP} audit witness cosign /root/w1 /root/request -o /root/note")
    vkey = machine.good("cat", "/root/w1/witness.vkey").strip()
    machine.file("/root/policy.tlog").write_text(f"witness w1 {vkey}\nquorum w1\n")
    words = f"/root/note --policy /root/policy.tlog --root {TREE}"
    lab.type(f"{AIRGAP} audit witness import {words}")
    act("/root/prune", "prune")
    said = lab.type(f"{AIRGAP} audit prune /root/prune --root {TREE}")
    assert f"{SEGMENT:,} records pruned" in said, said
    owned = machine.good("find", f"{TREE}/audit", f"{TREE}/keys", "!", "-user", "airgap-audit")
    assert owned == f"{TREE}/keys/payloads.pub\n", owned  # root's, who decides to whom
    lab.ask("ada")
    machine.good("systemctl", "restart", "airgap-audit", "airgap")
    lab.verify("export-6")


def tells(lab: Lab) -> None:
    """The journal holds what an operator needs and nothing that a person asked or was told."""
    said = lab.machine.good("journalctl", "--no-pager", "--output=cat")
    assert SECRET not in said
    for bad in ("Traceback", "Unknown key", "Failed to parse", "ignoring", "host.internal"):
        assert bad not in said, [line for line in said.splitlines() if bad in line]
    failed = lab.machine.good("systemctl", "list-units", "--failed", "--no-legend", "airgap*")
    assert failed.strip() == "", failed


def examines(lab: Lab) -> None:
    """The other units, the settings, and the doctor."""
    machine = lab.machine
    lab.type("systemctl start airgap-doctor")
    request = (
        "AIRGAP_TASK=retrosynthesis\nAIRGAP_ARGUMENTS=--smiles CCO -n 2 --project route-design"
    )
    machine.file("/etc/airgap/requests/first.conf").write_text(f"{request}\n")
    lab.type("systemctl start airgap-run@first")
    lab.type(f"{AIRGAP} doctor --system --root {TREE}")
    for unit in (
        "airgap.service",
        "airgap.socket",
        "airgap-audit.service",
        "airgap-doctor.service",
    ):
        assert machine.good("systemd-analyze", "verify", "--man=no", unit) == ""
    # The settings are of the one kernel: systemd-sysctl gets a /proc/sys of paper to write to.
    machine.good("unshare", "--mount", "sh", "-c", PAPER_SETTINGS)


def starts_by_itself(lab: Lab) -> None:
    """After the power was cut the services come up alone, and the log goes on."""
    lab.wait("the daemon", lambda: lab.main_pid("airgap.service") != 0)
    assert lab.ask("ada")["summary"]["n"] == 4
    lab.verify("export-2")


def goes(lab: Lab) -> None:
    """Remove takes units, settings and what runs; the log stays, and verifies."""
    machine = lab.machine
    lab.verify("export-3")
    lab.type(f"{AIRGAP} remove --all --keep-audit --system --root {TREE}")
    left = machine.run("systemctl", "list-unit-files", "--no-legend", "airgap*").said
    assert left.strip() == "", left
    active = machine.good("systemctl", "list-units", "--all", "--no-legend", "airgap*")
    assert active.strip() == "", active
    places = ("/etc/systemd/system", "/etc/sysctl.d", "/etc/sysusers.d", "/run")
    found = machine.good("find", *places, "-name", "*airgap*")
    assert found == "", found
    assert "no such" not in lab.type(f"ls {TREE}")


FIRST_DAY: tuple[Callable[[Lab], None], ...] = (
    installs,
    serves,
    activates,
    confines,
    drains,
    comes_back,
    examines,
    backs_up,
    says_restart,
    prunes_and_purges,
    tells,
)
AFTER_A_POWER_CUT: tuple[Callable[[Lab], None], ...] = (starts_by_itself, goes)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
