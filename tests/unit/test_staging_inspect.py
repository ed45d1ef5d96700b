"""The report as a whole: complete, repeatable, safe to show, and one run tells everything."""

from __future__ import annotations

import json
import os
import re

import pytest
import tiny_llama

from bundle.canonical import parse_canonical
from bundle.staging.inspect import inspect_source
from bundle.staging.lineage import lineage_hints, silent_card
from bundle.staging.views import plain, report_page, report_view, size_text, write_page
from policy.errors import RefusedError


@pytest.fixture
def snapshot(tmp_path):
    return tiny_llama.write_snapshot(tmp_path / "model")


def codes(folder) -> list[str]:
    return [error.code for error in inspect_source(folder).refusals]


def screen(document, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(report_view(document))
    return console.export_text()


def test_the_report_is_canonical_and_repeatable(snapshot, tmp_path):
    first = inspect_source(snapshot, name="m").to_bytes()
    other = tiny_llama.write_snapshot(tmp_path / "elsewhere" / "copy")
    assert inspect_source(other, name="m").to_bytes() == first
    assert (
        parse_canonical(first, code="scan.config", what="report", limit=1 << 20)["verdict"]
        == "ready"
    )
    assert str(tmp_path).encode() not in first


def test_the_name_is_the_best_that_is_known(snapshot):
    assert inspect_source(snapshot, name="given").name == "given"
    assert inspect_source(snapshot).name == "tiny-random-llama"  # the title of the card
    (snapshot / "README.md").write_text("no title")
    assert inspect_source(snapshot).name == "model"  # the folder


def test_progress_counts_every_byte(snapshot):
    seen = []
    inspect_source(snapshot, progress=lambda *step: seen.append(step))
    total = sum(path.stat().st_size for path in snapshot.iterdir())
    assert ("hash", total, total) in seen
    assert ("scan", 7, 7) in seen


def test_all_refusals_stand_in_one_report(snapshot):
    (snapshot / "config.json").write_text('{"auto_map": {}}')
    (snapshot / "model.py").write_text("x")
    (snapshot / "w.bin").write_bytes(b"x")
    report = inspect_source(snapshot)
    assert [error.code for error in report.refusals] == ["scan.config", "scan.role", "scan.pickle"]
    document = report.as_document()
    assert {f["path"] for f in document["files"] if f["role"] == "refused"} == {
        "config.json",
        "model.py",
        "w.bin",
    }
    assert all(len(f["sha256"]) == 64 for f in document["files"])
    with pytest.raises(RefusedError, match="and 2 more"):
        report.require_ready()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(snapshot, name):
    assert codes(snapshot) == []
    (snapshot / name).unlink()
    report = inspect_source(snapshot)
    assert [error.code for error in report.refusals] == ["source.incomplete"]
    assert report.refusals[0].hint


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "README.md"]
)
@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 64], ids=["empty", "binary"])
def test_empty_and_binary_files_are_refused(snapshot, name, content):
    (snapshot / name).write_bytes(content)
    if name == "README.md" and not content:
        assert codes(snapshot) == []  # an empty card says nothing, and that is a finding
        return
    assert codes(snapshot)


def test_huge_text_files_are_refused_without_being_read(snapshot):
    with (snapshot / "config.json").open("r+b") as stream:
        stream.truncate(40 << 20)
    assert codes(snapshot)[0] == "scan.config"


def test_huge_weights_that_are_none_are_refused_before_anything_is_hashed(snapshot):
    told = []
    inspect_source(snapshot, progress=lambda stage, *_: told.append(stage))
    assert "hash" in told
    with (snapshot / "model.safetensors").open("r+b") as stream:
        stream.truncate(1 << 40)  # sparse: hashing it would take a quarter of an hour
    told.clear()
    with pytest.raises(RefusedError) as refused:
        inspect_source(snapshot, progress=lambda stage, *_: told.append(stage))
    assert refused.value.code == "scan.safetensors"
    assert "hash" not in told


def test_pickled_weights_alone_do_not_also_read_as_missing(snapshot):
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    found = codes(snapshot)
    assert found[0] == "scan.pickle"
    assert "source.incomplete" not in found


def shards(folder, names):
    tensors = list(tiny_llama.shapes().items())
    half = len(tensors) // 2
    (folder / "model.safetensors").unlink()
    for name, part in zip(names, (tensors[:half], tensors[half:]), strict=True):
        (folder / name).write_bytes(tiny_llama.safetensors(dict(part)))
    where = {key: names[n >= half] for n, (key, _) in enumerate(tensors)}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    tiny_llama.write_json(folder / "model.safetensors.index.json", index)


NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_shards_and_their_index_agree(snapshot):
    shards(snapshot, NAMES)
    report = inspect_source(snapshot)
    assert report.ready
    assert report.as_document()["weights"]["files"] == 2


def test_a_missing_shard_is_named(snapshot):
    shards(snapshot, NAMES)
    (snapshot / NAMES[1]).unlink()
    report = inspect_source(snapshot)
    assert report.refusals[0].code == "source.incomplete"
    assert NAMES[1] in report.refusals[0].message


@pytest.mark.parametrize("index", [{}, {"weight_map": {"a": "model.safetensors"}}])
def test_an_index_of_other_tensors_is_refused(snapshot, index):
    tiny_llama.write_json(snapshot / "model.safetensors.index.json", index)
    assert codes(snapshot) == ["source.incomplete"]


