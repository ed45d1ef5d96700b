"""Bytes of a pack become plain values, each with its place (docs/design/policy.md, 3).

YAML readers disagree about plain scalars (`NO`, `1_000`, `12:30`, `0o17`), so only `true`,
`false`, `null`, decimal integers and texts that every reader reads alike pass without quotes.
Duplicate keys, anchors, aliases, merge keys, tags, directives and second documents are refused, as
are invisible and bidirectional characters, because a pack is read and signed by people.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    ValidationError,
)

from policy.errors import RefusedError

MAX_BYTES = 4 << 20
MAX_DEPTH = 24
MAX_NODES = 200_000
MAX_TEXT = 4_096
MAX_INTEGER = 2**53 - 1  # RFC 8785 writes no larger one exactly

Path = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,15})")
_PLAIN = re.compile(r"[^\W\d_][^\x00-\x1f]*")  # begins with a letter, so no reader sees a number
_DIGITS = frozenset("-0123456789")
_READ_DIFFERENTLY = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_WORDS = {"true": True, "false": False, "null": None}
_INVISIBLE = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})


_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def parse_day(value: object) -> object:
    """Turn `YYYY-MM-DD` into a date; anything else is left for the strict type to refuse."""
    if isinstance(value, str) and _DAY.fullmatch(value):
        with contextlib.suppress(ValueError):  # 2026-02-30: not a date, so it stays a text
            return date.fromisoformat(value)
    return value


def shift_day(day: date, days: int) -> date:
    """The day so many days later, or earlier; never beyond the ends of the calendar."""
    number = day.toordinal() + days
    return date.fromordinal(min(max(number, date.min.toordinal()), date.max.toordinal()))


class Frozen(BaseModel):
    """Base of all our own files: immutable, strict types, no unknown field."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)


