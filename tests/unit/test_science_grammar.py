import pytest

from airgap.science import checkpoint, fields, grammar
from airgap.science.completions import parse_completion
from airgap.science.grammar import (
    TAGS,
    Chain,
    Complex,
    Material,
    Molecule,
    Reaction,
    Retro,
    Search,
    Trans,
    annotate,
    bare,
    parse_document,
    parse_prompt,
    write,
)
from airgap.science.refusals import PromptError

DOCUMENTS = {
    "protein": (bare("MKJ"), 1),
    "antibody": (Chain(bare("EVQL").residues, "Antibody"), 1),
    "annotated": (annotate("MKCA", {1, 2}), 2),
    "expanded": (
        Chain((grammar.Residue("M"), grammar.Residue("NCC(=O)O", pocket=True))),
        3,
    ),
    "molecule": (Molecule("CCO"), 2),
    "material": (Material(("[Zn][O]", "[Cu]"), ("C#N", "OC=O")), 2),
    "reaction": (Reaction(("CC", "O"), ("CCO",)), 2),
    "retro": (Retro("CCO", ("CC", "O")), 2),
    "trans": (
        Trans(annotate("MK", {0}), Chain((grammar.Residue("CSCC", True), grammar.Residue("K")))),
        2,
    ),
    "search": (Search(bare("MK"), annotate("MK", {1})), 2),
    "complex": (Complex(annotate("MK", {1}), "CCO"), 2),
}


