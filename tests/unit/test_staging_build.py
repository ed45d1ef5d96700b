"""From a snapshot to a signed draft with the real programs, torch to onnxruntime; without seal."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import bundles
import pytest
import tiny_llama
from staging_runs import FACTS, Result, build_tiny, permit, run_inline

from bundle.envelope import parse_envelope
from bundle.graphs import FileRef, parse_graphs
from bundle.media import open_medium
from bundle.scan.bom import PATH as BOM
from bundle.scan.bom import require_bom
from bundle.scan.onnx import parse_onnx
from bundle.scan.payload import _require_agreement
from bundle.scan.tokenizer import parse_tokenizer
from bundle.staging.bom import require_schema
from bundle.staging.inspect import inspect_source
from bundle.staging.pipeline import memory_of
from bundle.staging.prompts import MIN_PROMPTS
from bundle.staging.release import modalities_of, model_entry, stable_evidence
from bundle.staging.sign import count, read_draft, sign
from bundle.staging.views import (
    built_document,
    built_view,
    draft_view,
    tally_document,
    tally_view,
)
from bundle.verify import open_bundle, verify_bundle
from policy.errors import AirgapError, FaultError, RefusedError

NOW = bundles.NOW + timedelta(days=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A snapshot with hub records and pins, and the draft that was built from it."""
    base = tmp_path_factory.mktemp("build")
    folder = tiny_llama.write_snapshot(base / "model")
    (folder / "LICENSE").write_text((Path(__file__).parents[2] / "LICENSE").read_text())
    pins = base / "pins"
    pins.write_text(
        "".join(
            f"{inspect_source(folder).digests[path.name].sha256}  {path.name}\n"
            for path in sorted(folder.iterdir())
        )
    )
    steps = []
    built = build_tiny(
        folder, base / "tiny.agb", pins=pins, progress=lambda *step: steps.append(step[0])
    )
    return built, folder, pins, list(dict.fromkeys(steps))


@pytest.fixture
def draft(made, tmp_path):
    """A copy of the draft that a test may sign or damage."""
    return Path(shutil.copyfile(made[0].path, tmp_path / "tiny.agb"))


def member(path: Path, name: str) -> bytes:
    manifest = read_draft(path).manifest
    entry = manifest.find(name)
    start = open_medium(path).head.body_start + entry.offset
    return path.read_bytes()[start : start + entry.size]


def refused(call, *args, **kwargs) -> AirgapError:
    with pytest.raises(AirgapError) as caught:
        call(*args, **kwargs)
    return caught.value


# -- what is built ----------------------------------------------------------------------------


def test_the_proof_is_far_below_the_tolerance(made):
    parity = made[0].parity
    assert len(parity.vectors) >= MIN_PROMPTS
    assert not parity.skipped
    assert float(parity.full) < 1e-4
    assert float(parity.past) < 1e-4


def test_stages_are_told_in_order(made):
    assert made[3] == ["scan", "hash", "admit", "convert", "parity", "describe", "seal"]


def test_nothing_but_the_draft_is_left(made):
    built, folder, pins, _ = made
    assert {p.name for p in built.path.parent.iterdir()} == {"tiny.agb", folder.name, pins.name}


def test_the_manifest_tells_what_was_found(made):
    model = made[0].manifest.models[0]
    assert model.source == "local:tiny"
    assert model.revision.startswith("sha256:")
    assert model.provenance_level == "L1"
    text = next(item for item in model.licences_found if item.status == "verified")
    assert (model.licence.spdx, model.licence.status) == ("Apache-2.0", "verified")
    assert (text.place, model.licence.text_digest) == ("LICENSE", f"sha256:{text.sha256}")
    assert {item.status for item in model.licences_found} == {"declared", "verified"}
    assert (model.reference_model, model.scientific_use) == (True, False)
    assert model.modalities == ("retrosynthesis", "molecule", "protein", "antibody", "material")
    assert model.supplier.legal_name == "not stated"


