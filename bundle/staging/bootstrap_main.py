"""The last part of `install.sh`: the wheels for this host, and the environment made of them.

It runs from inside the shell script on a host that has nothing of ours, after `bootstrap_seal` has
said that the bundle is sealed. It takes the wheels out, each by its sealed digest, makes an
environment of its own from them, and hands over to `airgap bootstrap`, which verifies everything
once more and completely. Until all checks hold it writes nothing outside of a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bundle.scan.wheel import check_wheel, installed_files, require_disjoint, split_wheel_name
from bundle.staging.bootstrap_medium import (
    HEAD,
    Medium,
    Stop,
    clean,
    fault,
    held,
    open_medium,
    parse,
    refuse,
    require_own,
    require_place,
    work_folder,
)
from bundle.staging.bootstrap_seal import (
    Judge,
    approves_rollback,
    follow_roots,
    read_held,
    require_epoch,
    require_time,
    verify_seal,
)
from policy.errors import RefusedError

FOLDER = "payload/wheels"
INSTALLER = f"{FOLDER}/install.sh"
SCRIPT_LIMIT = 1 << 20
UNPACKED = 6  # times the bytes of the wheels, compiled code included
MARGIN = 64 << 20
LINE = re.compile(r"([a-z0-9-]+)==([A-Za-z0-9.+!_-]+) --hash=sha256:([0-9a-f]{64})")
DONE = "airgap-runtime.json"


@dataclass
class Transcript:
    """What was said, with the time of each line; it becomes an object of the audit log.

    `begun` is set when the host itself may have changed, so that nobody is told otherwise.
    """

    lines: list[str] = field(default_factory=list)
    begun: bool = False

    def say(self, text: str) -> None:
        """Print a line and keep it; a reader who went away is no reason to stop half-way."""
        shown = clean(text)
        self.lines.append(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {shown}")
        if sys.stdout is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.write(shown + "\n")
                sys.stdout.flush()


# -- what this host takes -------------------------------------------------------------------------


def choose_runtime(manifest: Mapping[str, Any], accelerator: str | None) -> dict[str, Any]:
    """Return the runtime of the manifest that this interpreter on this machine can run.

    Raises:
        Stop: `install.target`.

    """
    arch, python = platform.machine(), f"{sys.version_info.major}.{sys.version_info.minor}"
    libc = platform.libc_ver()
    odd = sysconfig.get_config_var("Py_GIL_DISABLED") or sys.maxsize < 1 << 32
    if sys.implementation.name != "cpython" or odd:
        raise refuse(
            "install.target",
            f"{sys.executable} is no CPython of the ordinary kind with 64 bits, which wheels need",
            "name another interpreter: sh install.sh --python /usr/bin/python3 ...",
        )
    glibc = int(libc[1].split(".")[1]) if libc[0] == "glibc" else 0
    offered = manifest.get("runtimes", [])
    fitting = []
    for each in offered:
        needs = re.search(r"-glibc2\.(\d+)$", each["target"])
        new_enough = glibc >= int(needs[1] if needs else 31)
        same = each["os"] == "linux" and each["arch"] == arch and each["python"] == python
        if same and new_enough and accelerator in {None, each["accelerator"]}:
            fitting.append(each)
    if len(fitting) == 1:
        return dict(fitting[0])
    if fitting:
        fitting.sort(key=lambda each: each["target"])
        if len({each["accelerator"] for each in fitting}) == 1:
            return dict(fitting[-1])
        raise refuse("install.target", "wheels for cpu and cuda: say which with --accelerator")
    known = ", ".join(f"{e['target']} ({e['accelerator']})" for e in offered) or "none"
    raise refuse(
        "install.target",
        f"this host is {arch} with Python {python} and {libc[0] or 'no glibc'} {libc[1]}; the "
        f"bundle has wheels for: {known}",
        "name another interpreter with --python, or have a bundle built for this --target",
    )


@dataclass(frozen=True)
class Wanted:
    """The wheels of a runtime: entries of the manifest by distribution name."""

    lines: dict[str, tuple[str, str]]
    entries: dict[str, dict[str, Any]]
    digest: str  # of the list

    @property
    def size(self) -> int:
        """Bytes of all wheels."""
        return sum(entry["size"] for entry in self.entries.values())


def wanted_wheels(
    medium: Medium, manifest: Mapping[str, Any], runtime: Mapping[str, Any]
) -> Wanted:
    """Return the wheels that the list of the runtime names; each must be a listed file.

    Raises:
        Stop: `install.wheel`.

    """
    files = {entry["path"]: entry for entry in manifest["files"]}
    path = f"{FOLDER}/{runtime['target']}-{runtime['accelerator']}.txt"
    entry = files.get(path)
    if entry is None:
        raise refuse("install.wheel", f"{path} is missing")
    raw = b"".join(medium.read(entry["offset"], entry["size"]))
    if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
        raise refuse("install.wheel", f"{path} is not the sealed one", "copy the bundle again")
    wheels = {e["sha256"]: e for p, e in files.items() if p.startswith(f"{FOLDER}/")}
    lines, entries = {}, {}
    for line in raw.decode("ascii").splitlines()[1:]:
        found = LINE.fullmatch(line)
        if found is None or found[3] not in wheels:
            raise refuse("install.wheel", f"{line!r:.120} names no wheel of the bundle")
        file = str(wheels[found[3]]["path"]).rpartition("/")[2]
        if split_wheel_name(file) != (found[1], found[2]):
            raise refuse("install.wheel", f"{line!r:.120} names {file!r:.100}")
        lines[found[1]] = (found[2], found[3])
        entries[found[1]] = wheels[found[3]]
    if {name: version for name, (version, _) in lines.items()} != runtime["packages"]:
        raise refuse("install.wheel", f"{path} and the manifest name other packages")
    return Wanted(lines, entries, entry["sha256"])


def copy_wheel(medium: Medium, entry: Mapping[str, Any], folder: Path) -> Path:
    """Copy a wheel out of the medium; it stays only if it is the sealed one."""
    name = str(entry["path"]).rpartition("/")[2]
    target, hasher = folder / name, hashlib.sha256()
    with target.open("xb") as stream:
        for part in medium.read(entry["offset"], entry["size"]):
            hasher.update(part)
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    if hasher.hexdigest() != entry["sha256"]:
        target.unlink()
        raise refuse(
            "install.wheel",
            f"{name!r:.120} on the medium is not the sealed one",
            "copy the bundle again; if it stays, the medium or its source is damaged",
        )
    return target


# -- the runtime ----------------------------------------------------------------------------------


def require_script(script: Path | None, manifest: Mapping[str, Any]) -> None:
    """Refuse an installer that is not the one of the bundle: of another release, or damaged.

    It holds itself against the seal, so it is no proof against one that somebody wrote to lie:
    that is what SHA256SUMS and the signature over it are for, before it runs.

    Raises:
        Stop: `install.digest`.

    """
    if script is None:
        return
    sealed = [entry for entry in manifest["files"] if entry["path"] == INSTALLER]
    if not script.is_file():
        raise refuse(
            "install.digest",
            f"{script} is no file that could be held against the bundle",
            "run it by its name: sh install.sh --bundle ...",
        )
    with script.open("rb") as stream:
        raw = stream.read(SCRIPT_LIMIT)
    if [hashlib.sha256(raw).hexdigest()] != [entry["sha256"] for entry in sealed]:
        raise refuse(
            "install.digest",
            f"{script} is not the installer of this bundle: it is of another one, or was changed",
            "take the install.sh that lies beside this bundle, then: sha256sum -c SHA256SUMS",
        )


def make_runtime(target: Path, medium: Medium, wanted: Wanted, out: Transcript) -> None:
    """Make the environment at `target`: wheels by digest, pip from its own wheel, no network."""
    try:
        import venv
    except ImportError as error:
        raise fault(
            "host.self",
            f"this Python lacks its own module {error.name}",
            "take the whole Python of the distribution (Debian: python3, not python3-minimal)",
        ) from error

    wheels = target / "wheels"
    if target.exists():
        shutil.rmtree(target)  # of an installer that was killed
    target.mkdir(parents=True, mode=0o755)
    wheels.mkdir()
    found = {name: copy_wheel(medium, e, wheels) for name, e in sorted(wanted.entries.items())}
    out.say(f"wheels: {len(found)} taken from the medium, each with its sealed digest")
    check_wheels(list(found.values()))
    lines = [
        f"{name}=={version} --hash=sha256:{sha256}"
        for name, (version, sha256) in sorted(wanted.lines.items())
        if name != "pip"
    ]
    listed = wheels / "lock.txt"
    listed.write_text("\n".join(lines) + "\n")
    venv.EnvBuilder(with_pip=False, symlinks=False).create(target)
    python = target / "bin" / "python"
    argv = [str(python), "-I", f"{found['pip']}/pip", "--isolated", "install", "--no-index"]
    argv += ["--find-links", str(wheels), "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    argv += ["--no-cache-dir", "--no-compile", "--disable-pip-version-check", "--no-input"]
    argv += ["--quiet", "--root-user-action", "ignore", "-r", str(listed)]
    run(argv, target)
    shutil.rmtree(wheels)
    packages = next((target / "lib").glob("python3*")) / "site-packages"
    # A sealed start can write nothing, and would compile its libraries each time.
    run([str(python), "-I", "-m", "compileall", "-f", "-q", str(packages)], target)
    out.say(f"runtime: {len(lines)} packages in {target}")


def check_wheels(paths: list[Path]) -> None:
    """Look into every wheel, before pip does: `scan.wheel`, by the very code of the program."""
    brought = {}
    for path in paths:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as data,
        ):
            check_wheel(data, path.name)
            brought[path.name] = installed_files(data, path.name)
    require_disjoint(brought)


def run(argv: list[str], folder: Path) -> None:
    """Run a program with a bare environment; its last words are the reason of a fault."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder)}
    environment |= {"LC_ALL": "C.UTF-8", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-3:]
        code = "host.space" if "No space left" in " ".join(words) else "install.wheel"
        raise fault(code, f"{Path(argv[2]).name}: {' '.join(words):.400}")


