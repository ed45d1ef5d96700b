"""Field types of our own documents: text, digests, times and numbers with their limits."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from bundle.canonical import MAX_INTEGER

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
# Controls, line and paragraph separators, and all that reorders text on a screen (UAX 9).
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


class Document(BaseModel):
    """Base of our own documents: frozen, strict, and no field that we do not know."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def format_time(moment: datetime) -> str:
    """Write a time in UTC to the second, `2026-01-31T12:00:00Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(value: Any) -> datetime:
    """Read the one form that `format_time` writes, or pass a UTC `datetime`; ValueError else."""
    if isinstance(value, datetime):
        if value.tzinfo is None or value.microsecond:
            raise ValueError("a time has a zone and whole seconds")
        return value.astimezone(UTC)
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError("a time reads like 2026-01-31T12:00:00Z")
    return datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def has_hidden(text: str) -> bool:
    """Tell whether `text` holds characters that a screen hides, reorders or acts on."""
    return _HIDDEN.search(text) is not None


def _visible(text: str) -> str:
    if has_hidden(text):
        raise ValueError("text holds a control or bidirectional character")
    return text


Instant = Annotated[
    datetime,
    BeforeValidator(parse_time),
    PlainSerializer(format_time, return_type=str),
]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Text = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_visible)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
Token = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
PersonId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._@-]{0,63}$")]
Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sha384Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{96}$")]
DigestText = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96})$")]
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Status = Literal["verified", "declared"]