def test_a_tensor_in_two_files_is_refused(snapshot):
    raw = (snapshot / "model.safetensors").read_bytes()
    (snapshot / "second.safetensors").write_bytes(raw)
    assert "source.shape" in codes(snapshot)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(snapshot):
    value = tiny_llama.tokenizer()
    value["model"]["vocab"]["<more>"] = 500
    tiny_llama.write_json(snapshot / "tokenizer.json", value)
    assert codes(snapshot) == ["source.shape"]


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "m", eos_token_id=9999)
    assert codes(folder) == ["source.shape"]


def test_use_is_stamped_by_card_and_configuration(tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "m", reference_model=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    report = inspect_source(folder)
    assert (report.reference_model, report.scientific_use) == (True, True)
    tiny_llama.write_json(folder / "config.json", tiny_llama.config(scientific_use=False))
    report = inspect_source(folder)
    assert (report.reference_model, report.scientific_use) == (False, False)
    assert report.findings == []


def test_tags_are_the_special_tokens_of_prompts(snapshot):
    assert inspect_source(snapshot).tags == {
        tag: number for number, tag in enumerate(tiny_llama.TAGS, len(tiny_llama.CONTROL))
    }


# -- lineage ----------------------------------------------------------------------------------


def test_a_silent_card_is_contradicted(tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "m", _name_or_path="meta-llama/Llama-3.2-1B")
    report = inspect_source(folder)
    assert [hint.party for hint in report.lineage] == ["meta-llama/Llama-3.2-1B"]
    assert any("names no base model" in finding.text for finding in report.findings)
    card = {"base_model": "meta-llama/Llama-3.2-1B", "developers": ["A", "B"]}
    hints = lineage_hints(card, {}, None, None)
    assert [hint.relation for hint in hints] == ["derived_from", "developed_by", "developed_by"]
    assert silent_card(card, hints) == ""


def test_shapes_and_control_tokens_give_the_family_away():
    from bundle.scan.tokenizer import Tokenizer
    from bundle.staging.architecture import parse_architecture

    shape = parse_architecture(
        tiny_llama.config(
            num_hidden_layers=16, hidden_size=2048, intermediate_size=8192,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        )
    )  # fmt: skip
    words = Tokenizer("BPE", 1, None, {}, {"<|begin_of_text|>": 0})
    hints = lineage_hints({}, {}, shape, words)
    assert {hint.party for hint in hints} == {"llama-3.2-1b", "llama-3 (tokenizer)"}
    assert {hint.status for hint in hints} == {"declared"}


# -- what people see --------------------------------------------------------------------------


def test_the_screen_tells_the_essentials(snapshot):
    text = screen(inspect_source(snapshot).as_document())
    for word in ("ready to build", "L0", "llama: 2 layers", "Apache-2.0", "not for scientific use"):
        assert word in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_the_screen_shows_refusals_with_their_next_step(snapshot):
    (snapshot / "w.bin").write_bytes(b"x")
    text = screen(inspect_source(snapshot).as_document(), 80)
    assert "scan.pickle" in text
    assert "next step" in text


def test_foreign_text_is_escaped_everywhere(snapshot):
    (snapshot / "README.md").write_text(
        '---\nlicense: mit\nbase_model: "<script>alert(1)</script>\\u202e\\e[31m"\n---\n'
    )
    report = inspect_source(snapshot)
    page = report_page(report.as_document(), str(report.digest))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\u202e" not in page
    text = screen(report.as_document())
    assert "\x1b[31m" not in text
    assert "\u202e" not in text
    assert plain("a\u202eb") == "a\\u202eb"


def test_reports_say_how_each_file_travels(snapshot):
    report = inspect_source(snapshot)
    page = report_page(report.as_document(), str(report.digest))
    rows = dict(re.findall(r"<tr><td>([^<]+)</td>[\s\S]*?</code></td><td>([^<]*)</td></tr>", page))
    assert (rows["model.safetensors"], rows["config.json"]) == ("yes, + ONNX", "yes")
    lines = [line.split() for line in screen(report.as_document()).splitlines()]
    ends = {line[0]: line[-2:] for line in lines if line}
    assert ends["model.safetensors"] == ["+", "ONNX"]
    assert ends["config.json"][-1] == "yes"


def test_the_page_needs_no_other_file(snapshot):
    report = inspect_source(snapshot)
    page = report_page(report.as_document(), str(report.digest))
    assert not re.search(r"(src|href)=|@import|url\(|https?:", page)
    assert "default-src 'none'" in page
    for file in report.as_document()["files"]:
        assert file["sha256"] in page


def test_long_lists_are_cut_on_the_screen_only(snapshot):
    for number in range(80):
        (snapshot / f"note{number:03}.md").write_text("x")
    document = inspect_source(snapshot).as_document()
    assert "27 more" in screen(document)
    assert len(json.dumps(document)) > 8000


def test_a_page_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    place = tmp_path / "r.html"
    write_page(place, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_page(place, "new")
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes_for_people(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize("name", ["LICENSE", "README.md"])
def test_a_text_of_gigabytes_is_refused_and_not_read_into_memory(tmp_path, name, monkeypatch):
    from bundle.staging import inspect

    snapshot = tiny_llama.write_snapshot(tmp_path / "model")
    (snapshot / name).touch()
    os.truncate(snapshot / name, 64 * 1024 * 1024)
    seen = []
    monkeypatch.setattr(inspect, "licence_text", lambda _, text: seen.append(len(text)))
    monkeypatch.setattr(inspect, "parse_card", lambda text: seen.append(len(text)) or {})
    report = inspect.inspect_source(snapshot)
    assert report.refusal() is not None
    assert seen
    assert max(seen) <= 4 * 1024 * 1024