def test_the_payload_is_what_the_worker_expects(made):
    names = {e.path for e in made[0].manifest.files if e.path.startswith("payload/")}
    assert names == {
        f"payload/tiny/{name}"
        for name in (
            *("LICENSE", "README.md", "config.json", "generation_config.json", "graphs.json"),
            *("fast.onnx", "model.safetensors", "model.onnx"),
            *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
        )
    }
    graphs = json.loads(member(made[0].path, "payload/tiny/graphs.json"))
    fast, reference = graphs["graphs"]
    assert (fast["name"], fast["interface"]) == ("fast", "shared")
    assert (reference["name"], reference["interface"]) == ("reference", "past")
    assert reference["inputs"][:3] == ["input_ids", "attention_mask", "position_ids"]
    assert (graphs["bos_id"], graphs["eos_ids"], graphs["unk_id"]) == (2, [3], 1)
    assert graphs["tags"]["<MoleculeS>"] == 8


def test_documents_speak_of_the_files_that_travel(made):
    built = made[0]
    paths = ("payload/tiny/fast.onnx", "payload/tiny/model.onnx")
    graphs = [built.manifest.find(path) for path in paths]
    for name in ("parity", "conversion"):
        document = json.loads(member(built.path, f"META/attest/{name}.json"))
        assert document["subject"] == [
            {"digest": {"sha256": graph.sha256}, "name": graph.path} for graph in graphs
        ]
    assert member(built.path, "META/report.json") == built.report.to_bytes()
    assert member(built.path, "META/policy/admission.json") == permit(None, None)
    seal = read_draft(built.path).statement.predicate
    assert seal.policy_pack_digests == (f"sha256:{'7' * 64}",)
    vectors = json.loads(member(built.path, "META/vectors/parity.json"))
    assert len(vectors["vectors"]) == len(built.parity.vectors)
    assert member(built.path, "META/evidence/pins.sha256") == made[2].read_bytes()


def test_the_fast_graph_runs_on_the_bytes_that_were_published(made):
    built, folder = made[:2]
    published = (folder / "model.safetensors").read_bytes()
    entry = built.manifest.find("payload/tiny/model.safetensors")
    assert entry.role == "external-data"
    assert entry.sha256 == entry.origin.sha256 == hashlib.sha256(published).hexdigest()
    assert entry.derived_from == ()
    assert built.manifest.published_weights("tiny") == (entry,)
    assert member(built.path, entry.path) == published
    fast = built.manifest.find("payload/tiny/fast.onnx")
    assert fast.derived_from == (f"sha256:{entry.sha256}",)
    assert fast.size < 64 * 1024


def test_the_graph_tells_nothing_of_the_machine_that_made_it(made):
    raw = member(made[0].path, "payload/tiny/model.onnx")
    for word in (b"site-packages", b"torch", str(Path.home()).encode(), b".py"):
        assert word not in raw


def test_the_bill_of_materials_passes_the_schema_and_the_files(made):
    raw = member(made[0].path, BOM)
    require_schema(raw)
    require_bom(memoryview(raw), made[0].manifest)
    document = json.loads(raw)
    assert document["specVersion"] == "1.7"
    model = document["components"][0]
    assert model["modelCard"]["modelParameters"]["modelArchitecture"] == "llama"
    assert model["pedigree"]["ancestors"][0]["hashes"][0]["alg"] == "SHA-256"


@pytest.mark.parametrize("change", ["digest", "left out", "added", "twice", "version", "no hash"])
def test_a_bill_of_other_materials_is_refused(made, change):
    document = json.loads(member(made[0].path, BOM))
    files = document["components"][0]["components"]
    if change == "digest":
        files[0]["hashes"][0]["content"] = "0" * 64
    elif change == "left out":
        files.pop()
    elif change == "added":
        files.append({**files[0], "name": "payload/tiny/more"})
    elif change == "twice":
        files.append(files[0])
    elif change == "no hash":
        files[0]["hashes"] = []
    else:
        document["specVersion"] = "1.5"
    raw = json.dumps(document).encode()
    assert refused(require_bom, memoryview(raw), made[0].manifest).code == "bom.mismatch"


