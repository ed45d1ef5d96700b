"""Remove or break each layer in turn: the seal is refused and the refusal names the layer.

A copy of the launcher and the worker is changed by text; the broker that judges them is untouched.
Where the launcher's own check would catch a change, a second mutant removes that check as well, so
that the broker has to see it from outside.
"""

# ruff: noqa: E501 - a text to be replaced is one line of the source
from __future__ import annotations

import pytest
from enclave_harness import PROGRAMS, needs_namespaces, run_as, starters

LAUNCHER, WORKER, ROOT, LINUX = "launcher.py", "worker.py", "root.py", "linux.py"
FILTERS, STUB = "filters.py", "stub.py"
NO_CHECK = "if False:"

# name: (rungs, starters, file, [(text, replacement)], layers that may be named)
UP = """import _socket, fcntl
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    fcntl.ioctl(probe.fileno(), 0x8914, struct.pack("<16sH14x", b"lo", 1))
    probe.close()
"""
EACH, OWN, ANY = "AUB", "AU", ("root", "user")  # OWN: rungs with namespaces
MUTANTS = {
    "stage 1 is not installed": (
        EACH,
        ANY,
        LAUNCHER,
        [("    filters.install(filters.stage1(linux.MACHINE))\n    expected", "    expected")],
        {"stage1"},
    ),
    "stage 1 is not installed and not tried": (
        EACH,
        ANY,
        LAUNCHER,
        [("        apply_stage1()\n", "        pass\n")],
        {"stage1"},
    ),
    "stage 1 is another filter": (
        EACH,
        ANY,
        LAUNCHER,
        [
            (
                "filters.install(filters.stage1(linux.MACHINE))",
                "filters.install(filters.no_exec(linux.MACHINE))",
            )
        ],
        {"stage1"},
    ),
    "stage 1 forgets sendmsg": (
        EACH,
        ANY,
        "tables.py",
        [("sendmsg=46/211 ", ""), ("mq_timedsend", "sendmsg=46/211 mq_timedsend")],
        {"stage1"},
    ),
    "Landlock is not applied": (
        EACH,
        ANY,
        LAUNCHER,
        [
            (
                '    landlock.restrict([(path, _RIGHTS[kind]) for path, kind in wanted["rules"]], abi)\n',
                "",
            )
        ],
        {"landlock"},
    ),
    "Landlock allows everything": (
        EACH,
        ANY,
        "landlock.py",
        [
            (
                "    files = _HANDLED[min(abi, _HIGHEST)]",
                "    files = _HANDLED[min(abi, _HIGHEST)] & ~READ",
            )
        ],
        {"landlock"},
    ),
    "Landlock has no network rules": (
        EACH,
        ANY,
        "landlock.py",
        [("_TCP if abi >= _TCP_ABI else 0, _SCOPES", "0, _SCOPES")],
        {"landlock"},
    ),
    "the network namespace is left out": (
        OWN,
        ANY,
        LINUX,
        [('"net": CLONE_NEWNET,', '"net": 0,')],
        {"network"},
    ),
    "the network namespace is left out and not looked at": (
        OWN,
        ANY,
        LINUX,
        [
            ('"net": CLONE_NEWNET,', '"net": 0,'),
            ("            check_network()\n", ""),
        ],
        {"network"},
    ),
    "the PID namespace is left out": (
        OWN,
        ANY,
        LINUX,
        [('"pid": CLONE_NEWPID,', '"pid": 0,')],
        {"namespaces"},
    ),
    "the PID namespace is left out and not looked at": (
        OWN,
        ANY,
        LINUX,
        [('"pid": CLONE_NEWPID,', '"pid": 0,'), ("    if os.getpid() != 1:", f"    {NO_CHECK}")],
        {"namespaces"},
    ),
    "the IPC namespace is left out": (
        OWN,
        ANY,
        LINUX,
        [('"ipc": CLONE_NEWIPC,', '"ipc": 0,')],
        {"namespaces"},
    ),
    "the UTS namespace is left out": (
        OWN,
        ANY,
        LINUX,
        [('"uts": CLONE_NEWUTS,', '"uts": 0,')],
        {"namespaces"},
    ),
    "the cgroup namespace is left out": (
        "A",
        ANY,
        LINUX,
        [('"cgroup": CLONE_NEWCGROUP,', '"cgroup": 0,')],
        {"namespaces"},
    ),
    # Not as root: it would rebuild the root of the test's own mount namespace.
    "the mount namespace is left out": (
        "A",
        ("user",),
        LINUX,
        [('"mnt": CLONE_NEWNS,', '"mnt": 0,')],
        {"root"},
    ),
    "the user namespace is left out": (
        "U",
        ANY,
        LINUX,
        [('"user": CLONE_NEWUSER,', '"user": 0,')],
        {"namespaces"},
    ),
    # As root the worker has its uid by then, and may not write the map.
    "an id is mapped where none should be": (
        "U",
        ANY,
        LAUNCHER,
        [
            (
                '    mapping = plan["mapping"]\n    outside_uid',
                "    mapping = [61184, 61184]\n    outside_uid",
            )
        ],
        {"identity", "namespaces"},
    ),
    "all namespaces are left out": (
        "A",
        ("user",),
        LAUNCHER,
        [
            (
                '    linux.call("unshare", flags)\n    if mapping:',
                "    if False:",
            )
        ],
        {"namespaces", "network", "root"},
    ),
    "the loopback interface is up": (
        OWN,
        ANY,
        LAUNCHER,
        [
            (
                "    names = [name for _, name in _socket.if_nameindex()]",
                f"    {UP}    names = ['lo']",
            )
        ],
        {"network"},
    ),
    "the loopback interface is up and not looked at": (
        OWN,
        ANY,
        LAUNCHER,
        [
            (
                "            check_network()\n",
                f"            {UP.replace(chr(10) + '    ', chr(10) + '            ')}",
            )
        ],
        {"network"},
    ),
    "the private root is left out": (
        "A",
        ANY,
        LAUNCHER,
        [("            root.private_root(plan)\n", "            pass\n")],
        {"root"},
    ),
    "mounts stay writable": (
        "A",
        ANY,
        ROOT,
        [("    protect(base, binds)\n", "")],
        {"root"},
    ),
    "the root stays writable": (
        "A",
        ANY,
        ROOT,
        [
            (
                "linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV,",
                "linux.MS_BIND | linux.MS_REMOUNT | linux.MS_NOSUID | linux.MS_NODEV,",
            )
        ],
        {"root"},
    ),
    "the root stays writable and is not looked at": (
        "A",
        ANY,
        ROOT,
        [
            (
                "linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV,",
                "linux.MS_BIND | linux.MS_REMOUNT | linux.MS_NOSUID | linux.MS_NODEV,",
            ),
            (
                '    if os.path.exists("/.old") or os.statvfs("/").f_flag & os.ST_RDONLY == 0:',
                f"    {NO_CHECK}",
            ),
        ],
        {"root"},
    ),
    "something more is mounted": (
        "A",
        ANY,
        ROOT,
        [
            (
                '    old = os.path.join(base, ".old")',
                "    os.makedirs(base + '/more'); linux.mount('tmpfs', base + '/more', 'tmpfs', 0)\n    old = os.path.join(base, \".old\")",
            )
        ],
        {"root"},
    ),
    "no_new_privs is not set": (
        EACH,
        ANY,
        LAUNCHER,
        [("    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)\n", "")],
        {"nnp", "landlock", "stage1", "parent"},
    ),
    "the uid is not dropped": (
        EACH,
        ("root",),
        LAUNCHER,
        [("        os.setresuid(uid, uid, uid)\n", "")],
        {"identity", "landlock"},
    ),
    "the uid is not dropped and not looked at": (
        EACH,
        ("root",),
        LAUNCHER,
        [
            ("        os.setresuid(uid, uid, uid)\n", ""),
            ("    if 0 in uids or len(set(uids)) != 1:", f"    {NO_CHECK}"),
            (
                '        raise Refusal("identity", "the process can become root again")',
                "        pass",
            ),
            ("            os.setuid(0)\n", "            pass\n"),
            ('    with layer("files"):\n        check_readable(plan)\n', ""),
        ],
        {"identity", "root", "landlock"},
    ),
    # On U it is dropped again inside.
    "the bounding set stays": (
        "AB",
        ("root",),
        LAUNCHER,
        [("        linux.drop_bounding_set()\n", "")],
        {"identity"},
    ),
    "the user maps itself to 0": (
        "A",
        ("user",),
        LAUNCHER,
        [("        if 0 in mapping:", "        mapping = [0, 0]\n        if 0 in mapping:")],
        {"identity"},
    ),
    "the user maps itself to 0 and it is not looked at": (
        "A",
        ("user",),
        LAUNCHER,
        [
            ("        if 0 in mapping:", "        mapping = [0, 0]\n        if False:"),
            ("    if 0 in uids or len(set(uids)) != 1:", f"    {NO_CHECK}"),
        ],
        {"identity"},
    ),
    "descriptors are not closed": (
        EACH,
        ANY,
        LAUNCHER,
        [("            close_others()\n", "            pass\n")],
        {"descriptors"},
    ),
    "descriptors are not closed and not listed": (
        EACH,
        ANY,
        LAUNCHER,
        [
            ("            close_others()\n", "            pass\n"),
            ("            check_descriptors()\n", "            pass\n"),
            ("        check_descriptors_by_number()\n", ""),
        ],
        {"descriptors"},
    ),
    "limits are not set": (
        EACH,
        ANY,
        LAUNCHER,
        [("        set_limits(plan)\n", "        pass\n")],
        {"limits"},
    ),
    "the session stays the terminal's": (
        EACH,
        ANY,
        LAUNCHER,
        [("            os.setsid()\n", "            pass\n")],
        {"parent"},
    ),
    "the environment has one variable more": (
        EACH,
        ANY,
        LAUNCHER,
        [
            (
                'plan["argv"], plan["env"])',
                'plan["argv"], {**plan["env"], "LD_LIBRARY_PATH": "/tmp"})',
            )
        ],
        {"environment"},
    ),
    "another program is started": (
        EACH,
        ANY,
        LAUNCHER,
        [('os.execve(plan["argv"][0], ', 'os.execve("/usr/bin/true", ')],
        {"exec"},
    ),
    "the waiting parent is not sealed": (
        OWN,
        ANY,
        LAUNCHER,
        [("        filters.install(filters.waiting_parent(child, linux.MACHINE))\n", "")],
        {"parent"},
    ),
    # A user may not list the descriptors of a process that is not dumpable.
    "the waiting parent keeps its descriptors": (
        OWN,
        ("root",),
        LAUNCHER,
        [("        os.closerange(0, OPEN_DESCRIPTORS * 2)\n", "")],
        {"parent"},
    ),
    "the launcher has another filter than the broker": (
        EACH,
        ANY,
        "tables.py",
        [("CEILING = 453", "CEILING = 600")],
        {"stage1"},
    ),
    "stage 2 is not installed": (
        EACH,
        ANY,
        WORKER,
        [("    filters.install(filters.last(name, os.getpid(), linux.MACHINE))\n", "")],
        {"stage2"},
    ),
    "stage 2 is not installed and the worker lies": (
        EACH,
        ANY,
        WORKER,
        [
            ("    filters.install(filters.last(name, os.getpid(), linux.MACHINE))\n", ""),
            ("name: attempt() for name", "name: 'EPERM' for name"),
        ],
        {"stage2"},
    ),
    "stage 2 binds the main thread alone": (
        EACH,
        ANY,
        FILTERS,
        [("_TSYNC | _LOG, ctypes", "_LOG, ctypes")],
        {"stage2"},
    ),
    "stage 2 is another filter and the worker lies": (
        EACH,
        ("root",),
        WORKER,
        [
            ("filters.last(name, os.getpid(), linux.MACHINE)", "filters.no_exec(linux.MACHINE)"),
            ("name: attempt() for name", "name: 'EPERM' for name"),
        ],
        {"stage2"},
    ),
    "stage 2 lets every descriptor be written to": (
        EACH,
        ANY,
        FILTERS,
        [
            (
                '_rule(tables.number("write", arch), _allow_values(0, tables.WRITABLE))',
                '_answer(tables.number("write", arch), ALLOW)',
            )
        ],
        {"stage2"},
    ),
    "stage 2 lets memory be executable": (
        EACH,
        ANY,
        FILTERS,
        [
            (
                'for name in ("mmap", "mprotect"):\n        code += _rule(tables.number(name, arch), _deny_bits(2, tables.PROT_EXEC))',
                'for name in ("mmap", "mprotect"):\n        code += _answer(tables.number(name, arch), ALLOW)',
            )
        ],
        {"stage2"},
    ),
    "stage 2 lets others be signalled": (
        EACH,
        ANY,
        FILTERS,
        [
            (
                '_rule(tables.number("tgkill", arch), _allow_values(0, (pid,)))',
                '_answer(tables.number("tgkill", arch), ALLOW)',
            )
        ],
        {"stage2"},
    ),
    "stage 2 lets files be opened": (
        EACH,
        ANY,
        FILTERS,
        [
            (
                "_stage2(pid, arch, tuple(tables.STAGE2))",
                '_stage2(pid, arch, (*tables.STAGE2, "openat"))',
            )
        ],
        {"stage2", "descriptors"},
    ),
    "stage 2 allows what it does not list": (
        EACH,
        ANY,
        FILTERS,
        [
            (
                "_allow_values(0, (pid,)))\n    return _pack([*code, (_RETURN, 0, 0, _ERRNO | EPERM)])",
                "_allow_values(0, (pid,)))\n    return _pack([*code, (_RETURN, 0, 0, ALLOW)])",
            )
        ],
        {"stage2", "descriptors"},
    ),
    # Root compares the parent's live filter; a user may not dump.
    "the waiting parent may write": (
        OWN,
        ("root",),
        FILTERS,
        [('"brk", "futex", "rt_sigprocmask"', '"brk", "write", "rt_sigprocmask"')],
        {"parent"},
    ),
    "the worker gets the filter of a GPU": (
        EACH,
        ANY,
        WORKER,
        [("filters.last(name, os.getpid()", 'filters.last("stage2_gpu", os.getpid()')],
        {"stage2", "descriptors"},
    ),
    # Its self-test could open a file, which is seen first.
    "stage 2 is another filter": (
        EACH,
        ANY,
        WORKER,
        [("filters.last(name, os.getpid(), linux.MACHINE)", "filters.no_exec(linux.MACHINE)")],
        {"stage2", "descriptors"},
    ),
    "the self-test is left out": (
        EACH,
        ANY,
        WORKER,
        [
            (
                "    result = {name: attempt() for name, attempt in attempts.items()}\n",
                "    result = {}\n",
            )
        ],
        {"stage2"},
    ),
    "the worker stays dumpable": (
        EACH,
        ANY,
        WORKER,
        [("    linux.prctl(linux.PR_SET_DUMPABLE, 0)", "    pass")],
        {"dumpable"},
    ),
    "the worker says ready too early": (
        EACH,
        ANY,
        WORKER,
        [
            (
                '    frame = channel.receive(CHANNEL_IN, PROGRAM_LIMIT)\n    if frame.kind != channel.SEAL:\n        raise ValueError("the broker did not seal")\n    attempts',
                "    channel.send(CHANNEL_OUT, channel.READY, b'{}')\n    attempts",
            )
        ],
        {"stage1", "stage2", "dumpable", "descriptors", "evidence", "parent"},
    ),
}
# Caught by the probe alone: no fact of /proc shows Landlock, or what a filter forgets.
PROBED = {
    "Landlock is left out whole": (
        EACH,
        ANY,
        LAUNCHER,
        [("        apply_landlock(plan)\n", "        pass\n")],
        {"probe"},
    ),
    "Landlock lets every file be read and is not tried": (
        "B",
        ANY,
        LAUNCHER,
        [
            (
                'landlock.restrict([(path, _RIGHTS[kind]) for path, kind in wanted["rules"]], abi)',
                "landlock.restrict([('/', landlock.READ), *((path, _RIGHTS[kind]) for path, kind in wanted[\"rules\"])], abi)",
            ),
            ("    landlock.verify_behaviour(abi, readable=script, outside=outside)\n", ""),
        ],
        {"probe"},
    ),
    # Root's worker has another uid than root, so that the launcher's own signal fails anyway.
    "Landlock has no scopes": (
        "B",
        ANY,
        "landlock.py",
        [("_SCOPES if abi >= _SCOPE_ABI else 0", "0")],
        {"landlock", "probe"},
    ),
    "a conversion may exec": (
        EACH,
        ANY,
        STUB,
        [("    filters.install(filters.no_exec(linux.MACHINE))\n", "")],
        {"stage2"},
    ),
    "a conversion stays dumpable": (
        EACH,
        ANY,
        STUB,
        [("    linux.prctl(linux.PR_SET_DUMPABLE, 0)\n", "")],
        {"dumpable"},
    ),
    "a conversion may write everywhere": (
        "B",
        ANY,
        LAUNCHER,
        [
            (
                'landlock.restrict([(path, _RIGHTS[kind]) for path, kind in wanted["rules"]], abi)',
                "landlock.restrict([('/tmp', landlock.WRITE), *((path, _RIGHTS[kind]) for path, kind in wanted[\"rules\"])], abi)",
            )
        ],
        {"probe", "landlock"},  # the proof of Landlock tries a script below the opened folder
    ),
}
RUNNER = """
import shutil, tempfile, os
from pathlib import Path
import airgap.enclave
from airgap.enclave import host, plan, seal, twin
from policy.errors import AirgapError

real, whole = Path(airgap.enclave.__file__).parent, plan.package_folders()
facts = host.survey()
os.set_inheritable(0, False)
leak = os.open("/etc/passwd", os.O_RDONLY)
made = {}
for name, (rung, file, changes, probed) in ARGUMENTS[0].items():
    folder = Path(tempfile.mkdtemp()) / "airgap"
    shutil.copytree(real, folder / "enclave", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__init__.py").write_text("")
    folder.parent.chmod(0o755)
    for old, new in changes:
        places = [folder / "enclave" / name for name in (file, "launcher.py", "worker.py")]
        target = next((place for place in places if old in place.read_text()), None)
        assert target, (name, old)
        target.write_text(target.read_text().replace(old, new, 1))
    plan.package_folders = lambda folder=folder: {**whole, "airgap": str(folder)}
    spec = airgap.enclave.SealSpec(
        profile="worker",
        program=f"{Path(ARGUMENTS[1])}:create",
        config={"warm": "thread"},
        read_only=(Path(ARGUMENTS[1]),),
        deadline_s=10.0,
        caps=airgap.enclave.Caps(memory_mb=512),
    )
    try:
        if probed:
            twin.require_sealed(twin.probe_rung(rung, None, facts, None, fresh=True))
            made[name] = "SEALED"
        else:
            seal.start(rung, spec, facts, leaked=(leak,)).close()
            made[name] = "SEALED"
    except AirgapError as error:
        made[name] = error.code + ": " + error.message[:300]
    shutil.rmtree(folder.parent)
print(json.dumps(made))
"""
EVERY = [
    (starter, rung, name)
    for starter in starters()
    for name, (rungs, who, *_) in (MUTANTS | PROBED).items()
    for rung in rungs
    if starter in who
]
# Root reaches A and a user may be left with U or B: each mutant runs there, the rest in `make soak`.
USUAL = {"root": "A", "user": "B" if "root" in starters() else "AUB"}
QUICK = [
    (starter, rung, name)
    for starter, rung, name in EVERY
    if rung in USUAL[starter]
    or (MUTANTS | PROBED)[name][:2] == ("A", ("user",))
    or (rung == "U" and starter == "user" and (MUTANTS | PROBED)[name][0] in {OWN, "U"})
]


