"""The real programs under stage 2: nothing that they need is missing."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from enclave_harness import PROGRAMS, needs_namespaces

from airgap.enclave import Caps, SealSpec, launch, twin
from policy.errors import AirgapError

pytestmark = needs_namespaces


@pytest.fixture(autouse=True)
def probed(monkeypatch):
    monkeypatch.setattr(twin, "probe_rung", lambda *_a, **_k: {"probed": "elsewhere"})
    monkeypatch.setattr(twin, "require_sealed", lambda _: None)
    monkeypatch.setattr(twin, "summary", lambda report: report)


@pytest.fixture
def inference():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")  # the small model is exported by the staging side
    import inference_models

    folder = inference_models.model_folder()
    config = {"folder": str(folder), "precision": "fp32", "threads": 2}
    with launch(
        SealSpec(
            profile="worker",
            program="airgap.inference.program:create",
            config=config,
            read_only=(folder,),
        )
    ) as enclave:
        yield enclave


def inference_requests():
    from airgap.inference.protocol import Generate, Grammar, Info, Score, Segment, segments_of

    retro = segments_of("<MoleculeS>CCO<MoleculeE><ReverseReact><MoleculeS>")
    search = segments_of("<ProteinS>MKTAYIAKQR<ProteinE><Search><PocketS>")
    plain = Generate(
        prompt=retro,
        n=4,
        max_new_tokens=20,
        temperature=1.2,
        top_p=0.85,
        top_k=50,
        repetition_penalty=1.05,
        seed=1,
    )
    return [
        plain,
        replace(plain, grammar=Grammar("structure", "retrosynthesis")),
        replace(plain, prompt=search, grammar=Grammar("copy", sequence="MKTAYIAKQR")),
        Score(prompt=retro, completions=((Segment("CC"),),)),
        Info(),
        replace(plain, n=0),
        replace(plain, prompt=(Segment("C" * 2**20),)),
        replace(plain, max_new_tokens=600),
        replace(plain, max_new_tokens=300, n=2),
        replace(plain, n=40, max_new_tokens=4),
    ]


def exercise(enclave, payloads, count):
    """Send requests round and round; a refusal is an answer, an end is not."""
    refused = {}
    for number in range(count):
        try:
            enclave.request(payloads[number % len(payloads)], 60.0)
        except AirgapError as error:
            refused[error.code] = refused.get(error.code, 0) + 1
            assert enclave.alive, error.message  # noqa: PT017
    enclave.reverify()
    return refused


def test_inference_needs_nothing_that_stage_2_denies(inference):
    payloads = [request.encode() for request in inference_requests()]
    refused = exercise(inference, [*payloads, b"\xff garbage"], 22)
    assert refused == {"request.malformed": 4, "request.limit": 2, "prompt.g10": 2}
    assert inference.close()["incident"] is None


@pytest.mark.soak
def test_ten_thousand_requests_under_stage_2(inference):
    payloads = [request.encode() for request in inference_requests()[:8]]
    started = time.monotonic()
    refused = exercise(inference, [*payloads, b"\xff garbage"], 10_000)
    assert set(refused) == {"request.malformed", "request.limit", "prompt.g10"}
    print(f"{time.monotonic() - started:.0f} s")
    assert inference.close()["incident"] is None


@pytest.mark.soak
def test_ten_thousand_requests_several_at_once_under_stage_2():
    """Threads share one worker, some callers go away or have no time: it serves all the others."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    import inference_models

    folder = inference_models.fast_folder()
    config = {"folder": str(folder), "precision": "fp32", "threads": 2}
    spec = SealSpec(
        profile="worker",
        program="airgap.inference.program:create",
        config=config,
        read_only=(folder,),
        caps=Caps(in_flight=8),
    )
    payloads = [request.encode() for request in inference_requests()] + [b"\xff garbage"]
    with launch(spec) as enclave, ThreadPoolExecutor(12) as pool:
        alone = [outcome_of(enclave, payload) for payload in payloads]

        def one(number):
            payload = payloads[number % len(payloads)]
            if number % 7 == 3:  # the caller goes away
                with contextlib.suppress(AirgapError, StopIteration):
                    stream = enclave.stream(payload, 120.0)
                    next(stream)
                    stream.close()
                return "left"
            if number % 13 == 5:  # its time is over before its turn
                return outcome_of(enclave, payload, total_s=0.0)[0]
            assert outcome_of(enclave, payload)[0] == alone[number % len(payloads)][0]
            return "answered"

        found = Counter(pool.map(one, range(10_000)))
        assert found.total() == 10_000
        assert set(found) <= {"left", "answered", "request.busy", "model.deadline"}
        assert found["answered"] > 7_000
        enclave.reverify()
        print(dict(found))
        assert enclave.close()["incident"] is None


