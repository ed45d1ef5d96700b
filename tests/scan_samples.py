"""The seed of the weight-file attack catalogue: 20 attacks and one benign model, built from bytes.

Payloads are inert: they print or name a command, and only run if a program unpickles, renders or
imports the sample. Nobody does. ONNX is written by the few lines below, so that a malformed file is
as easy to make as a sound one and no test needs the onnx library.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ESCAPE = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
    "{{ x()._module.__builtins__['__import__']('os').popen('id').read() }}{% endif %}{% endfor %}"
)
ONE_TENSOR = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


class Call:
    """Unpickles into a shell command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo sample ran",)


# -- protobuf ---------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """Encode a number; a negative one takes ten bytes, as in protobuf."""
    value &= (1 << 64) - 1
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def put(number: int, value: float | str | bytes) -> bytes:
    """Encode one field: a varint, a float of 32 bits, or text and bytes with their length."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def pair(key: str, value: str) -> bytes:
    return put(1, key) + put(2, value)


def tensor(
    name: str = "W", *, dims: tuple[int, ...] = (4,), kind: int = 1, more: bytes = b""
) -> bytes:
    return b"".join(put(1, size) for size in dims) + put(2, kind) + put(8, name) + more


def external(name: str = "W", *, dims: tuple[int, ...] = (4,), **pairs: str) -> bytes:
    entries = b"".join(put(13, pair(key, value)) for key, value in pairs.items())
    return tensor(name, dims=dims, more=entries + put(14, 1))


def value_info(name: str) -> bytes:
    shape = put(1, put(1, 4))
    return put(1, name) + put(2, put(1, put(1, 1) + put(2, shape)))


def node(
    op: str = "Add", *, domain: str = "", inputs: tuple[str, ...] = ("x", "W"), more: bytes = b""
) -> bytes:
    return (
        b"".join(put(1, name) for name in inputs)
        + put(2, "y")
        + put(4, op)
        + (put(7, domain) if domain else b"")
        + more
    )


def graph(*nodes: bytes, tensors: tuple[bytes, ...] = (), more: bytes = b"") -> bytes:
    return (
        b"".join(put(1, item) for item in nodes or (node(),))
        + put(2, "g")
        + b"".join(put(5, item) for item in tensors)
        + put(11, value_info("x"))
        + put(12, value_info("y"))
        + more
    )


def opset(version: int = 17, domain: str = "") -> bytes:
    return (put(1, domain) if domain else b"") + put(2, version)


def onnx_model(
    body: bytes | None = None,
    *,
    ir: int = 9,
    opsets: tuple[bytes, ...] = (opset(),),
    more: bytes = b"",
) -> bytes:
    sound = graph(tensors=(tensor(more=put(9, bytes(16))),))
    return (
        put(1, ir)
        + put(7, sound if body is None else body)
        + b"".join(put(8, item) for item in opsets)
        + more
    )


# -- the samples ------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def torch_zip(*, bad_crc: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Call(), 2))
    data = bytearray(file.getvalue())
    if bad_crc:  # both CRC fields flipped: the shape of CVE-2025-10156
        data[data.find(b"PK\3\4") + 14] ^= 0xFF
        data[data.find(b"PK\1\2") + 16] ^= 0xFF
    return bytes(data)


def gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    string = struct.pack("<I", 8)
    return (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 2)
        + text("general.architecture")
        + string
        + text("llama")
        + text("tokenizer.chat_template")
        + string
        + text(ESCAPE)
        + bytes(64)
    )


def wheel(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def linked(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(reads("w.data"))
    (folder / "w.data").symlink_to("/etc/passwd")


def reads(location: str, **more: str) -> bytes:
    return onnx_model(
        graph(tensors=(external(location=location, offset="0", length="16", **more),))
    )


Sample = tuple[str | None, dict[str, bytes] | Callable[[Path], None]]
_ENTRY = json.dumps(ONE_TENSOR)[1:-1]
_OVERLAP: dict[str, Any] = {
    **ONE_TENSOR,
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
}

# Name of the sample -> the code that must refuse it (None: it must pass), and its files.
SAMPLES: dict[str, Sample] = {
    "01 pickle": ("scan.pickle", {"w.bin": pickle.dumps(Call(), 2)}),
    "02 torch zip": ("scan.pickle", {"pytorch_model.bin": torch_zip()}),
    "03 torch zip, bad CRC": ("scan.pickle", {"pytorch_model.bin": torch_zip(bad_crc=True)}),
    "04 chat template in JSON": (
        "scan.template",
        {"tokenizer_config.json": dump({"chat_template": ESCAPE})},
    ),
    "05 chat template file": ("scan.template", {"chat_template.jinja": ESCAPE.encode()}),
    "06 auto_map": (
        "scan.config",
        {
            "config.json": dump(
                {
                    "architectures": ["Evil"],
                    "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
                }
            )
        },
    ),
    "07 attention from the hub (CVE-2026-4372)": (
        "scan.config",
        {
            "config.json": dump(
                {"model_type": "llama", "_attn_implementation_internal": "attacker/kernel"}
            )
        },
    ),
    "08 nested trust (CVE-2026-5241)": (
        "scan.config",
        {
            "config.json": dump(
                {"model_type": "lightglue", "keypoint_detector_config": {"trust_remote_code": True}}
            )
        },
    ),
    "09 ONNX parent folder": (
        "scan.onnx.external",
        {"model.onnx": reads("../../../../etc/passwd")},
    ),
    "10 ONNX absolute path": ("scan.onnx.external", {"model.onnx": reads("/etc/passwd")}),
    "11 ONNX path through the middle": ("scan.onnx.external", {"model.onnx": reads("a/../../x")}),
    "12 ONNX symbolic link (CVE-2026-34447)": ("scan.onnx.external", linked),
    "13 ONNX foreign keys (CVE-2026-34445)": (
        "scan.onnx.external",
        {"model.onnx": reads("w.data", __class__="x", basepath="/etc"), "w.data": bytes(16)},
    ),
    "14 ONNX custom operator": (
        "scan.onnx.domain",
        {
            "model.onnx": onnx_model(
                graph(node("EvilOp", domain="com.attacker", inputs=("x",))),
                opsets=(opset(), opset(1, "com.attacker")),
            )
        },
    ),
    "15 safetensors huge header": (
        "scan.safetensors",
        {"model.safetensors": safetensors(b"{}", size=1 << 40)},
    ),
    "16 safetensors overlap": (
        "scan.safetensors",
        {"model.safetensors": safetensors(_OVERLAP, bytes(12))},
    ),
    "17 safetensors duplicate keys": (
        "scan.safetensors",
        {"model.safetensors": safetensors(f"{{{_ENTRY},{_ENTRY}}}".encode(), bytes(8))},
    ),
    "18 safetensors trailing bytes": (
        "scan.safetensors",
        {"model.safetensors": safetensors(ONE_TENSOR, bytes(8) + b"#!/bin/sh\nevil\n")},
    ),
    "19 GGUF template (CVE-2026-5760)": ("scan.role", {"m.gguf": gguf()}),
    "20 wheel with .pth": (
        "scan.wheel",
        {
            "evil-1.0-py3-none-any.whl": wheel(
                {
                    "evil.pth": b"import os;os.system('id')",
                    "evil-1.0.dist-info/METADATA": b"Name: evil\nVersion: 1.0\n",
                }
            )
        },
    ),
    "21 benign": (
        None,
        {
            "model.safetensors": safetensors(ONE_TENSOR, bytes(8)),
            "config.json": dump({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        },
    ),
}


def write_sample(name: str, folder: Path) -> str | None:
    """Write the files of a sample to `folder`; returns the code that must refuse it."""
    code, files = SAMPLES[name]
    if callable(files):
        files(folder)
        return code
    for path, content in files.items():
        (folder / path).write_bytes(content)
    return code