def parameters(cases):
    return [pytest.param(*case, id="-".join(case)) for case in cases]


@pytest.fixture(scope="module")
def verdicts():
    """All mutants of one starter run in one process: its start is the larger cost."""
    made = {}

    def verdict(cases, starter, key):
        which = (id(cases), starter)
        if which not in made:
            wanted = {f"untouched {rung}": (rung, LAUNCHER, [], False) for rung in EACH}
            for who, rung, name in cases:
                if who == starter:
                    _, _, file, changes, _ = (MUTANTS | PROBED)[name]
                    wanted[f"{name} {rung}"] = (rung, file, changes, name in PROBED)
            made[which] = run_as(starter, RUNNER, wanted, str(PROGRAMS), timeout=200)
        return made[which][key]

    return verdict


def check(verdicts, cases, starter, rung, name):
    found = verdicts(cases, starter, f"{name} {rung}")
    layers = (MUTANTS | PROBED)[name][4]
    assert found.split(":")[0] in {f"enclave.{layer}" for layer in layers}, found


@needs_namespaces
@pytest.mark.parametrize("starter", starters())
@pytest.mark.parametrize("rung", EACH)
def test_the_untouched_seal_holds(starter, rung, verdicts):
    assert verdicts(QUICK, starter, f"untouched {rung}") == "SEALED"


@needs_namespaces
@pytest.mark.parametrize(("starter", "rung", "name"), parameters(QUICK))
def test_a_missing_layer_is_refused_by_name(starter, rung, name, verdicts):
    check(verdicts, QUICK, starter, rung, name)


@pytest.mark.soak
@needs_namespaces
@pytest.mark.parametrize(("starter", "rung", "name"), parameters(EVERY))
def test_a_missing_layer_is_refused_everywhere(starter, rung, name, verdicts):
    check(verdicts, EVERY, starter, rung, name)