def outcome_of(enclave, payload, *, total_s=None):
    """Return "answered" or the code of the refusal; the worker lives on."""
    try:
        return "answered", enclave.request(payload, 120.0, total_s=total_s)
    except AirgapError as error:
        assert enclave.alive, error.message  # noqa: PT017
        return error.code, b""


@pytest.mark.soak
def test_ten_thousand_threads_errors_and_tracebacks_under_stage_2():
    """The interpreter's own needs: each kind of answer and failure, a thread, a long input."""
    wanted = [
        {"op": "echo", "value": "x" * 100},
        {"op": "thread"},
        {"op": "traceback"},
        {"op": "raise"},
        {"op": "refuse", "code": "prompt.g01"},
        {"op": "memory", "size": 8 << 20},
        {"op": "echo", "value": "x" * (1 << 18), "parts": 3},
        {"op": "open", "path": "/etc/passwd"},
        {"op": "connect"},
        {"op": "no such operation"},
    ]
    payloads = [json.dumps(one).encode() for one in wanted]
    spec = SealSpec(profile="worker", program=f"{PROGRAMS}:create", read_only=(PROGRAMS,))
    with launch(spec) as enclave:
        refused = exercise(enclave, payloads, 10_000)
        assert refused == {"enclave.program": 2000, "prompt.g01": 1000}
        assert enclave.close()["incident"] is None


def science_requests():
    from airgap.science import tasks

    every = {
        tag: n for n, tag in enumerate(sorted({t for k in tasks.TASKS.values() for t in k.tokens}))
    }
    context = {"max_context": 2048, "tags": every}
    inputs = {
        "retrosynthesis": {"smiles": "CC(=O)Oc1ccccc1C(=O)O"},
        "molecule": {},
        "binding-site": {"sequence": "MKTAYIAKQRQISFVKSHFSRQ"},
        "pocket-ligand": {"fasta": ">a\nMKTAYIAKQR", "residues": "1,3"},
        "material": {},
    }
    sample = {"index": 0, "finish_reason": "eos", "logprob": -1.0, "tokens": 4, "removed_mass": 0.0}
    texts = [
        "CCO<MoleculeE>",
        "c1ccccc1<MoleculeE><MoleculeS>",
        "C1CC(<MoleculeE>",
        "\x00<Foo>",
        "C" * 5000,
    ]
    out = []
    for task, given in inputs.items():
        out.append({"op": "prepare", "task": task, "inputs": given, "context": context})
        samples = [{**sample, "index": n, "text": text} for n, text in enumerate(texts)]
        out.append({"op": "assess", "task": task, "inputs": given, "samples": samples})
    broken = [
        {"smiles": "C1CC("},
        {"smiles": "C" * 20_000},
        {"smiles": "[U+9]"},
        {"nothing": 1},
        {},
    ]
    out += [
        {"op": "prepare", "task": "retrosynthesis", "inputs": b, "context": context} for b in broken
    ]
    return out


@pytest.mark.soak
def test_ten_thousand_requests_of_the_screening_helper():
    pytest.importorskip("rdkit")
    pytest.importorskip("gemmi")
    payloads = [json.dumps(wanted).encode() for wanted in science_requests()]
    with launch(SealSpec(profile="screen", program="airgap.science.program:create")) as enclave:
        refused = exercise(enclave, payloads, 10_000)
        assert {code.split(".")[0] for code in refused} <= {"prompt", "request", "science"}
        assert enclave.close()["incident"] is None


def test_the_screening_helper_needs_nothing_that_stage_2_denies():
    pytest.importorskip("rdkit")
    pytest.importorskip("gemmi")
    with launch(SealSpec(profile="screen", program="airgap.science.program:create")) as enclave:
        assert enclave.evidence["profile"] == "screen"
        for wanted in science_requests():
            assert enclave.alive
            try:
                reply = json.loads(enclave.request(json.dumps(wanted).encode(), 30.0))
            except AirgapError as error:
                room = error.code.split(".")[0]
                assert room in {"prompt", "request", "science"}, error.message  # noqa: PT017
                continue
            if wanted["op"] == "assess" and reply.get("rows"):
                more = {**wanted, "rows": reply["rows"], "track": reply.get("track")}
                for op in ("draw", "sdf"):
                    enclave.request(json.dumps({**more, "op": op}).encode(), 30.0)
        enclave.reverify()
        assert enclave.close()["incident"] is None
