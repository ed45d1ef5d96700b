"""Man pages, completion, and a page for each code: all of them, and as their readers take them."""

import json
import re
import shutil
import subprocess

import pytest
import typer

from airgap import cli
from airgap.cli.app import build
from airgap.cli.manual import _codes_of, _commands
from policy.errors import CODES


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manual")
    assert cli.invoke(["manual", "-o", str(folder), "--json"]) == 0
    return folder


def test_each_command_has_a_man_page_that_names_its_options(pages):
    commands = dict(_commands(("airgap",), typer.main.get_command(build())))
    assert len(commands) > 60
    assert {p.stem for p in (pages / "man" / "man1").iterdir()} == {"-".join(w) for w in commands}
    for words, command in commands.items():
        text = (pages / "man" / "man1" / f"{'-'.join(words)}.1").read_text()
        for parameter in command.params:
            for name in getattr(parameter, "opts", []):
                if name.startswith("-") and not parameter.hidden:
                    assert name.replace("-", "\\-") in text, (words, name)
        for child in getattr(command, "commands", {}):
            assert f"{'-'.join((*words, child))}".replace("-", "\\-") in text


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_say_of_them(pages):
    files = sorted((pages / "man" / "man1").iterdir())
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", *map(str, files)],
        capture_output=True, check=False, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "--no-releases" in re.sub("\x1b\\[[0-9;]*m|.\b", "", done.stdout)


def test_completion_for_three_shells(pages):
    folder = pages / "completion"
    assert sorted(p.name for p in folder.iterdir()) == ["_airgap", "airgap.bash", "airgap.fish"]
    subprocess.run(["bash", "-n", folder / "airgap.bash"], check=True)
    assert (folder / "_airgap").read_text().startswith("#compdef airgap")


def test_each_code_has_a_page(pages):
    folder = pages / "errors"
    assert {p.stem for p in folder.iterdir()} == {*CODES, "README"}
    for code in CODES:
        text = (folder / f"{code}.md").read_text()
        assert text.startswith(f"# `{code}`\n")
        assert "**Next step.**" in text
        assert f"]({code}.md)" in (folder / "README.md").read_text()
    assert "bundle.statement.verify_seal" in (folder / "seal.threshold.md").read_text()


def test_explain(capsys):
    assert cli.invoke(["explain", "seal.threshold"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"seal.threshold: {CODES['seal.threshold']}\n")
    assert "bundle.statement.verify_seal" in shown
    assert max(map(len, shown.split("raised by")[0].splitlines())) <= 80
    assert cli.invoke(["explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["codes"] == CODES
    assert cli.invoke(["explain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CODES)
    assert cli.invoke(["explain", "seal.thresholds"]) == 2
    assert "did you mean seal.threshold" in capsys.readouterr().err


def test_a_reason_alone_is_of_the_room_before_it():
    text = "RefusedError: `seal.type`, `.algorithm`; `trust.expired`, `.epoch`, `.nothing`, `xy.z`"
    assert list(_codes_of(text)) == ["seal.type", "seal.algorithm", "trust.expired", "trust.epoch"]


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path, capsys):
    (tmp_path / "man").write_text("a file")
    assert cli.invoke(["manual", "-o", str(tmp_path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["code"] == "host.io"
