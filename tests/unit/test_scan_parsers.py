"""Safetensors, configurations, templates, tokenizers, wheels and roles: limits and refusals."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import zipfile
from copy import deepcopy

import pytest
import tiny_llama
from scan_samples import ONE_TENSOR, dump, safetensors, wheel

from bundle.scan import safetensors as st
from bundle.scan import template as templates
from bundle.scan import tokenizer as tok
from bundle.scan import wheel as wheels
from bundle.scan.config import lint_config, unknown_keys
from bundle.scan.payload import scan_file, templates_of
from bundle.scan.roles import Role, role_of
from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import open_view, parse_json, parse_text
from bundle.scan.template import lint_template
from bundle.scan.tokenizer import parse_tokenizer
from bundle.scan.wheel import check_wheel
from policy.errors import AirgapError, FaultError, RefusedError


def refused(call, *args, **kwargs) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        call(*args, **kwargs)
    return caught.value


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b'{"a":1,"a":2}', b'{"a":{"b":1,"b":1}}', b"NaN", b"[Infinity]", b"1e999", b"\xff",
     b'{"a":' + b"9" * 40 + b"}", b"[" * 100 + b"]" * 100, b"[" * 100_000],
)  # fmt: skip
def test_ambiguous_json_is_refused(raw):
    assert refused(parse_json, memoryview(raw), code="scan.config", what="x", limit=1 << 20).code


def test_json_is_bounded_in_size():
    data = memoryview(b"[1.5, 1e-6, -3]")
    assert parse_json(data, code="scan.config", what="x", limit=15) == [1.5, 1e-6, -3]
    assert "at most 14" in refused(parse_json, data, code="scan.config", what="x", limit=14).message


def test_text_holds_no_control_characters():
    assert parse_text(memoryview("a\tü\r\n".encode()), code="scan.text", what="x", limit=99)
    for raw in (b"a\x1b[31m", b"\xff", b"\0"):
        assert refused(parse_text, memoryview(raw), code="scan.text", what="x", limit=99)
    assert refused(parse_text, memoryview(b"abc"), code="scan.text", what="x", limit=2)


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    (tmp_path / "link").symlink_to("f")
    os.mkfifo(tmp_path / "pipe")
    assert bytes(open_view(tmp_path / "f")) == b"abc"
    assert len(open_view(tmp_path / "big")) == 3 << 20
    assert refused(open_view, tmp_path / "link").code == "scan.role"
    assert refused(open_view, tmp_path / "pipe").code == "scan.role"
    with pytest.raises(FaultError):
        open_view(tmp_path / "absent")


# -- safetensors ------------------------------------------------------------------------------

TWO = {**ONE_TENSOR, "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12]}}


def test_header_of_a_sound_file():
    found = parse_safetensors(
        memoryview(safetensors({"__metadata__": {"format": "pt"}, **TWO}, bytes(12)))
    )
    assert [tensor.name for tensor in found.tensors] == ["a", "b"]
    assert found.tensors[1].shape == (2, 1)
    assert found.tensors[1].end - found.tensors[1].start == 4
    assert found.metadata == {"format": "pt"}


def test_tensors_may_stand_in_any_order_of_the_header():
    swapped = dict(reversed(TWO.items()))
    assert [
        t.name for t in parse_safetensors(memoryview(safetensors(swapped, bytes(12)))).tensors
    ] == ["a", "b"]


def entry(**changes):
    return {"a": {**ONE_TENSOR["a"], **changes}}


BAD_HEADERS = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "not an object": safetensors(b"[]"),
    "space first": safetensors(b" {}"),
    "no tensors": safetensors({}),
    "only metadata": safetensors({"__metadata__": {}}),
    "metadata not of strings": safetensors({"__metadata__": {"a": 1}, **ONE_TENSOR}, bytes(8)),
    "metadata a list": safetensors({"__metadata__": [], **ONE_TENSOR}, bytes(8)),
    "metadata too large": safetensors({"__metadata__": {"a": "x" * 300_000}, **ONE_TENSOR}, bytes(8)),  # noqa: E501 - a table
    "unknown type": safetensors(entry(dtype="F4"), bytes(8)),
    "type not text": safetensors(entry(dtype=[]), bytes(8)),
    "negative size": safetensors(entry(shape=[-2]), bytes(8)),
    "boolean size": safetensors(entry(shape=[True, 2]), bytes(8)),
    "float size": safetensors(entry(shape=[2.0]), bytes(8)),
    "huge size": safetensors(entry(shape=[1 << 60]), bytes(8)),
    "nine dimensions": safetensors(entry(shape=[1] * 8 + [2]), bytes(8)),
    "three offsets": safetensors(entry(data_offsets=[0, 8, 8]), bytes(8)),
    "one offset": safetensors(entry(data_offsets=[8]), bytes(8)),
    "offsets reversed": safetensors(entry(data_offsets=[8, 0]), bytes(8)),
    "gap at the start": safetensors(entry(data_offsets=[4, 12]), bytes(12)),
    "extra key": safetensors(entry(x=1), bytes(8)),
    "entry not an object": safetensors({"a": 1}, bytes(8)),
    "empty name": safetensors({"": ONE_TENSOR["a"]}, bytes(8)),
    "shape and span differ": safetensors(entry(shape=[3]), bytes(8)),
    "data cut": safetensors(ONE_TENSOR, bytes(7)),
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused(name):
    assert refused(parse_safetensors, memoryview(BAD_HEADERS[name])).code == "scan.safetensors"


def test_header_is_bounded(monkeypatch):
    data = memoryview(safetensors(ONE_TENSOR, bytes(8)))
    parse_safetensors(data)
    monkeypatch.setattr(st, "MAX_TENSORS", 0)
    assert refused(parse_safetensors, data)
    monkeypatch.setattr(st, "HEADER_LIMIT", 10)
    assert "limit is 10" in refused(parse_safetensors, data).message


# -- configurations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["auto_map", "AUTO_MAP", "trust_remote_code", "vision_trust_remote_code", "_attn_implementation",  # noqa: E501 - a table
     "_attn_implementation_internal", "_attn_implementation_autoset", "attn_implementation_x",
     "custom_pipelines", "custom_generate", "_target_", "model_target_", "__class__", "py/object",
     "use_kernels", "code_revision"],
)  # fmt: skip
@pytest.mark.parametrize("depth", [0, 1, 5])
def test_keys_that_load_code_are_refused_at_any_depth(key, depth):
    value = {key: None}
    for _ in range(depth):
        value = {"a": [{"b": value}]}
    error = refused(lint_config, memoryview(dump(value)), "config.json")
    assert error.code == "scan.config"
    assert key.lower() in error.message.lower()


def test_ordinary_configurations_pass_without_findings():
    for value in (
        tiny_llama.config(),
        {"torch_dtype": "torch.float16", "transformers_version": "4.57.6"},
    ):
        assert lint_config(memoryview(dump(value)), "config.json")[1] == ()


def test_values_that_look_like_code_or_a_hub_are_findings():
    value = {"a": {"b": "attacker/model"}, "c": ["os.system"], "_name_or_path": "org/base"}
    _, findings = lint_config(memoryview(dump(value)), "config.json")
    assert len(findings) == 2
    assert any("a.b" in line and "hub" in line for line in findings)
    assert any("c[0]" in line and "import" in line for line in findings)


def test_long_text_in_a_configuration_is_refused():
    assert refused(lint_config, memoryview(dump({"a": "x" * 200_000})), "config.json")


def test_unknown_keys_are_named():
    assert unknown_keys({"model_type": "llama", "zzz": 1}) == ("zzz",)


# -- templates --------------------------------------------------------------------------------

CHAT = """{% macro say(m) %}{{ m['role'] + ': ' + m.content | trim }}{% endmacro %}
{%- set ns = namespace(first=true) %}
{%- for m in messages if m.role != 'system' %}
  {%- if not loop.first %}{{ '\\n' }}{% endif %}
  {%- if m['content'] is string and m.content.startswith('x') %}{% continue %}{% endif %}
  {%- set ns.first = false %}{{ say(m) }}
{%- endfor %}{{ bos_token if add_generation_prompt else '' }}{{ messages[-1]['content'][:3] }}"""


def test_an_ordinary_chat_template_passes():
    lint_template(memoryview(CHAT.encode()), "chat_template.jinja")


@pytest.mark.parametrize(
    "text",
    ["{{ x.__class__ }}", "{{ x['__class__'] }}", "{{ x|attr('y') }}", "{{ f() }}", "{{ x.y.system() }}",  # noqa: E501 - a table
     "{{ _x }}", "{% import 'a' as b %}", "{% include 'a' %}", "{% extends 'a' %}", "{{ 2 ** 99 }}",
     "{{ 'a' * 99 }}", "{{ x is foo }}", "{{ (x or y)() }}", "{% block a %}{% endblock %}",
     "{% filter upper %}{% endfilter %}", "{{ '%s'|format(x) }}", "{{ cycler(1) }}", "{{ lipsum() }}",  # noqa: E501 - a table
     "{% if %}", "{{ x }" , "{{" + "(" * 200 + "1" + ")" * 200 + "}}", "{{ 1//0 }}"],
)  # fmt: skip
def test_templates_that_do_more_are_refused_before_rendering(text, monkeypatch):
    monkeypatch.setattr(templates, "render", lambda *_: pytest.fail("it was rendered"))
    assert refused(lint_template, memoryview(text.encode()), "t").code == "scan.template"


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ '%0999999999d' % 1 }}",
        "{{ none.a.b }}",
        "{{ messages[0].content % 5 }}",
    ],
    ids=["bomb", "memory", "undefined", "type"],
)
def test_templates_that_do_not_render_within_limits_are_refused(text):
    assert refused(lint_template, memoryview(text.encode()), "t").code == "scan.template"


def test_a_template_may_refuse_a_conversation():
    lint_template(memoryview(b"{{ raise_exception('no system prompt') }}"), "t")


def test_templates_are_bounded(monkeypatch):
    assert refused(lint_template, memoryview(b"x" * (templates.TEMPLATE_LIMIT + 1)), "t")
    monkeypatch.setattr(templates, "MAX_NODES", 3)
    assert refused(templates.check_syntax, "{{ a }}{{ b }}", "t")


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.01)
    assert "finish" in refused(templates.render, "{{ 1 }}", "t").message


def test_templates_of_a_tokenizer_configuration():
    assert templates_of(None) == []
    assert templates_of("x") == [("chat_template", "x")]
    assert len(templates_of([{"name": "a", "template": "x"}, {"name": "b", "template": "y"}])) == 2
    for value in ({"a": "x"}, [1], [{"name": "a"}], 7):
        assert refused(templates_of, value).code == "scan.template"


# -- tokenizers -------------------------------------------------------------------------------


def changed(**parts):
    value = deepcopy(tiny_llama.tokenizer())
    for path, item in parts.items():
        place, keys = value, path.split("__")
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = item
    return memoryview(dump(value))


def test_facts_of_a_tokenizer():
    found = parse_tokenizer(changed())
    assert (found.model, found.unk, found.size) == (
        "WordLevel",
        "<unk>",
        len(tiny_llama.vocabulary()),
    )
    assert found.special["<MoleculeS>"] == found.ids["<MoleculeS>"] == 8
    assert found.starts is None


def template(*single, ids=(2,)):
    table = {"<bos>": {"id": "<bos>", "ids": list(ids), "tokens": ["<bos>"]}}
    return {"type": "TemplateProcessing", "single": list(single), "special_tokens": table}


BOS = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    ("part", "starts"),
    [
        (None, None),
        ({"type": "ByteLevel"}, None),
        (template(BOS, TEXT), (2,)),
        (template(TEXT, BOS), ()),
        (template(BOS, BOS, TEXT), (2, 2)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template(BOS, TEXT)]}, (2,)),
    ],
)
def test_what_a_template_puts_before_a_text(part, starts):
    assert parse_tokenizer(changed(post_processor=part)).starts == starts


def test_an_added_token_may_be_a_word_of_texts():
    value = deepcopy(tiny_llama.tokenizer())
    token = {**value["added_tokens"][0], "content": "<think>", "special": False, "id": 200}
    found = parse_tokenizer(memoryview(dump({**value, "added_tokens": [SPECIAL, token]})))
    assert found.ids["<think>"] == 200
    assert found.size == 201
    assert set(found.special) == {"<pad>"}


def test_tokenizers_of_other_kinds():
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "unk_token": None}
    assert parse_tokenizer(memoryview(dump({"model": bpe, "added_tokens": []}))).unk is None
    pieces = {"type": "Unigram", "vocab": [["<u>", 0.0], ["a", -1.5]], "unk_id": 0}
    assert parse_tokenizer(memoryview(dump({"model": pieces}))).unk == "<u>"


SPECIAL = tiny_llama.tokenizer()["added_tokens"][0]
BAD_TOKENIZERS = {
    "no model": memoryview(b"{}"),
    "unknown part": changed(plugin={}),
    "unknown model": changed(model__type="Custom"),
    "vocabulary empty": changed(model__vocab={}),
    "vocabulary a list of pairs cut": changed(model__vocab=[["a"]]),
    "vocabulary twice": changed(model__vocab=[["a", 0], ["a", 1]]),
    "negative id": changed(model__vocab={"<unk>": -1}),
    "id not a number": changed(model__vocab={"<unk>": "1"}),
    "id twice": changed(model__vocab={"<unk>": 1, "a": 1}),
    "huge id": changed(model__vocab={"<unk>": 1 << 30}),
    "long token": changed(model__vocab={"x" * 2000: 1}),
    "unknown token absent": changed(model__unk_token="<none>"),
    "unknown token a number": changed(model__unk_token=1),
    "added tokens no list": changed(added_tokens={}),
    "added token malformed": changed(added_tokens=[{"id": 1}]),
    "added token twice": changed(added_tokens=[SPECIAL, SPECIAL]),
    "added token with another id": changed(added_tokens=[{**SPECIAL, "id": 40}]),
    "added token takes an id": changed(added_tokens=[{**SPECIAL, "content": "<new>", "id": 30}]),
    "a template without its text": changed(post_processor={"type": "TemplateProcessing"}),
    "a template of numbers": changed(post_processor=template(1)),
    "a template that names nobody": changed(
        post_processor=template({"SpecialToken": {"id": "<x>", "type_id": 0}})
    ),
    "unknown step": changed(pre_tokenizer={"type": "Exec"}),
    "step without type": changed(normalizer={}),
    "step a text": changed(decoder="Fuse"),
    "unknown step inside": changed(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "X"}]}
    ),
    "steps no list": changed(pre_tokenizer={"type": "Sequence", "pretokenizers": 1}),
    "too many steps": changed(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 64}
    ),
    "long pattern": changed(pre_tokenizer__pattern={"Regex": "a" * 5000}),
    "pattern a number": changed(pre_tokenizer__pattern={"Regex": 1}),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_bad_tokenizers_are_refused(name):
    assert refused(parse_tokenizer, BAD_TOKENIZERS[name]).code == "scan.tokenizer"


def test_vocabulary_is_bounded(monkeypatch):
    monkeypatch.setattr(tok, "MAX_VOCABULARY", 10)
    assert refused(parse_tokenizer, changed())


# -- wheels -----------------------------------------------------------------------------------

NAME = "good-1.0-py3-none-any.whl"


def record(files: dict[str, bytes], tag: str = "py3-none-any", **changes: str) -> dict[str, bytes]:
    info = "good-1.0.dist-info"
    files = {
        f"{info}/METADATA": b"Metadata-Version: 2.4\nName: good\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
        **files,
    }
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={changes.get(path, digest)},{len(content)}")
    place = f"{info}/RECORD"
    return {**files, place: ("\n".join([*lines, f"{place},,"]) + "\n").encode()}


SOUND = record({"good/__init__.py": b"x = 1\n"})
LINUX = "cp311-cp311-linux_x86_64"


def test_a_sound_wheel_passes():
    check_wheel(memoryview(wheel(SOUND)), NAME)
    assert scan_file(memoryview(wheel(SOUND)), Role.WHEEL, f"payload/wheels/{NAME}") == ()


BAD_WHEELS = {
    "not a zip": (NAME, b"hello"),
    "empty": (NAME, wheel({})),
    "name of a source archive": ("good-1.0.tar.gz", wheel(SOUND)),
    "no RECORD": (NAME, wheel({"good/__init__.py": b""})),
    "file not in RECORD": (NAME, wheel({**SOUND, "good/extra.py": b"x"})),
    "file missing": (NAME, wheel({k: v for k, v in SOUND.items() if not k.startswith("good/")})),
    "other content": (NAME, wheel({**SOUND, "good/__init__.py": b"x = 2\n"})),
    "pth": (NAME, wheel(record({"good.pth": b"import good"}))),
    "sitecustomize": (NAME, wheel(record({"sitecustomize.py": b""}))),
    "parent path": (NAME, wheel(record({"../x.py": b""}))),
    "absolute path": (NAME, wheel(record({"/x.py": b""}))),
    "case twins": (NAME, wheel(record({"a.py": b"", "A.py": b""}))),
    "RECORD of two columns": (NAME, wheel({**SOUND, "good-1.0.dist-info/RECORD": b"a,b\n"})),
    "RECORD not UTF-8": (NAME, wheel({**SOUND, "good-1.0.dist-info/RECORD": b"\xff"})),
    "cut": (NAME, wheel(SOUND)[:-30]),
    "native code in a pure wheel": (NAME, wheel(record({"good/a.so.1": b""}))),
    "a telemetry client": (
        f"good-1.0-{LINUX}.whl",
        wheel(record({"good/a.so": b"\0" * 1048570 + b"OneCollector/1.0"}, LINUX)),
    ),
    "entry points that cannot be read": (
        NAME,
        wheel(record({"good-1.0.dist-info/entry_points.txt": b"no section\n"})),
    ),
}


@pytest.mark.parametrize("name", BAD_WHEELS)
def test_bad_wheels_are_refused(name):
    file, data = BAD_WHEELS[name]
    assert refused(check_wheel, memoryview(data), file).code == "scan.wheel"


def test_native_libraries_and_entry_points_are_told():
    files = {
        "good/__init__.py": b"",
        "good/_a.cpython-311.so": b"",
        "good.libs/libz.so.1": b"",
        "good-1.0.dist-info/entry_points.txt": b"[console_scripts]\ngood = good:main\n",
    }
    found = check_wheel(memoryview(wheel(record(files, LINUX))), f"good-1.0-{LINUX}.whl")
    assert found == (
        "2 native libraries: libz.so.1, _a.cpython-311.so",
        "entry points 'console_scripts': good",
    )


def test_links_and_bombs_in_wheels_are_refused(tmp_path, monkeypatch):
    path = tmp_path / NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert "link" in refused(check_wheel, memoryview(path.read_bytes()), NAME).message
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(24 << 20))
    assert "unpacks" in refused(check_wheel, memoryview(path.read_bytes()), NAME).message
    monkeypatch.setattr(wheels, "MAX_MEMBERS", 1)
    assert refused(check_wheel, memoryview(wheel(SOUND)), NAME)


# -- roles ------------------------------------------------------------------------------------

ROLES = {
    "config.json": Role.CONFIG,
    "tokenizer.json": Role.TOKENIZER,
    "chat_template.jinja": Role.TEMPLATE,
    "model-00001-of-00002.safetensors": Role.WEIGHTS,
    "model.safetensors.index.json": Role.INDEX,
    "README.md": Role.CARD,
    "LICENSE": Role.LICENCE,
    "LICENSE.txt": Role.LICENCE,
    "USE_POLICY.md": Role.LICENCE,
    "LLAMA_LICENSE": Role.LICENCE,
    "NOTICE": Role.LICENCE,
    "figures/scores.png": Role.SIDE,
    "docs/notes.md": Role.DOCUMENT,
    ".gitattributes": Role.SIDE,
    "merges.txt": Role.SIDE,
    "tokenizer.model": Role.SIDE,
    "tokenizer.model.v3": Role.SIDE,
    "tokenizer.model.v7m1": Role.SIDE,
    "tekken.json": Role.SIDE,
    ".cache/huggingface/download/config.json.metadata": Role.HUB,
    ".cache/huggingface/.gitignore": Role.HUB,
}


@pytest.mark.parametrize("path", ROLES)
def test_roles_by_name(path):
    assert role_of(path, b"{}") is ROLES[path]


@pytest.mark.parametrize(
    ("path", "head", "code"),
    [
        ("model.bin", b"", "scan.pickle"),
        ("data.npy", b"", "scan.pickle"),
        ("notes.md", b"\x80\x04\x95", "scan.pickle"),
        ("merges.txt", b"\x80\x02}", "scan.pickle"),
        ("model.pt.txt", b"\x80\x05", "scan.pickle"),
        ("run.py", b"", "scan.role"),
        ("lib.so", b"\x7fELF", "scan.role"),
        ("LICENSE.py", b"", "scan.role"),
        ("README.md", b"\x7fELF", "scan.role"),
        ("figure.png", b"PK\x03\x04", "scan.role"),
        ("tool", b"#!/bin/sh", "scan.role"),
        ("weights.h5", b"\x89HDF", "scan.role"),
        ("unknown.json", b"{}", "scan.role"),
        ("tokenizer.model.vx", b"\n", "scan.role"),
        ("sub/config.json", b"{}", "scan.role"),
        ("original/consolidated.00.pth", b"", "scan.pickle"),
    ],
)
def test_formats_without_a_role(path, head, code):
    error = refused(role_of, path, head)
    assert error.code == code
    assert error.hint


def test_a_file_in_a_folder_is_refused_in_plain_words():
    message = refused(role_of, "fp16/model.safetensors", b"{}").message
    assert message.endswith("a file of role weights belongs at the top of a snapshot")


def test_safetensors_may_begin_like_a_pickle():
    assert role_of("model.safetensors", b"\x80\x02\0\0\0\0\0\0") is Role.WEIGHTS


def test_every_error_is_ours_and_says_something():
    for call in (lambda: parse_safetensors(memoryview(b"")), lambda: role_of("x.bin", b"")):
        with pytest.raises(AirgapError) as caught:
            call()
        assert json.dumps(caught.value.message)
