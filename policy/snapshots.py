"""List snapshots: who was listed when, and what was held when (docs/design/policy.md, 8).

A snapshot is consolidated: removed entries stay, with their end date. `complete: false` says that
names of the edition are missing here, so a name that is not found is unknown, not absent.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from types import MappingProxyType
from typing import Annotated, Literal

import rfc8785
from pydantic import Field, StringConstraints

from policy.errors import RefusedError
from policy.pack import Confidence, SourceTag, Window, require_schema
from policy.strict import Day, Frozen, Name, Words, read_yaml
from policy.terms import Digest

SCHEMA = "airgap/lists/1"
MAX_SNAPSHOTS = 64
MAX_ENTRIES = 50_000

Edition = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,31}$")]


class Entry(Frozen):
    """One listed party, under every name that the list gives it."""

    names: tuple[Words, ...] = Field(min_length=1, strict=False)
    listed_as: Literal["listed", "named_subsidiary"]
    released: Window | None
    published: Window | None
    source: SourceTag
    confidence: Confidence
    litigation_watch: bool = False
    verify_before_release: bool
    note: Words | None

    def window(self, basis: str) -> Window | None:
        """Days on the list, counted from release or from publication; None when not recorded."""
        return self.published if basis == "published" else self.released


class SnapshotText(Frozen):
    """One edition of one list, as held here."""

    list_id: Name
    edition: Edition
    status: Literal["in_force", "superseded", "withdrawn"]
    released: Day | None
    published: Day | None
    complete: bool
    names_in_edition: int | None = Field(ge=0)
    citation: Words
    source_url: Words | None
    source_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None
    source: SourceTag
    retrieved_on: Day | None
    next_review_by: Day | None
    verify_before_release: bool
    note: Words | None
    entries: tuple[Entry, ...] = Field(max_length=MAX_ENTRIES, strict=False)


class FileText(Frozen):
    """A file of snapshots as written."""

    schema_: str = Field(alias="schema")
    prepared_on: Day
    snapshots: tuple[SnapshotText, ...] = Field(max_length=MAX_SNAPSHOTS, strict=False)


@dataclass(frozen=True, slots=True, eq=False)
class ListSnapshot:
    """A loaded edition; `index` holds its entries by normalised name."""

    text: SnapshotText
    prepared_on: date
    digest: Digest
    index: Mapping[str, tuple[Entry, ...]]
    since: date | None = None  # of an edition that a site completes: the shipped one was held then

    @property
    def list_id(self) -> str:
        """The list that this is an edition of."""
        return self.text.list_id

    @property
    def dated(self) -> date:
        """The day from which its age counts: retrieval, or preparation of a seed."""
        return self.text.retrieved_on or self.prepared_on

    @property
    def held_since(self) -> date:
        """The first day on which it could be held: retrieval, else the release of the edition."""
        own = self.text.retrieved_on or self.text.released or self.prepared_on
        return own if self.since is None else min(own, self.since)

    @property
    def names_held(self) -> int:
        """How many names of the edition stand here; what was removed from it does not count.

        The names of a complete edition were counted when it was loaded. One that a site completes
        in part may hold a party under a short and a full name: it never counts as more than whole.
        """
        found = len({normal_name(each.names[0]) for each in self.text.entries if not _ended(each)})
        whole = self.text.names_in_edition
        if whole is None:
            return found
        return whole if self.text.complete else min(found, whole)

    def matches(self, keys: Iterable[str]) -> tuple[Entry, ...]:
        """Entries under exactly one of these normalised names."""
        found = {id(entry): entry for key in keys for entry in self.index.get(key, ())}
        return tuple(found.values())


def parse_lists(content: bytes, name: str = "lists") -> tuple[ListSnapshot, ...]:
    """Load a file of list snapshots.

    Raises:
        RefusedError: `pack.*`, with line and column.

    """
    source = read_yaml(content, name)
    require_schema(source, SCHEMA)
    text = source.build(FileText)
    loaded = []
    for at, snapshot in enumerate(text.snapshots):
        if snapshot.names_in_edition is not None and snapshot.complete:
            listed = sum(1 for entry in snapshot.entries if not _ended(entry))
            if listed != snapshot.names_in_edition:
                raise source.refusal(
                    "pack.schema",
                    ("snapshots", at, "names_in_edition"),
                    f"the edition has {snapshot.names_in_edition} names, {listed} stand here",
                    hint="mark it `complete: false`, or add the missing names",
                )
        index: dict[str, list[Entry]] = {}
        for entry in snapshot.entries:
            for each in entry.names:
                index.setdefault(normal_name(each), []).append(entry)
        plain = source.value["snapshots"][at]
        loaded.append(
            ListSnapshot(
                text=snapshot,
                prepared_on=text.prepared_on,
                digest=Digest.of(rfc8785.dumps(plain)),
                index=MappingProxyType({key: tuple(found) for key, found in index.items()}),
            )
        )
    return tuple(loaded)


def complete(shipped: Iterable[ListSnapshot], own: Iterable[ListSnapshot]) -> Snapshots:
    """Unite editions; one of a site completes a shipped one of which names are missing.

    What the shipped one names stays: completing it can only add.

    Raises:
        RefusedError: `pack.duplicate`, one edition twice, or a complete one that is brought again.

    """
    own = tuple(own)
    ours = {(each.list_id, each.text.edition): each for each in own}
    found: list[ListSnapshot] = []
    for each in shipped:
        better = None if each.text.complete else ours.pop((each.list_id, each.text.edition), None)
        found.append(each if better is None else _completed(each, better))
    used = {id(each) for each in own} - {id(each) for each in ours.values()}
    return Snapshots((*found, *(each for each in own if id(each) not in used)))


def require_same_edition(shipped: ListSnapshot, own: ListSnapshot) -> None:
    """Refuse a file that would set the edition aside, or call it whole when it is not."""
    old, new = shipped.text, own.text
    problem = next(
        (
            f"{name} is {getattr(new, name)}, expected {getattr(old, name)}"
            for name in ("status", "released", "published")
            if getattr(new, name) != getattr(old, name)
        ),
        None,
    )
    wanted, found = old.names_in_edition or 0, new.names_in_edition or 0
    if new.complete and found < wanted:
        problem = f"it is called complete with {found} names, and the edition has {wanted}"
    if problem:
        raise RefusedError(
            "pack.duplicate",
            f"edition {old.edition} of list {old.list_id} is shipped, and this file may only add"
            f" to it: {problem}",
            hint="correct the field, or mark the list `complete: false`; an edition of another day"
            " has another name",
        )


def _completed(shipped: ListSnapshot, own: ListSnapshot) -> ListSnapshot:
    require_same_edition(shipped, own)
    entries = (*own.text.entries, *shipped.text.entries)
    index: dict[str, list[Entry]] = {}
    for entry in entries:
        for each in entry.names:
            index.setdefault(normal_name(each), []).append(entry)
    return ListSnapshot(
        text=own.text.model_copy(update={"entries": entries}),
        prepared_on=own.prepared_on,
        digest=Digest.of(rfc8785.dumps([str(shipped.digest), str(own.digest)])),
        index=MappingProxyType({key: tuple(each) for key, each in index.items()}),
        since=shipped.held_since,
    )


def _ended(entry: Entry) -> bool:
    return bool(entry.released and entry.released.end)


@dataclass(frozen=True)
class Snapshots:
    """All editions at hand."""

    snapshots: tuple[ListSnapshot, ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        for each in self.snapshots:
            key = (each.list_id, each.text.edition)
            if key in seen:
                raise RefusedError(
                    "pack.duplicate", f"edition {key[1]} of list {key[0]} stands twice"
                )
            seen.add(key)

    def held(self, list_id: str, known_at: datetime) -> ListSnapshot | None:
        """The newest edition held at `known_at` that was not withdrawn; None when there is none."""
        return self.held_on(list_id, known_at.astimezone(UTC).date())

    def held_on(self, list_id: str, day: date) -> ListSnapshot | None:
        """The same for a day of UTC."""
        found = [
            each
            for each in self.snapshots
            if each.list_id == list_id
            and each.text.status != "withdrawn"
            and each.held_since <= day
        ]
        return max(found, key=_newness, default=None)


def _newness(snapshot: ListSnapshot) -> tuple[date, date, str]:
    text = snapshot.text
    return (text.released or date.min, snapshot.dated, text.edition)


# -- names ----------------------------------------------------------------------------------------

# Trailing words that say what kind of body it is, not who it is.
_LEGAL_FORMS = frozenset(
    {
        *("ab", "ag", "bhd", "bv", "co", "company", "corp", "corporation", "gmbh", "inc"),
        *("incorporated", "kk", "limited", "llc", "llp", "lp", "ltd", "nv", "oy", "plc", "pte"),
        *("pty", "pvt", "sa", "sarl", "sas", "spa", "srl", "ultd"),
    }
)
_LEGAL_ENDINGS = ("股份有限公司", "有限责任公司", "有限責任公司", "有限公司", "公司")
_BREAKS = re.compile(r"[\W_]+")


def normal_name(name: str) -> str:
    """Normalise a name for exact comparison: NFKC, case, punctuation, legal form.

    `Alibaba Group Holding Limited` and `ALIBABA GROUP HOLDING LTD.` become one, as do full-width
    and half-width forms of Chinese names. A handle such as `hf:Qwen` keeps its prefix.
    """
    text = unicodedata.normalize("NFKC", name).casefold().replace("'", "").replace("’", "")
    prefix, colon, rest = text.partition(":")
    if colon and prefix in {"hf", "github"} and rest:
        return f"{prefix}:{rest.strip()}"
    text = text.replace("&", " and ")
    words = [word for word in _BREAKS.split(text) if word]
    while len(words) > 1 and words[-1] in _LEGAL_FORMS:
        words.pop()
    joined = " ".join(words)
    for ending in _LEGAL_ENDINGS:
        if joined.endswith(ending) and len(joined) > len(ending):
            return joined.removesuffix(ending).strip()
    return joined
