"""The wheelhouse: every wheel that a secured host needs, resolved, fetched and checked.

pip resolves for the machine that the lab has and not for this one, under the pins of the product;
what it reports is walked again with the target's own markers, the edge to the hub client is cut,
and each name must stand on the list below. Each wheel passes `bundle.scan.wheel`. The result is
flat: wheels, and for each target one list that pip is later given with `--require-hashes`.
docs/design/bundle.md, 7.
"""

from __future__ import annotations

import email.parser
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from bundle.manifest import Runtime
from bundle.scan.strict import open_view
from bundle.scan.wheel import check_wheel, installed_files, require_disjoint
from bundle.scan.wheelhouse import FOLDER, INSTALLER, list_path, list_text
from bundle.write import Member
from policy.errors import FaultError, RefusedError

Accelerator = Literal["cpu", "cuda"]
EXTRAS: Mapping[Accelerator, str] = {"cpu": "cpu,science", "cuda": "gpu,science"}
OWN = "airgap"
CONSTRAINTS = "airgap/packaging/constraints.txt"  # inside our own wheel
PROVENANCE = "META/attest/wheels"
OLDEST_PYTHON = 11
DEFAULT_GLIBC = 31
OLDEST_GLIBC = 17
MAX_ROUNDS = 4
CUT_FOLDER = "cut"  # of the work folder
REPORT_LIMIT = 256 * 1024 * 1024
METADATA_LIMIT = 4 * 1024 * 1024

# Nothing but these runs in a lab. A new name is a decision of people, here and in constraints.txt.
ALLOWED: frozenset[str] = frozenset([
    "airgap", "annotated-doc", "annotated-types", "cffi", "cryptography", "flatbuffers", "gemmi",
    "jinja2", "llguidance", "markdown-it-py", "markupsafe", "mdurl", "numpy", "nvidia-cublas",
    "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "nvidia-cufft",
    "nvidia-curand", "nvidia-nvjitlink", "onnxruntime", "onnxruntime-gpu", "orjson", "packaging",
    "partialsmiles", "pillow", "pip", "protobuf", "pycparser", "pydantic", "pydantic-core",
    "pygments", "pyyaml", "rdkit", "rfc8785", "rich", "shellingham", "structlog", "tokenizers",
    "typer", "typing-extensions", "typing-inspection",
])  # fmt: skip
# tokenizers reads its files itself; the client that it declares would bring an HTTP stack along.
CUT: frozenset[tuple[str, str]] = frozenset([("tokenizers", "huggingface-hub")])

