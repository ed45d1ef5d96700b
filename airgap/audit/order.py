"""Intent, chunks and outcome of a request come in that order (docs/design/audit.md, 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from airgap.audit.recovery import OpenIntents, note_intent


class Order:
    """The requests that callers have open, what waits in a batch included."""

    def __init__(self) -> None:
        self._intents: OpenIntents = {}
        self._parts: dict[str, Part] = {}

    def take(self, fields: Mapping[str, Any]) -> str:
        """Take note of a record on its way; else say in words why it is out of order."""
        phase, req = fields["phase"], fields.get("req", "")
        known = self._intents.get(req)
        if phase == "intent" and known is not None:
            return f"{req} has an open intent"
        if phase in {"chunk", "outcome"}:
            if known is None or known[0] != fields["kind"]:
                return f"{req} has no open {fields['kind']} intent"
            newest, wrong = next_part(self._parts.get(req), fields)
            if wrong:
                return f"{req}: {wrong}"
            if newest is None:
                self._parts.pop(req, None)
            else:
                self._parts[req] = newest
        note_intent(self._intents, fields)
        return ""


class Part(NamedTuple):
    """The newest chunk of a request that is open."""

    part: int
    commit: str
    bytes: int


def next_part(before: Part | None, record: Mapping[str, Any]) -> tuple[Part | None, str]:
    """Return the newest chunk after `record`, and in words how that breaks the order of chunks.

    Args:
        before: The chunk before it, None for the first.
        record: A valid chunk or outcome of an inference.

    """
    out = record.get("out")
    if record["phase"] == "chunk" and out is not None:
        expected = 0 if before is None else before.part + 1
        wrong = ""
        if record["part"] != expected:
            wrong = f"chunk {record['part']} where chunk {expected} was due"
        elif out["bytes"] <= (0 if before is None else before.bytes):
            wrong = f"chunk {expected} adds nothing"
        return Part(record["part"], out["commit"], out["bytes"]), wrong
    if before is None or out is None or (out["commit"], out["bytes"]) == before[1:]:
        return None, ""
    return None, f"an outcome that commits to another output than chunk {before.part}"