def test_a_broken_bill_does_not_pass_the_schema():
    error = refused(require_schema, b'{"bomFormat":"CycloneDX","specVersion":"1.7","x":1}')
    assert error.code == "build.bom"


def test_two_builds_give_the_same_bytes(made, tmp_path):
    built, folder, pins, _ = made
    copy = tmp_path / "another" / "place"
    shutil.copytree(folder, copy)
    again = build_tiny(copy, tmp_path / "again.agb", pins=pins)
    assert again.manifest == built.manifest
    assert again.path.read_bytes() == built.path.read_bytes()  # Ed25519: the signature too


def test_large_models_keep_their_weights_beside_the_graph(snapshot, tmp_path, monkeypatch):
    from bundle.staging import convert_main

    monkeypatch.setattr(convert_main, "INLINE_LIMIT", 0)
    built = build_tiny(snapshot, tmp_path / "x.agb")
    again = build_tiny(snapshot, tmp_path / "y.agb")
    assert built.path.read_bytes() == again.path.read_bytes()
    data = built.manifest.find("payload/tiny/model.onnx_data")
    assert data.role == "external-data"
    graphs = json.loads(member(built.path, "payload/tiny/graphs.json"))
    assert graphs["graphs"][1]["external"] == [{"path": "model.onnx_data", "sha256": data.sha256}]
    for name in ("alice", "bob"):
        sign(
            read_draft(built.path),
            TRUST,
            bundles.signer(name),
            confirmation="tiny",
            now=bundles.NOW,
        )
    assert verify_bundle(built.path, TRUST, now=NOW).scan.files


