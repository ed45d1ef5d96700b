"""Sealed conversions: what they may read and leave, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from enclave_harness import HERE, needs_namespaces, run_as, starters

from airgap.enclave import SealRefused, convert, filters, host, plan, run_sealed, twin
from policy.errors import FaultError

ROOT = os.geteuid() == 0


@dataclass
class Job:
    argv: list[str]
    out: Path
    read_only: tuple[Path, ...] = ()
    memory_mb: int = 512
    timeout_s: float = 15.0
    stderr_limit: int = 2000
    extra: dict = field(default_factory=dict)


@pytest.fixture(autouse=True)
def probed(monkeypatch):
    monkeypatch.setattr(twin, "probe_rung", lambda *_a, **_k: {"probed": "elsewhere"})
    monkeypatch.setattr(twin, "require_sealed", lambda _: None)
    monkeypatch.setattr(twin, "summary", lambda report: report)


@pytest.fixture
def sealed(tmp_path):
    """Run a piece of Python as a sealed job; `OUT` is its folder."""

    def run(code, *, timeout_s=15.0, arguments=(), **options):
        script = tmp_path / "job.py"
        script.write_text(f"import os, sys\nOUT = sys.argv[1]\n{code}\n")
        out = tmp_path / "out"
        job = Job(
            [sys.executable, "-I", str(script), str(out), *arguments],
            out,
            read_only=(script,),
            timeout_s=timeout_s,
        )
        return run_sealed(job, **{"out_limit_mb": 2, **options})

    run.out = tmp_path / "out"
    return run


@needs_namespaces
def test_files_that_a_job_leaves_are_the_callers_own(sealed):
    result = sealed("os.mkdir(OUT + '/sub')\nfor n in 'ab': open(f'{OUT}/sub/{n}', 'w').write(n)")
    assert (result.status, result.signal) == (0, None)
    assert [str(path.relative_to(sealed.out)) for path in result.files] == ["sub/a", "sub/b"]
    for path in (*result.files, sealed.out, sealed.out / "sub"):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.geteuid(), os.getegid())
    assert result.evidence["profile"] == "convert"
    assert result.evidence["exit"] == {"status": 0, "signal": None}
    assert set(result.evidence["files"]) == {"sub/a", "sub/b"}
    assert result.evidence["seccomp"]["no_exec"]["sha256"] == filters.PUBLISHED["no_exec.x86_64"]
    if result.evidence["rung"] == "A":
        assert [m for m in result.evidence["mounts"] if m.endswith(":rw") and "/dev/" not in m]
    assert list(sealed.out.parent.glob(".out-*")) == []  # no scratch is left


@needs_namespaces
def test_a_job_may_read_its_inputs_and_write_to_its_folder_alone(sealed, tmp_path):
    (tmp_path / "secret").write_text("x")
    code = f"""
def tried(action):
    try:
        action()
    except OSError as error:
        return error.errno
    return 0
