"""Laws of the parsers: any text gives a value or our own error; what we write reads back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from science_runs import ask, program

from airgap.enclave.channel import ProgramError
from airgap.science import completions, fields, grammar, results, svg, tasks
from airgap.science.grammar import TAGS
from policy.errors import AirgapError

PIECES = st.lists(
    st.one_of(
        st.sampled_from(TAGS),
        st.sampled_from(
            ["C", "MK", "c1ccccc1", "CC(=O)O", "[Zn][O]", ">>", "<", ">", "\u202e", "é"]
        ),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)
ANY_TEXT = st.one_of(st.text(max_size=80), PIECES)
TASK = st.sampled_from(sorted(tasks.TASKS))

SMILES = st.sampled_from(["C", "CCO", "c1ccccc1", "C[C@H](N)C(=O)O", "[NH4+]", "C#N", "C1CC1"])
NODE = st.sampled_from(["[Zn]", "[O][Zn][Zn]", "[Cu][Cu]"])
SEQUENCE = st.text(alphabet=fields.RESIDUES + "JX", min_size=1, max_size=12)
MANY = st.lists(SMILES, min_size=1, max_size=3).map(tuple)


@st.composite
def annotated(draw):
    sequence = draw(SEQUENCE)
    return grammar.annotate(sequence, draw(st.sets(st.integers(0, len(sequence) - 1))))


@st.composite
def expanded(draw):
    residues = draw(st.lists(st.tuples(st.booleans(), SMILES, SEQUENCE), min_size=1, max_size=4))
    return grammar.Chain(
        tuple(grammar.Residue(s if pocket else q[0], pocket) for pocket, s, q in residues)
    )


DOCUMENTS = st.one_of(
    st.tuples(SEQUENCE.map(grammar.bare), st.just(1)),
    st.tuples(annotated(), st.just(2)),
    st.tuples(expanded(), st.just(3)),
    st.tuples(st.builds(grammar.Molecule, SMILES), st.just(2)),
    st.tuples(
        st.builds(grammar.Material, st.lists(NODE, min_size=1, max_size=2).map(tuple), MANY),
        st.just(2),
    ),
    st.tuples(st.builds(grammar.Reaction, MANY, MANY), st.just(2)),
    st.tuples(st.builds(grammar.Retro, SMILES, MANY), st.just(2)),
    st.tuples(st.builds(grammar.Trans, annotated(), expanded()), st.just(2)),
    st.tuples(st.builds(grammar.Search, SEQUENCE.map(grammar.bare), annotated()), st.just(2)),
    st.tuples(st.builds(grammar.Complex, annotated(), SMILES), st.just(2)),
    st.tuples(st.builds(grammar.Complex, expanded(), SMILES), st.just(3)),
)


def refusal(call, *arguments, **named) -> AirgapError | ProgramError | None:
    """Call and return the refusal, or None; anything else that is raised fails the test."""
    try:
        call(*arguments, **named)
    except (AirgapError, ProgramError) as error:
        return error
    return None


@given(DOCUMENTS)
def test_what_is_written_reads_back(pair):
    document, level = pair
    assert grammar.parse_document(grammar.write(document), level=level) == document


@given(ANY_TEXT, st.integers(1, 3))
def test_any_text_is_a_document_or_refused(text, level):
    refused = refusal(grammar.parse_document, text, level=level)
    if refused is None:
        assert grammar.write(grammar.parse_document(text, level=level)) == text
    else:
        assert refused.code.startswith("prompt.")
        assert refused.hint


@given(ANY_TEXT, TASK)
def test_any_text_is_a_prompt_or_refused(text, task):
    refused = refusal(grammar.parse_prompt, text, task)
    if refused is not None and refused.offset is not None:
        assert refused.offset <= len(text.encode("utf-8", "surrogatepass"))


@given(ANY_TEXT, TASK, st.booleans())
def test_any_completion_is_read_and_keeps_its_remainder(text, task, stopped):
    found = completions.parse_completion(task, text, stopped=stopped)
    assert found.remainder in text
    if found.complete:
        assert not found.remainder.strip()


@given(ANY_TEXT)
def test_smiles_scanner_loses_nothing(text):
    assert "".join(piece for _, piece, _ in fields.scan_smiles(text)) == text


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT, st.booleans())
def test_any_product_is_prepared_or_refused(text, fix):
    request = {
        "op": "prepare",
        "task": "retrosynthesis",
        "inputs": {"smiles": text, "fix": fix},
        "context": {"max_context": 512, "tags": {tag: n for n, tag in enumerate(TAGS)}},
    }
    refused = refusal(ask, request)
    if refused is None:
        assert results.parse_prepared(ask(request)).input_screen.status == "complete"
    else:
        assert refused.code.startswith("prompt.")


@settings(max_examples=150, deadline=None)
@given(st.lists(ANY_TEXT, max_size=4), TASK)
def test_any_completions_are_assessed(texts, task):
    inputs = {
        "retrosynthesis": {"smiles": "CCO"},
        "binding-site": {"sequence": "MK"},
        "pocket-ligand": {"sequence": "MK"},
    }.get(task, {})
    samples = [
        {
            "index": n,
            "text": text,
            "finish_reason": "eos",
            "logprob": -1.5,
            "tokens": 3,
            "removed_mass": 0.0,
        }
        for n, text in enumerate(texts)
    ]
    reply = results.parse_assessed(
        ask({"op": "assess", "task": task, "inputs": inputs, "samples": samples})
    )
    assert reply.summary.valid + reply.summary.invalid == len(texts)
    assert sum(row.votes for row in reply.rows) == reply.summary.valid


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(
                    ["op", "task", "inputs", "samples", "rows", "context", "track", "smiles", "n"]
                ),
                inner,
                max_size=5,
            ),
        ),
        max_leaves=12,
    ),
    st.sampled_from(["prepare", "assess", "draw", "sdf", "", "eval"]),
)
def test_any_request_is_answered_or_refused(value, operation):
    request = {**value, "op": operation} if isinstance(value, dict) else value
    raw = json.dumps(request).encode()
    refused = refusal(program().handle, raw, lambda _: None)
    assert refused is None or refused.code.startswith(("prompt.", "request."))


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_answered_or_refused(raw):
    with pytest.raises(ProgramError):
        program().handle(raw, lambda _: None)


@given(st.one_of(st.text(max_size=60), PIECES.map(lambda t: f"<svg xmlns='x'>{t}</svg>")))
def test_any_text_is_a_drawing_or_refused(text):
    with pytest.raises(AirgapError):
        svg.clean_svg(text)


@given(st.binary(max_size=40))
def test_any_reply_is_read_or_refused(raw):
    for parse in (results.parse_prepared, results.parse_assessed, results.parse_drawings):
        with pytest.raises(AirgapError):
            parse(raw)
