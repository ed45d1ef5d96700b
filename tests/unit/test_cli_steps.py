"""Every refusal ends with a next step."""

import json

import pytest

from airgap.cli.common import show_error
from airgap.cli.steps import next_step
from policy.errors import CODES, FaultError, RefusedError


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_has_a_next_step(code: str) -> None:
    assert next_step(RefusedError(code, "checked, expected, found"))


def test_the_raiser_knows_best() -> None:
    assert next_step(FaultError("host.io", "no", hint="mend it")) == "mend it"


def test_both_forms_print_it(capsys: pytest.CaptureFixture[str]) -> None:
    error = FaultError("host.io", "the bundle cannot be read")
    show_error(error, json=True)
    assert json.loads(capsys.readouterr().out)["hint"]
    show_error(error, json=False)
    assert "next step: check the path" in capsys.readouterr().err
