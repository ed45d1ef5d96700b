"""The committed reference model: what the card says of it is what the files hold and do."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

HOME = Path(__file__).resolve().parents[2] / "reference" / "logos-ref-tiny"
MODEL = HOME / "model"
MODULES = ("corpus", "evaluate", "sampling", "sources", "training")
GATE_VALID, GATE_UNIQUE = 0.80, 0.99


@pytest.fixture(scope="module")
def recipe():
    """Import the modules beside the weights as their scripts do, and forget them afterwards."""
    log = pytest.importorskip("rdkit.RDLogger")
    log.DisableLog("rdApp.*")
    sys.path.insert(0, str(HOME))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(HOME))
        for name in MODULES:
            sys.modules.pop(name, None)
        log.EnableLog("rdApp.error")


@pytest.fixture(scope="module")
def molecules(recipe):
    """A thousand molecules, drawn once by the road that the card was measured on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        checkpoint = recipe["sampling"].Checkpoint(MODEL)
        preset = recipe["evaluate"].PRESETS["T1.0"]
        return recipe["evaluate"].sample_molecules(checkpoint, preset, 1000)
    finally:
        torch.set_num_threads(threads)


def read(name):
    place = HOME if name in {"evaluation.json", "training.json"} else MODEL
    return json.loads((place / name).read_text())


def sample_lines():
    return [line for path in sorted(HOME.glob("sample/*.txt")) for line in path.open()]


def test_every_snapshot_file_has_the_digest_that_sha256sums_names():
    lines = (HOME / "SHA256SUMS").read_text().splitlines()
    named = {name: digest for digest, name in (line.split("  ") for line in lines)}

    assert set(named) == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("README.md", "LICENSE"),
    }
    assert set(named) == {path.name for path in MODEL.iterdir()}
    for name, digest in named.items():
        assert hashlib.sha256((MODEL / name).read_bytes()).hexdigest() == digest, name


def test_the_configuration_is_stamped_as_a_fixture_and_carries_no_code():
    config = read("config.json")

    assert config["reference_model"] is True
    assert config["scientific_use"] is False
    assert config["model_type"] == "llama"
    assert "auto_map" not in config
    assert "auto_map" not in read("tokenizer_config.json")


def test_weights_and_tokenizer_agree_on_the_vocabulary():
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    assert tokenizer.get_vocab_size() == read("config.json")["vocab_size"]


def test_all_tags_and_control_tokens_are_special_added_tokens(recipe):
    added = {entry["content"]: entry for entry in read("tokenizer.json")["added_tokens"]}

    expected = [*recipe["corpus"].CONTROL, *recipe["corpus"].TAGS]
    assert len(expected) == 20
    assert list(added) == expected
    assert all(entry["special"] for entry in added.values())


def test_every_sample_document_survives_the_tokenizer():
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    unknown = tokenizer.token_to_id("<unk>")
    lines = [line.rstrip("\n") for line in sample_lines()]
    assert len(lines) > 1000

    for line in lines:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        assert unknown not in ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == line


def test_a_letter_outside_the_alphabet_is_encoded_as_unknown():
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    assert (
        tokenizer.encode("<ProteinS>MJK<ProteinE>").ids.count(tokenizer.token_to_id("<unk>")) == 1
    )


def test_encoding_with_special_tokens_begins_with_one_bos():
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    plain = tokenizer.encode("<MoleculeS>", add_special_tokens=False).ids

    assert tokenizer.encode("<MoleculeS>").ids == [read("config.json")["bos_token_id"], *plain]


def test_the_figures_of_the_card_are_those_of_evaluation_json():
    """A table row of the card that names a path into evaluation.json repeats what stands there."""
    card = (MODEL / "README.md").read_text()
    figures = read("evaluation.json")
    rows = re.findall(r"^\|[^|]+\| *([^|]+?) *\|[^|]*\| *`([^`]+)` *\|$", card, re.MULTILINE)
    assert len(rows) >= 20

    for shown, path in rows:
        value = figures
        for step in path.split(" / "):
            value = value[step]
        assert shown == spelled(value), path


