"""The sealed side of an auditor's program, and what the commands print; in this process."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
from enclave_harness import needs_namespaces

from airgap.cli.app import dispatch
from airgap.enclave import channel, guest, host, twin


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Keep what a probe changes of the interpreter out of the other tests."""
    monkeypatch.setattr(sys, "argv", ["x"])
    kept = {name: sys.modules.get(name) for name in ("__main__", "airgap_probe")}
    yield
    for name, module in kept.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module


def run(source, stage=1):
    return guest.run({"name": "p.py", "source": source.encode().hex(), "stage": stage})


ENDS = {
    "a script": ("x = 1", "returned", 0),
    "main without an answer": ("def main(): pass", "returned", 0),
    "main with a status": ("def main(): return 7", "exited", 7),
    "main with a large status": ("def main(): return 256 + 3", "exited", 3),
    "prepare before main": (
        "def prepare():\n global x\n x = 4\ndef main(): return x",
        "exited",
        4,
    ),
    "exit in prepare": ("import sys\ndef prepare(): sys.exit(2)\ndef main(): 1 / 0", "exited", 2),
    "exit with words": ("raise SystemExit('bye')", "exited", 1),
    "syntax": ("def", "syntax", 1),
    "a null byte": ("a\0", "syntax", 1),
    "memory": ("raise MemoryError", "memory", 1),
    "an exception": ("1 / 0", "raised", 1),
    "an exit that is none": ("raise KeyboardInterrupt", "raised", 1),
    "no output left": ("import sys\nsys.stdout = None\n1 / 0", "raised", 1),
}


@pytest.mark.parametrize(("source", "outcome", "status"), ENDS.values(), ids=ENDS.keys())
def test_an_end_has_a_name(source, outcome, status, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    found = run(source)
    assert (found["outcome"], found["status"]) == (outcome, status)
    assert len(found["error"]) <= channel.ERROR_TEXT_LIMIT


def test_a_trace_shows_the_line_although_the_file_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run("first = 1\nfirst / 0  # here")
    assert "first / 0  # here" in sys.stderr.getvalue()


def test_imports_of_a_script_come_first_wherever_they_stand():
    import ast

    sys.modules.pop("colorsys", None)
    guest.import_ahead(ast.parse("def f():\n import colorsys, no_such\nfrom . import x"))
    assert "colorsys" in sys.modules


def test_the_held_program_answers_with_the_request():
    held = guest.create({})
    assert held.warm_up() == {"name": "reference"}
    assert held.handle(b"x", lambda _: None) == b"x"


# -- what the commands print ----------------------------------------------------------------------


@pytest.fixture
def probed(monkeypatch):
    monkeypatch.setattr(twin, "probe_rung", lambda *_a, **_k: {"probed": "elsewhere"})
    monkeypatch.setattr(twin, "require_sealed", lambda _: None)
    monkeypatch.setattr(twin, "summary", lambda report: report)


@pytest.fixture
def audit(request, tmp_path, capfd):
    request.getfixturevalue("probed")

    def call(source, *more):
        path = tmp_path / "probe.py"
        path.write_text(source)
        words = ["enclave", "audit", "--probe", str(path), "--root", str(tmp_path), *more]
        status = dispatch(words)
        return status, *capfd.readouterr()

    return call


@needs_namespaces
def test_output_goes_to_one_place_and_what_the_host_saw_to_the_other(audit):
    status, out, err = audit("print('\\x1b[31mhello')")
    assert status == 0
    assert out == "\\x1b[31mhello\n"
    assert "SEALED/" in err
    assert "returned, status 0" in err
    assert "denied calls" in err


@needs_namespaces
def test_a_probe_that_failed_is_exit_1_with_its_code(audit):
    status, out, err = audit("1 / 0", "--stage", "1")
    assert status == 1
    assert "ZeroDivisionError" in out
    assert "enclave.program" in err
    status, out, _ = audit("1 / 0", "--json")
    assert (status, json.loads(out)["code"]) == (1, "enclave.program")


@needs_namespaces
def test_output_over_the_limit_is_said_to_be_cut(audit):
    status, out, err = audit("import os\nfor _ in range(40): os.write(2, b'x' * 65536)")
    assert status == 0
    assert len(out) <= (1 << 20) + 1
    assert "cut: 2,621,440 bytes came" in err


def test_a_file_that_is_no_probe_and_a_stage_that_is_none_are_refused(tmp_path, capfd):
    words = ["enclave", "audit", "--root", str(tmp_path), "--probe"]
    assert dispatch([*words, str(tmp_path)]) == 1
    assert "enclave.probe_file" in capfd.readouterr().err
    assert dispatch([*words, str(tmp_path), "--stage", "3"]) == 2
    assert dispatch([*words, str(tmp_path), "--rung", "D"]) == 2


@needs_namespaces
@pytest.mark.usefixtures("probed")
def test_a_held_worker_is_shown_and_ends(tmp_path, capfd):
    assert dispatch(["enclave", "hold", "--seconds", "1", "--root", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert "held for 1 s" in out
    assert "ended: status 0" in err
    assert dispatch(["enclave", "show", "--root", str(tmp_path)]) == 0
    assert "no sealed process" in capfd.readouterr().out


@needs_namespaces
@pytest.mark.usefixtures("probed")
def test_running_workers_are_listed_with_their_pids(tmp_path, capfd):
    from airgap.enclave import SealSpec, launch
    from airgap.enclave.running import noted

    spec = SealSpec(profile="worker", program="airgap.enclave.guest:create")
    with launch(spec) as enclave, noted(tmp_path / "enclave", enclave.evidence):
        assert dispatch(["enclave", "show", "--root", str(tmp_path)]) == 0
        assert f"pid {enclave.pid}  worker  SEALED/" in capfd.readouterr().out
        status = dispatch(["enclave", "filters", "--pid", str(enclave.pid)])
        out, err = capfd.readouterr()
        if status == 0:
            assert [line.split()[-1] for line in out.splitlines()] == ["stage1", "stage2"]
        else:
            assert "enclave.evidence" in err  # a user may not look


def test_filters_of_no_process_are_refused(capfd):
    assert dispatch(["enclave", "filters", "--pid", str(2**22 - 1)]) == 1
    assert "enclave.evidence" in capfd.readouterr().err


def test_a_process_without_a_filter_is_named_as_no_sealed_process(capfd):
    if host.survey().own_filters:
        pytest.skip("these tests run under filters of their own")
    assert dispatch(["enclave", "filters", "--pid", str(os.getpid())]) == 1
    assert "it is no sealed process" in capfd.readouterr().err
