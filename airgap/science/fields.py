"""The values that a user types: residues and SMILES, checked as text before anything reads them.

Whether a SMILES is chemistry is decided by RDKit in the sealed helper. Standard library only: the
broker imports this module, and so does the helper.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from airgap.science.refusals import PromptError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
RARE_RESIDUES = "BJOUXZ"
"""Accepted with a warning: the authors' own figure shows a `J`."""

NUCLEIC_LENGTH = 12
"""Residues from which a sequence of A, C, G, T and U alone is no accident."""

TEXT_LIMIT = 65_536
"""Largest prompt or field in bytes; longer text is refused before it is read."""

_SMILES_TOKEN = re.compile(
    r"(?P<atom>\[[!-Z^-~]+\]|Br|Cl|[BCNOPSFI]|[bcnops]|\*)"
    r"|(?P<bond>[-=#$:/\\.~])"
    r"|(?P<ring>%\(\d{1,5}\)|%\d\d|\d)"
    r"|(?P<branch>[()])"
)
_LOOKALIKES = (
    ("an InChI", re.compile(r"InChI=.+", re.IGNORECASE | re.DOTALL)),
    ("an InChIKey", re.compile(r"[A-Z]{14}-[A-Z]{10}-[A-Z]")),
    ("a CAS number", re.compile(r"(?:CAS[\s:#-]*)?\d{2,7}-\d{2}-\d", re.IGNORECASE)),
    (
        "a formula",
        re.compile(r"(?=.*H)(?:(?:[HCNOSPFIBK]|Cl|Br|Na|Li|Si|Mg|Ca)\d*|[().])+"),
    ),
)
_WORDS = re.compile(r"[a-z]{4,}")
_SHORT_NAME = re.compile(r"[A-Z]{3,8}(?:-?\d{1,3})?")
LOOKALIKE_LIMIT = 300


def check_field(text: str, what: str) -> None:
    """Refuse tags, arrows and oversize in a value that a user typed (g03, g12, size)."""
    if len(text) > TEXT_LIMIT:
        raise PromptError(
            "prompt.size",
            f"the {what} has {len(text)} characters, more than {TEXT_LIMIT}",
            hint="give one molecule or one chain at a time",
        )
    if ">>" in text or (text.count(">") > 1 and "<" not in text):
        raise PromptError(
            "prompt.g12",
            f"the {what} is a reaction SMILES",
            text=text,
            at=text.index(">"),
            hint="give the product alone, the part after the last '>'",
        )
    for at, character in enumerate(text):
        if character in "<>":
            raise PromptError(
                "prompt.g03",
                f"the {what} contains {character!r}: a value may not contain tags",
                text=text,
                at=at,
                hint="give the bare value; the tags are added for you",
            )


def check_residues(text: str, whole: str | None = None, base: int = 0) -> list[str]:
    """Check residue letters and return warnings, one for each rare letter.

    Args:
        text: The residues.
        whole: The text that they were cut from, for positions.
        base: Where in `whole` they begin.

    Raises:
        PromptError: `prompt.g06` at the first letter that is none.

    """
    shown = text if whole is None else whole
    if not text:
        raise PromptError("prompt.g06", "the sequence is empty", hint="give residue letters")
    for at, letter in enumerate(text):
        if letter in RESIDUES or letter in RARE_RESIDUES:
            continue
        raise PromptError(
            "prompt.g06",
            f"{_name(letter)} is not a residue letter",
            text=shown,
            at=base + at,
            expected=(RESIDUES, f"({RARE_RESIDUES} with a warning)"),
            hint=_residue_fix(letter),
        )
    warnings = [
        f"residue letter {letter} occurs {text.count(letter)} times: outside the 20 standard ones"
        for letter in RARE_RESIDUES
        if letter in text
    ]
    if len(text) >= NUCLEIC_LENGTH and set(text) <= set("ACGTU"):
        bases = " ".join(sorted(set(text)))
        warnings.append(
            f"the sequence holds only the letters {bases} and reads like DNA or RNA; it was taken "
            "as residues of a protein: nothing is translated here"
        )
    return warnings


def _residue_fix(letter: str) -> str:
    if letter.upper() in RESIDUES or letter.upper() in RARE_RESIDUES:
        return (
            f"write {letter.upper()}; lower case may also mean a masked residue: check the source"
        )
    if letter in "-.":
        return "this is an aligned sequence: take the gaps away"
    if letter == "*":
        return "take the stop sign away"
    if letter == ">":
        return "this is a FASTA header: give the file as FASTA"
    if letter.isspace() or letter.isdigit():
        return "take spaces, line breaks and numbers away"
    return "take it away"


