"""The command-line frame: every outcome becomes one exit status and one document."""

import ast
import contextlib
import errno
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.exceptions import TyperException

from airgap import cli
from airgap.cli import streams
from airgap.cli.app import as_error, build
from airgap.cli.common import show, show_error
from policy.errors import CODE_LIMIT, CODES, FaultError, RefusedError, UsageError


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        ([], 2),
        (["--help"], 0),
        (["no-such-command"], 2),
        (["run"], 2),
        (["run", "molecule", "-n", "many"], 2),
        (["verify"], 2),
        (["audit"], 2),
    ],
)
def test_usage_ends_with_its_status(argv, status, capsys):
    assert cli.invoke(argv) == status
    assert "Traceback" not in capsys.readouterr().err


def test_every_command_has_a_sentence_of_help(capsys):
    root = typer.main.get_command(build())

    def walk(command, path):
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                walk(child, [*path, name])
        else:
            assert command.help, path
            assert cli.invoke([*path, "--help"]) == 0

    walk(root, [])
    assert "--root" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "verify", "install", "status", "list", "inspect", "build"])
def test_root_commands_exist(name):
    assert name in {c.name or c.callback.__name__ for c in build().registered_commands}


def test_a_refusal_is_one_json_document(tmp_path, capsys):
    assert cli.invoke(["status", "--root", str(tmp_path), "--json"]) in {0, 1, 3}
    out = capsys.readouterr()
    json.loads(out.out)
    status = cli.invoke(["verify", str(tmp_path / "absent.agb"), "--root", str(tmp_path), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert status == document["exit"]
    assert document["code"] in CODES


def test_usage_errors_are_json_too(capsys):
    assert cli.invoke(["run", "molecule", "-n", "many", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == "usage.argument"


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), FaultError, "host.space"),
        (OSError(errno.EDQUOT, "Quota"), FaultError, "host.space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), FaultError, "host.io"),
        (TyperException("no"), UsageError, "usage.argument"),
        (RefusedError("policy.denied", "no"), RefusedError, "policy.denied"),
        (ZeroDivisionError("x"), FaultError, "host.internal"),
    ],
)
def test_any_exception_has_a_code(error, kind, code):
    ours = as_error(error)
    assert type(ours) is kind
    assert ours.code == code


def test_an_unlisted_code_cannot_be_raised():
    with pytest.raises(KeyError):
        RefusedError("no.such", "x")


def test_codes_are_short_and_described():
    for code, meaning in CODES.items():
        assert len(code) <= CODE_LIMIT
        assert "." in code
        assert meaning


SOURCES = [
    path
    for package in ("policy", "bundle", "airgap")
    for path in (Path(__file__).parents[2] / package).rglob("*.py")
]
RAISERS = re.compile(r"(Error|Refused|refusal|refuse|wrong|bad|fault)$", re.IGNORECASE)


def raised_codes():
    """Yield (file, line, code) of each literal code that an error is made with."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            if getattr(getattr(node.func, "value", None), "id", "") == "operator":
                continue  # a line of the diagnosis log: an event, and no code
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            first = node.args[0]
            if (
                RAISERS.search(name)
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
                and re.fullmatch(r"[a-z0-9]+\.[a-z0-9_]+", first.value)
            ):
                yield path.name, node.lineno, first.value


def test_every_code_that_the_source_raises_is_listed():
    found = list(raised_codes())
    assert len(found) > 100
    assert [entry for entry in found if entry[2] not in CODES] == []


def test_every_listed_code_occurs_in_the_source():
    text = "".join(path.read_text() for path in SOURCES if path.name != "errors.py")
    # Made from parts: the layer of a seal, the number of a grammar rule.
    made = {code for code in CODES if code.startswith(("enclave.", "prompt.g"))}
    assert [code for code in CODES if f'"{code}"' not in text and code not in made] == []


# -- streams as they are found ---------------------------------------------------------------------


def command(line):
    """Run a shell line in which `$A` is the command, and return its status and what it said."""
    program = f"{shlex.quote(sys.executable)} -c 'from airgap.cli import main; main()'"
    shell = ["bash", "-c", f'A() {{ {program} "$@"; }}; {line}']
    done = subprocess.run(shell, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("A run nope --json >&-", 1),
        ("A run nope 2>&-", 1),
        ("A run nope >&- 2>&- <&-", 1),
        ("A run nope --json >/dev/full", 4),
        ("A run nope --json >/dev/full 2>/dev/full", 4),
        ("A run nope --json | true; exit ${PIPESTATUS[0]}", 4),
        ("A run nope --unknown --json >/dev/full", 4),
        ("A enclave profiles --json >/dev/full", 3),
        ("A enclave show --root /nowhere --json >/dev/full", 3),
        ("A run nope 2>/dev/full", 1),
        ("A --help >/dev/full", 3),
        ("A doctor --help >&-", 0),
        ("A run binding-site --fasta - <&-", 2),
        ("A --help | true; exit ${PIPESTATUS[0]}", 141),
        ("A policy explain --model logos-8b --root /nowhere | true; exit ${PIPESTATUS[0]}", 141),
    ],
)
def test_no_state_of_the_streams_ends_in_a_traceback(line, status):
    code, _, said = command(line)
    assert code == status, said
    assert b"Traceback" not in said
    assert b"Exception ignored" not in said
    assert b"host.internal" not in said


def test_no_command_loses_a_code_with_its_document(monkeypatch, capsys):
    """A command of each group tells a refusal in words where its document has no room."""
    groups = typer.main.get_command(build()).commands
    for name, group in sorted(groups.items()):
        words = [name, *sorted(getattr(group, "commands", {}))[:1]]
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            status = cli.invoke([*words, "--json", "--no-such-option"])
            monkeypatch.undo()
            with contextlib.suppress(OSError):
                full.close()
        said = capsys.readouterr().err
        assert status == 4, (words, said)
        assert "usage usage.argument" in said, words
        assert "host.space" in said, words


def test_documents_are_written_in_one_place():
    for path in Path(cli.__file__).parent.glob("*.py"):
        text = path.read_text()
        if path.name not in {"common.py", "streams.py"}:
            assert "sys.stdout.write" not in text, path.name
            assert "print_json" not in text, path.name


@pytest.mark.parametrize(
    ("status", "code"), [(0, 3), (1, 4), (2, 4), (3, 3), (130, 130), (141, 141)]
)
def test_a_document_that_is_lost_changes_yes_and_no_alone(status, code, monkeypatch):
    monkeypatch.setattr(streams, "lost", [])
    assert streams.told(status) == status
    streams.lost.append(OSError(28, "full"))
    assert streams.told(status) == code


def test_json_is_one_document_in_every_encoding():
    code, out, _ = command(
        "PYTHONIOENCODING=ascii A run molecule --json --root /tmp/\u4e2d\U0001f600/none"
    )
    assert (code, json.loads(out)["exit"]) == (1, 1)


def test_an_argument_that_is_no_text_is_told():
    code, out, _ = command("A run retrosynthesis --json --smiles $'\\xff'")
    assert (code, json.loads(out)["code"]) == (2, "usage.argument")


def test_an_error_cannot_move_the_cursor_of_a_terminal(capsys):
    show_error(RefusedError("prompt.task", "a\x1b[2Jb\u202ec\n  ^"), json=False)
    said = capsys.readouterr().err
    assert r"a\x1b[2Jb\u202ec" in said
    assert "\n  ^" in said


def test_an_interrupt_inside_a_command_is_told(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("airgap.science.tasks.find_task", stop)
    assert cli.invoke(["run", "molecule"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_before_the_modules_are_there_is_told(capsys, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("airgap.cli.streams.prepare", stop)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("table", [False, True])
def test_what_a_bundle_says_is_text_and_no_markup(capsys, table):
    """A closing tag would end the command; others hide words, or make links of them."""
    from rich.table import Table

    said = "a [/] [/red] [conceal]hid[/conceal] [link=file:///x]y[/link] :skull:"
    shown = Table.grid()
    shown.add_row(said)
    show({}, shown if table else f"{said}\x1b[2J", json=False)
    out = capsys.readouterr().out
    assert " ".join(out.split()).startswith(said)
    assert "\x1b" not in out
    show_error(RefusedError("seal.role", said, hint=said), json=False)
    assert said in capsys.readouterr().err
