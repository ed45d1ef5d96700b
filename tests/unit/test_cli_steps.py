"""Every refusal ends with a next step."""

import json
import re

import pytest
import typer

from airgap.cli.app import build
from airgap.cli.common import show_error
from airgap.cli.steps import next_step, usual_step
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