Day = Annotated[date, BeforeValidator(parse_day)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Words = Annotated[str, StringConstraints(min_length=1, max_length=2000)]


@dataclass(frozen=True)
class Source:
    """A parsed document: its plain value, and how to find the place of each node."""

    name: str
    value: Any
    locate: Callable[[], Mapping[Path, tuple[int, int]]]

    @cached_property
    def places(self) -> Mapping[Path, tuple[int, int]]:
        """The (line, column) of every node, both from 1; read when something is refused."""
        return self.locate()

    def where(self, path: Path) -> str:
        """Name the place of the node at `path`, or of its nearest ancestor."""
        while path and path not in self.places:
            path = path[:-1]
        line, column = self.places.get(path, (1, 1))
        return f"{self.name}: line {line}, column {column}"

    def refusal(self, code: str, path: Path, problem: str, *, hint: str = "") -> RefusedError:
        """Make the RefusedError `code` that names the place of `path`."""
        return RefusedError(code, f"{self.where(path)}: {problem}", hint=hint)

    def build(self, model: type[Model], *, code: str = "pack.schema") -> Model:
        """Validate the document against `model`; RefusedError `code` names the first fault."""
        return self.build_part(model, (), self.value, code=code)

    def build_part(
        self, model: type[Model], at: Path, value: object, *, code: str = "pack.schema"
    ) -> Model:
        """Validate `value`, the node at `at`."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            path: Path = (*at, *first["loc"])
            field = ".".join(str(part) for part in path)
            found = "" if first["type"] == "missing" else f", found {first['input']!r:.60}"
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise self.refusal(
                code, path, f"{field or 'document'}: {first['msg']}{found}{more}"
            ) from error


def read_yaml(content: bytes, name: str = "pack") -> Source:
    """Parse strict YAML.

    Args:
        content: Untrusted bytes.
        name: What to call the document in messages.

    Raises:
        RefusedError: `pack.yaml` or `pack.limit`, with line and column.

    """
    if len(content) > MAX_BYTES:
        raise RefusedError(
            "pack.limit",
            f"{name}: line 1, column 1: {len(content)} bytes, of {MAX_BYTES} allowed",
        )
    return _Reader(_decode(content, name), name).document()


def _decode(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise RefusedError(
            "pack.yaml",
            f"{name}: line {line}, column {column}: byte 0x{content[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        ) from error
    for number, line_text in enumerate(text.split("\n"), 1):
        if line_text.isascii() and line_text.isprintable():
            continue
        for column, character in enumerate(line_text, 1):
            if character == "\r" and column == len(line_text):
                continue
            if unicodedata.category(character) in _INVISIBLE:
                raise RefusedError(
                    "pack.yaml",
                    f"{name}: line {number}, column {column}: invisible character"
                    f" U+{ord(character):04X}",
                    hint="delete it: tabs, zero-width and direction marks hide what is signed",
                )
    return text


class _Reader:
    """Builds plain values from parser events; never from PyYAML's own constructors."""

    def __init__(self, text: str, name: str, *, placed: bool = False) -> None:
        self.name = name
        self.text = text
        self.placed = placed
        self.places: dict[Path, tuple[int, int]] = {}
        self.nodes = 0
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=loader))

    def document(self) -> Source:
        try:
            next(self.events)  # StreamStart
            start = next(self.events)
            if isinstance(start, yaml.StreamEndEvent):
                self._refuse(start, "the document is empty")
            if start.version or start.tags:
                self._refuse(start, "a directive is not allowed")
            value = self._node(next(self.events), (), 0)
            next(self.events)  # DocumentEnd
            rest = next(self.events)
            if not isinstance(rest, yaml.StreamEndEvent):
                self._refuse(rest, "a second document is not allowed")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            problem = getattr(error, "problem", None) or "not YAML"
            raise RefusedError(
                "pack.yaml", f"{self.name}: line {line}, column {column}: {problem!s:.200}"
            ) from error
        return Source(self.name, value, self._locate)

    def _locate(self) -> Mapping[Path, tuple[int, int]]:
        """Read the same text again, with places."""
        again = _Reader(self.text, self.name, placed=True)
        again.document()
        return again.places

    def _node(self, event: Any, path: Path, depth: int) -> Any:
        kind = type(event)
        if kind is yaml.AliasEvent:
            self._refuse(event, "an alias is not allowed")
        if event.anchor is not None:
            self._refuse(event, "an anchor is not allowed")
        if event.tag is not None:
            self._refuse(event, f"a tag is not allowed: {event.tag!r:.60}")
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES} nodes", code="pack.limit")
        if depth > MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH}", code="pack.limit")
        if self.placed:
            mark = event.start_mark
            self.places[path] = (mark.line + 1, mark.column + 1)
        if kind is yaml.ScalarEvent:
            return self._scalar(event)
        if kind is yaml.SequenceStartEvent:
            return self._sequence(path, depth)
        return self._mapping(path, depth)

    def _sequence(self, path: Path, depth: int) -> list[Any]:
        values: list[Any] = []
        while type(event := next(self.events)) is not yaml.SequenceEndEvent:
            inner = (*path, len(values)) if self.placed else path
            values.append(self._node(event, inner, depth + 1))
        return values

    def _mapping(self, path: Path, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while type(event := next(self.events)) is not yaml.MappingEndEvent:
            key = self._node(event, (*path, "<key>") if self.placed else path, depth + 1)
            if not isinstance(key, str):
                self._refuse(event, "a key must be text; quote it")
            if key in values:
                self._refuse(event, f"key {key!r:.60} stands twice")
            inner = (*path, key) if self.placed else path
            values[key] = self._node(next(self.events), inner, depth + 1)
        return values

    def _scalar(self, event: Any) -> bool | int | str | None:
        text: str = event.value
        if len(text) > MAX_TEXT:
            self._refuse(event, f"text longer than {MAX_TEXT} characters", code="pack.limit")
        if not event.implicit[0]:  # quoted or block text
            self._visible(event, text)
            return text
        if text in _WORDS:
            return _WORDS[text]
        if text[:1] in _DIGITS and _INTEGER.fullmatch(text) and text != "-0":
            number = int(text)
            if abs(number) > MAX_INTEGER:
                self._refuse(event, "an integer beyond 2^53 - 1")
            return number
        if text.lower() in _READ_DIFFERENTLY or not _PLAIN.fullmatch(text):
            self._refuse(event, f"YAML readers type {text!r:.60} differently; quote it")
        return text

    def _visible(self, event: Any, text: str) -> None:
        """Escapes in double quotes can write what the file itself does not show."""
        if text.isascii() and text.isprintable():
            return
        for character in text:
            if character != "\n" and unicodedata.category(character) in _INVISIBLE:
                self._refuse(event, f"invisible character U+{ord(character):04X} in a text")

    def _refuse(self, event: Any, problem: str, *, code: str = "pack.yaml") -> NoReturn:
        mark = event.start_mark
        raise RefusedError(
            code, f"{self.name}: line {mark.line + 1}, column {mark.column + 1}: {problem}"
        )
