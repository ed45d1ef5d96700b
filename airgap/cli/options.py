"""Groups of options: a command takes one value, and shows the options that it is made of.

    @dataclass(frozen=True)
    class Period:
        since: Since = ""
        until: Until = ""

    @grouped
    def report(*, period: Period, json: Json = False) -> None: ...

gives `report` the options `--since` and `--until` in the place of `period`. What several commands
ask for together is worded, and worked with, once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_type_hints

Result = TypeVar("Result")


def grouped(command: Callable[..., Result]) -> Callable[..., Result]:
    """Return the command with each parameter that is a group shown as the options in it."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    taken = {name: list(_options(kind)) for name, kind in groups.items()}
    shown: list[inspect.Parameter] = []
    for each in inspect.signature(command).parameters.values():
        shown += taken.get(each.name) or [each.replace(annotation=hints[each.name])]

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> Result:
        for name, kind in groups.items():
            parts = {part.name: given.pop(part.name) for part in taken[name] if part.name in given}
            given[name] = kind(**parts)
        return command(*args, **given)

    run.__dict__["__signature__"] = inspect.Signature(shown)
    run.__annotations__ = {each.name: each.annotation for each in shown}
    return run


def _options(kind: Any) -> Iterator[inspect.Parameter]:
    """Yield the parameters that a group stands for, in order."""
    hints = get_type_hints(kind, include_extras=True)
    for each in dataclasses.fields(kind):
        default = each.default
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        yield inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=hints[each.name],
        )
