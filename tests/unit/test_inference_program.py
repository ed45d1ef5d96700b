"""The program behind the channel: configuration, one answer a request, nothing opened late."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
from inference_models import RETRO, SEARCH, SEQUENCE, model_folder, poison, rewrite, write_model

from airgap.enclave.channel import ProgramError
from airgap.inference import program as program_module
from airgap.inference.program import create, half_of_free_memory
from airgap.inference.protocol import (
    Done,
    Generate,
    Grammar,
    Info,
    Sample,
    Score,
    Scores,
    Segment,
    parse_event,
    parse_reply,
    segments_of,
)

REQUEST = Generate(
    prompt=segments_of(RETRO),
    n=6,
    max_new_tokens=30,
    temperature=1.2,
    top_p=0.85,
    top_k=50,
    repetition_penalty=1.05,
    seed=1,
    grammar=Grammar("structure", "retrosynthesis"),
)


def config(folder=None, **more):
    return {"folder": str(folder or model_folder()), "precision": "fp32", "threads": 1, **more}


@pytest.fixture(scope="module")
def program():
    made = create(config())
    made.warm_up()
    return made


def answer(program, request):
    events = []
    reply = program.handle(request.encode(), events.append)
    return parse_reply(reply), [parse_event(event) for event in events]


def test_a_request_is_answered_with_events_and_totals(program):
    done, events = answer(program, REQUEST)
    samples = [event for event in events if isinstance(event, Sample)]
    assert isinstance(done, Done)
    assert sorted(sample.index for sample in samples) == list(range(6))
    assert done.tokens == sum(len(sample.ids) for sample in samples)


def test_scores_are_answered(program):
    reply, events = answer(
        program, Score(prompt=segments_of(RETRO), completions=((Segment("CC"),),))
    )
    assert isinstance(reply, Scores)
    assert reply.scores[0][1] == 2
    assert events == []


def test_the_facts_name_the_model_and_what_may_be_done_with_it(program):
    facts, _ = answer(program, Info())
    assert facts["model"] == "tiny-random-llama"
    assert facts["scientific_use"] is False
    assert facts["provider"] == "cpu"
    assert facts["batch_invariant"] is True
    assert facts["grammar"] is True
    assert (
        facts["graph_sha256"]
        == json.loads((model_folder() / "graphs.json").read_text())["graphs"][0]["sha256"]
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"prompt": segments_of("<MoleculeS>CC?")}, "prompt.g11"),
        ({"prompt": segments_of("<Proteins>")}, "prompt.g04"),
        ({"max_new_tokens": 600}, "prompt.g10"),
        ({"stop": ("<Nothing>",)}, "model.stop"),
        ({"n": 0}, "request.malformed"),
        ({"n": 10**6}, "request.malformed"),
        ({"prompt": (Segment("C" * 2**20),)}, "request.limit"),
    ],
)
def test_a_refusal_has_a_code_and_the_next_request_works(program, change, code):
    with pytest.raises(ProgramError) as caught:
        program.handle(replace(REQUEST, **change).encode(), lambda _event: None)
    assert caught.value.code == code
    assert isinstance(answer(program, REQUEST)[0], Done)


@pytest.mark.parametrize(
    "change",
    [
        {"folder": 3},
        {"threads": 0},
        {"precision": None},
        {"provider": "tpu"},
        {"memory_mb": 0},
        {"most_rows": 0},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_configuration_that_is_not_understood_is_refused(change):
    create(config())
    with pytest.raises(ProgramError) as caught:
        create(config() | change)
    assert caught.value.code == "model.config"


def test_memory_of_the_configuration_is_the_budget():
    made = create(config(memory_mb=1, most_rows=7))
    facts = made.warm_up()
    assert (facts["memory_bytes"], facts["most_rows"]) == (1 << 20, 7)
    assert answer(made, replace(REQUEST, n=20))[0].rows <= 7


def test_half_of_the_free_memory_is_planned_by_default():
    assert half_of_free_memory("MemTotal: 9 kB\nMemAvailable:    2048 kB\n") == 1 << 20
    for table in ("", "MemAvailable:", "MemAvailable: many"):
        assert half_of_free_memory(table) == 1 << 30


def test_running_out_of_memory_is_a_refusal(program, monkeypatch):
    def exhausted(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr("airgap.inference.decoder.Cache", exhausted)
    with pytest.raises(ProgramError) as caught:
        program.handle(REQUEST.encode(), lambda _event: None)
    assert caught.value.code == "model.memory"


def test_a_poisoned_model_does_not_come_up(tmp_path):
    with pytest.raises(ProgramError) as caught:
        create(config(poison(write_model(tmp_path / "model")))).warm_up()
    assert caught.value.code == "model.nan"


def test_a_model_without_grammar_serves_free_requests_only(tmp_path):
    folder = write_model(tmp_path / "model")
    document = tiny_llama.tokenizer()
    document["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"Regex": "_"}, "content": " "},
            {"type": "Fuse"},
        ],
    }
    rewrite(folder, "tokenizer.json", json.dumps(document).encode())
    made = create(config(folder))
    assert made.warm_up()["grammar"] is False
    assert isinstance(answer(made, replace(REQUEST, grammar=Grammar()))[0], Done)
    with pytest.raises(ProgramError) as caught:
        made.handle(REQUEST.encode(), lambda _event: None)
    assert caught.value.code == "model.grammar"


def test_a_machine_whose_batches_add_up_otherwise_is_told(program, monkeypatch):
    model = program._model
    real = type(model).run

    def unsteady(self, ids, cache, length):
        return real(self, ids, cache, length) * np.float32(1 + len(ids) * 1e-6)

    assert program_module.is_batch_invariant(model)
    monkeypatch.setattr(type(model), "run", unsteady)
    assert not program_module.is_batch_invariant(model)


# After stage 2 a process may read and write its channel, take memory and wait; it opens nothing.
SEALED = """
import json, os, sys
from airgap.enclave import filters, linux
from airgap.enclave.channel import ProgramError
from airgap.inference.program import create

