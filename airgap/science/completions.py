"""What a model wrote, read as far as it obeys the grammar; what cannot be read is kept.

Standard library only. Nothing is repaired, and nothing raises, whatever the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from airgap.science.grammar import Residue
from airgap.science.refusals import byte_offset

CONTROL = re.compile(r"(?:<(?:eos|bos|pad|unk)>|</?s>|<\|[a-z_]{2,24}\|>)\s*\Z")
"""A control token at the end of a text."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote, as far as it obeys the grammar.

    Attributes:
        molecules: SMILES of reactants, of the ligand, or of linkers, in order.
        metals: Node strings of a material.
        residues: Copied residues of an annotated protein.
        remainder: The text that could not be read, from the first fault on.
        offset: Byte offset of the remainder in the completion.
        complete: Whether the text ends as its task demands, with nothing left over.

    """

    molecules: tuple[str, ...] = ()
    metals: tuple[str, ...] = ()
    residues: tuple[Residue, ...] = ()
    remainder: str = ""
    offset: int = 0
    complete: bool = False


def parse_completion(task: str, text: str, *, stopped: bool = False) -> Completion:
    """Read the completion of `task`, for any string; what cannot be read is kept as remainder.

    Args:
        task: `retrosynthesis`, `molecule`, `pocket-ligand`, `binding-site` or `material`.
        text: Untrusted; an end-of-text token at its end is ignored.
        stopped: The decoder reported the stop tag of the task; the text need not repeat it.

    Raises:
        KeyError: No task of that name has a completion form.

    """
    body = text
    while (control := CONTROL.search(body)) is not None:
        body = body[: control.start()]
    reader = _Lenient(body)
    if task == "retrosynthesis":
        molecules = reader.pairs("Molecule")
        return reader.done(molecules=molecules, complete=bool(molecules))
    if task in {"molecule", "pocket-ligand"}:
        smiles, closed = reader.open_value("<MoleculeE>", stopped=stopped)
        return reader.done(molecules=(smiles,) if smiles and closed else (), complete=closed)
    if task == "binding-site":
        residues = reader.residues()
        closed = reader.close("<ProteinE>", stopped=stopped)
        return reader.done(residues=residues, complete=closed)
    if task == "material":
        metals, linkers = reader.pairs("Metal"), reader.pairs("Molecule")
        closed = reader.close("<MaterialE>", stopped=stopped)
        good = closed and bool(metals) and bool(linkers)
        return reader.done(molecules=linkers, metals=metals, complete=good)
    raise KeyError(task)


class _Lenient:
    """Reads forward and never raises; `at` stops at the first fault."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def pairs(self, pair: str) -> tuple[str, ...]:
        """Take every complete non-empty pair that stands here."""
        form = re.compile(f"<{pair}S>([^<>]+)<{pair}E>")
        found = []
        while (match := form.match(self.text, self.at)) is not None:
            found.append(match[1])
            self.at = match.end()
        return tuple(found)

    def open_value(self, end: str, *, stopped: bool) -> tuple[str, bool]:
        """Take text up to `end`; text that never closes stays in the remainder."""
        found = re.compile(r"[^<>]+").match(self.text, self.at)
        if found is None:
            return "", False
        before, self.at = self.at, found.end()
        closed = self.close(end, stopped=stopped)
        if not closed:
            self.at = before
        return found[0], closed

    def residues(self) -> tuple[Residue, ...]:
        form = re.compile(r"<PocketS>([A-Z])<PocketE>|([A-Z])")
        found = []
        while (match := form.match(self.text, self.at)) is not None:
            found.append(Residue(match[1], pocket=True) if match[1] else Residue(match[2]))
            self.at = match.end()
        return tuple(found)

    def close(self, end: str, *, stopped: bool) -> bool:
        """Take the end tag; with `stopped` it may be absent at the end of the text."""
        if self.text.startswith(end, self.at):
            self.at += len(end)
            return True
        return stopped and self.at == len(self.text)

    def done(
        self,
        *,
        molecules: tuple[str, ...] = (),
        metals: tuple[str, ...] = (),
        residues: tuple[Residue, ...] = (),
        complete: bool,
    ) -> Completion:
        rest = self.text[self.at :]
        return Completion(
            molecules=molecules,
            metals=metals,
            residues=residues,
            remainder=rest,
            offset=byte_offset(self.text, self.at),
            complete=complete and not rest.strip(),
        )
