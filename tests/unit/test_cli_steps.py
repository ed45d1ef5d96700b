"""Every refusal ends with a next step."""

import json
import re

import pytest
import typer

from airgap.cli.app import build
from airgap.cli.common import folded, show_error
from airgap.cli.steps import next_step, usual_step
from airgap.cli.streams import Screen
from policy.errors import CODES, FaultError, RefusedError


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_has_a_next_step(code: str) -> None:
    assert next_step(RefusedError(code, "checked, expected, found"))


def test_every_command_that_a_step_names_exists() -> None:
    program = typer.main.get_command(build())
    for words in {
        words
        for code in CODES
        for words in re.findall(r"airgap((?: [a-z][a-z-]+)+)", usual_step(code))
    }:
        command = program
        for word in words.split():
            if not hasattr(command, "commands"):
                break
            assert word in command.commands, words
            command = command.commands[word]


def test_the_raiser_knows_best() -> None:
    assert next_step(FaultError("host.io", "no", hint="mend it")) == "mend it"


def test_both_forms_print_it(capsys: pytest.CaptureFixture[str]) -> None:
    error = FaultError("host.io", "the bundle cannot be read")
    show_error(error, json=True)
    assert json.loads(capsys.readouterr().out)["hint"]
    show_error(error, json=False)
    assert "next step: check the path" in capsys.readouterr().err


def test_people_read_whole_words_and_scripts_whole_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    digest = "sha256:" + "0" * 64
    message = f"  the release {digest} is not what the sealed list of this medium says it is\n  ^"
    screen = Screen(force_terminal=True, width=80, color_system=None)
    lines = folded(message, screen).split("\n")
    assert [len(line) <= 80 for line in lines] == [True] * 4
    assert lines[1].startswith(f"  {digest} ")
    assert lines[-1] == "  ^"
    assert " ".join("\n".join(lines).split()) == " ".join(message.split())
    assert folded(message, Screen(force_terminal=False, width=80)) == message
    assert folded("x" * 200, screen) == "x" * 200
    show_error(RefusedError("chunk.leaf", message), json=False)
    assert digest in capsys.readouterr().err