def require_untouched(target: Path, medium: Medium, wanted: Wanted) -> None:
    """Hold an environment against the sealed wheels, file by file: refusal `install.digest`.

    A file that no wheel brought is refused too: Python would import it. What is made at install,
    scripts in `bin` and compiled modules, is not compared.
    """
    packages = next((target / "lib").glob("python3*")) / "site-packages"
    brought: set[Path] = set()
    with work_folder() as folder:
        for distribution, entry in sorted(wanted.entries.items()):
            if distribution == "pip":
                continue
            path = copy_wheel(medium, entry, folder)
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    inner = re.match(r"[^/]+\.data/([^/]+)/(.+)", member.filename)
                    if inner is not None and inner[1] in {"purelib", "platlib"}:
                        brought.add(packages / inner[2])
                    if member.is_dir() or inner is not None:
                        continue
                    brought.add(packages / member.filename)
                    if member.filename.endswith(".dist-info/RECORD"):
                        written = ("INSTALLER", "REQUESTED", "direct_url.json")
                        brought |= {packages / member.filename[:-6] / each for each in written}
                    place = packages / member.filename
                    own = member.filename.endswith((".dist-info/RECORD", ".pyc"))
                    if not own and not same_bytes(place, archive, member):
                        raise refuse(
                            "install.digest",
                            f"{place} is not the file of the sealed wheel",
                            f"find out who changed it, then remove {target} and run it again",
                        )
            path.unlink()
    for place in sorted(packages.rglob("*")):
        source = place.parent.parent / f"{place.name.partition('.')[0]}.py"
        compiled = place.parent.name == "__pycache__" and place.suffix == ".pyc"
        known = place in brought or (compiled and source in brought)
        if place.is_symlink() or not (place.is_dir() or known):
            raise refuse(
                "install.digest",
                f"{place} is of no sealed wheel",
                f"find out who put it there, then remove {target} and run it again",
            )


