"""Units, profile and settings: they parse, each option has its reason, their commands exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from enclave_harness import needs_namespaces, needs_root, run_as

from airgap.enclave import profiles

PACKAGING = Path(__file__).parents[2] / "packaging"
UNITS = sorted((PACKAGING / "systemd").glob("*.service"))
SERVE, SOCKET = PACKAGING / "systemd/airgap.service", PACKAGING / "systemd/airgap.socket"
DROP_IN = PACKAGING / "systemd/gpu.conf"
RUN, AUDIT = (
    PACKAGING / "systemd" / name for name in ("airgap-run@.service", "airgap-audit.service")
)
# What a unit is, rather than what it may: no reason is asked for.
PLAIN = {"Type", "ExecStart", "EnvironmentFile", "Description", "Documentation", "WantedBy"}
PLAIN |= {"ListenStream", "Also"}


def options(path):
    """Yield (name, value, the comment above it, empty where there is none)."""
    comment = ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            comment += line
            continue
        name, equals, value = line.partition("=")
        if equals:
            yield name, value, comment
        if name != "DeviceAllow":  # a list of one reason
            comment = ""


def values(path, name):
    return [value for option, value, _ in options(path) if option == name]


@pytest.mark.parametrize("path", [*UNITS, SOCKET, DROP_IN], ids=lambda path: path.name)
def test_every_option_of_a_unit_has_its_reason(path):
    found = list(options(path))
    assert len(found) > 3
    assert [name for name, _, comment in found if name not in PLAIN and len(comment) < 10] == []


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_is_valid(path, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace("/opt/airgap/bin/airgap ", "/usr/bin/true "))
    shutil.copy(SOCKET, tmp_path)  # a unit that needs it looks beside itself
    done = subprocess.run(
        ["systemd-analyze", "verify", copy], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("path", "most"), [(AUDIT, 10), (RUN, 60), (SERVE, 45)], ids=["audit", "run", "serve"]
)
def test_a_unit_is_as_confined_as_it_can_be(path, most):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={most}", path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd-analyze is older than 250")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-300:]


def test_the_log_speaks_unix_sockets_alone_and_has_no_capability():
    assert values(AUDIT, "RestrictAddressFamilies") == ["AF_UNIX"]
    assert values(AUDIT, "CapabilityBoundingSet") == [""]
    assert values(AUDIT, "PrivateNetwork") == ["yes"]
    assert values(AUDIT, "User") == ["airgap-audit"]


def test_the_daemon_has_no_capability_and_its_socket_is_for_a_group():
    assert values(SERVE, "CapabilityBoundingSet") == [""]
    assert values(SERVE, "PrivateNetwork") == ["yes"]
    assert values(SERVE, "User") == ["airgap"]
    assert (values(SOCKET, "SocketUser"), values(SOCKET, "SocketMode")) == (["root"], ["0660"])
    text = SERVE.read_text()
    names = {name for name, _, _ in options(SERVE)}
    broken = {"RestrictAddressFamilies", "RestrictNamespaces", "MemoryDenyWriteExecute"}
    broken |= {"ProtectProc", "ProtectKernelTunables", "IPAddressDeny"}
    broken |= {"ProtectKernelLogs", "ProtectHostname"}  # they cover a part of /proc
    assert not names & broken
    assert values(SERVE, "SystemCallFilter") == ["~syslog"]
    for name in broken:
        assert f"{name}=" in text, f"it is not said why {name} is left out"


def test_a_request_has_no_network_and_nothing_that_would_break_its_proof():
    names = {name for name, _, _ in options(RUN)}
    assert values(RUN, "PrivateNetwork") == ["yes"]
    assert values(RUN, "NoNewPrivileges") == ["yes"]
    assert values(RUN, "StandardOutput") == ["truncate:/run/airgap-run-%i.json"]
    assert values(RUN, "ExecStart")[0].endswith(" --json")  # a refusal in words goes to the journal
    broken = {"RestrictAddressFamilies", "RestrictNamespaces", "MemoryDenyWriteExecute"}
    broken |= {"SystemCallFilter", "ProtectProc", "ProcSubset", "IPAddressDeny"}
    assert not names & broken
    for name in broken:
        assert f"{name}=" in RUN.read_text(), f"it is not said why {name} is left out"


def test_the_probe_at_boot_has_the_rights_of_a_request():
    differ = {
        "Type",
        "EnvironmentFile",
        "ExecStart",
        "TimeoutStartSec",
        "KillMode",
        "RemainAfterExit",
        "StandardOutput",
    }
    differ |= {"Description", "Documentation", "After", "WantedBy"}

    def same(path):
        return {(name, value) for name, value, _ in options(path) if name not in differ}

    assert same(PACKAGING / "systemd/airgap-doctor.service") == same(RUN)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_that_exists(path, capsys):
    from airgap.cli.app import dispatch

    (command,) = values(path, "ExecStart")
    program, *words = command.split()
    assert program == "/opt/airgap/bin/airgap"
    group = words[: 2 if words[0] == "audit" else 1]
    assert dispatch([*group, "--help"]) == 0
    shown = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert option in shown


def test_the_nodes_of_a_gpu_are_those_of_its_profile():
    allowed = {value.split()[0] for value in values(DROP_IN, "DeviceAllow")}
    patterns = [re.escape(node).replace("N", "[0-9]+") for node in profiles.GPU_NODES]
    for node in allowed - {"char-nvidia-caps"}:
        assert any(re.fullmatch(pattern, node) for pattern in patterns), node
    readme = (PACKAGING / "README.md").read_text()
    for node in (*profiles.GPU_NODES, *profiles.NEVER_NODES):
        assert node.replace("nvidiaN", "nvidia0") in readme
    assert not {node for node in profiles.NEVER_NODES if node in DROP_IN.read_text()}


def test_the_apparmor_profile_is_for_our_interpreter_alone():
    text = (PACKAGING / "apparmor/airgap").read_text()
    rules = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    (attached,) = re.findall(r"^profile \S+ (\S+)", rules, re.MULTILINE)
    assert attached.startswith("/opt/airgap/bin/")
    assert "/usr/bin" not in rules
    assert "userns," in rules


def test_the_apparmor_profile_parses(tmp_path):
    parser = shutil.which("apparmor_parser", path="/usr/sbin:/sbin:/usr/bin")
    if parser is None:
        pytest.skip("no apparmor_parser")
    shown = subprocess.run(
        [parser, "--version"], check=False, capture_output=True, text=True
    ).stdout
    text = (PACKAGING / "apparmor/airgap").read_text()
    if int(re.search(r"version (\d+)", shown)[1]) < 4:
        # Its grammar has no `userns` yet: all else is checked.
        text = text.replace("abi/4.0", "abi/3.0").replace("  userns,\n", "")
    copy = tmp_path / "airgap"
    copy.write_text(text)
    done = subprocess.run([parser, "-Q", "-K", copy], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    copy.write_text(text.replace("{\n", "{\n  nonsense\n", 1))
    assert (
        subprocess.run([parser, "-Q", "-K", copy], check=False, capture_output=True).returncode != 0
    )


def test_no_setting_lifts_a_restriction_of_the_host():
    text = (PACKAGING / "sysctl.d/60-airgap.conf").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if " = " not in line] == []
    assert not any("apparmor" in line or "user_namespaces" in line for line in lines)


# -- the rights of a request, as the kernel gives them ---------------------------------------------

RIGHTS = """
import os
from airgap.enclave import linux
NAMES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8,
    "NET_BIND_SERVICE": 10, "NET_ADMIN": 12, "NET_RAW": 13, "SYS_PTRACE": 19, "SYS_ADMIN": 21,
    "AUDIT_READ": 37}
