"""The LOGOS grammar: tags, documents, prompts, completions, and the token table of a checkpoint.

Decides whether a text is a document or a prompt of the grammar and names the byte at which it is
not. A missing end tag gives fluent nonsense and no error, so a wrong prompt is a refusal here,
before a model runs. The tags and prompt forms are those of the authors' released scripts and
figures (repository LOGOS-Hub/LOGOS, commit 66c935a). No token id is a constant: ids come from the
checkpoint.

Standard library only: the broker imports this module, and so does the sealed helper. Whether a
SMILES is chemistry is decided by RDKit in the helper; here it is checked as text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from policy.errors import RefusedError

PAIRS = ("Protein", "Antibody", "Molecule", "Pocket", "Material", "Metal")
OPERATORS = ("<Trans>", "<Search>", "<React>", "<ReverseReact>")
TAGS = tuple(f"<{pair}{side}>" for pair in PAIRS for side in "SE") + OPERATORS
"""The 16 tags seen in the released scripts and figures."""

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
RARE_RESIDUES = "BJOUXZ"
"""Accepted with a warning: the authors' own figure shows a `J`."""

NUCLEIC_LENGTH = 12
"""Residues from which a sequence of A, C, G, T and U alone is no accident."""

TEXT_LIMIT = 65_536
"""Largest prompt or field in bytes; longer text is refused before it is read."""

_TAG = re.compile(r"<[^<>]{0,64}>")
_WORD = re.compile(r"\[[^\[\]]+\]|Br|Cl|%\d\d|.", re.DOTALL)
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
_NESTED = {"Protein": ("Pocket",), "Material": ("Metal", "Molecule")}
_EXCERPT = 30
LOOKALIKE_LIMIT = 300
_CONTROL = re.compile(r"(?:<(?:eos|bos|pad|unk)>|</?s>|<\|[a-z_]{2,24}\|>)\s*\Z")