def same_bytes(place: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Tell whether a file is the one of a wheel, a part at a time."""
    if place.is_symlink() or not place.is_file() or place.stat().st_size != member.file_size:
        return False
    with place.open("rb") as stream, archive.open(member) as sealed:
        while part := sealed.read(1 << 20):
            if stream.read(len(part)) != part:
                return False
    return True


def switch(link: Path, target: Path) -> None:
    """Point `link` to `target` by a rename."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)


# -- the road -------------------------------------------------------------------------------------


def install(
    options: argparse.Namespace, out: Transcript, now: datetime, script: Path | None
) -> int:
    """Check everything, then make the runtime, hand over, and switch; return the exit status."""
    out.say(f"installer: {' '.join(options.words)}")
    medium = open_medium(options.bundle, options.volume)
    for note in medium.notes:
        out.say(f"note: {note}")
    with work_folder() as folder:
        judge = Judge(options.openssl, folder)
        chain = parse(medium.head[HEAD[1]], HEAD[1])
        host = read_held(options.root)
        anchor = options.fingerprint or host.fingerprint or ask_fingerprint()
        root = follow_roots(chain, anchor, judge, host)
        out.say(f"trust root: version {root['version']}, from the fingerprint sha256:{anchor}")
        manifest, approvers = verify_seal(medium.head, root, judge, host)
        if root["profile"] == "cnsa2" and not judge.knows_mldsa:
            out.say("note: this openssl knows no ML-DSA; P-384 was checked, the rest comes after")
        digest = hashlib.sha256(medium.head[HEAD[2]]).hexdigest()
        out.say(f"bundle: {manifest['name']} {manifest['version']}, sha256:{digest}")
        out.say(f"approved by: {', '.join(approvers)}")
        moment = f"{now:%Y-%m-%dT%H:%M:%SZ}"
        require_time(moment, root, manifest)

        def approved(envelope: Mapping[str, Any], mark: tuple[int, str]) -> bool:
            return approves_rollback(
                envelope, mark, medium.head, root=root, judge=judge, host=host, now=moment
            )

        require_epoch(options.root, manifest, f"sha256:{digest}", options.approval, approved)
    require_script(script, manifest)
    runtime = choose_runtime(manifest, options.accelerator)
    wanted = wanted_wheels(medium, manifest, runtime)
    out.say(f"for this host: {runtime['target']}, {runtime['accelerator']}")
    runtimes = options.prefix / "runtimes"
    target = runtimes / wanted.digest[:16]
    for place in (options.prefix, runtimes, target):
        require_own(place)
    link = options.prefix / "bin"
    if os.path.lexists(link) and not link.is_symlink():
        raise fault(
            "host.io",
            f"{link} is in the way: it is no link that an installer made",
            "choose another place with --prefix, or move it away",
        )
    ready = (target / DONE).is_file()
    body = sum(entry["size"] for entry in manifest["files"]) if manifest["models"] else 0
    missing = [place for place in (runtimes, *runtimes.parents) if not place.exists()]
    require_place(options.prefix, (0 if ready else UNPACKED * wanted.size) + MARGIN)
    require_place(options.root, body + MARGIN)
    options.prefix.mkdir(parents=True, exist_ok=True, mode=0o755)
    with held(options.prefix):
        try:
            return _work(options, out, medium, wanted, target, anchor=anchor, release=digest)
        except (Stop, RefusedError, OSError, KeyboardInterrupt):
            for place in missing:
                with contextlib.suppress(OSError):
                    place.rmdir()  # only if nothing is left in it
            raise


def _work(
    options: argparse.Namespace,
    out: Transcript,
    medium: Medium,
    wanted: Wanted,
    target: Path,
    *,
    anchor: str,
    release: str,
) -> int:
    """Do what changes the host; a model that is not admitted leaves the rest in place."""
    link = options.prefix / "bin"
    ready = (target / DONE).is_file()  # by now nobody else can make it
    if ready:
        require_untouched(target, medium, wanted)
        out.say(f"runtime: {target} is there, and every file is that of its sealed wheel")
    try:
        if not ready:
            make_runtime(target, medium, wanted, out)
        status, changed = hand_over(options, out, target, anchor=anchor, release=release)
        if not ready:
            (target / DONE).write_text(json.dumps({"list": wanted.digest}) + "\n")
    except BaseException:
        if not ready:
            shutil.rmtree(target, ignore_errors=True)
        raise
    if not link.is_symlink() or link.resolve() != target / "bin":
        switch(link, target / "bin")
        out.say(f"active: {link} -> {target / 'bin'}")
        older = len(list(target.parent.iterdir())) - 1
        if older:
            out.say(f"note: {older} older beside it; `airgap runtimes` says which may go")
    elif not changed:
        out.say("nothing to do: this host is as this bundle makes it")
    return status


def hand_over(
    options: argparse.Namespace, out: Transcript, target: Path, *, anchor: str, release: str
) -> tuple[int, bool]:
    """Let the installed program verify it all again, and set up the tree.

    Returns its status and whether it changed anything. What it refuses it has said itself; a
    refusal without a result changed nothing, one with a result is that of the model alone.
    """
    with (
        work_folder() as folder,
        (folder / "transcript.txt").open("w", encoding="utf-8") as transcript,
    ):
        told = folder / "result.json"
        transcript.write("\n".join(out.lines) + "\n")
        transcript.flush()
        argv = [str(target / "bin" / "python"), "-I", str(target / "bin" / "airgap"), "bootstrap"]
        argv += [str(options.bundle), "--fingerprint", f"sha256:{anchor}"]
        argv += ["--digest", f"sha256:{release}"]  # the medium may be another one by now
        argv += ["--prefix", str(options.prefix), "--root", str(options.root)]
        argv += ["--transcript", transcript.name, "--result", str(told)]
        argv += [word for place in options.volume for word in ("--volume", str(place))]
        argv += ["--system"] if options.system else []
        for word in ("site", "model", "project", "approval"):
            value = getattr(options, word)
            argv += [f"--{word}", str(value)] if value is not None else []
        out.begun = True
        status = subprocess.run(argv, check=False).returncode
        if not told.is_file():
            raise Stop(status or 3, "", "")
        return status, bool(json.loads(told.read_bytes())["changed"])


def ask_fingerprint() -> str:
    """Read the fingerprint from the terminal, or from standard input."""
    sys.stderr.write("Type the fingerprint of the trust root, as it was told you (sha256:...): ")
    sys.stderr.flush()
    typed = sys.stdin.readline(4096) if sys.stdin is not None else ""
    if sys.stdin is None or not sys.stdin.isatty():
        sys.stderr.write("\n")  # a terminal has shown that of the person
    return fingerprint(typed)


def fingerprint(text: str) -> str:
    """Return the digits of a fingerprint, typed with spaces or not; a file holds it as well."""
    found = "".join(text.split()).lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", found):
        raise refuse(
            "trust.fingerprint",
            f"{text.strip()!r:.90} is no fingerprint: sha256:<64 hex>",
            "type all of what `airgap trust show` prints on the staging host, as it was told you",
        )
    return found


def read_options(words: list[str]) -> argparse.Namespace:
    """Parse the command line and fill in the places of each mode."""
    parser = argparse.ArgumentParser(prog="install.sh", description="Install airgap from a bundle.")
    parser.add_argument("--bundle", type=Path, required=True, help="bundle, volume, or its folder")
    parser.add_argument("--volume", type=Path, action="append", default=[], help="further places")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--user", action="store_true", help="for this account alone (default)")
    mode.add_argument(
        "--system", action="store_true", help="for the host: accounts, units, profile"
    )
    parser.add_argument("--prefix", type=Path, help="where the program goes")
    parser.add_argument("--root", type=Path, help="where trust, store, log and keys go")
    parser.add_argument("--fingerprint", help="of the trust root, or a file that holds it")
    parser.add_argument("--site", type=Path, help="site.toml of this lab")
    parser.add_argument("--model", type=Path, help="another bundle to admit, with a model")
    parser.add_argument("--project", help="project of site.toml that the model is for")
    parser.add_argument("--approval", type=Path, help="of going back to an older bundle of wheels")
    parser.add_argument("--accelerator", choices=["cpu", "cuda"])
    parser.add_argument("--openssl", default="openssl", help="the program that checks signatures")
    options = parser.parse_args(words)
    options.words = list(words)
    if options.prefix is None:
        options.prefix = Path("/opt/airgap") if options.system else _data() / "airgap-program"
    if options.root is None:
        options.root = Path("/var/lib/airgap") if options.system else _data() / "airgap"
    options.prefix, options.root = options.prefix.absolute(), options.root.absolute()
    options.bundle = options.bundle.absolute()
    options.volume = [place.absolute() for place in options.volume]
    if options.fingerprint is not None:
        path = Path(options.fingerprint)
        text = path.read_text() if "/" in options.fingerprint else options.fingerprint
        options.fingerprint = fingerprint(text)
    if options.system and os.geteuid() != 0:
        raise refuse("host.io", "--system makes accounts and units, which root alone may do")
    return options


def _data() -> Path:
    """Return the folder of this account for data."""
    try:
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    except RuntimeError as error:
        raise fault(
            "host.io", "this account has no home folder", "name places with --prefix and --root"
        ) from error


def main(words: list[str], now: datetime | None = None, script: Path | None = None) -> int:
    """Run the installer and return its exit status: 0 done, 1 refused, 2 usage, 3 fault."""
    out = Transcript()
    os.umask(0o022)
    try:
        return install(read_options(words), out, now or datetime.now(UTC), script)
    except Stop as stop:
        problem = stop
    except RefusedError as error:
        problem = refuse(error.code, error.message, error.hint)
    except KeyboardInterrupt:
        problem = Stop(130, "", "interrupted")
    except (OSError, subprocess.SubprocessError) as error:
        code = "host.space" if getattr(error, "errno", 0) in {28, 122} else "host.io"
        problem = fault(code, f"{error!s:.300}", "mend it, then run it again")
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        problem = refuse("manifest.schema", f"a document of the bundle lacks {error!s:.120}")
    _tell(problem, out)
    return problem.status


def _tell(problem: Stop, out: Transcript) -> None:
    """Print why it ended: code, what was found, a next step, and whether anything changed."""
    if not problem.message:
        return  # the program has said it
    lines = [f"{'refused' if problem.status == 1 else 'fault'} {problem.code}"]
    lines = [*(lines if problem.code else []), clean(problem.message)]
    if problem.hint:
        lines.append(f"next step: {clean(problem.hint)}")
    end = "it may be half done: run it again, it goes on" if out.begun else "nothing was changed"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write("\n".join([*lines, end]) + "\n")


def interrupted(number: int, _: object) -> None:
    """End as by Ctrl-C: what was begun is taken back."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, interrupted)
    sys.exit(main(sys.argv[2:], script=Path(sys.argv[1])))
