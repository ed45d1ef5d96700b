"""The program of the target: both kinds of graph answer the same vectors alike, and nothing odd."""

import itertools
import json

import pytest
from inference_models import fast_folder, model_folder

from airgap.enclave.channel import ProgramError
from airgap.inference.vectors import create

GREEDY = [9, 10, 11, 12, 13, 14]
VECTORS = [
    {"prompt_ids": [2, 8, 20, 21], "greedy_ids": GREEDY, "top_ids": [5, 6, 7]},
    {"prompt_ids": list(range(4, 40)) * 8, "greedy_ids": GREEDY, "top_ids": [5]},
]


def program(folder):
    made = create({"folder": str(folder), "precision": "fp32", "threads": 1, "provider": "cpu"})
    assert made.warm_up()["graph"] in ("fast", "reference")
    return made


def ask(made, vectors=VECTORS, **changes):
    request = {"vectors": vectors, "seconds": 60, "least": 1, **changes}
    return json.loads(made.handle(json.dumps(request).encode(), lambda _: None))["answers"]


@pytest.fixture(scope="module")
def programs():
    return program(fast_folder()), program(model_folder())


def test_the_fast_and_the_reference_graph_answer_alike(programs):
    fast, reference = (ask(made) for made in programs)
    assert len(fast) == len(reference) == 2
    for one, other in zip(fast, reference, strict=True):
        assert one["decoded"] == other["decoded"]
        for ours, theirs in zip(
            [*one["best"], one["top"]], [*other["best"], other["top"]], strict=True
        ):
            assert [float(v) for v in ours] == pytest.approx([float(v) for v in theirs], abs=1e-4)
    first, second, wanted = (float(value) for value in fast[0]["best"][0])
    assert first >= second
    assert first >= wanted
    assert len(fast[0]["decoded"]) == len(GREEDY)
    assert fast[1]["decoded"] == []


def test_what_it_writes_by_itself_is_best_at_each_place(programs):
    for made in programs:
        (one,) = ask(made, VECTORS[:1])
        (again,) = ask(made, [{**VECTORS[0], "greedy_ids": one["decoded"]}])
        assert all(first == wanted for first, _, wanted in again["best"])


def test_time_over_ends_after_the_least():
    made, many = program(fast_folder()), VECTORS[:1] * 9
    made.clock = itertools.count().__next__  # a second for each look
    assert len(ask(made, many, seconds=60, least=2)) == 9
    assert len(ask(made, many, seconds=3, least=2)) == 5
    assert len(ask(made, many, seconds=1, least=7)) == 8


@pytest.mark.parametrize(
    "vector",
    [
        {"prompt_ids": []},
        {"greedy_ids": []},
        {"top_ids": [10**6]},
        {"prompt_ids": [10**6]},
        {"prompt_ids": [5] * 600},
        {"more": 1},
    ],
    ids=str,
)
def test_odd_vectors_are_refused(programs, vector):
    with pytest.raises(ProgramError) as caught:
        ask(programs[0], [{**VECTORS[0], **vector}])
    assert caught.value.code == "request.malformed"


def test_an_odd_configuration_is_refused():
    with pytest.raises(ProgramError) as caught:
        create({"folder": "/x"})
    assert caught.value.code == "model.config"
