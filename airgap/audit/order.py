"""Intent, chunks and outcome of a request come in that order (docs/design/audit.md, 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airgap.audit.chunks import Part, next_part
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