CONTRADICTIONS = {
    "graph of another name": {"path": "other.onnx"},
    "inputs in another order": {"inputs": ("attention_mask", "input_ids")},
    "external file that is not used": {"external": (FileRef(path="w", sha256="0" * 64),)},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_graphs_json_may_not_contradict_the_graph(made, name):
    graphs, onnx, tokenizer = parsed(made[0].path)
    _require_agreement(graphs, onnx, tokenizer, "payload/tiny")
    graph = graphs.graphs[1].model_copy(update=CONTRADICTIONS[name])
    changed = graphs.model_copy(update={"graphs": (graphs.graphs[0], graph)})
    error = refused(_require_agreement, changed, onnx, tokenizer, "payload/tiny")
    assert error.code == "scan.graphs"


@pytest.mark.parametrize(
    "change", [{"vocab_size": 20}, {"tags": {"<MoleculeS>": 9}}, {"unk_id": 0}]
)
def test_graphs_json_may_not_contradict_the_tokenizer(made, change):
    graphs, onnx, tokenizer = parsed(made[0].path)
    changed = graphs.model_copy(update=change)
    assert refused(_require_agreement, changed, onnx, tokenizer, "p").code == "scan.graphs"
    assert refused(_require_agreement, graphs, onnx, None, "p").code == "scan.graphs"


def parsed(path: Path):
    """Return graphs.json, graphs and tokenizer of a draft, each by its own parser."""
    weights = "model.safetensors"
    sizes = {weights: len(member(path, f"payload/tiny/{weights}"))}
    return (
        parse_graphs(member(path, "payload/tiny/graphs.json")),
        {
            name: parse_onnx(memoryview(member(path, f"payload/tiny/{name}")), sizes=sizes.get)
            for name in ("fast.onnx", "model.onnx")
        },
        parse_tokenizer(memoryview(member(path, "payload/tiny/tokenizer.json"))),
    )


def test_stated_facts_come_before_those_of_the_card(made):
    report = made[0].report
    stated = replace(
        FACTS,
        source="hf:Org/tiny",
        revision="abc",
        supplier="Org Ltd",
        jurisdiction="US",
        modalities=("text",),
        intended_use="tests",
    )
    model = model_entry(report, stated)
    assert (model.source, model.revision, model.supplier.legal_name) == (
        "hf:Org/tiny",
        "abc",
        "Org Ltd",
    )
    assert (model.modalities, model.intended_use) == (("text",), "tests")
    report = replace_card(
        report, supplier={"legal_name": "Card Ltd", "jurisdiction": "FR"}, modalities=["molecule"]
    )
    model = model_entry(report, FACTS)
    assert (model.supplier.legal_name, model.supplier.jurisdiction) == ("Card Ltd", "FR")
    assert modalities_of(report) == ("molecule",)


def replace_card(report, **card):
    return replace(report, card=card)


def test_memory_grows_with_the_weights(made):
    assert memory_of(made[0].report) >= 6144


def test_only_stable_evidence_of_the_seal_is_sealed():
    assert stable_evidence({"rung": "A", "ts": "now", "pid": 7}) == {"rung": "A"}


# -- what is refused --------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path):
    return tiny_llama.write_snapshot(tmp_path / "model")


def never(_job):
    pytest.fail("the sealed runner was called")


def test_without_a_sealed_runner_nothing_is_converted(snapshot, tmp_path):
    error = refused(build_tiny, snapshot, tmp_path / "x.agb", run_sealed=None)
    assert error.code == "build.seal"
    assert not (tmp_path / "x.agb").exists()


def test_a_refused_snapshot_is_not_converted(snapshot, tmp_path):
    (snapshot / "w.bin").write_bytes(b"x")
    assert refused(build_tiny, snapshot, tmp_path / "x.agb", run_sealed=never).code == "scan.pickle"


def test_the_policy_is_asked_before_the_expensive_steps(snapshot, tmp_path):
    def deny(models, digest):
        assert models[0].id == "tiny"
        assert str(digest).startswith("sha256:")
        raise RefusedError("policy.denied", "no")

    error = refused(build_tiny, snapshot, tmp_path / "x.agb", run_sealed=never, admit=deny)
    assert error.code == "policy.denied"


@pytest.mark.parametrize("who", ["alice", "mallory", "root"])
def test_only_an_enrolled_builder_builds(snapshot, tmp_path, who):
    error = refused(
        build_tiny, snapshot, tmp_path / "x.agb", signer=bundles.signer(who), run_sealed=never
    )
    assert error.code == "seal.role"


@pytest.mark.parametrize("out", ["", "absent/x.agb", "model"])
def test_an_output_that_cannot_be_made(snapshot, tmp_path, out):
    error = refused(build_tiny, snapshot, tmp_path / out, run_sealed=never)
    assert error.code == "build.output"


@pytest.mark.parametrize(
    "facts", [replace(FACTS, model_id="no/slash"), replace(FACTS, jurisdiction="\x1b")]
)
def test_facts_in_no_sound_form(snapshot, tmp_path, facts):
    error = refused(build_tiny, snapshot, tmp_path / "x.agb", facts=facts, run_sealed=never)
    assert error.code == "build.facts"


def test_too_little_space_is_told_before_the_work(snapshot, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = refused(build_tiny, snapshot, tmp_path / "x.agb", run_sealed=never)
    assert error.code == "host.space"
    assert isinstance(error, FaultError)


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"model"}


LEAVINGS = {
    "nothing": ({}, "convert.output"),
    "no graph": ({"convert.json": b"{}"}, "convert.output"),
    "record no JSON": ({"convert.json": b"x", "model.onnx": b""}, "convert.output"),
    "graph no ONNX": ({"convert.json": b"{}", "model.onnx": b"x"}, "scan.onnx"),
    "an extra file": ({"convert.json": b"{}", "model.onnx": b"", "run.sh": b""}, "convert.output"),
}


@pytest.mark.parametrize("name", LEAVINGS)
def test_what_the_conversion_leaves_is_not_believed(snapshot, tmp_path, name):
    files, code = LEAVINGS[name]

    def run(job):
        for path, content in files.items():
            (job.out / path).write_bytes(content)
        return Result()

    assert refused(build_tiny, snapshot, tmp_path / "x.agb", run_sealed=run).code == code
    assert left_behind(tmp_path) == set()


def test_a_link_in_place_of_the_graph_is_refused(snapshot, tmp_path):
    def run(job):
        (job.out / "convert.json").write_text("{}")
        (job.out / "model.onnx").symlink_to("/etc/passwd")
        return Result()

    assert (
        refused(build_tiny, snapshot, tmp_path / "x.agb", run_sealed=run).code == "convert.output"
    )


def test_a_graph_with_another_interface_is_refused(snapshot, tmp_path):
    from scan_samples import onnx_model

    def run(job):
        (job.out / "convert.json").write_text('{"versions":{}}')
        (job.out / "model.onnx").write_bytes(onnx_model())
        return Result()

    error = refused(build_tiny, snapshot, tmp_path / "x.agb", run_sealed=run)
    assert error.code == "convert.output"
    assert "a decoder of 2 layers" in error.message


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_the_old_file_and_nothing_else(snapshot, tmp_path, failure):
    out = tmp_path / "x.agb"
    out.write_bytes(b"the release of last month")

    def run(_job):
        assert list(tmp_path.glob(".x.agb.work"))
        raise failure

    with pytest.raises(failure):
        build_tiny(snapshot, out, run_sealed=run)
    assert out.read_bytes() == b"the release of last month"
    assert left_behind(tmp_path) == {"x.agb"}


def test_the_leavings_of_a_killed_build_are_cleared(snapshot, tmp_path):
    old = tmp_path / ".x.agb.work" / "graph"
    old.mkdir(parents=True)
    (old / "model.onnx").write_bytes(b"half")
    error = refused(
        build_tiny, snapshot, tmp_path / "x.agb", run_sealed=lambda _: Result(1, stderr="no")
    )
    assert error.code == "convert.failed"
    assert left_behind(tmp_path) == set()


def test_two_builds_of_one_file_do_not_meet(snapshot, tmp_path):
    from bundle.staging.resume import work_folder

    out = tmp_path / "x.agb"
    with work_folder(out) as work:
        (work.folder / "half").mkdir()
        error = refused(build_tiny, snapshot, out, run_sealed=never)
        assert error.code == "build.output"
        assert (work.folder / "half").exists()
    assert left_behind(tmp_path) == set()


def test_a_source_that_changes_after_inspection_is_refused(snapshot, tmp_path):
    def admit(models, digest):
        (snapshot / "config.json").write_text("{}")
        return permit(models, digest)

    error = refused(build_tiny, snapshot, tmp_path / "x.agb", admit=admit, run_sealed=never)
    assert error.code == "source.changed"


# -- a wrong graph is caught ------------------------------------------------------------------


def scale(model) -> None:
    """Make one weight matrix half a percent too large."""
    change(model, "down_proj", lambda array: array * 1.005)


def swap_heads(model) -> None:
    """Exchange the first two query heads of the first layer."""
    head = tiny_llama.SHAPE["head_dim"]

    def swap(array):
        found = array.copy()
        found[:, :head], found[:, head : 2 * head] = array[:, head : 2 * head], array[:, :head]
        return found

    change(model, "q_proj", swap)


def forget_the_cache(model) -> None:
    """Feed one layer's past to the other: right in a full pass, wrong with the cache."""
    for node in model.graph.node:
        node.input[:] = [
            "past_key_values.0.value" if name == "past_key_values.1.value" else name
            for name in node.input
        ]


def change(model, word, alter) -> None:
    """Alter the matrix that the first MatMul of that name multiplies with."""
    from onnx import numpy_helper

    node = next(n for n in model.graph.node if n.op_type == "MatMul" and word in n.name)
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(alter(numpy_helper.to_array(tensor)), tensor.name))