def _name(character: str) -> str:
    return f"{character!a} (U+{ord(character):04X})"


def scan_smiles(text: str) -> list[tuple[str, str, int]]:
    """Split a SMILES into (kind, text, index); kinds are atom, bond, ring, branch and `unknown`."""
    found: list[tuple[str, str, int]] = []
    at = 0
    while at < len(text):
        token = _SMILES_TOKEN.match(text, at)
        if token is None:
            found.append(("unknown", text[at], at))
            at += 1
        else:
            found.append((str(token.lastgroup), token[0], at))
            at = token.end()
    return found


def check_smiles(text: str, whole: str | None = None, base: int = 0) -> None:
    """Check a SMILES as text: letters, brackets, branches and ring numbers (g07).

    Valence and aromaticity are RDKit's to judge. A `whole` text and a `base` give positions in it.
    """
    if not text:
        raise PromptError("prompt.g07", "the SMILES is empty", hint="give a molecule")
    fault = _smiles_fault(text)
    if fault is not None:
        message, at, hint = fault
        shown = text if whole is None else whole
        hint = lookalike_hint(text) or hint
        raise PromptError("prompt.g07", message, text=shown, at=base + at, hint=hint)


def lookalike(text: str) -> str:
    """Return what a text that is no SMILES looks like, as `a name`; empty if like nothing known."""
    plain = text.strip()
    if len(plain) > LOOKALIKE_LIMIT:
        return ""
    for kind, form in _LOOKALIKES:
        if form.fullmatch(plain):
            return kind
    # Aromatic atoms make lower-case runs too, but of few letters.
    if any(set(word[0]) - set("bcnops") for word in _WORDS.finditer(plain)):
        return "a name"
    short = _SHORT_NAME.fullmatch(plain) is not None
    return "a name" if short and len(set(plain) & set("ADEGHJLMQRTUVWXYZ")) > 1 else ""


def lookalike_hint(text: str) -> str:
    """Return what to give in place of a name, a number or a formula, or an empty text."""
    first, _, rest = text.strip().partition(" ")
    if rest and len(first) > 2 and _smiles_fault(first) is None:  # noqa: PLR2004 - `N`, `CO` chance
        return f"a SMILES has no spaces: give it without the name, {first:.200}"
    kind = lookalike(text)
    if not kind:
        return ""
    return (
        f"this looks like {kind}, and nothing is looked up here: give the structure as SMILES, "
        "such as CC(=O)Oc1ccccc1C(=O)O for aspirin; a drawing program writes it with "
        "`Copy as SMILES`"
    )


def _smiles_fault(text: str) -> tuple[str, int, str] | None:
    """Return message, index and fix of the first fault in the text of a SMILES."""
    scanned = scan_smiles(text)
    for kind, piece, at in scanned:
        if kind == "unknown" and piece == "[":
            return "'[' opens a bracket atom that is not closed", at, "close it with ']'"
        if kind == "unknown":
            return f"{_name(piece)} has no meaning in a SMILES", at, _smiles_fix(piece)
    if all(kind != "atom" for kind, _, _ in scanned):
        return "the SMILES holds no atom", 0, "give a molecule"
    return _branch_fault(scanned) or _ring_fault(scanned)


def _branch_fault(scanned: Sequence[tuple[str, str, int]]) -> tuple[str, int, str] | None:
    opened: list[int] = []
    for kind, piece, at in scanned:
        if kind == "branch" and piece == "(":
            opened.append(at)
        elif kind == "branch":
            if not opened:
                return "')' closes no branch", at, "take it away, or add the '(' before"
            opened.pop()
    if opened:
        return "'(' opens a branch that is not closed", opened[-1], "close it with ')'"
    return None


def _ring_fault(scanned: Sequence[tuple[str, str, int]]) -> tuple[str, int, str] | None:
    opened: dict[str, int] = {}
    for kind, piece, at in scanned:
        if kind == "ring":
            number = piece.strip("%()").lstrip("0") or "0"
            if opened.pop(number, None) is None:
                opened[number] = at
    for number, at in opened.items():
        message = f"ring number {number} is opened and not closed"
        return message, at, "repeat it at the closing atom"
    return None


def _smiles_fix(token: str) -> str:
    if token.isspace():
        return "a SMILES has no spaces: give the SMILES without a name"
    if token.isalpha():
        return "atoms outside the organic subset stand in square brackets, as in [Na]"
    return "take it away"
