"""What verification found, and the verdict that follows (docs/design/audit.md, 9)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

MAX_FINDINGS: Final = 50
TAMPERED: Final = "tampered"
UNKNOWN: Final = "cannot tell"
NOTE: Final = "note"
GOOD: Final = "good"
_EXITS: Final = {GOOD: 0, TAMPERED: 1, UNKNOWN: 3}
_CODES: Final = {GOOD: "", TAMPERED: "audit.tampered", UNKNOWN: "audit.unknown"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not fit, or that the reader should know (`note`)."""

    level: str  # TAMPERED, UNKNOWN or NOTE
    check: str
    place: str  # file below the folder, or the anchor's name
    seq: int | None = None
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        at = "" if self.seq is None else f" record {self.seq}"
        what = f": expected {self.expected}" if self.expected else ""
        return f"{self.level}: {self.check}, {self.place}{at}{what}" + (
            f"{',' if what else ':'} found {self.found}" if self.found else ""
        )

    def as_document(self) -> dict[str, Any]:
        """Return the finding for JSON output."""
        return {
            "level": self.level,
            "check": self.check,
            "place": self.place,
            "seq": self.seq,
            "expected": self.expected,
            "found": self.found,
        }


@dataclass(slots=True)
class Opened:
    """What the key of the payloads' holder came to, in payloads of records."""

    opened: int = 0  # and the commitment of the record holds
    other_key: int = 0  # sealed to another key: not judged
    gone: int = 0  # purged, pruned, or left out of an export

    def __str__(self) -> str:
        """Say it in words."""
        return (
            f"{self.opened} opened, and each is what its record commits to; "
            f"{self.other_key} sealed to another key, {self.gone} not here"
        )


class Findings:
    """Collected in order; the first of a kind tells, thousands of followers do not."""

    def __init__(self) -> None:
        self.all: list[Finding] = []
        self._levels: set[str] = set()

    def add(
        self,
        level: str,
        check: str,
        place: str,
        seq: int | None = None,
        *,
        expected: str = "",
        found: str = "",
    ) -> None:
        """Add one; texts are cut."""
        self.keep(Finding(level, check, place, seq, expected[:160], found[:160]))

    def keep(self, finding: Finding) -> None:
        """Add one as it stands."""
        if len(self.all) < MAX_FINDINGS or finding.level not in self._levels:
            self._levels.add(finding.level)
            self.all.append(finding)

    def has(self, level: str) -> bool:
        """Whether anything of this level was found."""
        return level in self._levels

    def in_order(self) -> tuple[Finding, ...]:
        """Return them, the worst first; within a level, what names a record comes first."""
        order = [TAMPERED, UNKNOWN, NOTE]
        return tuple(sorted(self.all, key=lambda f: (order.index(f.level), f.seq is None)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification came to. `exit` is 0 good, 1 tampered, 3 cannot tell."""

    verdict: str
    origin: str
    size: int  # records under the newest signed head
    records: int  # records that were read, or known by their hash alone
    first: int  # the first record whose line is there; more than 0 in a pruned or partial log
    anchored_size: int  # the largest outside anchor that agrees
    anchors: int  # how many agree
    root: str
    findings: tuple[Finding, ...]
    previous: str = ""  # the log that this one continues, as its first record names it
    opened: Opened | None = None  # payloads, where the holder's key was given

    @property
    def exit(self) -> int:
        """The exit status of the command."""
        return _EXITS[self.verdict]

    @property
    def code(self) -> str:
        """`audit.tampered`, `audit.unknown`, or nothing for a good log."""
        return _CODES[self.verdict]

    def as_document(self) -> dict[str, Any]:
        """Return the verdict for JSON output."""
        opened = {} if self.opened is None else {"payloads": asdict(self.opened)}
        return opened | {
            "verdict": self.verdict,
            "code": self.code,
            "exit": self.exit,
            "origin": self.origin,
            "previous": self.previous,
            "size": self.size,
            "records": self.records,
            "first": self.first,
            "anchored_size": self.anchored_size,
            "unanchored": self.size - self.anchored_size,
            "anchors": self.anchors,
            "root": self.root,
            "findings": [finding.as_document() for finding in self.findings],
        }