@pytest.mark.parametrize("fault", [scale, swap_heads, forget_the_cache], ids=lambda f: f.__name__)
def test_a_seeded_fault_in_the_graph_is_caught(snapshot, tmp_path, fault):
    import onnx

    def run(job):
        result = run_inline(job)
        place = job.out / "model.onnx"
        if place.exists():
            model = onnx.load(place)
            fault(model)
            place.write_bytes(model.SerializeToString(deterministic=True))
        return result

    error = refused(build_tiny, snapshot, tmp_path / "x.agb", run_sealed=run)
    assert error.code == "parity.failed"
    assert left_behind(tmp_path) == set()


def test_a_tokenizer_without_the_words_of_the_prompts_proves_nothing(tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "model")
    value = tiny_llama.tokenizer()
    value["model"]["vocab"].pop("Cl")
    value["model"]["vocab"].pop("O")
    tiny_llama.write_json(folder / "tokenizer.json", value)
    error = refused(build_tiny, folder, tmp_path / "x.agb")
    assert error.code == "parity.vectors"


@pytest.mark.parametrize("silent", [False, True])
def test_the_proof_reads_what_the_worker_will_read(silent, snapshot, tmp_path):
    if silent:  # as Qwen: config.json names a start token that the tokenizer never writes
        settings = {"add_bos_token": False, "bos_token": None}
        (snapshot / "tokenizer_config.json").write_text(json.dumps(settings))
    built = build_tiny(snapshot, tmp_path / "a.agb")
    start = json.loads((snapshot / "config.json").read_text())["bos_token_id"]
    (facts,) = (each for each in built.manifest.files if each.path.endswith("graphs.json"))
    told = parse_graphs(member(tmp_path / "a.agb", facts.path)).bos_id
    assert told == (None if silent else start)
    firsts = {vector.prompt_ids[0] == start for each in built.vectors for vector in each.vectors}
    assert firsts == {not silent}


