"""A flood of refusals becomes one record a second (docs/design/audit.md, 3, `denial`).

Whoever is refused again and again must not fill the disk with that. A few refusals of a person in a
second are written one by one; what comes on top waits for the second's end and is written as one
record with their count. Every caller still waits for a durable record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from airgap.audit.writer import Pending

BURST: Final = 20  # refusals of one person within a second that are written one by one
_WINDOW_NS: Final = 10**9

_Person = tuple[int, str]


class Joiner:
    """Holds refusals back and joins them; used by the writer's thread alone."""

    def __init__(self) -> None:
        self._since = 0
        self._seen: dict[_Person, int] = {}
        self._held: dict[tuple[Any, ...], Pending] = {}

    @property
    def holds(self) -> bool:
        """Whether anybody waits for the end of the second."""
        return bool(self._held)

    def take(self, batch: Sequence[Pending], mono_ns: int, *, last: bool = False) -> list[Pending]:
        """Return what is to be written now; `last` holds nothing back."""
        ready: list[Pending] = []
        if last or not 0 <= mono_ns - self._since < _WINDOW_NS:
            self._since, self._seen = mono_ns, {}
            ready = self.release()
        for pending in batch:
            person = _refused_person(pending.fields)
            if person is None:
                ready.append(pending)
                continue
            self._seen[person] = self._seen.get(person, 0) + 1
            if last or self._seen[person] <= BURST:
                ready.append(pending)
            else:
                self._hold(pending)
        return ready

    def release(self) -> list[Pending]:
        """Return all that is held, each group as one record."""
        held, self._held = list(self._held.values()), {}
        return held

    def _hold(self, pending: Pending) -> None:
        key = _alike(pending.fields)
        leader = self._held.setdefault(key, pending)
        if leader is pending:
            pending.fields.pop("req", None)  # it will speak for several requests
            return
        leader.followers.append(pending)
        data = leader.fields["data"]
        leader.fields["data"] = data | {"count": data["count"] + 1}


def _refused_person(fields: dict[str, Any]) -> _Person | None:
    """Return who was refused, None for any record but a single refusal."""
    if fields["kind"] != "denial" or fields.get("data", {}).get("count") != 1:
        return None
    actor = fields["actor"]
    return actor["uid"], actor.get("name", "")


def _alike(fields: dict[str, Any]) -> tuple[Any, ...]:
    """Return what two refusals must share to be told as one."""
    decision = fields.get("decision", {})
    return (
        *fields["actor"].items(),
        *(fields.get(name) for name in ("project", "model", "policy", "label", "src")),
        fields.get("err", {}).get("code"),
        decision.get("outcome"),
        decision.get("rule"),
        *(item for item in fields["data"].items() if item[0] != "count"),
    )
