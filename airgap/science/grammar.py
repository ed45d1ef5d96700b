"""The LOGOS grammar: tags, documents and prompts.

Decides whether a text is a document or a prompt of the grammar and names the byte at which it is
not. A missing end tag gives fluent nonsense and no error, so a wrong prompt is a refusal here,
before a model runs. The tags and prompt forms are those of the authors' released scripts and
figures (repository LOGOS-Hub/LOGOS, commit 66c935a). No token id is a constant: ids come from the
checkpoint (`checkpoint`). What a user types is checked in `fields`, what a model wrote is read in
`completions`.

Standard library only: the broker imports this module, and so does the sealed helper.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from airgap.science.fields import TEXT_LIMIT, check_residues, check_smiles
from airgap.science.refusals import PromptError, byte_offset

PAIRS = ("Protein", "Antibody", "Molecule", "Pocket", "Material", "Metal")
OPERATORS = ("<Trans>", "<Search>", "<React>", "<ReverseReact>")
TAGS = tuple(f"<{pair}{side}>" for pair in PAIRS for side in "SE") + OPERATORS
"""The 16 tags seen in the released scripts and figures."""

_TAG = re.compile(r"<[^<>]{0,64}>")
_WORD = re.compile(r"\[[^\[\]]+\]|Br|Cl|%\d\d|.", re.DOTALL)
_NESTED = {"Protein": ("Pocket",), "Material": ("Metal", "Molecule")}


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


def count_words(text: str) -> int:
    """Return the number of chemical words: bracket atoms, two-letter halogens, characters, tags."""
    tags = _TAG.findall(text)
    return len(tags) + len(_WORD.findall(_TAG.sub("", text)))