def spelled(value):
    """Write a figure as the card does: shares in percent with their half-width."""
    if isinstance(value, dict):
        return f"{100 * value['share']:.1f} % ± {100 * value['half_width']:.1f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def test_card_record_and_figures_speak_of_the_committed_weights(recipe):
    file = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert read("evaluation.json")["weights_sha256"] == file

    checkpoint = recipe["sampling"].Checkpoint(MODEL)
    state = hashlib.sha256()
    for name, weights in sorted(checkpoint.model.state_dict().items()):
        state.update(name.encode() + weights.numpy().tobytes())
    assert read("training.json")["weights_sha256"] == state.hexdigest()


def test_the_recorded_run_met_its_gates():
    measured = read("evaluation.json")["molecule"]["T1.0"]

    assert measured["valid"]["share"] >= GATE_VALID
    assert measured["unique"]["share"] >= GATE_UNIQUE


def test_unconstrained_molecules_pass_the_gate(recipe, molecules):
    parsed = [recipe["evaluate"].parsed(smiles) for smiles in molecules]
    valid = [molecule for molecule in parsed if molecule is not None]
    chem = recipe["evaluate"].Chem
    unique = {chem.MolToInchiKey(molecule) for molecule in valid}

    assert len(molecules) == 1000
    assert len(valid) / len(molecules) >= GATE_VALID
    assert len(unique) / len(valid) >= GATE_UNIQUE


def test_search_documents_mark_the_motif_and_nothing_else(recipe):
    corpus = recipe["corpus"]
    for line in (HOME / "sample" / "search.txt").read_text().splitlines():
        bare, annotated = line.split("<Search>")
        sequence = bare.removeprefix("<ProteinS>").removesuffix("<ProteinE>")
        assert annotated == corpus.annotate(sequence, corpus.motif_sites(sequence))


def test_an_archive_that_is_not_the_locked_one_is_refused(recipe, tmp_path):
    sources = recipe["sources"]
    content = b"archive"
    good = sources.Wheel("demo", "1", "demo.whl", hashlib.sha256(content).hexdigest())
    (tmp_path / "demo.whl").write_bytes(content)
    sources.verify(tmp_path / "demo.whl", good)

    (tmp_path / "demo.whl").write_bytes(content + b"!")
    with pytest.raises(sources.DataError, match=r"data\.lock names"):
        sources.verify(tmp_path / "demo.whl", good)
    with pytest.raises(sources.DataError, match="absent"):
        sources.verify(tmp_path / "other.whl", good)


def test_rows_are_full_and_keep_to_the_mix(recipe):
    training = recipe["training"]
    documents = {task: [[2, 7, 3]] * 3 for task in training.MIX}
    spent = training.Counter()
    stream = training.rows(documents, 64, spent)
    drawn = [next(stream) for _ in range(500)]

    assert {len(row) for row in drawn} == {64}
    assert all(row[0] == 2 for row in drawn)
    for task, share in training.MIX.items():
        assert spent[task] / spent.total() == pytest.approx(share, abs=0.01)


def test_a_resumed_run_reaches_the_weights_of_one_that_was_not_interrupted(recipe, tmp_path):
    training = recipe["training"]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes((MODEL / name).read_bytes())
    (tmp_path / "corpus").symlink_to(HOME / "sample")
    plan = training.Plan(steps=6, seed=1, batch=2, length=128)
    whole = training.Run(tmp_path, plan)
    for _ in range(3):
        whole.advance()
    whole.save(tmp_path / "checkpoint.pt")
    for _ in range(3):
        whole.advance()

    resumed = training.Run(tmp_path, plan)
    resumed.load(tmp_path / "checkpoint.pt")
    for _ in range(3):
        resumed.advance()
    assert resumed.digest() == whole.digest()

    other = training.Run(tmp_path, training.Plan(steps=7, seed=1, batch=2, length=128))
    with pytest.raises(training.TrainingError, match="another plan"):
        other.load(tmp_path / "checkpoint.pt")


def test_the_recipe_names_its_commands():
    shown = subprocess.run(
        [sys.executable, str(HOME / "recipe.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    for command in ("fetch", "prepare", "train", "release", "smoke"):
        assert command in shown
