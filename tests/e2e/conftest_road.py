"""Runs the real commands in this process; shared by the end-to-end tests."""

import json
from dataclasses import dataclass
from pathlib import Path

from airgap import cli

REPOSITORY = Path(__file__).parents[2]
SNAPSHOT = REPOSITORY / "reference" / "logos-ref-tiny" / "model"
PINS = SNAPSHOT.with_name("SHA256SUMS")


@dataclass
class Call:
    status: int
    document: dict
    text: str


def call(capsys, *argv, as_json=True):
    """Run one command in this process and return exit status and document."""
    capsys.readouterr()
    words = [str(word) for word in argv] + (["--json"] if as_json else [])
    status = cli.invoke(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return Call(status, json.loads(out) if as_json and out.strip() else {}, out + err)


class Capture:
    """Stands in for `capsys` where the scope is the session."""

    def __init__(self):
        import contextlib
        import io

        self._streams = io.StringIO(), io.StringIO()
        self._stack = contextlib.ExitStack()

    def readouterr(self):
        texts = tuple(stream.getvalue() for stream in self._streams)
        for stream in self._streams:
            stream.seek(0)
            stream.truncate()
        return texts

    def __enter__(self):
        import contextlib

        out, err = self._streams
        self._stack.enter_context(contextlib.redirect_stdout(out))
        self._stack.enter_context(contextlib.redirect_stderr(err))
        return self

    def __exit__(self, *_):
        self._stack.close()


@dataclass
class Road:
    """Folders of one road: staging, the sealed bundle, the draft with no approval, the lab."""

    staging: Path
    draft: Path
    half: Path
    bundle: Path
    lab: Path
    built: dict
    installed: dict
