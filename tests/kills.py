"""Killing a command at any of its operations on files, in a fork of the test."""

import os
import signal
import sys
from pathlib import Path

from airgap import cli


def operations(words: tuple[object, ...], folder: Path) -> int:
    """Run a command to its end, which must be good, and return how many operations it made."""
    ended = _fork(words, 0, folder)
    assert ended == 0, ended
    return int((folder / "operations").read_text())


def run_killed(words: tuple[object, ...], at: int, folder: Path) -> int:
    """Run a command that is killed at its n-th operation, and return how it ended.

    Operations are what the interpreter reports to audit hooks: files opened, renamed, removed,
    folders made, locks taken. A hook cannot be taken out again, so it lives in the fork alone.
    """
    return _fork(words, at, folder)


def _fork(words: tuple[object, ...], at: int, folder: Path) -> int:
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            if event.startswith(("open", "os.", "shutil.", "fcntl.")):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 70
        try:
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - before the hook
                sys.stdout = sys.stderr = nowhere
                sys.addaudithook(hook)
                status = cli.invoke([str(word) for word in words])
        finally:
            if not at:
                (folder / "operations").write_text(str(count))
            os._exit(status)
    _, found = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(found)
