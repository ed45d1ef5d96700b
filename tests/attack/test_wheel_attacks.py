"""Wheels that are not what they say, or come into each other's way: each is refused by name.

Every row alters a wheel (or a pair) that first passes; its RECORD is written anew unless the row is
about it, so that the named check and not the digest has to find it.
"""

import base64
import hashlib
import io
import mmap
import random
import re
import struct
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import wheel_index

from bundle.scan.wheel import check_wheel, installed_files, require_disjoint, split_wheel_name
from policy.errors import RefusedError

INFO, DATA = "good-1.0.dist-info", "good-1.0.data"
PURE, LINUX = "py3-none-any", "cp311-cp311-manylinux_2_28_x86_64"


@dataclass(frozen=True)
class Draft:
    """What a wheel is made of; `raw` alters the finished bytes."""

    name: str = f"good-1.0-{PURE}.whl"
    files: dict = field(default_factory=lambda: {"good/__init__.py": b"x = 1\n"})
    metadata: str = "Metadata-Version: 2.4\nName: good\nVersion: 1.0\n"
    wheel: str = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {PURE}\n"
    record: object = staticmethod(lambda text: text)
    modes: dict = field(default_factory=dict)
    raw: object = staticmethod(lambda raw: raw)

    def more(self, **files):
        return replace(self, files={**self.files, **files})

    def bytes(self):
        files = {
            **self.files,
            f"{INFO}/METADATA": self.metadata.encode(),
            f"{INFO}/WHEEL": self.wheel.encode(),
        }
        rows = [
            f"{path},sha256={digest(raw)},{len(raw)}\n"
            for path, raw in files.items()
            if not path.endswith("/")
        ]
        files[f"{INFO}/RECORD"] = self.record("".join(rows) + f"{INFO}/RECORD,,\n").encode()
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, raw in files.items():
                member = zipfile.ZipInfo(path)
                member.external_attr = self.modes.get(path, 0o100644) << 16
                member.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(member, raw)
        return self.raw(stream.getvalue())

    def check(self):
        return check_wheel(memoryview(self.bytes()), self.name)


def digest(raw):
    return base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()


GOOD = Draft()
NATIVE = replace(
    GOOD,
    name=f"good-1.0-{LINUX}.whl",
    wheel=f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {LINUX}\n",
    files={
        **GOOD.files,
        "good/_a.so": b"\x7fELF",
        "good/lib/": b"",
        "good/__pycache__/__init__.cpython-311.pyc": b"",
        f"{DATA}/platlib/good/more.py": b"",
        f"{DATA}/scripts/good-tool": b"#!python\n",
        f"{DATA}/headers/good.h": b"",
        f"{DATA}/data/share/man/man1/good.1": b"",
        f"{INFO}/entry_points.txt": b"[console_scripts]\ngood = good:main\n",
        f"{INFO}/licenses/LICENSE": b"free",
    },
)


def program(name):
    return {f"{INFO}/entry_points.txt": f"[console_scripts]\n{name} = good:main\n".encode()}


def twice(raw):
    """Repeat the first member under its name, in the file and in its directory."""
    stream = io.BytesIO(raw)
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("good/__init__.py", b"x = 1\n")
    return stream.getvalue()


def swapped(old, new, times=-1):
    return lambda raw: raw.replace(old, new, times)


