"""The wheelhouse: resolved for the target, nothing but the list of names, the same bytes twice."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import bundles
import pytest
import wheel_index

from airgap.cli.bundle import verify_view
from bundle.manifest import Runtime
from bundle.scan.payload import Finding, ScanReport
from bundle.scan.wheelhouse import INSTALLER, list_text, parse_list, require_wheelhouse
from bundle.staging.bootstrap import ATTEST, WheelFacts, build_wheels, installer_text
from bundle.staging.wheelhouse import (
    ALLOWED,
    Pip,
    Resolved,
    closure,
    collect,
    default_source,
    licence_of,
    own_wheel,
    parse_pins,
    parse_target,
    require_allowed,
)
from bundle.verify import verify_bundle
from bundle.write import Member
from policy.errors import FaultError, RefusedError

TARGET = "linux-x86_64-cp311"
FACTS = WheelFacts("runtime", "1.0", bundles.CREATED, bundles.NOW + timedelta(days=99), 1)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return wheel_index.make_index(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return wheel_index.make_own(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def house(tmp_path_factory, index, own):
    return gather(tmp_path_factory.mktemp("work"), index, own)


def gather(work, index, own, *targets, accelerator="cpu", pip=Pip):
    found = [parse_target(name) for name in targets or (TARGET,)]
    return collect(found, accelerator, work, own=own, pip=pip(index))


def build(house, out):
    return build_wheels(
        house, out, FACTS, trust=bundles.make_trust(), signer=bundles.signer("builder")
    )


def refused(code, call, *words, **named):
    with pytest.raises((RefusedError, FaultError)) as caught:
        call(*words, **named)
    assert caught.value.code == code, caught.value.message
    return caught.value.message


# -- what is gathered -----------------------------------------------------------------------------


def test_the_wheels_are_those_that_the_target_needs(house):
    names = {wheel.name for wheel in house.wheels}
    assert names == {
        "airgap",
        "pip",
        "pydantic",
        "onnxruntime",
        "tokenizers",
        "numpy",
        "flatbuffers",
    }
    runtime = house.runtimes[0]
    assert (runtime.target, runtime.python, runtime.arch) == (TARGET, "3.11", "x86_64")
    assert set(runtime.packages) == names
    assert {wheel.licence for wheel in house.wheels} >= {"MIT"}
    assert {wheel.attestation for wheel in house.wheels} == {"absent"}


def test_the_hub_client_stays_behind_and_would_be_refused(index, house):
    assert (index / "huggingface_hub-0.36.2-py3-none-any.whl").exists()
    assert "huggingface-hub" not in house.runtimes[0].packages
    assert "huggingface-hub" not in ALLOWED


def test_a_gpu_target_takes_the_libraries_along(tmp_path, index, own):
    house = gather(tmp_path, index, own, accelerator="cuda")
    names = set(house.runtimes[0].packages)
    assert names >= {"onnxruntime-gpu", "nvidia-cublas", "nvidia-cudnn-cu13", "tokenizers"}
    assert "onnxruntime" not in names
    assert [m.path for m in house.members if m.role == "document"] == [
        f"payload/wheels/{TARGET}-cuda.txt"
    ]


def test_two_targets_share_what_is_the_same_and_markers_are_those_of_the_target(tmp_path, own):
    other = tmp_path / "index"
    wheel_index.make_index(other)
    for name in ("onnxruntime", "numpy"):
        version = wheel_index.CPU[name][0]
        requires = wheel_index.CPU[name][1]
        wheel_index.make_wheel(other, name, version, requires, "cp312-cp312-manylinux_2_28_aarch64")
    for path in (*other.glob("huggingface_hub-*"), *other.glob("requests-*")):
        path.unlink()  # a mirror need not hold what is cut
    wheel_index.make_wheel(
        other, "tokenizers", "0.22.2", ("huggingface-hub",), "cp39-abi3-manylinux_2_17_aarch64"
    )
    work = tmp_path / "work"
    work.mkdir()
    house = gather(work, other, own, TARGET, "linux-aarch64-cp312")
    arm, intel = house.runtimes
    assert (arm.arch, arm.python, intel.arch) == ("aarch64", "3.12", "x86_64")
    # asked for by the marker of 3.12 alone, on a builder that runs 3.11
    assert "typing-extensions" in arm.packages
    assert "typing-extensions" not in intel.packages
    assert sum(wheel.name == "pydantic" for wheel in house.wheels) == 1
    assert sum(wheel.name == "numpy" for wheel in house.wheels) == 2


def test_a_wheel_that_the_target_cannot_run_is_not_taken(tmp_path, index, own):
    refused("build.wheels", gather, tmp_path, index, own, "linux-aarch64-cp311")


def test_a_name_that_is_on_no_list_is_refused(tmp_path):
    wheel_index.make_wheel(tmp_path, "left-pad", "1.0")
    own = wheel_index.make_own(tmp_path, extra=("left-pad",))
    folder = tmp_path / "index"
    wheel_index.make_index(folder)
    wheel_index.make_wheel(folder, "left-pad", "1.0")
    work = tmp_path / "work"
    work.mkdir()
    assert "left-pad" in refused("build.wheels", gather, work, folder, own, pip=wheel_index.OnePip)


def test_a_version_that_is_not_pinned_is_refused():
    good = Resolved("numpy", "2.4.6", "0" * 64, ())
    require_allowed([good], {"numpy": "2.4.6"})
    refused("build.wheels", require_allowed, [good], {"numpy": "2.4.5"})
    refused("build.wheels", require_allowed, [good], {})


BAD_WHEELS = {
    "runs when Python starts": {"flatbuffers.pth": b"import os\n"},
    "telemetry client": {"flatbuffers/x.py": b"# One" + b"Collector"},
    "native code under a pure tag": {"flatbuffers/_x.so": b"\x7fELF"},
    "a script in place of the interpreter": {
        "flatbuffers-25.12.19.data/scripts/python": b"#!/bin/sh\n"
    },
    "data in place of the interpreter": {"flatbuffers-25.12.19.data/data/bin/python3": b"x"},
    "data among the libraries": {"flatbuffers-25.12.19.data/data/lib/python3.11/x.py": b"x"},
    "a command in place of the interpreter": {
        "flatbuffers-25.12.19.dist-info/entry_points.txt": (
            b"[console_scripts]\npython3 = flatbuffers:main\n"
        )
    },
    "a path that leaves": {"flatbuffers/../../x.py": b"x"},
}


@pytest.mark.parametrize("files", BAD_WHEELS.values(), ids=BAD_WHEELS.keys())
def test_a_wheel_that_is_not_plain_is_refused(tmp_path, own, files):
    folder = tmp_path / "index"
    wheel_index.make_index(folder)
    wheel_index.make_wheel(folder, "flatbuffers", "25.12.19", files=files)
    work = tmp_path / "work"
    work.mkdir()
    refused("scan.wheel", gather, work, folder, own, pip=wheel_index.OnePip)


# -- pure parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linux",
        "win-x86_64-cp311",
        "linux-x86_64-cp310",
        "linux-x86_64-cp311-glibc2.5",
        "x" * 99,
    ],
)
def test_what_is_no_target_is_refused(text):
    refused("build.target", parse_target, text)


def test_a_target_names_its_platforms():
    old = parse_target("linux-x86_64-cp312-glibc2.28")
    assert old.platforms[0] == "manylinux_2_28_x86_64"
    assert "manylinux1_x86_64" in old.platforms
    arm = parse_target("linux-aarch64-cp313")
    assert arm.platforms[0] == "manylinux_2_31_aarch64"
    assert "manylinux1_x86_64" not in arm.platforms
    assert arm.python == "3.13"


def test_no_target_and_one_twice_are_refused(tmp_path, own):
    refused("build.target", collect, [], "cpu", tmp_path, own=own)
    twice = [parse_target(TARGET)] * 2
    refused("build.target", collect, twice, "cpu", tmp_path, own=own)


def test_the_closure_cuts_the_client_and_finds_what_is_missing():
    offered = {
        "airgap": Resolved("airgap", "1", "", ('tokenizers; extra == "cpu"', "rich")),
        "tokenizers": Resolved("tokenizers", "1", "", ("huggingface_hub>=0.1",)),
        "huggingface-hub": Resolved("huggingface-hub", "1", "", ()),
    }
    kept, missing = closure({"airgap": ["cpu"]}, offered, parse_target(TARGET))
    assert kept == {"airgap", "tokenizers"}
    assert missing == {"rich"}
    assert closure({"airgap": []}, offered, parse_target(TARGET))[0] == {"airgap"}
    bad = {"airgap": Resolved("airgap", "1", "", ("not a requirement !",))}
    refused("build.wheels", closure, {"airgap": []}, bad, parse_target(TARGET))


def test_pins_are_read_from_constraints():
    assert parse_pins("# c\nA_b==1.0\nc.d==2  # why\n\nbad line\n") == {"a-b": "1.0", "c-d": "2"}


HEADERS = {
    "License-Expression: MIT OR X\n": "MIT OR X",
    "License: BSD\n": "BSD",
    "License: line\n two\nClassifier: License :: OSI Approved :: MIT License\n": "MIT License",
    "Classifier: License :: OSI Approved\n": "NOASSERTION",
    "": "NOASSERTION",
}


@pytest.mark.parametrize(("headers", "found"), HEADERS.items())
def test_the_licence_is_what_the_wheel_states(tmp_path, headers, found):
    assert licence_of(wheel_index.make_wheel(tmp_path, "a", "1", headers=headers)) == found


def test_our_own_wheel_needs_its_pins_and_its_source(tmp_path, own):
    assert own_wheel(own, tmp_path) == own
    refused("build.wheels", own_wheel, tmp_path, tmp_path)
    bare = wheel_index.make_wheel(tmp_path, "airgap", "1")
    refused("build.wheels", gather, tmp_path, tmp_path, bare)
    assert (default_source() / "pyproject.toml").is_file()


def test_pip_says_why_without_the_address_of_its_index(tmp_path):
    pip = Pip(tmp_path / "https://index.example/simple")
    message = refused("build.wheels", pip.run, "download", "-d", str(tmp_path), "numpy")
    assert "numpy" in message
    assert "example" not in message.partition("numpy")[0] or "(address)" in message


# -- the release ----------------------------------------------------------------------------------


def test_a_release_of_wheels_alone_is_verified_and_lists_all(tmp_path, house):
    built = build(house, tmp_path / "a.agb")
    assert built.manifest.models == ()
    assert built.manifest.find(INSTALLER).role == "installer"
    wheel_index.approve(tmp_path / "a.agb")
    report = verify_bundle(tmp_path / "a.agb", bundles.make_trust(), now=bundles.NOW)
    assert report.manifest.digest == built.manifest.digest
    with open_at(tmp_path / "a.agb") as sealed:
        bom = json.loads(sealed.read("META/sbom/bom.cdx.json"))
        assert {c["name"] for c in bom["components"] if c["type"] == "library"} == {
            wheel.name for wheel in house.wheels
        }
        attested = json.loads(sealed.read(ATTEST))
        assert len(attested["subject"]) == len(house.wheels)
        assert sealed.read(INSTALLER) == installer_text()


def test_the_screen_counts_what_every_wheel_has_and_tells_what_is_odd(tmp_path, house):
    build(house, tmp_path / "a.agb")
    wheel_index.approve(tmp_path / "a.agb")
    report = verify_bundle(tmp_path / "a.agb", bundles.make_trust(), now=bundles.NOW)
    said = verify_view(report)
    count = len(house.wheels)
    assert f"{count} for {TARGET} cpu: 1 with native code, 2 with programs" in said
    assert "note" not in said
    long = verify_view(report, verbose=True)
    assert all(each.text in long and each.path in long for each in report.scan.findings)
    odd = [
        Finding("payload/wheels/numpy-2.4.6-cp311-cp311-linux_x86_64.whl", text)
        for text in ("entry points 'pip.plugins': evil", "2 native libraries: a.so, b.so", "other")
    ]
    files = {odd[0].path: "wheel"}
    more = replace(report, scan=ScanReport({**report.scan.files, **files}, tuple(odd)))
    said = verify_view(more)
    assert "numpy 2.4.6: entry points 'pip.plugins': evil; other" in said
    assert "a.so" not in said
    many = tuple(Finding(f"payload/tiny/{n}.json", f"key {n}") for n in range(40))
    said = verify_view(replace(report, scan=ScanReport(report.scan.files, many)))
    assert said.count("note") == 13
    assert "28 more: airgap verify --verbose" in said


ELSEWHERE = """
import hashlib, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
os.umask(0o077)
from test_wheelhouse import build, gather
index, own, out, target = map(Path, sys.argv[3:])
work = out.parent / "other work"
work.mkdir()
build(gather(work, index, own, str(target)), out)
"""


@pytest.mark.parametrize(
    "target",
    [
        "linux-aarch64-cp312",
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in (TARGET, "linux-x86_64-cp312-glibc2.28")
        ),
    ],
)
def test_the_same_bundle_built_twice_has_the_same_bytes(tmp_path, own, target):
    """Here, and in a process with another hash seed, zone, umask and order of the index."""
    arch, python = target.split("-")[1:3]
    index, shuffled = tmp_path / "index", tmp_path / "shuffled"
    wheel_index.make_index(index, f"{python}-{python}-manylinux_2_28_{arch}")
    shuffled.mkdir()
    for number, path in enumerate(sorted(index.iterdir(), reverse=True)):
        shutil.copyfile(path, shuffled / path.name)
        os.utime(shuffled / path.name, (number, number))
    work = tmp_path / "work"
    work.mkdir()
    build(gather(work, index, own, target), tmp_path / "one.agb")
    folders = [str(Path(__file__).parent), str(Path(wheel_index.__file__).parent)]
    words = [*folders, shuffled, own, tmp_path / "two.agb", target]
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *words],
        check=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONHASHSEED": "1",
            "TZ": "Asia/Tokyo",
            "LC_ALL": "C",
            "SOURCE_DATE_EPOCH": "1",
        },
    )
    digests = {
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("one.agb", "two.agb")
    }
    assert len(digests) == 1


def open_at(path):
    from bundle.verify import open_bundle

    return open_bundle(path, bundles.make_trust(), now=bundles.NOW)


RUNTIME = Runtime(
    target=TARGET, python="3.11", os="linux", arch="x86_64", accelerator="cpu", packages={"a": "1"}
)


def test_a_list_has_one_form():
    raw = list_text(RUNTIME, {"a": ("1", "0" * 64)})
    assert parse_list(raw, RUNTIME) == {"a": ("1", "0" * 64)}
    for bad in (raw + b"\n", raw.replace(b"a==", b"A=="), raw[:-1], b"", raw + raw):
        refused("scan.wheel", parse_list, bad, RUNTIME)


ALTERED = {
    "a wheel is added": lambda m: [
        *m,
        Member("payload/wheels/x-1-py3-none-any.whl", b"x", "wheel"),
    ],
    "a wheel is missing": lambda m: [each for each in m if "numpy" not in each.path],
    "a wheel is replaced": lambda m: [
        Member(each.path, b"other", each.role) if "numpy" in each.path else each for each in m
    ],
    "the list is missing": lambda m: [each for each in m if not each.path.endswith(".txt")],
    "the installer is missing": lambda m: [each for each in m if each.path != INSTALLER],
    "a document is added": lambda m: [*m, Member("payload/wheels/x.txt", b"x", "document")],
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED.keys())
def test_lists_and_wheels_must_agree(tmp_path, house, alter):
    def check(members):
        sources = {m.path: m.source for m in members}

        def read(path):
            found = sources[path]
            return memoryview(found if isinstance(found, bytes) else found.read_bytes())

        manifest = bundles.make_bundle(
            tmp_path / "x.agb",
            members=[*bundles.make_members(), *members],
            runtimes=house.runtimes,
        )
        require_wheelhouse(manifest, read)

    check(list(house.members))
    refused("scan.wheel", check, alter(list(house.members)))


def test_wheels_without_a_runtime_and_a_release_of_nothing_are_refused(tmp_path, house):
    members = [*bundles.make_members(), *house.members]
    manifest = bundles.make_bundle(tmp_path / "x.agb", members=members)
    refused("scan.wheel", require_wheelhouse, manifest, lambda _: memoryview(b""))
    refused("manifest.schema", bundles.make_bundle, tmp_path / "y.agb", members=[], models=())
