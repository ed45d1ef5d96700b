"""A group of options is shown as its parts and taken as one value."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from airgap.cli.app import build
from airgap.cli.options import grouped

Key = Annotated[list[str], typer.Option("--key", help="Who signs.")]
Days = Annotated[int, typer.Option("--days", min=1)]


@dataclass(frozen=True)
class Signing:
    key: Key
    days: Days = 7

    def words(self) -> str:
        return f"{'+'.join(self.key)} for {self.days}"


@dataclass(frozen=True)
class OwnKey(Signing):
    key: Key = field(default_factory=lambda: ["root"])


@grouped
def sign(name: str, *, by: Signing, loud: bool = False) -> None:
    """Sign NAME."""
    typer.echo(f"{name} by {by.words()}{'!' * loud}")


@grouped
def renew(*, by: OwnKey) -> None:
    """Renew."""
    typer.echo(by.words())


def run(*argv):
    app = typer.Typer()
    app.command()(sign)
    app.command()(renew)
    return CliRunner().invoke(app, [str(each) for each in argv])


def test_the_parts_of_a_group_are_options_of_the_command_in_its_place():
    assert list(inspect.signature(sign).parameters) == ["name", "key", "days", "loud"]
    assert sign.__doc__ == "Sign NAME."
    shown = run("sign", "--help").output
    assert all(each in shown for each in ("--key", "Who signs.", "--days", "--loud"))
    assert "--by" not in shown


def test_a_command_gets_the_group_as_one_value():
    assert run("sign", "x", "--key", "a", "--key", "b", "--loud").output == "x by a+b for 7!\n"
    assert run("sign", "x", "--key", "a", "--days", 3).output == "x by a for 3\n"
    assert run("renew").output == "root for 7\n"
    assert run("renew", "--key", "other").output == "other for 7\n"


@pytest.mark.parametrize(
    "argv", [("sign", "x"), ("sign", "x", "--key", "a", "--days", 0)], ids=["missing", "too small"]
)
def test_what_an_option_refuses_the_group_refuses(argv):
    assert run("sign", "x", "--key", "a").exit_code == 0
    assert run(*argv).exit_code == 2


def test_one_default_list_is_not_another():
    one, other = OwnKey(), OwnKey()
    one.key.append("b")
    assert other.key == ["root"]


def test_every_command_still_builds():
    assert typer.main.get_command(build()).commands
