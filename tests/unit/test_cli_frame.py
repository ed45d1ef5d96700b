"""The command-line frame: every outcome becomes one exit status and one document."""

import errno
import json

import pytest
import typer
from typer.exceptions import TyperException

from airgap import cli
from airgap.cli.app import as_error, build
from policy.errors import CODES, FaultError, RefusedError, UsageError


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
        assert len(code) <= 32
        assert "." in code
        assert meaning
