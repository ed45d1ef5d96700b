"""`payload/wheels/`: wheels, one list for each kind of machine, and the installer; nothing else.

Decides whether the lists name exactly the wheels that are there, by digest, and say the same as
`runtimes` of the manifest, and whether wheels of one list come into each other's way. Both sides
call it; the installer repeats it before it starts pip.
FORMAT.md section 23.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from bundle.manifest import Manifest, Runtime
from bundle.scan.wheel import installed_files, require_disjoint, split_wheel_name
from policy.errors import RefusedError

CODE = "scan.wheel"
FOLDER = "payload/wheels"
INSTALLER = f"{FOLDER}/install.sh"
LIST_LIMIT = 1024 * 1024
_LINE = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([A-Za-z0-9.+!_-]+) --hash=sha256:([0-9a-f]{64})")


def list_path(runtime: Runtime) -> str:
    """Return where the list of a runtime lies."""
    return f"{FOLDER}/{runtime.target}-{runtime.accelerator}.txt"


def list_text(runtime: Runtime, packages: Mapping[str, tuple[str, str]]) -> bytes:
    """Return the list in the form of pip's requirements: name, version and SHA-256, sorted."""
    head = f"# {runtime.target}, {runtime.accelerator}: {len(packages)} wheels\n"
    lines = [
        f"{name}=={version} --hash=sha256:{sha256}\n"
        for name, (version, sha256) in sorted(packages.items())
    ]
    return (head + "".join(lines)).encode()


def parse_list(raw: bytes, runtime: Runtime) -> dict[str, tuple[str, str]]:
    """Return version and SHA-256 by name; RefusedError `scan.wheel` for any other form."""
    found: dict[str, tuple[str, str]] = {}
    text = raw[:LIST_LIMIT].decode("utf-8", "replace")
    for line in text.splitlines()[1:]:
        match = _LINE.fullmatch(line)
        if match is None:
            raise _no(f"{list_path(runtime)}: {line!r:.120} is no line of a list")
        found[match[1]] = (match[2], match[3])
    if list_text(runtime, found) != raw:
        raise _no(f"{list_path(runtime)} is not of the one form that it is written in")
    return found


def require_wheelhouse(manifest: Manifest, read: Callable[[str], memoryview]) -> None:
    """Check that lists, runtimes and wheels say the same.

    Raises:
        RefusedError: `scan.wheel`.

    """
    inside = {e.path: e for e in manifest.files if e.path.startswith(f"{FOLDER}/")}
    if not manifest.runtimes:
        if inside:
            raise _no(f"{min(inside)!r:.100} belongs to no runtime of the manifest")
        return
    lists = {list_path(runtime): runtime for runtime in manifest.runtimes}
    if len(lists) != len(manifest.runtimes):
        raise _no("the manifest names a runtime twice")
    others = {path for path, entry in inside.items() if entry.role != "wheel"}
    if others != {*lists, INSTALLER}:
        odd = min(others ^ {*lists, INSTALLER})
        raise _no(f"{odd!r:.100} is missing, or belongs to no runtime of the manifest")
    wheels = {entry.sha256: path for path, entry in inside.items() if entry.role == "wheel"}
    wanted: set[str] = set()
    for path, runtime in sorted(lists.items()):
        found = parse_list(bytes(read(path)), runtime)
        if {name: version for name, (version, _) in found.items()} != runtime.packages:
            raise _no(f"{path} and the manifest name other packages")
        _require_environment(found, wheels, read)
        wanted |= {sha256 for _, sha256 in found.values()}
    unlisted = min(wheels.keys() - wanted, default=None)
    if unlisted is not None:
        raise _no(f"{wheels[unlisted]!r:.160} stands on no list")


def _require_environment(
    found: Mapping[str, tuple[str, str]],
    wheels: Mapping[str, str],
    read: Callable[[str], memoryview],
) -> None:
    """Check that each line names a wheel of that name and version, and that all fit together."""
    brought: dict[str, frozenset[str]] = {}
    for name, (version, sha256) in sorted(found.items()):
        if sha256 not in wheels:
            raise _no(f"a list names the wheel {sha256}, which is not there")
        file = wheels[sha256].rpartition("/")[2]
        if split_wheel_name(file) != (name, version):
            raise _no(f"a list names {file!r:.100} as {name} {version}")
        brought[file] = installed_files(read(wheels[sha256]), file)
    require_disjoint(brought)


def _no(reason: str) -> RefusedError:
    return RefusedError(CODE, reason, hint="build the wheelhouse again")