config, requests, seal = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "sealed"
program = create(config)
program.warm_up()
before = set(sys.modules)
denied = not seal
if seal:
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    filters.install(filters.stage2(os.getpid(), linux.MACHINE))
    try:
        open("/dev/null")
    except OSError:
        denied = True
found = []
for request in requests:
    events = []
    try:
        program.handle(request.encode(), events.append)
        samples = [json.loads(event) for event in events]
        found.append(sorted(s["text"] for s in samples if s["event"] == "sample"))
    except ProgramError as error:
        found.append(error.code)
late = sorted(set(sys.modules) - before)
os.write(2, json.dumps({"found": found, "late": late, "denied": denied}).encode())
os._exit(0)
"""


def in_process(seal):
    requests = [
        REQUEST,
        replace(REQUEST, n=70, grammar=Grammar()),
        replace(
            REQUEST,
            prompt=segments_of(SEARCH),
            grammar=Grammar("copy", sequence=SEQUENCE),
            max_new_tokens=70,
        ),
        replace(REQUEST, prompt=segments_of("<MoleculeS>CC?")),
        replace(REQUEST, max_new_tokens=600),
        Score(prompt=segments_of(RETRO), completions=((Segment("CC"),),)),
        Info(),
    ]
    texts = [request.encode().decode() for request in requests] + ["{", "[" * 5000, ""]
    done = subprocess.run(
        [sys.executable, "-c", SEALED, json.dumps(config(threads=2)), json.dumps(texts), seal],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return json.loads(done.stderr)


def test_nothing_is_opened_or_imported_after_the_warm_up():
    if not sys.platform.startswith("linux"):
        pytest.skip("the filters are Linux's")
    free = in_process("free")
    assert free["late"] == []
    assert free["found"][3:5] == ["prompt.g11", "prompt.g10"]
    sealed = in_process("sealed")
    assert sealed["denied"]
    assert sealed == free


def test_the_worker_loads_no_room_but_its_own():
    code = (
        "import sys, airgap.inference.program as p\n"
        "roots = {name.split('.')[0] for name in sys.modules}\n"
        "ours = {n for n in sys.modules if n.split('.')[0] in ('airgap', 'bundle', 'policy')}\n"
        "print(sorted(roots & {'torch', 'transformers', 'optimum', 'rdkit', 'gemmi', 'pydantic',"
        " 'cryptography', 'huggingface_hub', 'onnx', 'policy', 'bundle'}))\n"
        "print(sorted(n for n in ours if not n.startswith(('airgap.inference', 'airgap.enclave'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "['airgap']"]


def test_the_broker_reads_the_protocol_without_the_worker_s_libraries():
    code = (
        "import sys, airgap.inference.protocol\n"
        "print(sorted({'numpy', 'onnxruntime', 'tokenizers', 'llguidance'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