keep = {NAMES[name] for name in ARGUMENTS[0]}
linux.call("unshare", linux.CLONE_NEWNET)
from airgap.enclave import fixture
fixture._configure_loopback()  # as PrivateNetwork= leaves it: a loopback that is up
for capability in range(64):
    if capability not in keep:
        try: linux.prctl(linux.PR_CAPBSET_DROP, capability)
        except OSError: break
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
code = "import json\\nfrom airgap.enclave import host, twin\\n"
code += "verdict = twin.judge(twin.probe_rung('A', None, host.survey(), None))\\n"
code += "print(json.dumps([verdict.sealed, verdict.reason]))"
os.execv(sys.executable, [sys.executable, "-c", code])
"""


def capabilities():
    (line,) = values(RUN, "CapabilityBoundingSet")
    return [word.removeprefix("CAP_") for word in line.split()]


@needs_namespaces
@needs_root
def test_the_capabilities_of_the_unit_are_enough_for_rung_a():
    assert run_as("root", RIGHTS, capabilities()) == [True, ""]


@pytest.mark.soak
@needs_namespaces
@needs_root
@pytest.mark.parametrize(
    "missing",
    ["CHOWN", "SETGID", "SETUID", "SETPCAP", "SYS_ADMIN", "NET_BIND_SERVICE"],
)
def test_a_capability_less_and_the_seal_or_its_proof_fails(missing):
    left = [name for name in capabilities() if name != missing]
    sealed, reason = run_as("root", RIGHTS, left)
    assert (sealed, bool(reason)) == (False, True)
