"""A small index of wheels in a folder: stand-ins that resolve, install and run like real ones.

`make_index` gives every name that our own stand-in requires, and pip itself, repacked from this
environment. The stand-in of `airgap` has the command that `install.sh` hands over to.
"""

from __future__ import annotations

import base64
import email
import hashlib
import importlib.metadata
import json
import zipfile
from pathlib import Path

import bundles

from bundle.envelope import ENVELOPE_SIZE, add_signature, parse_envelope

PIP = importlib.metadata.version("pip")
CPU = {
    "onnxruntime": ("1.28.0", ("flatbuffers",), "cp311-cp311-manylinux_2_28_x86_64"),
    "tokenizers": ("0.22.2", ("huggingface-hub>=0.1",), "cp39-abi3-manylinux_2_17_x86_64"),
    "numpy": ("2.4.6", (), "cp311-cp311-manylinux_2_28_x86_64"),
    "flatbuffers": ("25.12.19", ('typing-extensions; python_version >= "3.12"',), "py3-none-any"),
    "typing-extensions": ("4.16.0", (), "py3-none-any"),
    "huggingface-hub": ("0.36.2", ("requests",), "py3-none-any"),
    "requests": ("2.34.2", (), "py3-none-any"),
    "pydantic": ("2.14.3", ('idna; extra == "email"',), "py3-none-any"),
    "idna": ("3.20", (), "py3-none-any"),
    "onnxruntime-gpu": (
        "1.28.0",
        ('nvidia-cublas; extra == "cuda"', 'nvidia-cudnn-cu13; extra == "cudnn"'),
        "cp311-cp311-manylinux_2_28_x86_64",
    ),
    "nvidia-cublas": ("13.10.0.20", (), "py3-none-manylinux_2_27_x86_64"),
    "nvidia-cudnn-cu13": ("9.28.1.4", ("nvidia-cublas",), "py3-none-manylinux_2_27_x86_64"),
}
OWN_REQUIRES = (
    "pydantic>=2",
    'onnxruntime>=1.28,<1.29; extra == "cpu"',
    'onnxruntime-gpu[cuda,cudnn]>=1.28; extra == "gpu"',
    'tokenizers; extra == "cpu" or extra == "gpu"',
    'numpy; extra == "cpu" or extra == "gpu"',
)
PROGRAM = '''\
"""Stands for the command line: `bootstrap` leaves one file in the tree."""
import json, os, sys
def main():
    words = sys.argv[1:]
    value = lambda name: words[words.index(name) + 1]
    root = value("--root")
    place = os.path.join(root, "set-up")
    fresh = not os.path.exists(place)
    if os.environ.get("HOME", "").endswith("refused"):
        return 1
    if fresh:
        os.makedirs(root, exist_ok=True)
        with open(place, "w") as stream:
            stream.write(open(value("--transcript")).read())
    with open(value("--result"), "w") as stream:
        json.dump({"changed": ["tree"] if fresh else []}, stream)
    return 0
'''


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    requires: tuple[str, ...] = (),
    tag: str = "py3-none-any",
    *,
    files: dict[str, bytes] | None = None,
    headers: str = "License-Expression: MIT\n",
) -> Path:
    """Write one wheel with a RECORD; the same arguments give the same bytes."""
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    pure = "true" if tag.endswith("none-any") else "false"
    metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{headers}"
    if name == "airgap":
        metadata += "".join(f"Provides-Extra: {e}\n" for e in ("cpu", "gpu", "science"))
    if "cuda" in "".join(requires):
        metadata += "Provides-Extra: cuda\nProvides-Extra: cudnn\n"
    metadata += "".join(f"Requires-Dist: {text}\n" for text in requires)
    contents = {
        f"{plain}/__init__.py": b"",
        **(files or {}),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: {pure}\nTag: {tag}\n"
        ).encode(),
    }
    return pack(folder / f"{plain}-{version}-{tag}.whl", info, contents)