@pytest.mark.parametrize(("document", "level"), DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_every_form_of_the_grammar_reads_back_as_written(document, level):
    assert parse_document(write(document), level=level) == document


PROMPTS = {
    "retrosynthesis": "<MoleculeS>CCO<MoleculeE><ReverseReact>",
    "binding-site": "<ProteinS>MKA<ProteinE><Search><ProteinS>",
    "molecule": "<MoleculeS>",
    "pocket-ligand": "<ProteinS>M<PocketS>K<PocketE>A<ProteinE><MoleculeS>",
    "material": "<MaterialS>",
}

WRONG = {
    "end tag missing": (
        "binding-site",
        "<ProteinS>MKA<Search><ProteinS>",
        "prompt.g01",
        13,
        "<ProteinE>",
    ),
    "pocket not closed": (
        "pocket-ligand",
        "<ProteinS>M<PocketS>K<ProteinE><MoleculeS>",
        "prompt.g01",
        21,
        "<PocketE>",
    ),
    "molecule not closed at the end": (
        "retrosynthesis",
        "<MoleculeS>CCO",
        "prompt.g01",
        14,
        "<MoleculeE>",
    ),
    "closed without opening": (
        "retrosynthesis",
        "CCO<MoleculeE><ReverseReact>",
        "prompt.g02",
        3,
        "<MoleculeS>",
    ),
    "wrong case": (
        "retrosynthesis",
        "<moleculeS>CCO<MoleculeE><ReverseReact>",
        "prompt.g04",
        0,
        "<MoleculeS>",
    ),
    "spaces in a tag": (
        "retrosynthesis",
        "< MoleculeS >CCO<MoleculeE><ReverseReact>",
        "prompt.g04",
        0,
        "<MoleculeS>",
    ),
    "unknown tag": ("molecule", "<mol>", "prompt.g04", 0, ""),
    "operator missing": (
        "retrosynthesis",
        "<MoleculeS>CCO<MoleculeE>",
        "prompt.g05",
        25,
        "<ReverseReact>",
    ),
    "operator of another task": (
        "retrosynthesis",
        "<MoleculeS>CCO<MoleculeE><React>",
        "prompt.g05",
        25,
        "<ReverseReact>",
    ),
    "something after the prompt": (
        "retrosynthesis",
        "<MoleculeS>CCO<MoleculeE><ReverseReact><MoleculeS>C<MoleculeE>",
        "prompt.g05",
        39,
        "",
    ),
    "trailing open tag missing": (
        "binding-site",
        "<ProteinS>MKA<ProteinE><Search>",
        "prompt.g05",
        31,
        "<ProteinS>",
    ),
    "text outside tags": ("molecule", "CC<MoleculeS>", "prompt.g05", 0, ""),
    "letter outside the alphabet": (
        "binding-site",
        "<ProteinS>MkA<ProteinE><Search><ProteinS>",
        "prompt.g06",
        11,
        "",
    ),
    "empty sequence": (
        "binding-site",
        "<ProteinS><ProteinE><Search><ProteinS>",
        "prompt.g06",
        10,
        "",
    ),
    "empty SMILES": (
        "retrosynthesis",
        "<MoleculeS><MoleculeE><ReverseReact>",
        "prompt.g07",
        11,
        "",
    ),
    "open ring": (
        "retrosynthesis",
        "<MoleculeS>C1CC<MoleculeE><ReverseReact>",
        "prompt.g07",
        12,
        "",
    ),
    "two residues in one pocket": (
        "pocket-ligand",
        "<ProteinS><PocketS>MK<PocketE><ProteinE><MoleculeS>",
        "prompt.g09",
        19,
        "",
    ),
    "pocket in a bare protein": (
        "binding-site",
        "<ProteinS>M<PocketS>K<PocketE><ProteinE><Search><ProteinS>",
        "prompt.g09",
        11,
        "",
    ),
    "reaction SMILES": ("retrosynthesis", "CC.O>>CCO", "prompt.g12", 4, ""),
}


@pytest.mark.parametrize(("task", "text", "code", "offset", "fix"), WRONG.values(), ids=WRONG)
def test_wrong_prompt_is_refused_with_code_place_and_fix(task, text, code, offset, fix):
    parse_prompt(PROMPTS[task], task)

    with pytest.raises(PromptError) as refused:
        parse_prompt(text, task)

    error = refused.value
    assert (error.code, error.offset) == (code, offset)
    assert fix in error.hint + " ".join(error.expected)
    assert error.hint
    excerpt, line = error.caret.splitlines()
    assert line.index("^") <= len(excerpt)


def test_prompt_gives_its_subject_and_its_open_tag():
    assert parse_prompt(PROMPTS["retrosynthesis"], "retrosynthesis") == (Molecule("CCO"), "")
    assert parse_prompt(PROMPTS["binding-site"], "binding-site") == (bare("MKA"), "<ProteinS>")
    subject, _ = parse_prompt(PROMPTS["pocket-ligand"], "pocket-ligand")
    assert subject.pockets == (1,)
    assert parse_prompt(PROMPTS["material"], "material") == (None, "<MaterialS>")


def test_pocket_content_is_never_guessed():
    text = "<ProteinS>M<PocketS>C<PocketE><ProteinE>"
    assert parse_document(text, level=2) == parse_document(text, level=3)
    with pytest.raises(PromptError):
        parse_document(text, level=1)
    with pytest.raises(PromptError) as refused:
        parse_document("<ProteinS>M<PocketS>CC(N)C<PocketE><ProteinE>", level=2)
    assert refused.value.code == "prompt.g09"


WRONG_DOCUMENTS = {
    "empty": "",
    "two products before the arrow back": "<MoleculeS>C<MoleculeE><MoleculeS>C<MoleculeE>"
    "<ReverseReact><MoleculeS>C<MoleculeE>",
    "two molecules alone": "<MoleculeS>C<MoleculeE><MoleculeS>C<MoleculeE>",
    "linkers without metal": "<MaterialS><MoleculeS>C<MoleculeE><MaterialE>",
    "metal without linkers": "<MaterialS><MetalS>[Zn]<MetalE><MaterialE>",
    "protein then metal": "<ProteinS>M<ProteinE><MetalS>[Zn]<MetalE>",
    "molecule then protein": "<MoleculeS>C<MoleculeE><ProteinS>M<ProteinE>",
    "trans of a bare left side": "<ProteinS>M<ProteinE><Trans>",
    "antibody with a pocket": "<AntibodyS>M<PocketS>K<PocketE><AntibodyE>",
    "arrow in a molecule": "<MoleculeS>C>>O<MoleculeE>",
    "dative bond": "<MoleculeS>N->[Cu]<MoleculeE>",
    "half a tag": "<ProteinS",
    "wildcard letters": "<MoleculeS>CX<MoleculeE>",
    "nothing but a bond": "<MoleculeS>=<MoleculeE>",
    "closing branch": "<MoleculeS>C)C<MoleculeE>",
    "open branch": "<MoleculeS>C(C<MoleculeE>",
    "open bracket": "<MoleculeS>C[C<MoleculeE>",
    "space": "<MoleculeS>CCO ethanol<MoleculeE>",
}


@pytest.mark.parametrize("text", WRONG_DOCUMENTS.values(), ids=WRONG_DOCUMENTS.keys())
def test_text_that_is_no_document_is_refused(text):
    with pytest.raises(PromptError) as refused:
        parse_document(text)
    assert refused.value.hint


def test_text_beyond_the_limit_is_refused_before_it_is_read():
    with pytest.raises(PromptError) as refused:
        parse_document("<MoleculeS>" + "C" * 1_000_000)
    assert refused.value.code == "prompt.size"
    with pytest.raises(PromptError) as refused:
        fields.check_field("C" * 70_000, "product")
    assert refused.value.code == "prompt.size"


def test_caret_line_is_ascii_and_points_at_the_character():
    with pytest.raises(PromptError) as refused:
        fields.check_residues("MKÄ\u202eA")
    assert refused.value.offset == 2
    excerpt, line = refused.value.caret.splitlines()
    assert excerpt.isascii()
    assert line.index("^") == excerpt.index("?")
    assert "U+00C4" in refused.value.message


def test_long_text_is_cut_around_the_fault():
    with pytest.raises(PromptError) as refused:
        fields.check_residues("M" * 500 + "*" + "M" * 500)
    excerpt, line = refused.value.caret.splitlines()
    assert len(excerpt) < 80
    assert excerpt[line.index("^")] == "*"


@pytest.mark.parametrize(
    ("letter", "word"),
    [
        ("k", "write K"),
        ("-", "gaps"),
        ("*", "stop"),
        (">", "FASTA"),
        (" ", "spaces"),
        ("#", "away"),
    ],
)
def test_each_bad_residue_gets_its_own_fix(letter, word):
    with pytest.raises(PromptError) as refused:
        fields.check_residues("M" + letter)
    assert word in refused.value.hint


def test_rare_residues_warn_and_pass():
    assert fields.check_residues("MKA") == []
    (warning,) = fields.check_residues("MJJ")
    assert "J occurs 2 times" in warning


COMPLETIONS = {
    "reactants": (
        "retrosynthesis",
        "<MoleculeS>CC<MoleculeE><MoleculeS>O<MoleculeE>",
        ("CC", "O"),
        "",
        True,
    ),
    "reactants with an end token": (
        "retrosynthesis",
        "<MoleculeS>CC<MoleculeE><eos>",
        ("CC",),
        "",
        True,
    ),
    "reactants cut off": (
        "retrosynthesis",
        "<MoleculeS>CC<MoleculeE><MoleculeS>O",
        ("CC",),
        "<MoleculeS>O",
        False,
    ),
    "empty": ("retrosynthesis", "", (), "", False),
    "other task's tag": (
        "retrosynthesis",
        "<MoleculeS>CC<MoleculeE><React>",
        ("CC",),
        "<React>",
        False,
    ),
    "ligand": ("pocket-ligand", "CCO<MoleculeE>", ("CCO",), "", True),
    "ligand not closed": ("pocket-ligand", "CCO", (), "CCO", False),
    "empty ligand": ("molecule", "<MoleculeE>", (), "<MoleculeE>", False),
    "ligand with more": ("molecule", "CC<MoleculeE>CC", ("CC",), "CC", False),
    "linkers without metal": ("material", "<MoleculeS>C<MoleculeE><MaterialE>", ("C",), "", False),
}


@pytest.mark.parametrize(
    ("task", "text", "molecules", "rest", "complete"), COMPLETIONS.values(), ids=COMPLETIONS
)
def test_completion_keeps_what_it_could_not_read(task, text, molecules, rest, complete):
    found = parse_completion(task, text)
    assert (found.molecules, found.remainder, found.complete) == (molecules, rest, complete)


def test_stop_tag_may_be_absent_when_the_decoder_reported_it():
    assert not parse_completion("molecule", "CCO").complete
    assert parse_completion("molecule", "CCO", stopped=True).complete


def test_annotated_copy_gives_residues_with_marks():
    found = parse_completion("binding-site", "M<PocketS>K<PocketE>A<ProteinE>")
    assert [(r.text, r.pocket) for r in found.residues] == [("M", False), ("K", True), ("A", False)]
    assert found.complete


def test_completion_of_an_unknown_task_is_a_mistake_of_the_caller():
    with pytest.raises(KeyError):
        parse_completion("poetry", "C")


def test_task_is_refused_on_a_checkpoint_without_its_token():
    ids = {tag: number for number, tag in enumerate(TAGS)}
    needed = ("<MoleculeS>", "<ReverseReact>")
    checkpoint.require_tokens(ids, needed, model="m", task="retrosynthesis")
    for broken in ({"<MoleculeS>": 1}, {**ids, "<ReverseReact>": ids["<MoleculeS>"]}):
        with pytest.raises(PromptError) as refused:
            checkpoint.require_tokens(broken, needed, model="m", task="retrosynthesis")
        assert refused.value.code == "prompt.g11"