_TARGET = re.compile(r"linux-(x86_64|aarch64)-cp3(\d{1,2})(?:-glibc2\.(\d{1,2}))?")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9.+!_-]+)\s*(?:#.*)?$")


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of machine: `linux-x86_64-cp311`, with `-glibc2.28` for one older than 2.31."""

    name: str
    arch: str
    minor: int
    glibc: int

    @property
    def python(self) -> str:
        """The version of Python, `3.11`."""
        return f"3.{self.minor}"

    @property
    def platforms(self) -> tuple[str, ...]:
        """The wheel platforms that such a machine takes, the newest first."""
        newer = [f"manylinux_2_{n}_{self.arch}" for n in range(self.glibc, OLDEST_GLIBC - 1, -1)]
        older = [f"manylinux2014_{self.arch}"]
        if self.arch == "x86_64":
            older += ["manylinux_2_12_x86_64", "manylinux2010_x86_64", "manylinux_2_5_x86_64"]
            older += ["manylinux1_x86_64"]
        return (*newer, *older, f"linux_{self.arch}")

    def environment(self, extra: str) -> dict[str, str]:
        """Return what markers read on that machine."""
        return {
            **{name: str(value) for name, value in default_environment().items()},
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.arch,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
            "extra": extra,
        }


@dataclass(frozen=True, slots=True)
class Proved:
    """What is proved about who published a wheel, in words; `document` is kept and travels."""

    words: str
    document: bytes | None = None


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel that was fetched and passed every check."""

    path: Path
    name: str
    version: str
    sha256: str
    licence: str
    findings: tuple[str, ...]
    attestation: str = "absent"
    provenance: bytes | None = None

    @property
    def member_path(self) -> str:
        """Where it lies in a bundle."""
        return f"{FOLDER}/{self.path.name}"


@dataclass(frozen=True, slots=True)
class Wheelhouse:
    """What goes into `payload/wheels/`, and what the manifest says of it."""

    wheels: tuple[Wheel, ...]
    runtimes: tuple[Runtime, ...]
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes of all wheels."""
        return sum(wheel.path.stat().st_size for wheel in self.wheels)


@dataclass(frozen=True, slots=True)
class Pip:
    """How pip is called: as this host is set up for it, or on one folder of wheels alone.

    `folder` is the institution's own mirror of wheels; then nothing else is asked.
    """

    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def run(self, *words: str) -> None:
        """Run pip; its own words are the reason of a refusal.

        Raises:
            RefusedError: `build.wheels`.
            FaultError: `host.extra`; this environment has no pip.

        """
        source = () if self.folder is None else ("--no-index", "--find-links", str(self.folder))
        environment = {
            name: value
            for name, value in self.environment.items()
            if name not in {"SOURCE_DATE_EPOCH", "PYTHONPATH"}
            and (self.folder is None or not name.startswith("PIP_"))
        }
        isolated = ("--isolated",) if self.folder is not None else ()
        argv = [sys.executable, "-I", "-m", "pip", *isolated, words[0], "--quiet", *source]
        argv += ["--disable-pip-version-check", "--no-input", *words[1:]]
        done = subprocess.run(
            argv, env=environment, capture_output=True, text=True, check=False, errors="replace"
        )
        if done.returncode == 0:
            return
        if "No module named pip" in done.stderr:
            raise FaultError(
                "host.extra",
                "this environment has no pip, which resolves and fetches wheels",
                hint="python -m ensurepip; or build on a host that has pip",
            )
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        words_of_pip = _without_addresses(" ".join(lines) or done.stderr)
        raise RefusedError(
            "build.wheels",
            f"pip {words[0]}: {words_of_pip:.600}",
            hint="see that every pin of constraints.txt has a wheel for this target",
        )


def parse_target(text: str) -> Target:
    """Return the target that a text names; RefusedError `build.target`."""
    found = _TARGET.fullmatch(text)
    glibc = int(found[3] or DEFAULT_GLIBC) if found else 0
    if found is None or int(found[2]) < OLDEST_PYTHON or glibc < OLDEST_GLIBC:
        raise RefusedError(
            "build.target",
            f"{text!r:.60} is no target; one reads linux-x86_64-cp311 or linux-aarch64-cp312, with "
            f"-glibc2.28 at its end for a host with another C library than 2.{DEFAULT_GLIBC}",
            hint="on the lab's host: uname -m, python3 --version, ldd --version",
        )
    return Target(text, found[1], int(found[2]), glibc)


def collect(
    targets: Sequence[Target],
    accelerator: Accelerator,
    work: Path,
    *,
    own: Path,
    pip: Pip | None = None,
    attest: Callable[[Wheel], Proved] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Wheelhouse:
    """Gather every wheel of the targets.

    Args:
        targets: At least one, each once.
        accelerator: Which onnxruntime the hosts have.
        work: An empty folder; the wheels stay in it.
        own: Our own wheel, from `own_wheel`; its pins are the ones that count.
        pip: How pip is asked.
        attest: Says what is proved about the origin of a wheel, in words.
        progress: Told stages and units.

    Raises:
        RefusedError: `build.target`, `build.wheels`, `scan.wheel`.
        FaultError: `host.extra`, `host.io`.

    """
    if not targets or len({target.name for target in targets}) != len(targets):
        raise RefusedError("build.target", "name at least one target, and each once")
    pip, tell = pip or Pip(), progress or _silent
    constraints = work / "constraints.txt"
    constraints.write_bytes(pins_of(own))
    pins = parse_pins(constraints.read_text())
    folder = work / "wheels"
    folder.mkdir()
    chosen: dict[str, dict[str, Resolved]] = {}
    for number, target in enumerate(targets):
        tell("resolve", number, len(targets))
        found = resolve(target, accelerator, work, own=own, constraints=constraints, pip=pip)
        require_allowed(found.values(), pins)
        _fetch(target, found, folder, own=own, work=work, pip=pip)
        chosen[target.name] = found
    tell("resolve", len(targets), len(targets))
    wheels = _checked(folder, chosen, attest, tell)
    for found in chosen.values():
        digests = {each.sha256 for each in found.values()}
        paths = [wheel.path for wheel in wheels if wheel.sha256 in digests]
        require_disjoint({path.name: installed_files(open_view(path), path.name) for path in paths})
    runtimes = tuple(
        _runtime(target, accelerator, chosen[target.name])
        for target in sorted(targets, key=lambda each: each.name)
    )
    return Wheelhouse(wheels, runtimes, _members(wheels, runtimes, chosen))


def own_wheel(source: Path, work: Path, *, pip: Pip | None = None) -> Path:
    """Build our own wheel from a checkout, or take the one that `source` is.

    The build has no clock and gives the same bytes each time.

    Raises:
        RefusedError: `build.wheels`.

    """
    if source.is_file():
        return source
    if not (source / "pyproject.toml").is_file():
        raise RefusedError(
            "build.wheels",
            f"{str(source)!r:.160} is neither a wheel of airgap nor its source",
            hint="name the checkout, or the wheel that this host was installed from: --airgap",
        )
    folder = work / "own"
    folder.mkdir()
    limits = source / "constraints.txt"
    words = ["wheel", "--no-deps", "--wheel-dir", str(folder)]
    words += ["--build-constraint", str(limits)] if limits.is_file() else []
    (pip or Pip()).run(*words, str(source))
    return next(folder.glob("*.whl"))


def default_source() -> Path:
    """Return the checkout that this program runs from; without one, a path that does not exist."""
    return Path(str(resources.files("bundle"))).parent


def pins_of(own: Path) -> bytes:
    """Return the pins that our wheel carries."""
    try:
        with zipfile.ZipFile(own) as archive:
            return archive.read(CONSTRAINTS)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise RefusedError(
            "build.wheels", f"{own.name!r:.100} is no wheel of airgap with its pins: {error!s:.100}"
        ) from error


def parse_pins(text: str) -> dict[str, str]:
    """Return the version of each pinned name."""
    found = (_PIN.match(line.strip()) for line in text.splitlines())
    return {canonicalize_name(pin[1]): pin[2] for pin in found if pin}


@dataclass(frozen=True, slots=True)
class Resolved:
    """One distribution as pip resolved it."""

    name: str
    version: str
    sha256: str
    requires: tuple[str, ...]


def resolve(
    target: Target,
    accelerator: Accelerator,
    work: Path,
    *,
    own: Path,
    constraints: Path,
    pip: Pip,
) -> dict[str, Resolved]:
    """Return what the target needs, by canonical name, our own distribution and pip among it.

    pip reads markers as those of this host, so what only the target needs is asked for by name in
    a next round, and what only this host would need is dropped.
    """
    _write_stubs(work / CUT_FOLDER, parse_pins(constraints.read_text()))
    wanted = [f"{OWN}[{EXTRAS[accelerator]}] @ {own.absolute().as_uri()}", "pip"]
    start = {OWN: frozenset(EXTRAS[accelerator].split(",")), "pip": frozenset[str]()}
    for _ in range(MAX_ROUNDS):
        offered = _report(target, wanted, work, constraints, pip)
        kept, missing = closure(start, offered, target)
        if not missing:
            return {name: offered[name] for name in kept}
        wanted += sorted(missing)
    raise RefusedError(
        "build.wheels",
        f"pip does not resolve {', '.join(sorted(missing))!s:.200} for {target.name}",
        hint=f"build on a host with Python {target.python}",
    )


def closure(
    start: Mapping[str, Iterable[str]], offered: Mapping[str, Resolved], target: Target
) -> tuple[frozenset[str], frozenset[str]]:
    """Walk the requirements with the markers of the target; return what is kept, what is missing.

    Args:
        start: Names and the extras wanted of them.
        offered: What pip resolved.
        target: Whose markers count.

    """
    extras: dict[str, set[str]] = {}
    missing: set[str] = set()
    pending = [(name, frozenset(wanted)) for name, wanted in start.items()]
    while pending:
        name, wanted = pending.pop()
        if name in extras and wanted <= extras[name]:
            continue
        extras.setdefault(name, set()).update(wanted)
        for text in offered[name].requires if name in offered else ():
            try:
                needed = Requirement(text)
            except InvalidRequirement as error:
                raise RefusedError("build.wheels", f"{name} requires {text!r:.120}") from error
            other = canonicalize_name(needed.name)
            if (name, other) in CUT or not _applies(needed, target, extras[name]):
                continue
            if other not in offered:
                missing.add(str(needed).partition(";")[0].strip())
            else:
                pending.append((other, frozenset(needed.extras)))
    return frozenset(extras), frozenset(missing)


def require_allowed(found: Iterable[Resolved], pins: Mapping[str, str]) -> None:
    """Refuse a name that nobody decided on, and a version that is not the pinned one."""
    for each in found:
        if each.name not in ALLOWED:
            raise RefusedError(
                "build.wheels",
                f"{each.name!r:.80} is on no list of what may run in a lab",
                hint="people decide that: a line in bundle/staging/wheelhouse.py and a pin",
            )
        if each.name != OWN and pins.get(each.name) != each.version:
            raise RefusedError(
                "build.wheels",
                f"{each.name} {each.version} was resolved; "
                f"constraints.txt pins {pins.get(each.name, 'nothing')}",
            )


def licence_of(path: Path) -> str:
    """Return the licence that a wheel's own METADATA states; `NOASSERTION` where it states none."""
    stem = "-".join(path.name.split("-")[:2])
    with zipfile.ZipFile(path) as archive:
        raw = archive.read(f"{stem}.dist-info/METADATA")[:METADATA_LIMIT]
    head = email.parser.BytesHeaderParser().parsebytes(raw)
    stated = (head.get("License-Expression") or "").strip()
    classified = [
        text.rpartition("::")[2].strip()
        for text in head.get_all("Classifier") or []
        if text.startswith("License ::") and not text.endswith("OSI Approved")
    ]
    lines = (head.get("License") or "").strip().splitlines()
    free = lines[0].strip() if len(lines) == 1 else ""
    found = stated or free or " AND ".join(sorted(set(classified))) or "NOASSERTION"
    return "".join(c if c.isprintable() else " " for c in found)[:200]


def _report(
    target: Target, wanted: Sequence[str], work: Path, constraints: Path, pip: Pip
) -> dict[str, Resolved]:
    """Let pip resolve, and read its report."""
    place = work / f"{target.name}.report.json"
    pip.run(
        *("install", "--dry-run", "--ignore-installed", "--report", str(place)),
        *("--find-links", str(work / CUT_FOLDER), "--target", str(work / "nowhere")),
        *(*_for(target), "-c", str(constraints), *wanted),
    )
    if place.stat().st_size > REPORT_LIMIT:
        raise RefusedError("build.wheels", "the report of pip is too large to be one")
    found = {}
    for item in json.loads(place.read_bytes()).get("install", []):
        each = _resolved(item)
        found[each.name] = each
    return found


def _write_stubs(folder: Path, pins: Mapping[str, str]) -> None:
    """Write a stand-in for each end of a cut edge, so that a mirror need not hold what is cut.

    pip resolves with it and no more: the edge is cut from its answer, and nothing of that name may
    be fetched.
    """
    folder.mkdir(exist_ok=True)
    for _, name in CUT:
        version, plain = pins.get(name), name.replace("-", "_")
        info = f"{plain}-{version}.dist-info"
        if version is None:
            continue
        with zipfile.ZipFile(folder / f"{plain}-{version}-py3-none-any.whl", "w") as stub:
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            stub.writestr(f"{info}/METADATA", about)
            tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            stub.writestr(f"{info}/WHEEL", tags)
            stub.writestr(f"{info}/RECORD", "")


def _resolved(item: Any) -> Resolved:
    try:
        about = item["metadata"]
        return Resolved(
            canonicalize_name(str(about["name"])),
            str(about["version"]),
            str(item["download_info"]["archive_info"]["hashes"]["sha256"]),
            tuple(str(text) for text in about.get("requires_dist", [])),
        )
    except (KeyError, TypeError) as error:
        raise RefusedError(
            "build.wheels", f"the report of pip names a wheel without {error!s:.60}"
        ) from error


def _for(target: Target) -> list[str]:
    """Return the options that make pip choose for the target."""
    words = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", target.python]
    for abi in (f"cp3{target.minor}", "abi3", "none"):
        words += ["--abi", abi]
    for platform in target.platforms:
        words += ["--platform", platform]
    return words


def _fetch(
    target: Target, found: Mapping[str, Resolved], folder: Path, *, own: Path, work: Path, pip: Pip
) -> None:
    """Fetch exactly what was resolved, by digest; our own wheel is here already."""
    lines = [
        f"{each.name}=={each.version} --hash=sha256:{each.sha256}"
        for name, each in sorted(found.items())
        if name != OWN
    ]
    wanted = work / f"{target.name}.txt"
    wanted.write_text("\n".join(lines) + "\n")
    words = ["download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    pip.run(*words, *_for(target), "-r", str(wanted))
    place = folder / own.name
    if not place.exists():
        place.write_bytes(own.read_bytes())


def _checked(
    folder: Path,
    chosen: Mapping[str, Mapping[str, Resolved]],
    attest: Callable[[Wheel], Proved] | None,
    tell: Callable[[str, int, int], None],
) -> tuple[Wheel, ...]:
    """Parse every file of the folder: exactly what was resolved must be there."""
    wanted = {each.sha256: each for found in chosen.values() for each in found.values()}
    paths = sorted(folder.iterdir())
    wheels = []
    for number, path in enumerate(paths):
        tell("wheels", number, len(paths))
        data = open_view(path)
        sha256 = hashlib.sha256(data).hexdigest()
        known = wanted.pop(sha256, None)
        if known is None:
            raise RefusedError("build.wheels", f"{path.name!r:.100} is not what was resolved")
        findings = check_wheel(data, path.name)
        wheel = Wheel(path, known.name, known.version, sha256, licence_of(path), findings)
        if attest is not None and known.name != OWN:
            proved = attest(wheel)
            wheel = replace(wheel, attestation=proved.words, provenance=proved.document)
        wheels.append(wheel)
    tell("wheels", len(paths), len(paths))
    if wanted:
        names = ", ".join(sorted(each.name for each in wanted.values()))
        raise RefusedError("build.wheels", f"not fetched: {names:.300}")
    return tuple(wheels)


def _runtime(target: Target, accelerator: Accelerator, found: Mapping[str, Resolved]) -> Runtime:
    return Runtime(
        target=target.name,
        python=target.python,
        os="linux",
        arch=target.arch,
        accelerator=accelerator,
        packages={name: each.version for name, each in sorted(found.items())},
    )


def _members(
    wheels: Sequence[Wheel],
    runtimes: Sequence[Runtime],
    chosen: Mapping[str, Mapping[str, Resolved]],
) -> tuple[Member, ...]:
    from bundle.staging.bootstrap import installer_text

    members = [
        Member(wheel.member_path, wheel.path, "wheel", "application/zip", sha256=wheel.sha256)
        for wheel in wheels
    ]
    members += [
        Member(f"{PROVENANCE}/{wheel.path.name}.provenance", wheel.provenance, "attestation")
        for wheel in wheels
        if wheel.provenance is not None
    ]
    for runtime in runtimes:
        pairs = {name: (each.version, each.sha256) for name, each in chosen[runtime.target].items()}
        members.append(
            Member(list_path(runtime), list_text(runtime, pairs), "document", "text/plain")
        )
    members.append(Member(INSTALLER, installer_text(), "installer", "text/x-shellscript"))
    return tuple(members)


def _applies(needed: Requirement, target: Target, extras: Iterable[str]) -> bool:
    if needed.marker is None:
        return True
    return any(needed.marker.evaluate(target.environment(extra)) for extra in ("", *extras))


def _without_addresses(text: str) -> str:
    """Return pip's words without the addresses of this host's package index."""
    return " ".join(re.sub(r"\b[a-z+]+://\S+", "(address)", text).split())


def _silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""
