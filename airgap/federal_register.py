"""A list of companies from a notice of the Federal Register, as its XML gives it.

Obeys docs/design/policy.md, 8. The markup is that of the GPO: `NOTICE` or `RULE`, `SUPLINF`,
paragraphs `P` and `FP`, page breaks `PRTPAGE` anywhere, `FRDOC` at the end. One bullet is one
parent company; parentheses behind it hold other names and the named subsidiaries.

The file comes from outside: no document type, no entity, no instruction but a style sheet is read,
and every limit is counted. What does not add up is refused, never guessed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import accumulate
from typing import Any, NoReturn
from xml.parsers import expat

from policy.errors import RefusedError
from policy.snapshots import ListSnapshot, normal_name
from policy.terms import Digest

MAX_BYTES = 8 << 20
MAX_DEPTH = 64
MAX_ELEMENTS = 200_000
MAX_NAME = 300
MAX_BLOCK = 20_000  # characters of one paragraph with a bullet
MAX_COMPANIES = 10_000
MAX_NESTED = 8  # parentheses within parentheses
CODE = "policy.list"
_SKIPPED = frozenset({"FTNT", "SU", "FTREF", "PRTPAGE", "GPH", "MATH"})
_BLOCKS = frozenset({"P", "FP", "LI"})
_BULLET = re.compile(r"^[\u2022\u25cf\u00b7]\s*")
_DOT = re.compile(r"[\u2022\u25cf]")
_FORMER = re.compile(r"^(?:formerly(?: known as)?|f/?k/?a\.?|previously)\s+", re.IGNORECASE)
_ALSO = re.compile(
    r"^(?:also known as|also|a\.?k\.?a\.?|doing business as|d/?b/?a\.?|or)\s+", re.IGNORECASE
)
_SUBSIDIARIES = re.compile(
    r"^(?:including(?: its)?(?: subsidiaries)?|(?:and )?its subsidiar(?:y|ies)|subsidiar(?:y|ies))"
    r"\s*:?\s*",
    re.IGNORECASE,
)
# Words behind a comma or in parentheses that belong to the name before them.
_FORM = re.compile(
    r"^(?:co|company|corp|corporation|gmbh|holdings?|inc|incorporated|limited|llc|llp|lp|ltd|plc|"
    r"pte|s\.?a|b\.?v|a\.?g|pty)\b\.?",
    re.IGNORECASE,
)
_SHORT = re.compile(r"^[A-Z][A-Z0-9&.\- ]{0,15}$")


@dataclass(frozen=True, slots=True)
class Company:
    """One name of the list with its other names; `parent` is None for a company with a bullet."""

    name: str
    others: tuple[str, ...]
    parent: str | None


@dataclass(frozen=True, slots=True)
class Notice:
    """What a notice says."""

    document: str
    subject: str
    digest: Digest
    companies: tuple[Company, ...]

    @property
    def parents(self) -> int:
        """Companies with a bullet of their own."""
        return sum(each.parent is None for each in self.companies)


def parse_notice(content: bytes) -> Notice:
    """Read a notice.

    Raises:
        RefusedError: `policy.list`, with line and column where there is one.

    """
    if len(content) > MAX_BYTES:
        _refuse(f"{len(content):,} bytes, at most {MAX_BYTES:,}")
    reader = _Reader()
    reader.read(content)
    if reader.root not in {"NOTICE", "RULE", "PRORULE"}:
        _refuse(f"the document is {reader.root!r:.40}, expected NOTICE")
    companies = _companies(reader.blocks)
    return Notice(
        document=_number(reader.texts.get("FRDOC", "")),
        subject=reader.texts.get("SUBJECT", ""),
        digest=Digest.of(content),
        companies=companies,
    )


def require_counts(notice: Notice, *, parents: int | None, names: int | None) -> None:
    """Refuse a notice that holds more or fewer companies than its edition; `policy.list`."""
    for what, wanted, found in (
        ("companies with a bullet", parents, notice.parents),
        ("names", names, len(notice.companies)),
    ):
        if wanted is not None and wanted != found:
            raise RefusedError(
                CODE,
                f"the edition has {wanted} {what}, {found} were read",
                hint="compare the notice with its printed edition; --partial keeps what was read",
            )


# -- markup ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    """Collects paragraphs of the supplementary information, and a few texts of the head."""

    root: str = ""
    blocks: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _parts: list[str] | None = None
    _skipping: int = 0
    _count: int = 0
    _parser: Any = None

    def read(self, content: bytes) -> None:
        parser = self._parser = expat.ParserCreate(encoding="utf-8", namespace_separator=None)
        parser.StartDoctypeDeclHandler = self._declares
        parser.EntityDeclHandler = self._declares
        parser.ExternalEntityRefHandler = self._declares
        parser.ProcessingInstructionHandler = self._instructs
        parser.StartElementHandler = self._starts
        parser.EndElementHandler = self._ends
        parser.CharacterDataHandler = self._says
        try:
            parser.Parse(content, True)
        except expat.ExpatError as error:
            _refuse(f"not well-formed XML: {expat.ErrorString(error.code)}", parser)

    def _declares(self, *_: object) -> NoReturn:
        _refuse("a document type or an entity is declared, which no notice needs", self._parser)

    def _instructs(self, target: str, _: str) -> None:
        if target != "xml-stylesheet":
            _refuse(f"an instruction for {target!r:.40}", self._parser)

    def _starts(self, name: str, _: object) -> None:
        self._count += 1
        self.root = self.root or name
        self._open.append(name)
        if self._count > MAX_ELEMENTS or len(self._open) > MAX_DEPTH:
            _refuse(f"more than {MAX_ELEMENTS} elements or {MAX_DEPTH} levels", self._parser)
        block = name in _BLOCKS and "SUPLINF" in self._open and self._parts is None
        if name in _SKIPPED:
            self._skipping += 1
        elif block:
            self._parts = []
        elif name in {"FRDOC", "SUBJECT"}:
            if self._parts is not None:
                _refuse(f"{name} inside of another text", self._parser)
            self._parts = []

    def _says(self, text: str) -> None:
        if self._parts is not None and not self._skipping:
            self._parts.append(text)
        elif _DOT.search(text) and "SUPLINF" in self._open:
            _refuse("a bullet outside of a paragraph, which nobody would read", self._parser)

    def _ends(self, name: str) -> None:
        self._open.pop()
        if name in _SKIPPED:
            self._skipping -= 1
        elif name in {"FRDOC", "SUBJECT"} and self._parts is not None:
            self.texts.setdefault(name, " ".join("".join(self._parts).split()))
            self._parts = None
        elif self._parts is not None and name in _BLOCKS and not _BLOCKS & set(self._open):
            self.blocks.append(" ".join("".join(self._parts).split()))
            self._parts = None


def _refuse(problem: str, parser: Any = None) -> NoReturn:
    place = ""
    if parser is not None:
        place = f"line {parser.CurrentLineNumber}, column {parser.CurrentColumnNumber + 1}: "
    raise RefusedError(CODE, f"{place}{problem}")


def _number(text: str) -> str:
    found = re.search(r"FR Doc\.?\s*([0-9]{4}-[0-9]{4,6})", text)
    return found[1] if found else ""


# -- names ----------------------------------------------------------------------------------------


def _companies(blocks: Sequence[str]) -> tuple[Company, ...]:
    found: list[Company] = []
    parents: list[str] = []
    for block in blocks:
        if not _BULLET.match(block):
            continue
        if _DOT.search(block, 1):
            _refuse(f"two bullets in one paragraph: {block!r:.120}")
        if len(block) > MAX_BLOCK:
            _refuse(f"a paragraph of {len(block):,} characters, at most {MAX_BLOCK:,}")
        if _depth(block) > MAX_NESTED:
            _refuse(f"parentheses nested deeper than {MAX_NESTED}: {block!r:.120}")
        bullet = _bullet(_BULLET.sub("", block))
        parent = bullet[0].name
        if parents and _order(parents[-1]) > _order(parent):
            _refuse(f"not in alphabetical order: {parents[-1]!r:.80} before {parent!r:.80}")
        parents.append(parent)
        found += bullet
        if len(found) > MAX_COMPANIES:
            _refuse(f"more than {MAX_COMPANIES:,} names")
    if not found:
        _refuse("no bullet in the supplementary information")
    keys = Counter(normal_name(each.name) for each in found)
    twice = sorted(each for each, times in keys.items() if times > 1)
    if twice:
        _refuse(f"a name stands twice: {', '.join(twice)[:200]}")
    return tuple(found)


def _depth(text: str) -> int:
    """How deep its parentheses are nested."""
    steps = ((each == "(") - (each == ")") for each in text)
    return max(accumulate(steps), default=0)


def _order(name: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", name.casefold())


def _bullet(text: str) -> list[Company]:
    """A parent and its named subsidiaries."""
    name, groups = _name_and_groups(text.rstrip(" .;"))
    others: list[str] = []
    subsidiaries: list[Company] = []
    for group in groups:
        aliases, companies = _group(group, name)
        others += aliases
        subsidiaries += companies
    return [Company(name, tuple(others), None), *subsidiaries]


def _name_and_groups(text: str) -> tuple[str, list[str]]:
    """The name before its parentheses, and what stands in each pair of them."""
    outside, groups = _apart(text)
    name = re.sub(r"\s+", " ", outside).strip(" ,;")
    name = re.sub(r"\s*,?\s+and$", "", name)
    if not name or len(name) > MAX_NAME:
        _refuse(f"no name before the parentheses: {text!r:.120}")
    return name, [each for each in groups if each]


def _apart(text: str) -> tuple[str, list[str]]:
    """What stands outside parentheses, and what inside each outer pair."""
    outside: list[str] = []
    groups: list[str] = []
    depth, begin = 0, 0
    for at, character in enumerate(text):
        if character == "(":
            if depth == 0:
                begin = at + 1
            depth += 1
        elif character == ")":
            depth -= 1
            if depth < 0:
                _refuse(f"a parenthesis too many: {text!r:.120}")
            if depth == 0:
                groups.append(text[begin:at].strip())
                if _FORM.fullmatch(groups[-1]) or _is_part(text, at):
                    outside.append(f"({groups.pop()})")
        elif depth == 0:
            outside.append(character)
    if depth:
        _refuse(f"a parenthesis is not closed: {text!r:.120}")
    return "".join(outside), groups


def _is_part(text: str, at: int) -> bool:
    """Whether a name goes on behind this parenthesis, as in `China (Shenzhen) Co., Ltd.`."""
    rest = text[at + 1 :].strip()
    return bool(rest) and rest[0] not in "(,;" and not rest.startswith("and ")


def _group(text: str, parent: str) -> tuple[list[str], list[Company]]:
    """Other names of the parent, and subsidiaries, of one pair of parentheses."""
    aliases: list[str] = []
    companies: list[Company] = []
    in_names = False
    for part in _parts(text):
        for pattern in (_FORMER, _ALSO):
            if pattern.match(part):
                in_names = True
                part = pattern.sub("", part)  # noqa: PLW2901 - what is left is the name
        if _SUBSIDIARIES.match(part):
            in_names = False
            part = _SUBSIDIARIES.sub("", part)  # noqa: PLW2901 - as above
        if not part:
            continue
        name, groups = _name_and_groups(part)
        if in_names or (_SHORT.match(name) and not groups and not companies):
            aliases.append(name)
            continue
        own = [alias for group in groups for alias in _group(group, name)[0]]
        nested = [each for group in groups for each in _group(group, name)[1]]
        companies += [Company(name, tuple(own), parent), *nested]
    return aliases, companies


def _parts(text: str) -> list[str]:
    """Split at semicolons and commas, but never inside parentheses or before `Ltd.`."""
    parts: list[str] = []
    depth, begin = 0, 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        apart = character == ";" or (character == "," and not _FORM.match(text[at + 1 :].lstrip()))
        if depth == 0 and apart:
            parts.append(text[begin:at])
            begin = at + 1
    parts.append(text[begin:])
    cleaned = [re.sub(r"^and\s+", "", each.strip()).strip() for each in parts]
    return [each for each in cleaned if each]


# -- snapshot -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Edition:
    """What a person says about the edition that the notice publishes."""

    list_id: str
    edition: str
    released: date
    published: date
    retrieved_on: date
    citation: str
    next_review_by: date | None
    complete: bool


def snapshot_document(
    notice: Notice, edition: Edition, shipped: ListSnapshot | None
) -> dict[str, Any]:
    """The notice as a file of list snapshots.

    Days of a listing come from the entry of the same name of `shipped`, where there is one; since
    when any other company is listed is not in a notice, so it counts as listed at every date.
    """
    return {
        "schema": "airgap/lists/1",
        "prepared_on": edition.retrieved_on.isoformat(),
        "snapshots": [
            {
                "list_id": edition.list_id,
                "edition": edition.edition,
                "status": "in_force",
                "released": edition.released.isoformat(),
                "published": edition.published.isoformat(),
                "complete": edition.complete,
                "names_in_edition": len(notice.companies) if edition.complete else None,
                "citation": edition.citation,
                "source_url": None,
                "source_sha256": notice.digest.hex,
                "source": "primary",
                "retrieved_on": edition.retrieved_on.isoformat(),
                "next_review_by": _day(edition.next_review_by),
                "verify_before_release": False,
                "note": f"Read from FR Doc {notice.document or 'without a number'}: "
                f"{notice.parents} companies with a bullet, {len(notice.companies)} names.",
                "entries": [_entry(each, shipped) for each in notice.companies],
            }
        ],
    }


def _day(day: date | None) -> str | None:
    return None if day is None else day.isoformat()


def _entry(company: Company, shipped: ListSnapshot | None) -> dict[str, Any]:
    names = list(dict.fromkeys([company.name, *company.others]))
    matched = shipped.matches([normal_name(each) for each in names]) if shipped else ()
    known = next((each for each in matched if not (each.released and each.released.end)), None)
    always = {"from": None, "to": None}
    windows: dict[str, Any] = {"released": always, "published": always}
    if known is not None:
        windows = {
            basis: None
            if (window := known.window(basis)) is None
            else {"from": _day(window.start), "to": _day(window.end)}
            for basis in ("released", "published")
        }
    return {
        "names": names,
        "listed_as": "listed" if company.parent is None else "named_subsidiary",
        **windows,
        "source": "primary",
        "confidence": "high",
        "verify_before_release": False,
        "note": None if company.parent is None else f"Subsidiary of {company.parent}.",
    }


def to_yaml(document: dict[str, Any]) -> str:
    """The file as people read and sign it: one entry a line."""
    (snapshot,) = document["snapshots"]
    head = {key: value for key, value in snapshot.items() if key != "entries"}
    lines = [f"schema: {document['schema']}", f"prepared_on: {_json(document['prepared_on'])}"]
    lines.append("snapshots:")
    for at, (key, value) in enumerate(head.items()):
        lines.append(f"{'- ' if at == 0 else '  '}{key}: {_json(value)}")
    lines.append("  entries:")
    lines += [f"  - {_json(each)}" for each in snapshot["entries"]]
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