# -- signing ----------------------------------------------------------------------------------

TRUST = bundles.make_trust()


def test_two_people_complete_the_seal_and_the_lab_accepts_it(draft):
    assert refused(open_bundle, draft, TRUST, now=NOW).code == "seal.threshold"
    tally = count(read_draft(draft), TRUST)
    assert (tally.builder, tally.builder_signed, tally.approvers) == ("ben", True, ())

    first = sign(
        read_draft(draft), TRUST, bundles.signer("alice"), confirmation="tiny", now=bundles.NOW
    )
    assert (first.approvers, first.complete) == (("alice",), False)
    assert refused(open_bundle, draft, TRUST, now=NOW).code == "seal.threshold"

    digest = read_draft(draft).digest.hex
    second = sign(
        read_draft(draft),
        TRUST,
        bundles.signer("bob"),
        confirmation=f"sha256:{digest[:9]}\n",
        now=NOW,
    )
    assert second.complete
    report = verify_bundle(draft, TRUST, now=NOW)
    assert report.seal.approvers == ("alice", "bob")


@pytest.mark.parametrize("typed", ["", "yes", "Tiny", "0000000", "sha256:", "sha256:12345678"])
def test_another_confirmation_signs_nothing(draft, typed):
    before = draft.read_bytes()
    error = refused(
        sign, read_draft(draft), TRUST, bundles.signer("alice"), confirmation=typed, now=NOW
    )
    assert error.code == "sign.confirm"
    assert draft.read_bytes() == before


@pytest.mark.parametrize(
    ("who", "code"),
    [("builder", "seal.people"), ("mallory", "seal.role"), ("root", "seal.role")],
)
def test_who_may_not_approve(draft, who, code):
    before = draft.read_bytes()
    assert (
        refused(
            sign, read_draft(draft), TRUST, bundles.signer(who), confirmation="tiny", now=NOW
        ).code
        == code
    )
    assert draft.read_bytes() == before


def test_one_person_counts_once_even_with_a_second_key(draft):
    sign(read_draft(draft), TRUST, bundles.signer("alice"), confirmation="tiny", now=bundles.NOW)
    for name in ("alice", "alice2"):
        error = refused(
            sign, read_draft(draft), TRUST, bundles.signer(name), confirmation="tiny", now=NOW
        )
        assert error.code == "seal.people"


