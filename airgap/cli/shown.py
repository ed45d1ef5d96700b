"""How commands show what they do and what they found: a bar on standard error, facts in columns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from airgap.cli.common import stderr

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """A bar on standard error; called with bytes done and bytes in all."""

    def __init__(self, display: Progress, label: str) -> None:
        self._display = display
        self._task = display.add_task(label, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Move the bar."""
        self._display.update(self._task, completed=done, total=total)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar away while a person is asked something."""
        self._display.stop()
        try:
            yield
        finally:
            self._display.start()


@contextlib.contextmanager
def bar(label: str) -> Iterator[Bar]:
    """Show bytes done, rate and time left on standard error while the block runs."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    ) as display:
        yield Bar(display, label)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return labels and values in two columns; a digest is never wrapped."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