class PromptError(RefusedError):
    """A prompt or a field of it is not what the model can read.

    Args:
        code: `prompt.g01` to `prompt.g12`, or another `prompt.*` code.
        message: What is wrong, in one line; a caret line is added when `text` is given.
        hint: The fix.
        text: The text at fault.
        at: Character index of the fault in `text`.
        width: Characters to underline.
        expected: What could stand at that place.

    Attributes:
        at: Character index of the fault.
        offset: Byte offset of the fault in the UTF-8 form of `text`, or None.
        caret: Two lines, an excerpt and its underline; empty without `text`.

    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        text: str | None = None,
        at: int = 0,
        width: int = 1,
        expected: Sequence[str] = (),
    ) -> None:
        self.at = at
        self.offset = None if text is None else byte_offset(text, at)
        self.caret = "" if text is None else caret(text, at, width)
        self.expected = tuple(expected)
        lines = [message if self.offset is None else f"{message} (byte {self.offset})"]
        lines += self.caret.splitlines()
        if expected:
            lines.append(f"expected: {' '.join(expected)}")
        super().__init__(code, "\n".join(lines), hint=hint)


def byte_offset(text: str, at: int) -> int:
    """Return the UTF-8 byte offset of character `at`."""
    return len(text[:at].encode("utf-8", "surrogatepass"))


def caret(text: str, at: int, width: int = 1) -> str:
    """Return an excerpt around `at` and carets under it; only ASCII, so that they align."""
    start, end = max(0, at - _EXCERPT), min(len(text), at + _EXCERPT)
    before, after = "..." * (start > 0), "..." * (end < len(text))
    shown = "".join(c if " " <= c <= "~" else "?" for c in text[start:end])
    under = max(1, min(width, max(1, end - at)))
    return f"  {before}{shown}{after}\n  {' ' * (len(before) + at - start)}{'^' * under}"


# -- documents ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Residue:
    """One residue: a letter, or its SMILES where the level says so; `pocket` when it is marked."""

    text: str
    pocket: bool = False


@dataclass(frozen=True, slots=True)
class Chain:
    """A protein (bare, annotated or expanded) or an antibody; `kind` is the name of its tags."""

    residues: tuple[Residue, ...]
    kind: str = "Protein"

    @property
    def sequence(self) -> str:
        """The residues as one string; at level 3 a marked residue contributes its SMILES."""
        return "".join(residue.text for residue in self.residues)

    @property
    def pockets(self) -> tuple[int, ...]:
        """Zero-based indices of the marked residues."""
        return tuple(at for at, residue in enumerate(self.residues) if residue.pocket)


@dataclass(frozen=True, slots=True)
class Molecule:
    """One molecule."""

    smiles: str


@dataclass(frozen=True, slots=True)
class Material:
    """Building blocks of a metal-organic framework: no topology, no cell, no coordinates."""

    metals: tuple[str, ...]
    linkers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reaction:
    """Reactants to products."""

    reactants: tuple[str, ...]
    products: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Retro:
    """A product and the reactants that give it."""

    product: str
    reactants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trans:
    """An annotated protein rewritten with residue SMILES in its pockets."""

    annotated: Chain
    expanded: Chain


@dataclass(frozen=True, slots=True)
class Search:
    """A bare protein and its annotated copy."""

    protein: Chain
    annotated: Chain


@dataclass(frozen=True, slots=True)
class Complex:
    """A protein at level 1, 2 or 3 and a ligand."""

    protein: Chain
    ligand: str


Document = Chain | Molecule | Material | Reaction | Retro | Trans | Search | Complex


def tagged(pair: str, text: str) -> str:
    """Wrap `text` in the tags of `pair`, for example `Molecule`."""
    return f"<{pair}S>{text}<{pair}E>"


def bare(sequence: str) -> Chain:
    """Return the protein of `sequence` with no residue marked."""
    return Chain(tuple(Residue(letter) for letter in sequence))


def annotate(sequence: str, pockets: Collection[int]) -> Chain:
    """Return the protein of `sequence` with the residues at the zero-based `pockets` marked."""
    return Chain(tuple(Residue(letter, at in pockets) for at, letter in enumerate(sequence)))


def write(document: Document) -> str:  # noqa: PLR0911 - one form of the grammar a return
    """Return the text of `document`; `parse_document` reads it back."""
    match document:
        case Chain(residues, kind):
            inner = "".join(tagged("Pocket", r.text) if r.pocket else r.text for r in residues)
            return tagged(kind, inner)
        case Molecule(smiles):
            return tagged("Molecule", smiles)
        case Material(metals, linkers):
            return tagged("Material", _all("Metal", metals) + _all("Molecule", linkers))
        case Reaction(reactants, products):
            return _all("Molecule", reactants) + "<React>" + _all("Molecule", products)
        case Retro(product, reactants):
            return tagged("Molecule", product) + "<ReverseReact>" + _all("Molecule", reactants)
        case Trans(annotated, expanded):
            return write(annotated) + "<Trans>" + write(expanded)
        case Search(protein, annotated):
            return write(protein) + "<Search>" + write(annotated)
        case Complex(protein, ligand):
            return write(protein) + tagged("Molecule", ligand)


def _all(pair: str, texts: Iterable[str]) -> str:
    return "".join(tagged(pair, text) for text in texts)


# -- parsing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """A tag or a run of text between tags; `start` and `end` are character indices."""

    text: str
    start: int
    end: int
    tag: bool


def parse_document(text: str, *, level: int = 2) -> Document:
    """Read one complete document.

    Args:
        text: Untrusted.
        level: What a pocket pair holds where the grammar leaves it open: 1 no pocket may occur, 2 a
            residue letter, 3 a residue SMILES. `<PocketS>C<PocketE>` is cysteine or methane, so
            this is never guessed.

    Raises:
        PromptError: With code, byte offset, expected set and a fix.

    """
    tokens = tokenize(text)
    _check_brackets(text, tokens)
    return _Reader(text, tokens).document(level)


def parse_prompt(text: str, task: str, *, level: int = 2) -> tuple[Document | Chain | None, str]:
    """Check a raw prompt of `task` and return what it is about and its trailing open tag.

    Returns:
        The molecule of `retrosynthesis`, the bare protein of `binding-site`, the protein of
        `pocket-ligand`, None for `molecule` and `material`; and the open tag at the end, or "".

    Raises:
        PromptError: The text is not a prompt of this task.
        KeyError: No task of that name has a prompt form.

    """
    template, tail = PROMPT_FORMS[task]
    tokens = tokenize(text)
    rest = tokens
    if tail:
        if not tokens or tokens[-1].text != tail or not tokens[-1].tag:
            _check_brackets(text, tokens)  # a tag that is not closed is the first thing to say
            raise _wrong_form(text, len(text), task, (tail,))
        rest = tokens[:-1]
    _check_brackets(text, rest)
    reader = _Reader(text, rest, task)
    subject: Document | Chain | None = None
    if task == "retrosynthesis":
        subject = Molecule(reader.molecule())
        reader.operator("<ReverseReact>")
    elif task == "binding-site":
        subject = reader.chain(1)
        reader.operator("<Search>")
    elif task == "pocket-ligand":
        subject = reader.chain(level)
    reader.end((template,))
    return subject, tail


PROMPT_FORMS: dict[str, tuple[str, str]] = {
    "retrosynthesis": ("<MoleculeS>PRODUCT<MoleculeE><ReverseReact>", ""),
    "binding-site": ("<ProteinS>SEQUENCE<ProteinE><Search><ProteinS>", "<ProteinS>"),
    "molecule": ("<MoleculeS>", "<MoleculeS>"),
    "pocket-ligand": ("<ProteinS>SEQUENCE<ProteinE><MoleculeS>", "<MoleculeS>"),
    "material": ("<MaterialS>", "<MaterialS>"),
}
"""The prompt of each task as a template, and the open tag at its end."""


def tokenize(text: str) -> list[Token]:
    """Split `text` into tags and runs; PromptError for an unknown tag, an arrow, too much text."""
    if len(text) > TEXT_LIMIT or len(text.encode("utf-8", "surrogatepass")) > TEXT_LIMIT:
        raise PromptError(
            "prompt.size",
            f"the text has more than {TEXT_LIMIT} bytes",
            hint="give one molecule or one chain at a time",
        )
    tokens: list[Token] = []
    at = 0
    while at < len(text):
        if text[at] == "<":
            tokens.append(_tag(text, at))
        else:
            end = text.find("<", at)
            end = len(text) if end < 0 else end
            _refuse_arrow(text, at, end)
            tokens.append(Token(text[at:end], at, end, tag=False))
        at = tokens[-1].end
    return tokens


def _tag(text: str, at: int) -> Token:
    found = _TAG.match(text, at)
    if found is None:
        raise PromptError(
            "prompt.g04",
            "'<' begins no tag",
            text=text,
            at=at,
            hint="delete it, or complete the tag; a value holds no '<'",
        )
    if found[0] not in TAGS:
        near = nearest_tag(found[0])
        raise PromptError(
            "prompt.g04",
            f"{found[0]!a:.40} is not a tag of the grammar",
            text=text,
            at=at,
            width=len(found[0]),
            expected=(near,) if near else (),
            hint=f"write {near}" if near else "delete it; tags are case-sensitive, without spaces",
        )
    return Token(found[0], at, found.end(), tag=True)


def nearest_tag(text: str) -> str:
    """Return the tag that `text` most likely means, or an empty string."""
    plain = re.sub(r"[\s_/-]", "", text).lower()
    known = {tag.lower(): tag for tag in TAGS}
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    return known[close[0]] if close else ""


def _refuse_arrow(text: str, start: int, end: int) -> None:
    arrow = text.find(">", start, end)
    if arrow < 0:
        return
    if text.startswith(">>", arrow) or text.count(">", start, end) > 1:
        raise PromptError(
            "prompt.g12",
            "a reaction SMILES stands where the grammar wants tagged molecules",
            text=text,
            at=arrow,
            hint="give the product alone and choose the task `retrosynthesis`; in the raw form "
            "write one pair of tags a molecule and an operator for the arrow",
        )
    raise PromptError("prompt.g04", "'>' ends no tag", text=text, at=arrow, hint="delete it")


def _check_brackets(text: str, tokens: Sequence[Token]) -> None:
    """Refuse a start tag without its end tag (g01) and an end tag without its start tag (g02)."""
    stack: list[Token] = []
    for token in tokens:
        if not token.tag:
            continue
        if token.text in OPERATORS:
            if stack:
                raise _unclosed(text, stack[-1], token.start)
            continue
        pair, side = token.text[1:-2], token.text[-2]
        if side == "S":
            if stack and pair not in _NESTED.get(_pair(stack[-1]), ()):
                raise _unclosed(text, stack[-1], token.start)
            stack.append(token)
        elif stack and _pair(stack[-1]) == pair:
            stack.pop()
        elif any(_pair(other) == pair for other in stack):
            raise _unclosed(text, stack[-1], token.start)
        else:
            raise PromptError(
                "prompt.g02",
                f"{token.text} closes what was not opened",
                text=text,
                at=token.start,
                width=len(token.text),
                hint=f"insert <{pair}S> before its value, or delete {token.text}",
            )
    if stack:
        raise _unclosed(text, stack[-1], tokens[-1].end)


def _pair(token: Token) -> str:
    return token.text[1:-2]


def _unclosed(text: str, opened: Token, at: int) -> PromptError:
    end = f"<{_pair(opened)}E>"
    return PromptError(
        "prompt.g01",
        f"{opened.text} at byte {byte_offset(text, opened.start)} is not closed",
        text=text,
        at=at,
        expected=(end,),
        hint=f"insert {end} here",
    )


def _wrong_form(text: str, at: int, task: str, expected: Sequence[str]) -> PromptError:
    template = PROMPT_FORMS[task][0] if task in PROMPT_FORMS else "one document of the grammar"
    return PromptError(
        "prompt.g05",
        "the text does not have the form of its task" if task else "the text is not one document",
        text=text,
        at=at,
        expected=expected,
        hint=f"the form is {template}",
    )


class _Reader:
    """Recursive descent over tokens whose brackets are balanced."""

    def __init__(self, text: str, tokens: Sequence[Token], task: str = "") -> None:
        self.text, self.tokens, self.task, self.next = text, tokens, task, 0
        self.stop = tokens[-1].end if tokens else 0

    def peek(self) -> str:
        return self.tokens[self.next].text if self.next < len(self.tokens) else ""

    def fail(self, expected: Sequence[str]) -> NoReturn:
        here = self.tokens[self.next].start if self.next < len(self.tokens) else self.stop
        raise _wrong_form(self.text, here, self.task, expected)

    def take(self, *expected: str) -> Token:
        if self.peek() not in expected or not self.tokens[self.next].tag:
            self.fail(expected)
        self.next += 1
        return self.tokens[self.next - 1]

    operator = take

    def end(self, expected: Sequence[str] = ()) -> None:
        if self.next < len(self.tokens):
            self.fail(("the end of the text", *expected))

    def value(self, what: str) -> Token:
        """Take the text inside a leaf pair; an empty value is an error of its own."""
        token = self.tokens[self.next]  # brackets are balanced, so an end tag follows at the latest
        if token.tag:
            raise PromptError(
                "prompt.g07" if what == "SMILES" else "prompt.g06",
                f"the {what} is empty",
                text=self.text,
                at=token.start,
                hint=f"give a {what}",
            )
        self.next += 1
        return token

    def molecule(self, pair: str = "Molecule") -> str:
        self.take(f"<{pair}S>")
        token = self.value("SMILES")
        check_smiles(token.text, self.text, token.start)
        self.take(f"<{pair}E>")
        return token.text

    def molecules(self, pair: str = "Molecule") -> tuple[str, ...]:
        found = [self.molecule(pair)]
        while self.peek() == f"<{pair}S>":
            found.append(self.molecule(pair))
        return tuple(found)

    def chain(self, level: int, pair: str = "Protein") -> Chain:
        self.take(f"<{pair}S>")
        residues: list[Residue] = []
        while self.peek() != f"<{pair}E>":
            token = self.tokens[self.next]
            if token.tag:
                residues.append(self.pocket(level))
            else:
                check_residues(token.text, self.text, token.start)
                residues += [Residue(letter) for letter in token.text]
                self.next += 1
        if not residues:
            self.value("sequence")
        self.take(f"<{pair}E>")
        return Chain(tuple(residues), pair)

    def pocket(self, level: int) -> Residue:
        opened = self.take("<PocketS>")
        if level == 1:
            raise PromptError(
                "prompt.g09",
                "a marked residue stands in a protein that must be bare",
                text=self.text,
                at=opened.start,
                width=len(opened.text),
                hint="take the <PocketS> <PocketE> pair away, or state the level",
            )
        token = self.value("residue" if level == 2 else "SMILES")  # noqa: PLR2004 - levels 1 to 3
        if level == 2:  # noqa: PLR2004 - levels 1 to 3
            if len(token.text) != 1:
                raise PromptError(
                    "prompt.g09",
                    "a pocket pair holds one residue letter at level 2",
                    text=self.text,
                    at=token.start,
                    width=len(token.text),
                    hint="give each residue a pair of its own, or state level 3 for residue SMILES",
                )
            check_residues(token.text, self.text, token.start)
        else:
            check_smiles(token.text, self.text, token.start)
        self.take("<PocketE>")
        return Residue(token.text, pocket=True)

    def material(self) -> Material:
        self.take("<MaterialS>")
        metals, linkers = self.molecules("Metal"), self.molecules()
        self.take("<MaterialE>")
        return Material(metals, linkers)

    def document(self, level: int) -> Document:
        first = self.peek()
        result: Document
        if first == "<ProteinS>":
            result = self.about_protein(level)
        elif first == "<AntibodyS>":
            result = self.chain(1, "Antibody")
        elif first == "<MoleculeS>":
            result = self.about_molecules()
        elif first == "<MaterialS>":
            result = self.material()
        else:
            self.fail(("<ProteinS>", "<AntibodyS>", "<MoleculeS>", "<MaterialS>"))
        self.end()
        return result

    def about_protein(self, level: int) -> Document:
        # What follows the protein fixes the level of <Trans> and <Search>; else the caller does.
        closing = next(
            (at for at, token in enumerate(self.tokens) if token.text == "<ProteinE>"), 0
        )
        after = self.tokens[closing + 1].text if closing + 1 < len(self.tokens) else ""
        if after == "<Trans>":
            annotated = self.chain(2)
            self.take("<Trans>")
            return Trans(annotated, self.chain(3))
        if after == "<Search>":
            protein = self.chain(1)
            self.take("<Search>")
            return Search(protein, self.chain(2))
        protein = self.chain(level)
        if self.peek() == "<MoleculeS>":
            return Complex(protein, self.molecule())
        if self.peek():
            self.fail(("<Trans>", "<Search>", "<MoleculeS>", "the end of the text"))
        return protein

    def about_molecules(self) -> Document:
        molecules = self.molecules()
        if self.peek() == "<React>":
            self.take("<React>")
            return Reaction(molecules, self.molecules())
        if self.peek() == "<ReverseReact>" and len(molecules) == 1:
            self.take("<ReverseReact>")
            return Retro(molecules[0], self.molecules())
        if len(molecules) > 1:
            self.fail(("<React>",))
        if self.peek():
            self.fail(("<React>", "<ReverseReact>", "the end of the text"))
        return Molecule(molecules[0])


# -- fields ---------------------------------------------------------------------------------------


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


def count_words(text: str) -> int:
    """Return the number of chemical words: bracket atoms, two-letter halogens, characters, tags."""
    tags = _TAG.findall(text)
    return len(tags) + len(_WORD.findall(_TAG.sub("", text)))


# -- completions ----------------------------------------------------------------------------------


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
    while (control := _CONTROL.search(body)) is not None:
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


# -- the token table of a checkpoint --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenReport:
    """How the added tokens of a checkpoint compare with the 16 tags.

    Attributes:
        missing: Tags that the checkpoint lacks.
        unknown: Added tokens in tag form that the grammar does not know.
        clash: Ids that belong to more than one token.
        not_special: Tags that are ordinary tokens, which a tokenizer may split.

    """

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    clash: tuple[int, ...]
    not_special: tuple[str, ...]


def compare_tokens(
    ids: Mapping[str, int], *, special: Collection[str] | None = None
) -> TokenReport:
    """Compare the added tokens of a checkpoint, token to id, with the tags of the grammar."""
    owners: dict[int, list[str]] = {}
    for token, number in ids.items():
        owners.setdefault(number, []).append(token)
    shape = re.compile(r"<[A-Za-z]+>")
    return TokenReport(
        missing=tuple(tag for tag in TAGS if tag not in ids),
        unknown=tuple(
            sorted(
                token
                for token in ids
                if shape.fullmatch(token) and token not in TAGS and not _CONTROL.fullmatch(token)
            )
        ),
        clash=tuple(sorted(number for number, tokens in owners.items() if len(tokens) > 1)),
        not_special=()
        if special is None
        else tuple(tag for tag in TAGS if tag in ids and tag not in special),
    )


def require_tokens(ids: Mapping[str, int], needed: Sequence[str], *, model: str, task: str) -> None:
    """Refuse `task` on a checkpoint without a token it needs, or with its id given twice (g11)."""
    lacking = [tag for tag in needed if tag not in ids]
    if lacking:
        raise PromptError(
            "prompt.g11",
            f"{model} has no token {' '.join(lacking)}, which {task} needs",
            hint="choose another task or another model; `airgap list` shows what is installed",
        )
    twice = [tag for tag in needed if list(ids.values()).count(ids[tag]) > 1]
    if twice:
        raise PromptError(
            "prompt.g11",
            f"{model} gives the id of {' '.join(twice)} to another token as well",
            hint="its tokenizer was damaged in conversion: build the bundle again from the source",
        )