import socket, json
answers = {{
    "read": tried(lambda: open({str(tmp_path / "secret")!r})),
    "passwd": tried(lambda: open("/etc/passwd")),
    "own source": tried(lambda: open(__file__, "a")),
    "beside": tried(lambda: open({str(tmp_path / "new")!r}, "w")),
    "socket": tried(socket.socket),
    "fork": tried(os.fork),
    "exec": tried(lambda: os.execv("/usr/bin/true", ["true"])),
    "link": tried(lambda: os.symlink("/etc/passwd", OUT + "/link")),
    "fifo": tried(lambda: os.mkfifo(OUT + "/fifo")),
    "scratch": tried(lambda: open(os.environ["TMPDIR"] + "/x", "w")),
    "input": tried(lambda: open(__file__)),
}}
json.dump([answers, sorted(os.environ)], open(OUT + "/answers.json", "w"))
"""
    answers, environment = json.loads(sealed(code).files[0].read_text())
    assert answers.pop("scratch") == answers.pop("input") == 0
    assert all(answers.values()), answers
    assert "ORT_DISABLE_TELEMETRY" in environment
    assert not {"PYTHONPATH", "LD_PRELOAD", "CI"} & set(environment)
    assert not (tmp_path / "new").exists()


ENDS = {
    "a failure": ("sys.exit(3)", 3, None),
    "an exception": ("raise ValueError('why')", 1, None),
    "a segfault": ("import ctypes; ctypes.string_at(0)", None, signal.SIGSEGV),
    "too much memory": ("bytearray(4 << 30)", 1, None),
}


@needs_namespaces
@pytest.mark.parametrize(("code", "status", "number"), ENDS.values(), ids=ENDS.keys())
def test_a_job_that_fails_leaves_nothing(code, status, number, sealed):
    result = sealed(f"open(OUT + '/half', 'w').write('x')\nprint('said', flush=True)\n{code}")
    assert (result.status, result.signal) == (status, number)
    assert result.files == ()
    assert list(sealed.out.iterdir()) == []
    assert "said" in result.stderr


@needs_namespaces
def test_what_a_job_says_is_cut(sealed):
    result = sealed("print('x' * 100000)\nprint('\\x1b[31m')")
    assert len(result.stderr) == 2000
    assert "\x1b" not in result.stderr


@needs_namespaces
def test_a_job_that_does_not_end_is_ended(sealed):
    started = time.monotonic()
    with pytest.raises(FaultError) as caught:
        sealed("import time\nopen(OUT + '/x', 'w')\ntime.sleep(60)", timeout_s=0.5)
    assert caught.value.code == "enclave.deadline"
    assert time.monotonic() - started < 10
    assert list(sealed.out.iterdir()) == []


REFUSED_OUTPUT = {
    "one large file": "open(OUT + '/x', 'wb').write(bytes(3 << 20))",
    "many files": "[open(f'{OUT}/{n}', 'wb').write(bytes(1 << 19)) for n in range(9)]\n"
    "import time; time.sleep(5)",
    "a hidden file": "open(OUT + '/.x', 'w')",
    "a name to print": "open(OUT + '/a\\x1b', 'w')",
    "a hard link": "open(OUT + '/a', 'w'); os.link(OUT + '/a', OUT + '/b')",
    "a deep tree": "os.makedirs(OUT + '/a/b/c/d/e')",
}


@needs_namespaces
@pytest.mark.parametrize("code", REFUSED_OUTPUT.values(), ids=REFUSED_OUTPUT.keys())
def test_output_that_is_not_plain_is_refused_and_removed(code, sealed):
    try:
        result = sealed(code)
    except SealRefused as refused:
        assert refused.code == "enclave.output"  # noqa: PT017
    else:
        assert result.status != 0  # a limit of the kernel came first
    assert list(sealed.out.iterdir()) == []


@needs_namespaces
def test_only_expected_names_are_taken(sealed):
    code = "for n in ('model.onnx', 'extra'): open(f'{OUT}/{n}', 'w')"
    with pytest.raises(SealRefused) as caught:
        sealed(code, expected=("model.onnx",))
    assert "extra" in caught.value.message
    assert list(sealed.out.iterdir()) == []
    assert len(sealed(code, expected=("model.onnx", "extra")).files) == 2


@needs_namespaces
@pytest.mark.parametrize("starter", starters())
def test_jobs_run_on_both_rungs_as_anybody(starter, tmp_path):
    tmp_path.chmod(0o777)
    for path in tmp_path.parents[:2]:  # to be passed through, and for others to leave alone
        path.chmod(0o711)
    code = """
import tempfile
from pathlib import Path
from test_enclave_convert import Job
from airgap.enclave import run_sealed, twin
twin.probe_rung = lambda *a, **k: {}
twin.require_sealed = lambda report: None
twin.summary = lambda report: report
found = []
for rung in "AB":
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    script = base / "job.py"
    script.write_text("import sys; open(sys.argv[1] + '/x', 'w').write('y')")
    job = Job([sys.executable, str(script), str(base / "out")], base / "out", (script,))
    result = run_sealed(job, rung=rung, min_rung=rung)
    found.append([result.evidence["rung"], result.files[0].read_text()])
