"""Which parser a file belongs to, by its name; and the refusal of every format that can run code.

Decides the role of a file before anything reads it. There is no role for pickles, scripts, native
code or containers that embed templates: they are named and refused, with a way to go on that needs
no network. Obeys docs/design/bundle.md, 5.
"""

from __future__ import annotations

import re
from enum import StrEnum

from policy.errors import RefusedError


class Role(StrEnum):
    """What a file of a snapshot is for; the value is the role in the manifest where it has one."""

    CONFIG = "config"
    TOKENIZER = "tokenizer"
    TEMPLATE = "template"
    GRAPHS = "graphs"
    ONNX = "onnx"
    EXTERNAL_DATA = "external-data"
    WHEEL = "wheel"
    INSTALLER = "installer"
    DOCUMENT = "document"
    # Below: only in a snapshot on the staging side.
    WEIGHTS = "weights"
    INDEX = "weights-index"
    CARD = "card"
    LICENCE = "licence"
    SIDE = "not-carried"  # known, listed and hashed, and never read by a loader or carried
    HUB = "hub-metadata"


_LICENCE = re.compile(
    r"(licen[cs]e|copying|notice|use[_-]?policy|acceptable[_-]?use)([._-].*)?|.*[._-]licen[cs]e"
    r"(\.(txt|md))?",
    re.IGNORECASE,
)
_CONFIGS = frozenset(
    ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
_SIDE = re.compile(
    r"\.gitattributes|\.gitignore|vocab\.(json|txt)|merges\.txt|added_tokens\.json"
    r"|tokenizer\.model(\.v[0-9][0-9a-z]*)?|tekken\.json"
    r"|run\.json|training_args\.json|trainer_state\.json|all_results\.json|train_results\.json"
    r"|eval_results\.json|unpickled\.json"
    # evidence of the publisher, which is given to `inspect` by its path
    r"|model\.sig|sha256sums?(\.txt)?(\.(sig|asc|sigstore))?|.*\.sha256|.*\.sigstore(\.json)?"
    r"|.*\.intoto\.jsonl?|.*\.(safetensors|json)\.sig",
)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf")
_PICKLES = (
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".p", ".joblib", ".dill", ".npy", ".npz"),
    *(".t7", ".model.bin", ".mar", ".torch", ".pth.tar", ".skops"),
)
_CODE = (
    *(".py", ".pyc", ".pyo", ".so", ".dll", ".dylib", ".sh", ".bat", ".ps1", ".exe", ".js", ".jar"),
    *(".ipynb", ".lua", ".rb", ".pl", ".php", ".wasm"),
)
_CONTAINERS = (
    *(".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".pb", ".tflite", ".msgpack", ".engine", ".plan"),
    *(
        ".zip",
        ".tar",
        ".gz",
        ".tgz",
        ".xz",
        ".bz2",
        ".zst",
        ".7z",
        ".mlmodel",
        ".nemo",
        ".llamafile",
    ),
)
_DEPTH = 3  # payload/MODEL/FILE
_FOREIGN = (b"GGUF", b"\x7fELF", b"\x89HDF", b"PK\x03\x04")
_PICKLE_HINT = (
    "ask the publisher for safetensors, or run `airgap unpickle DIR -o NEW`, which reads weights "
    "in a sealed process; then pin and inspect NEW"
)
_CODE_HINT = (
    "remove the file; a model of a standard architecture needs no code of its own, and one that "
    "does cannot be carried"
)
_CONTAINER_HINT = "take the safetensors release of the same model; this container is not read"


def role_of(path: str, head: bytes) -> Role:
    """Return the role of a file in a snapshot.

    Args:
        path: Relative to the snapshot, with `/`.
        head: The first bytes of the file, at least 8 where it has them.

    Raises:
        RefusedError: `scan.pickle` or `scan.role`.

    """
    if path.startswith((".cache/huggingface/", ".huggingface/")):
        return Role.HUB
    folder, _, name = path.rpartition("/")
    lower = name.lower()
    role = _by_name(lower, name)
    # A safetensors file may begin with any eight bytes, a wheel is a zip; both parsers are strict.
    parsed = role in {Role.WEIGHTS, Role.EXTERNAL_DATA, Role.WHEEL}
    if role is None or (not parsed and (_is_pickle(head) or head.startswith(_FOREIGN))):
        _refuse(path, lower, head)
    if role is not None and folder and role not in {Role.SIDE, Role.DOCUMENT, Role.LICENCE}:
        raise RefusedError(
            "scan.role",
            f"{path!r:.160}: a file of role {role} belongs at the top of a snapshot",
            hint="inspect that folder as a snapshot by itself, or remove it",
        )
    return role or Role.SIDE


def payload_role(path: str) -> Role:
    """Return the role that a file below `payload/` must have in a manifest.

    Raises:
        RefusedError: `scan.pickle` or `scan.role`.

    """
    parts = path.split("/")
    name = parts[-1]
    lower = name.lower()
    if len(parts) == _DEPTH and parts[1] == "wheels" and lower.endswith(".whl"):
        return Role.WHEEL
    if path == "payload/wheels/install.sh":
        return Role.INSTALLER
    if len(parts) == _DEPTH:
        if name == "graphs.json":
            return Role.GRAPHS
        if lower.endswith((".onnx_data", ".onnx.data", ".safetensors")):
            return Role.EXTERNAL_DATA
        role = _by_name(lower, name)
        if role in {Role.CARD, Role.LICENCE, Role.DOCUMENT}:
            return Role.DOCUMENT
        if role in {Role.CONFIG, Role.TOKENIZER, Role.TEMPLATE, Role.ONNX}:
            return role
    _refuse(path, lower, b"")
    raise AssertionError


def _by_name(lower: str, name: str) -> Role | None:
    """Return the role that the name claims, None when it claims nothing we read."""
    for known, role in (
        (name in _CONFIGS, Role.CONFIG),
        (name == "tokenizer.json", Role.TOKENIZER),
        (lower.endswith((".jinja", ".jinja2")), Role.TEMPLATE),
        (lower.endswith(".safetensors"), Role.WEIGHTS),
        (lower.endswith(".safetensors.index.json"), Role.INDEX),
        (lower.endswith(".onnx"), Role.ONNX),
        (lower.endswith((".onnx_data", ".onnx.data")), Role.EXTERNAL_DATA),
        (lower.endswith(".whl"), Role.WHEEL),
        (lower == "readme.md", Role.CARD),
        (_LICENCE.fullmatch(lower) is not None and not lower.endswith(_CODE), Role.LICENCE),
        (lower.endswith((".md", ".txt", ".bib", ".cff", ".jsonl", ".csv")), Role.DOCUMENT),
        (_SIDE.fullmatch(lower) is not None or lower.endswith(_PICTURES), Role.SIDE),
    ):
        if known:
            return Role.SIDE if role is Role.DOCUMENT and _SIDE.fullmatch(lower) else role
    return None


def _is_pickle(head: bytes) -> bool:
    """Tell whether bytes begin like a pickle of protocol 2 or later, or like torch's own zip."""
    return head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}


def _refuse(path: str, lower: str, head: bytes) -> None:
    """Raise the refusal that fits: pickle, code, container, or simply unknown."""
    if lower.endswith(_PICKLES) or _is_pickle(head):
        raise RefusedError(
            "scan.pickle",
            f"{path!r:.160} is a pickle, or a format that can hold one: loading it runs code",
            hint=_PICKLE_HINT,
        )
    if lower.endswith(_CODE) or head.startswith((b"\x7fELF", b"#!")):
        raise RefusedError("scan.role", f"{path!r:.160} is program code", hint=_CODE_HINT)
    if lower.endswith(_CONTAINERS) or head.startswith((b"GGUF", b"\x89HDF", b"PK\x03\x04")):
        raise RefusedError(
            "scan.role", f"{path!r:.160} is a container that is not read", hint=_CONTAINER_HINT
        )
    raise RefusedError(
        "scan.role",
        f"{path!r:.160}: no parser reads a file of this name",
        hint="remove the file from the snapshot if the model does not need it, then inspect again",
    )