def pack(path: Path, info: str, contents: dict[str, bytes]) -> Path:
    """Write the files of a wheel and its RECORD."""
    rows = []
    for name, raw in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(raw)}\n")
    contents = {**contents, f"{info}/RECORD": ("".join(rows) + f"{info}/RECORD,,\n").encode()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in contents.items():
            member = zipfile.ZipInfo(name)  # 1980, as reproducible wheels have it
            member.external_attr = 0o644 << 16
            large = len(raw) > 1 << 24  # compressing it would take the time of a test
            member.compress_type = zipfile.ZIP_STORED if large else zipfile.ZIP_DEFLATED
            archive.writestr(member, raw)
    return path


def repack_pip(folder: Path) -> Path:
    """Make a wheel of the pip that runs here."""
    found = importlib.metadata.distribution("pip")
    info = f"pip-{PIP}.dist-info"
    kept = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
    contents = {
        str(file): Path(str(file.locate())).read_bytes()
        for file in sorted(found.files or [], key=str)
        if str(file).startswith(("pip/", f"{info}/"))
        and "__pycache__" not in str(file)
        and file.name not in kept
    }
    return pack(folder / f"pip-{PIP}-py3-none-any.whl", info, contents)


def make_own(folder: Path, *, version: str = "0.1.0", extra: tuple[str, ...] = ()) -> Path:
    """Make the stand-in of our own wheel, with its pins and its command."""
    pins = "".join(f"{name}=={found[0]}\n" for name, found in CPU.items()) + f"pip=={PIP}\n"
    return make_wheel(
        folder,
        "airgap",
        version,
        (*OWN_REQUIRES, *extra),
        files={
            "airgap/packaging/constraints.txt": pins.encode(),
            "airgap/standin.py": PROGRAM.encode(),
            f"airgap-{version}.dist-info/entry_points.txt": (
                b"[console_scripts]\nairgap = airgap.standin:main\n"
            ),
        },
    )


def make_index(folder: Path, native: str = "") -> Path:
    """Fill a folder with every stand-in and pip; `native` is the tag of what is no pure Python."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (version, requires, tag) in CPU.items():
        given = native if native and not tag.endswith("none-any") else tag
        make_wheel(folder, name, version, requires, given)
    repack_pip(folder)
    return folder


class OnePip:
    """Answers like pip for the one set of wheels in a folder, without its seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *words: str) -> None:
        if words[0] == "download":
            lines = Path(words[words.index("-r") + 1]).read_text().split("\n")
            wanted = {line.rpartition("sha256:")[2] for line in lines if line}
            target = Path(words[words.index("--dest") + 1])
            for path in self.folder.glob("*.whl"):
                if sha256(path) in wanted:
                    (target / path.name).write_bytes(path.read_bytes())
            return
        own = Path(words[-2].partition("file://")[2])
        items = [self._item(path) for path in [own, *sorted(self.folder.glob("*.whl"))]]
        Path(words[words.index("--report") + 1]).write_text(json.dumps({"install": items}))

    def _item(self, path: Path) -> dict:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("dist-info/METADATA"))
            head = email.message_from_bytes(archive.read(name))
        return {
            "metadata": {
                "name": head["Name"],
                "version": head["Version"],
                "requires_dist": head.get_all("Requires-Dist") or [],
            },
            "download_info": {"archive_info": {"hashes": {"sha256": sha256(path)}}},
        }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def approve(bundle: Path, *names: str) -> Path:
    """Let the approvers of `bundles` sign a draft."""
    with bundle.open("r+b") as stream:  # the envelope is the first member and has its room
        stream.seek(512)
        made = parse_envelope(stream.read(ENVELOPE_SIZE))
        made = add_signature(made, *(bundles.signer(name) for name in names or ("alice", "bob")))
        stream.seek(512)
        stream.write(made.to_padded())
    return bundle