def overlapping(raw):
    """Let the entry of one file in the directory point at the bytes of another."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = archive.infolist()
    at = raw.index(b"PK\x01\x02")
    second = raw.index(b"PK\x01\x02", at + 4)
    return raw[: second + 42] + struct.pack("<I", members[0].header_offset) + raw[second + 46 :]


def with_gap(raw):
    """Put bytes of no file before the directory, and let the end tell where it now begins."""
    at, end = raw.index(b"PK\x01\x02"), raw.rindex(b"PK\x05\x06")
    hidden = b"import os; os.system('id')\n"
    tail = bytearray(raw[end:])
    struct.pack_into("<I", tail, 16, at + len(hidden))
    return raw[:at] + hidden + raw[at:end] + bytes(tail)


def with_comment(raw):
    stream = io.BytesIO(raw)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.comment = b"#!/bin/sh"
    return stream.getvalue()


def encrypted(raw):
    raw = bytearray(raw)
    at = bytes(raw).index(b"PK\x01\x02")
    raw[6] |= 1
    raw[at + 8] |= 1
    return bytes(raw)


def source_archive(_):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("good-1.0/setup.py", b"import os\n")
        archive.writestr("good-1.0/PKG-INFO", b"Name: good\nVersion: 1.0\n")
    return stream.getvalue()


SINGLE = {
    # another thing than its name says
    "a source archive in disguise": (replace(GOOD, raw=source_archive), "dist-info"),
    "a tar in disguise": (replace(GOOD, raw=lambda _: b"\x1f\x8b\x08" + bytes(600)), "read"),
    "another name inside": (
        replace(GOOD, metadata=GOOD.metadata.replace("good", "evil")),
        "inside it is 'evil'",
    ),
    "another version inside": (
        replace(GOOD, metadata=GOOD.metadata.replace(": 1.0", ": 1.1")),
        "'1.1'",
    ),
    "two names inside": (replace(GOOD, metadata=f"{GOOD.metadata}Name: evil\n"), "2 times"),
    "no version inside": (
        replace(GOOD, metadata="Metadata-Version: 2.4\nName: good\n"),
        "0 times",
    ),
    "another tag inside": (replace(GOOD, wheel=GOOD.wheel.replace(PURE, LINUX)), "tags"),
    "a tag more inside": (replace(GOOD, wheel=f"{GOOD.wheel}Tag: {LINUX}\n"), "tags"),
    "another tag outside": (replace(GOOD, name=f"good-1.0-{LINUX}.whl"), "tags"),
    "another name outside": (replace(GOOD, name=f"evil-1.0-{PURE}.whl"), "dist-info"),
    "another version outside": (replace(GOOD, name=f"good-1.1-{PURE}.whl"), "dist-info"),
    "another format": (replace(GOOD, wheel=GOOD.wheel.replace("n: 1.0", "n: 2.0")), "format"),
    "a second distribution": (
        GOOD.more(**{"evil-1.0.dist-info/METADATA": b"Name: evil\n"}),
        "dist-info",
    ),
    "data of another distribution": (GOOD.more(**{"evil-1.0.data/scripts/x": b""}), "dist-info"),
    "an egg": (GOOD.more(**{"good.egg-info/PKG-INFO": b""}), "egg-info"),
    "no METADATA": (
        replace(GOOD, raw=swapped(f"{INFO}/METADATA".encode(), f"{INFO}/METADAT_".encode())),
        "METADATA",
    ),
    # RECORD
    "RECORD with another digest": (
        replace(GOOD, record=lambda text: text.replace(digest(b"x = 1\n"), digest(b""))),
        "RECORD names",
    ),
    "RECORD with another size": (
        replace(GOOD, record=lambda text: text.replace(",6\n", ",7\n")),
        "RECORD names",
    ),
    "RECORD with a weaker hash": (
        replace(GOOD, record=lambda text: text.replace("sha256=", "md5=", 1)),
        "RECORD names",
    ),
    "RECORD without a digest": (
        replace(
            GOOD, record=lambda text: text.replace(f"sha256={digest(b'x = 1' + bytes([10]))}", "")
        ),
        "RECORD names",
    ),
    "RECORD without a file": (
        replace(GOOD, record=lambda text: text.partition("\n")[2]),
        "differ",
    ),
    "RECORD with a file more": (
        replace(GOOD, record=lambda text: f"good/x.py,sha256={digest(b'')},0\n{text}"),
        "differ",
    ),
    "RECORD with a path that leaves": (
        replace(GOOD, record=lambda text: f"../../x.py,sha256={digest(b'')},0\n{text}"),
        "differ",
    ),
    "RECORD with a line twice": (
        replace(GOOD, record=lambda text: text + text.partition("\n")[0] + "\n"),
        "differ",
    ),
    # what runs by itself
    "a path file": (GOOD.more(**{"good.pth": b"import os\n"}), "whenever Python starts"),
    "a path file by purelib": (GOOD.more(**{f"{DATA}/purelib/x.pth": b""}), "whenever"),
    "a path file in capitals": (GOOD.more(**{"X.PTH": b""}), "whenever"),
    "an egg link": (GOOD.more(**{"x.egg-link": b"/tmp\n"}), "whenever"),
    "sitecustomize": (GOOD.more(**{"sitecustomize.py": b""}), "whenever"),
    "sitecustomize as a package": (GOOD.more(**{"sitecustomize/__init__.py": b""}), "whenever"),
    "usercustomize by platlib": (
        GOOD.more(**{f"{DATA}/platlib/usercustomize.py": b""}),
        "whenever",
    ),
    "sitecustomize as native code": (
        replace(NATIVE, files={**NATIVE.files, "sitecustomize.so": b"\x7fELF"}),
        "whenever",
    ),
    "compiled code without a source": (GOOD.more(**{"good/evil.pyc": b""}), "compiled"),
    "compiled code of no module": (
        GOOD.more(**{"good/__pycache__/more.cpython-311.pyc": b""}),
        "compiled",
    ),
    "compiled code under another name": (
        GOOD.more(**{"good/__pycache__/__init__.py": b""}),
        "compiled",
    ),
    # what takes the place of another
    "a program named python": (GOOD.more(**program("python3")), "would take the place"),
    "a program named Python": (GOOD.more(**program("Python")), "would take the place"),
    "a program named pip": (GOOD.more(**program("pip")), "would take the place"),
    "a program named airgap": (GOOD.more(**program("airgap")), "would take the place"),
    "a program named activate": (GOOD.more(**program("activate")), "would take the place"),
    "a program with a path": (GOOD.more(**program("../x")), "would take the place"),
    "a program that is an option": (GOOD.more(**program("-x")), "would take the place"),
    "a window's program named python": (
        GOOD.more(**{f"{INFO}/entry_points.txt": b"[gui_scripts]\npython = good:main\n"}),
        "would take the place",
    ),
    "a script named python": (GOOD.more(**{f"{DATA}/scripts/python": b""}), "in its place"),
    "a script named airgap": (GOOD.more(**{f"{DATA}/scripts/airgap": b""}), "in its place"),
    "a script in a folder": (GOOD.more(**{f"{DATA}/scripts/a/b": b""}), "in its place"),
    "a script and a program of one name": (
        GOOD.more(**program("good"), **{f"{DATA}/scripts/good": b""}),
        "in one place",
    ),
    "a file and one of purelib": (
        GOOD.more(**{f"{DATA}/purelib/good/__init__.py": b"x = 2\n"}),
        "in one place",
    ),
    "data among the programs": (GOOD.more(**{f"{DATA}/data/bin/sh": b""}), "in its place"),
    "data among the libraries": (GOOD.more(**{f"{DATA}/data/lib/x": b""}), "in its place"),
    "data of the environment": (GOOD.more(**{f"{DATA}/data/pyvenv.cfg": b""}), "in its place"),
    "data of a new kind": (GOOD.more(**{f"{DATA}/etc/x": b""}), "in its place"),
    "data that leaves": (GOOD.more(**{f"{DATA}/data/share/../../x": b""}), "path"),
    "a path that leaves": (GOOD.more(**{"../../x.py": b""}), "path"),
    "an absolute path": (GOOD.more(**{"/x.py": b""}), "path"),
    "a path with a dot": (GOOD.more(**{"good/./__init__.py": b""}), "path"),
    "a path with an empty part": (GOOD.more(**{"good//__init__.py": b""}), "path"),
    "a path with a backslash": (GOOD.more(**{"good\\x.py": b""}), "path"),
    "a path with a drive": (GOOD.more(**{"c:x.py": b""}), "path"),
    "a path with a line break": (GOOD.more(**{"good/\nx.py": b""}), "path"),
    "native code in a pure wheel": (GOOD.more(**{"good/x.so.1": b""}), "native"),
    # the archive itself
    "a member twice": (replace(GOOD, raw=twice), "one name"),
    "a member twice but for case": (GOOD.more(**{"Good/__INIT__.py": b""}), "one name"),
    "members that overlap": (replace(GOOD, raw=overlapping), "no file, or to two"),
    "bytes of no member": (replace(GOOD, raw=with_gap), "no file"),
    "a program before the archive": (
        replace(GOOD, raw=lambda raw: b"#!/bin/sh\n" + raw),
        "no file",
    ),
    "a comment at its end": (replace(GOOD, raw=with_comment), "goes on"),
    "another name in the member's own header": (
        replace(GOOD, raw=swapped(b"good/__init__.py", b"good/__evil__.py", 1)),
        "cannot be read",
    ),
    "a member of which the name ends early": (
        replace(GOOD, files={"good/__init__.pyQ": b""}, raw=swapped(b".pyQ", b".py\0")),
        "path",
    ),
    "an encrypted member": (replace(GOOD, raw=encrypted), "read"),
    "a link": (replace(GOOD, modes={"good/__init__.py": 0o120777}), "link"),
    "a device": (replace(GOOD, modes={"good/__init__.py": 0o020666}), "special"),
    "a pipe": (replace(GOOD, modes={"good/__init__.py": 0o010666}), "special"),
    "a member that unpacks to very much": (
        GOOD.more(**{"good/zeros.txt": bytes(24 << 20)}),
        "unpacks",
    ),
    "a cut archive": (replace(GOOD, raw=lambda raw: raw[:-30]), "read"),
}


def test_the_wheels_that_the_attacks_alter_pass():
    assert GOOD.check() == ()
    assert NATIVE.check() == ("1 native libraries: _a.so", "entry points 'console_scripts': good")
    assert installed_files(memoryview(NATIVE.bytes()), NATIVE.name) >= {
        "bin/good",
        "bin/good-tool",
        "include/good/good.h",
        "share/man/man1/good.1",
        "site-packages/good/more.py",
    }


@pytest.mark.parametrize("name", ["airgap", "pip"])
def test_a_program_of_its_own_name_is_the_wheel_s_own(tmp_path, name):
    files = {
        f"{name}-1.0.dist-info/entry_points.txt": f"[console_scripts]\n{name} = x:y\n".encode()
    }
    path = wheel_index.make_wheel(tmp_path, name, "1.0", files=files)
    assert check_wheel(memoryview(path.read_bytes()), path.name)


@pytest.mark.parametrize(("draft", "reason"), SINGLE.values(), ids=SINGLE.keys())
def test_a_wheel_that_is_not_plain_is_refused(draft, reason):
    with pytest.raises(RefusedError) as caught:
        draft.check()
    assert caught.value.code == "scan.wheel"
    assert reason in caught.value.message


# -- two wheels of one environment ----------------------------------------------------------------

LIB = "cp311-cp311-manylinux_2_28_x86_64"
PAIRS = {
    "the same module": ({"shared.py": b"a"}, {"shared.py": b"b"}, "brings"),
    "the same module with the same bytes": ({"shared.py": b""}, {"shared.py": b""}, "brings"),
    "a module of the other's package": ({}, {"one/__init__.py": b"evil"}, "brings"),
    "a module more in the other's package": ({}, {"one/more.py": b""}, "would lie in"),
    "by purelib": ({}, {"two-1.0.data/purelib/one/__init__.py": b"evil"}, "brings"),
    "native code in the place of a module": (
        {"one/core.py": b""},
        {"one/core.cpython-311-x86_64-linux-gnu.so": b"\x7fELF"},
        "brings",
    ),
    "a package in the place of a module": (
        {"plain.py": b""},
        {"plain/__init__.py": b""},
        "brings",
    ),
    "a folder in the place of a module": ({"plain.py": b""}, {"plain/x.txt": b""}, "would lie in"),
    "a folder in the place of a file": ({"ns/x": b""}, {"ns/x/y": b""}, "would lie in"),
    "a file in the place of a folder": ({"ns/x/y": b""}, {"ns/x": b""}, "would lie in"),
    "the same program": (
        {"one-1.0.dist-info/entry_points.txt": b"[console_scripts]\ntool = one:x\n"},
        {"two-1.0.dist-info/entry_points.txt": b"[console_scripts]\ntool = two:x\n"},
        "bin/tool",
    ),
    "a script in the place of a program": (
        {"one-1.0.dist-info/entry_points.txt": b"[console_scripts]\ntool = one:x\n"},
        {"two-1.0.data/scripts/tool": b"#!python\n"},
        "bin/tool",
    ),
    "the same manual": (
        {"one-1.0.data/data/share/man/x.1": b""},
        {"two-1.0.data/data/share/man/x.1": b""},
        "share/man/x.1",
    ),
    "a file of a namespace": ({"ns/x.txt": b""}, {"ns/x.txt": b""}, "brings"),
    "a namespace made a package": ({"ns/x.txt": b""}, {"ns/__init__.py": b""}, "would lie in"),
}


def pair(folder, first, second):
    """Write two wheels; return what each brings."""
    paths = [
        wheel_index.make_wheel(folder, name, "1.0", tag=LIB, files=files)
        for name, files in (("one", first), ("two", second))
    ]
    brought = {}
    for path in paths:
        data = memoryview(path.read_bytes())
        check_wheel(data, path.name)
        brought[path.name] = installed_files(data, path.name)
    return brought


@pytest.mark.parametrize(("first", "second", "reason"), PAIRS.values(), ids=PAIRS.keys())
def test_wheels_that_come_into_each_other_s_way_are_refused(tmp_path, first, second, reason):
    require_disjoint(pair(tmp_path, {**first, "ns/one.txt": b""}, {"ns/two.txt": b""}))
    require_disjoint(pair(tmp_path, {}, {k: v for k, v in second.items() if "one/" not in k}))
    with pytest.raises(RefusedError) as caught:
        require_disjoint(pair(tmp_path, first, second))
    assert caught.value.code == "scan.wheel"
    assert reason in caught.value.message


def test_a_file_name_gives_name_and_version():
    assert split_wheel_name("Py_Yaml.x-1.0+cpu-1-cp311-abi3-linux_x86_64.whl") == (
        "py-yaml-x",
        "1.0+cpu",
    )
    for bad in ("x.whl", "x-1.0.tar.gz", "x-1.0-py3-none-any.whl\n", "../x-1.0-py3-none-any.whl"):
        with pytest.raises(RefusedError):
            split_wheel_name(bad)


def test_a_large_wheel_is_not_kept_in_memory_while_it_is_read(tmp_path):
    noise = random.Random(3).randbytes(36 << 20)
    path = wheel_index.make_wheel(tmp_path, "one", "1.0", tag=LIB, files={"one/lib.so": noise * 2})
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
    before = resident()
    check_wheel(memoryview(mapped), path.name)
    assert resident() - before < 48 << 20
    mapped.read()
    assert resident() - before > 48 << 20
    mapped.close()


def resident():
    """Return bytes of mapped files that this process holds in memory."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssFile:\s+(\d+) kB", text)[1]) * 1024