def test_a_required_role_is_missed_until_it_signs(draft):
    trust = bundles.make_trust(required_roles=("isso",))
    sign(read_draft(draft), trust, bundles.signer("alice"), confirmation="tiny", now=bundles.NOW)
    tally = sign(
        read_draft(draft), trust, bundles.signer("carol"), confirmation="tiny", now=bundles.NOW
    )
    assert (len(tally.approvers), tally.missing_roles, tally.complete) == (2, ("isso",), False)
    assert sign(
        read_draft(draft), trust, bundles.signer("bob"), confirmation="tiny", now=bundles.NOW
    ).complete


def test_a_draft_that_changed_while_it_was_read_is_not_signed(made, draft):
    shown = read_draft(draft)
    other = build_tiny(made[1], draft, facts=replace(FACTS, version="6.6.6"))
    assert other.path == draft
    before = draft.read_bytes()
    error = refused(sign, shown, TRUST, bundles.signer("alice"), confirmation="tiny", now=NOW)
    assert error.code == "seal.subject"
    assert draft.read_bytes() == before


def test_a_changed_report_is_never_shown(draft):
    entry = read_draft(draft).manifest.find("META/report.json")
    raw = bytearray(draft.read_bytes())
    start = open_medium(draft).head.body_start + entry.offset
    raw[start + 20] ^= 1
    draft.write_bytes(raw)
    assert refused(read_draft, draft).code == "seal.subject"


def test_a_draft_with_another_seal_is_refused(draft):
    raw = draft.read_bytes()
    assert parse_envelope(open_medium(draft).head.envelope)
    draft.write_bytes(raw.replace(b'"version":"1.0"', b'"version":"2.0"', 1))
    assert refused(read_draft, draft).code in {"seal.subject", "archive.header"}


# -- what people see --------------------------------------------------------------------------


def screen(view) -> str:
    return " ".join(printed(view, 100).split())


def printed(view, width: int) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(view)
    return console.export_text()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_digest_is_whole_where_a_line_can_hold_it(made, width):
    text = printed(built_view(made[0]), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert (str(made[0].manifest.digest) in text) is (width > 70)
    assert str(made[0].manifest.name) in text


def test_the_builder_sees_what_was_proved(made):
    text = screen(built_view(made[0]))
    for word in ("draft built", "L1", "28 prompts of 5 kinds", "64 greedy tokens", "airgap sign"):
        assert word in text
    document = built_document(made[0])
    assert document["digest"] == str(made[0].manifest.digest)
    assert json.loads(json.dumps(document))["parity"]["prompts"] == 28


def test_the_approver_sees_what_she_signs(draft):
    shown = read_draft(draft)
    text = screen(draft_view(shown, count(shown, TRUST)))
    for word in ("built by ben", "L1", "Apache-2.0", "not for scientific use", "0 of 2 approvers"):
        assert word in text
    tally = sign(shown, TRUST, bundles.signer("alice"), confirmation="tiny", now=bundles.NOW)
    assert "1 of 2 approvers: alice" in screen(tally_view(shown, tally, "alice"))
    document = tally_document(shown, tally, "alice")
    assert (document["people"], document["complete"]) == (["alice"], False)
    done = sign(
        read_draft(draft), TRUST, bundles.signer("bob"), confirmation="tiny", now=bundles.NOW
    )
    assert "carry tiny.agb across" in screen(tally_view(shown, done, "bob"))


def test_findings_reach_the_approver(made):
    shown = read_draft(made[0].path)
    report = {**shown.report, "findings": [{"path": "README.md", "text": "a finding"}]}
    rule = {"rule": "LIC-CONFLICT", "plain": "They differ.", "citation": "the texts"}
    decision = {
        "outcome": "needs_approval",
        "as_of": "2026-06-01",
        "reasons": [
            {**rule, "effect": "needs_approval"},
            {**rule, "rule": "X", "effect": "permit"},
        ],
    }
    tally = replace(count(shown, TRUST), missing_roles=("isso",), builder_signed=False)
    text = screen(draft_view(replace(shown, report=report, decision=decision), tally))
    assert "a finding" in text
    assert "role isso" in text
    assert "NOT signed" in text
    assert "HELD until people approve as of 2026-06-01" in text
    assert "LIC-CONFLICT They differ. [the texts]" in text
    assert "X They" not in text