print(json.dumps(found))
"""
    path = f"sys.path.insert(0, {str(HERE / 'attack')!r})\n"
    assert run_as(starter, path + code) == [["A", "y"], ["B", "y"]]


# -- before anything starts -------------------------------------------------------------------

COMMANDS = {
    "a script": (["/x/python3", "-I", "-B", "/s.py", "a", "-b"], ("script", "/s.py", ["a", "-b"])),
    "a module": (["python", "-m", "pkg.mod", "-m"], ("module", "pkg.mod", ["-m"])),
}


@pytest.mark.parametrize(("argv", "wanted"), COMMANDS.values(), ids=COMMANDS.keys())
def test_a_command_line_is_a_script_or_a_module(argv, wanted):
    found = convert.parse_argv(argv)
    assert (found["kind"], found["name"], found["arguments"]) == wanted


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["bash", "-c", "x"],
        ["python"],
        ["python", "-c", "x"],
        ["python", "-m"],
        ["python", "-X", "dev", "s"],
    ],
)
def test_any_other_command_line_is_refused(argv):
    with pytest.raises(SealRefused) as caught:
        convert.parse_argv(argv)
    assert caught.value.code == "enclave.job"


def test_a_folder_for_results_is_made_or_empty(tmp_path):
    assert convert.fresh_folder(tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for path in (tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(SealRefused) as caught:
            convert.fresh_folder(path)
        assert caught.value.code == "enclave.job"


@pytest.mark.parametrize("options", [{"min_rung": "C"}, {"rung": "C"}])
def test_rung_c_is_never_enough(options, tmp_path):
    with pytest.raises(SealRefused) as caught:
        run_sealed(Job(["python", "/s.py"], tmp_path / "out"), **options)
    assert caught.value.code == "enclave.rung"


def test_a_missing_input_is_refused_before_the_folder_is_made(tmp_path):
    with pytest.raises(SealRefused) as caught:
        run_sealed(Job(["python", "/s.py"], tmp_path / "out", (tmp_path / "nothing",)))
    assert caught.value.code == "enclave.files"


def test_a_host_without_a_rung_is_refused_with_reasons(tmp_path, monkeypatch):
    from dataclasses import replace

    facts = replace(host.survey(), uid=1000, sys_admin=False, max_user_namespaces=0, landlock_abi=0)
    monkeypatch.setattr(host, "survey", lambda: facts)
    with pytest.raises(SealRefused) as caught:
        run_sealed(Job(["python", "/s.py"], tmp_path / "out"))
    assert caught.value.code == "enclave.rung"
    assert "Landlock" in caught.value.message


def test_a_lower_rung_is_taken_where_the_host_lacks_a_layer(tmp_path, monkeypatch):
    taken = []

    def run_on(rung, _work, **more):
        taken.append(rung)
        if rung == "A":
            raise SealRefused("namespaces", "EPERM")
        return more["tried"]

    monkeypatch.setattr(convert, "run_on", run_on)
    job = Job(["python", "/s.py"], tmp_path / "out")
    with pytest.raises(SealRefused):
        run_sealed(job, min_rung="A")
    assert run_sealed(job, min_rung="B")[-1]["rung"] == "A"
    assert taken == ["A", "A", "U"]


LEFT = {
    "a symbolic link": lambda out: (out / "x").symlink_to("/etc/passwd"),
    "a FIFO": lambda out: os.mkfifo(out / "x"),
    "a socket": lambda out: __import__("socket").socket(1).bind(str(out / "x")),
    "a link in a folder": lambda out: [(out / "d").mkdir(), (out / "d/x").symlink_to("/")],
    "two names of one file": lambda out: [(out / "x").touch(), os.link(out / "x", out / "y")],
    "too large": lambda out: (out / "x").write_bytes(bytes(1001)),
    "too many": lambda out: [(out / f"{n}").touch() for n in range(convert.ENTRY_LIMIT + 2)],
    "too deep": lambda out: (out / "a/b/c/d").mkdir(parents=True),
    "hidden": lambda out: (out / ".x").touch(),
    "not printable": lambda out: (out / "a\nb").touch(),
}


@pytest.mark.parametrize("leave", LEFT.values(), ids=LEFT.keys())
def test_nothing_but_plain_files_is_collected(leave, tmp_path):
    (tmp_path / "good").write_bytes(bytes(500))
    (tmp_path / "good").chmod(0o4755)
    assert convert.collect(tmp_path, limit=1000) == (tmp_path / "good",)
    assert oct((tmp_path / "good").stat().st_mode & 0o7777) == "0o644"
    leave(tmp_path)
    with pytest.raises(SealRefused) as caught:
        convert.collect(tmp_path, limit=1000)
    assert caught.value.code == "enclave.output"
    convert.empty(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not ROOT, reason="a device needs root")
def test_a_device_is_not_collected(tmp_path):
    os.mknod(tmp_path / "null", 0o600 | 0o020000, os.makedev(1, 3))
    with pytest.raises(SealRefused):
        convert.collect(tmp_path, limit=1000)


def test_the_size_of_a_folder_is_read_while_it_changes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "gone").symlink_to("/nowhere")
    assert convert.folder_size(tmp_path) == 10 + len("/nowhere")
    assert plan.folder_bytes([str(tmp_path / "a")]) == 10
