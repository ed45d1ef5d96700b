"""`install.sh` in hostile hands: the environment, the medium, the places, and bad moments.

`ACCEPTANCE` has a row for each thing that must end in a clear refusal with nothing changed. Every
row first has its good twin: the same words without the obstacle go past that check. What is
changed is told by a digest of the whole scratch folder, owner and mode of each file included.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bundles
import disks
import pytest
import wheel_index
from test_bootstrap_main import FACTS, PRINT, as_user, house_for, install, sealed, split

from bundle import transit
from bundle.delta import BundleBase, write_delta
from bundle.manifest import Base
from bundle.media import open_medium
from bundle.scan.wheelhouse import FOLDER, list_path, list_text
from bundle.source import PlainFile
from bundle.split import split as split_medium
from bundle.staging import bootstrap_medium
from bundle.staging.bootstrap import installer_text
from bundle.write import Member
from policy.errors import CODES

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is missing")

YEAR = timedelta(days=365)
MONTH = timedelta(days=30)
TODAY = replace(FACTS, expires=datetime.now(UTC).replace(microsecond=0) + MONTH)
PAST_THE_CHECKS = ("--accelerator", "cuda")  # ends a good way cheaply: seal and times have held


@dataclass(frozen=True)
class Ground:
    """A scratch folder with a place for the host, and the media of the module."""

    folder: Path
    media: Path

    @property
    def host(self):
        return self.folder / "host"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return house_for(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def media(tmp_path_factory, house):
    folder = tmp_path_factory.mktemp("media")
    sealed(house, folder / "good.agb", facts=TODAY)
    (folder / "install.sh").write_bytes(installer_text())
    wide = Member("payload/tiny/LICENSE", b"free\n" * 2_000_000, "document", "text/plain")
    members = bundles.make_members(extra=(wide,))
    bundles.make_bundle(
        folder / "wide.agb",
        members=[*members, *house.members],
        runtimes=house.runtimes,
        expires=TODAY.expires,
    )
    folder.chmod(0o755)
    return folder


@pytest.fixture
def ground(tmp_path, media):
    (tmp_path / "host").mkdir(mode=0o755)
    return Ground(tmp_path, media)


def state(folder):
    """Return a digest of names, owners, modes and contents below a folder."""
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        hasher.update(f"{path.relative_to(folder)!s} {found.st_mode} {found.st_uid}\0".encode())
        if path.is_file() and not path.is_symlink():
            hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()


def script(media, *words, by=("sh",), stdin="", **environment):
    """Run install.sh as a person does."""
    named = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment}
    return subprocess.run(
        [*by, media / "install.sh", "--python", sys.executable, *map(str, words)],
        input=stdin,
        env={key: value for key, value in named.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def told(said, code):
    """Check that the last words are a refusal with that code, what to do, and no change."""
    lines = said.strip().splitlines()
    start = max(n for n, line in enumerate(lines) if line in {f"refused {code}", f"fault {code}"})
    assert code in CODES
    assert lines[-1] == "nothing was changed"
    assert len(lines) - start >= 3
    return " ".join(lines[start:])


# -- the lines of the acceptance ------------------------------------------------------------------


@contextlib.contextmanager
def nothing(_):
    yield ()


@contextlib.contextmanager
def small_disk(ground):
    with disks.mounted(ground.host / "disk", "2m"):
        yield ("--prefix", ground.host / "disk" / "p")


@contextlib.contextmanager
def small_disk_for_the_tree(ground):
    with disks.mounted(ground.host / "disk", "2m"):
        yield ("--root", ground.host / "disk" / "t")


@contextlib.contextmanager
def read_only(ground):
    with disks.mounted(ground.host / "disk", "100m"):
        subprocess.run(["mount", "-o", "remount,ro", ground.host / "disk"], check=True)
        yield ("--prefix", ground.host / "disk" / "p")


@contextlib.contextmanager
def read_only_tree(ground):
    with read_only(ground) as words:
        yield ("--root", words[1])


@contextlib.contextmanager
def denied(ground):
    """A folder that may be read and not changed, for the account that runs the installer."""
    with tempfile.TemporaryDirectory() as name:  # where every account may read
        place = Path(name)
        place.chmod(0o755)
        shutil.copyfile(ground.media / "good.agb", place / "good.agb")
        (place / "closed").mkdir(mode=0o500)
        words = ("--prefix", place / "closed" / "p", "--root", place / "closed" / "t")
        yield (*words, "--bundle", place / "good.agb")
        assert list((place / "closed").iterdir()) == []


@contextlib.contextmanager
def immutable(ground):
    place = ground.host / "kept"
    place.mkdir()
    done = subprocess.run(["chattr", "+i", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this file system knows no immutable folders")
    try:
        yield ("--prefix", place / "p")
    finally:
        subprocess.run(["chattr", "-i", place], check=True)


@contextlib.contextmanager
def another_installer(ground):
    program = ground.host / "program"
    program.mkdir(mode=0o755)
    with subprocess.Popen(
        ["flock", program, "sh", "-c", "echo held; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"held\n"
        yield ()
        other.stdin.close()


@contextlib.contextmanager
def file_in_the_way(ground):
    (ground.host / "program").write_text("mine")
    yield ()


@contextlib.contextmanager
def programs_in_the_way(ground):
    (ground.host / "program" / "bin").mkdir(parents=True, mode=0o755)
    yield ()


@contextlib.contextmanager
def pipe_for_a_bundle(ground):
    os.mkfifo(ground.folder / "pipe.agb")
    yield ("--bundle", ground.folder / "pipe.agb")


@contextlib.contextmanager
def pipe_for_a_root(ground):
    trust = ground.host / "tree" / "trust"
    trust.mkdir(parents=True)
    os.mkfifo(trust / "1.root.json")
    yield ()


def of_target(target):
    @contextlib.contextmanager
    def made(ground):
        bundle = sealed(
            house_for(ground.folder / "other", target), ground.folder / "x.agb", facts=TODAY
        )
        yield ("--bundle", bundle)

    return made


@contextlib.contextmanager
def missing_volume(ground):
    discs = ground.folder / "discs"
    split(ground.media / "wide.agb", discs, volume_size=2 * bundles.CHUNK_SIZE)
    volumes = sorted(discs.iterdir())
    assert len(volumes) > 2
    volumes[1].unlink()
    yield ("--bundle", volumes[0])


ACCEPTANCE = {
    "full disk, the program": (small_disk, "host.space", timedelta()),
    "full disk, the tree": (small_disk_for_the_tree, "host.space", timedelta()),
    "read-only target, the program": (read_only, "host.io", timedelta()),
    "read-only target, the tree": (read_only_tree, "host.io", timedelta()),
    "wrong architecture": (
        of_target("linux-aarch64-cp311-glibc2.17"),
        "install.target",
        timedelta(),
    ),
    "wrong Python": (of_target("linux-x86_64-cp399-glibc2.17"), "install.target", timedelta()),
    "older C library": (of_target("linux-x86_64-cp311-glibc2.99"), "install.target", timedelta()),
    "missing volume": (missing_volume, "volume.missing", timedelta()),
    "expired bundle": (nothing, "trust.expired", 2 * MONTH),
    "clock one year back": (nothing, "trust.clock", bundles.CREATED - datetime.now(UTC) - YEAR),
    "second installer running": (another_installer, "host.state", timedelta()),
    "denied directory": (denied, "host.io", timedelta()),
    "immutable directory": (immutable, "host.io", timedelta()),
    "file in the way": (file_in_the_way, "host.io", timedelta()),
    "programs of others in the way": (programs_in_the_way, "host.io", timedelta()),
    "pipe in the place of a bundle": (pipe_for_a_bundle, "archive.type", timedelta()),
    "pipe in the place of a trust root": (pipe_for_a_root, "archive.type", timedelta()),
}


@pytest.mark.parametrize(("obstacle", "code", "later"), ACCEPTANCE.values(), ids=ACCEPTANCE.keys())
def test_a_clear_refusal_and_nothing_changed(ground, capsys, obstacle, code, later):
    now = datetime.now(UTC)
    places = ("--prefix", ground.host / "program", "--root", ground.host / "tree")
    good = [*places, "--bundle", ground.media / "good.agb", *PAST_THE_CHECKS]
    assert install(ground.folder, ground.media / "good.agb", *map(str, good), now=now) == 1
    told(capsys.readouterr().err, "install.target")
    with obstacle(ground) as words:
        before, medium = state(ground.folder), state(ground.media)
        argv = list(map(str, [*places, "--bundle", ground.media / "good.agb", *words]))
        with as_user() if obstacle is denied else contextlib.nullcontext():
            status = install(ground.folder, ground.media / "good.agb", *argv, now=now + later)
        said = capsys.readouterr().err
        assert (state(ground.folder), state(ground.media)) == (before, medium)
    assert status == (3 if code.startswith("host") else 1)
    told(said, code)


# -- the script itself ----------------------------------------------------------------------------


def with_byte(at, new):
    def alter(raw):
        place = raw.index(at)
        return raw[:place] + new + raw[place + len(new) :]

    return alter


SCRIPTS = {
    "a comment of the shell part": with_byte(b"# Needs Python", b"# needs"),
    "a comment of the program": with_byte(b"# by now nobody", b"# By"),
    "a message of the program": with_byte(b"nothing to do:", b"Nothing"),
    "a line more": lambda raw: raw + b"\n",
    "of a release before": lambda raw: raw.replace(b"exec env -i", b": old\nexec env -i"),
}


def words_for(ground, bundle=None):
    """Return words that go past seal, times and installer, and end there."""
    words = ["--bundle", bundle or ground.media / "good.agb", *PAST_THE_CHECKS]
    return [*words, "--prefix", ground.host / "p", "--root", ground.host / "t"]


def test_an_installer_that_is_not_the_one_of_its_bundle(ground):
    words = [*words_for(ground), "--fingerprint", PRINT]
    told(script(ground.media, *words).stderr, "install.target")
    raw = (ground.media / "install.sh").read_bytes()
    for name, alter in SCRIPTS.items():
        changed = alter(raw)
        assert changed != raw, name
        (ground.folder / "install.sh").write_bytes(changed)
        before = state(ground.folder)
        done = script(ground.folder, *words)
        assert done.returncode == 1, name
        told(done.stderr, "install.digest")
        assert state(ground.folder) == before


def test_an_installer_that_comes_by_a_pipe_is_no_file_to_compare(ground):
    words = ["--python", sys.executable, *map(str, words_for(ground)), "--fingerprint", PRINT]
    with (ground.media / "install.sh").open("rb") as stream:
        done = subprocess.run(
            ["sh", "-s", "--", *words], stdin=stream, capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert "sh install.sh" in told(done.stderr, "install.digest")


SHELLS = {
    "dash": ("dash",),
    "bash": ("bash",),
    "bash --posix": ("bash", "--posix"),
    "busybox sh": ("busybox", "sh"),
}


@pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS.keys())
def test_every_shell_gives_the_program_what_it_was_given(ground, shell):
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    odd = ground.folder / "two words\nand a line $HOME `id` *"
    odd.mkdir()
    shutil.copyfile(ground.media / "good.agb", odd / "-x.agb")
    before = state(ground.folder)
    words = words_for(ground, odd / "-x.agb")
    done = script(ground.media, *words, by=shell, stdin=f"{PRINT}\n", IFS="/:s", CDPATH="/")
    shown = f"installer: {' '.join(map(str, words))}".replace("\n", "?")
    assert done.stdout.splitlines()[0] == shown
    assert "approved by: alice, bob" in done.stdout
    told(done.stderr, "install.target")
    assert state(ground.folder) == before


# -- the environment ------------------------------------------------------------------------------

TRAP = """#!/bin/sh
echo "$0" >> '{marks}'
exit 0
"""


def test_a_hostile_environment_changes_nothing_of_a_good_run(ground):
    """Programs in front of the search path, hooks of linker, Python, pip, openssl, shells."""
    traps, marks = ground.folder / "traps", ground.folder / "marks"
    traps.mkdir()
    hook = f"open({str(marks)!r}, 'a').write('hook')\n"
    for name in ("python3", "openssl", "env", "uname", "sh", "cat", "sed", "id", "pip", "printf"):
        (traps / name).write_text(TRAP.format(marks=marks))
        (traps / name).chmod(0o755)
    for name in ("sitecustomize", "usercustomize", "json", "hashlib", "venv", "bundle", "policy"):
        (traps / f"{name}.py").write_text(hook)
    (traps / "startup").write_text(TRAP.format(marks=marks))
    (traps / "openssl.cnf").write_text("openssl_conf = nothing\n[nothing\n")
    (traps / "pip.conf").write_text(
        "[global]\nindex-url = http://127.0.0.1:1/\nrequire-virtualenv = 1\n"
    )
    hostile = {
        "PATH": f"{traps}:/usr/bin:/bin",
        "LD_PRELOAD": str(traps / "absent.so"),
        "LD_LIBRARY_PATH": str(traps),
        "PYTHONPATH": str(traps),
        "PYTHONHOME": str(traps),
        "PYTHONSTARTUP": str(traps / "startup"),
        "PYTHONINSPECT": "1",
        "PYTHONBREAKPOINT": "sitecustomize",
        "PIP_CONFIG_FILE": str(traps / "pip.conf"),
        "PIP_INDEX_URL": "http://127.0.0.1:1/",
        "PIP_TARGET": str(traps),
        "PIP_NO_INDEX": "0",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "OPENSSL_CONF": str(traps / "openssl.cnf"),
        "OPENSSL_MODULES": str(traps),
        "ENV": str(traps / "startup"),
        "BASH_ENV": str(traps / "startup"),
        "IFS": "/",
        "CDPATH": "/",
        "LC_ALL": "xx_XX.UTF-16",
        "LANG": "tr_TR",
        "HOME": None,
        "http_proxy": "http://127.0.0.1:1/",
        "AIRGAP_ROOT": str(traps),
    }
    words = ["--bundle", ground.media / "good.agb", "--fingerprint", PRINT]
    words += ["--prefix", ground.host / "p", "--root", ground.host / "t"]
    before = os.umask(0)
    try:
        done = script(ground.media, *words, by=("/bin/sh",), **hostile)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    assert not marks.exists(), marks.read_text()
    # The shell itself was loaded before it could say otherwise, and nothing after it.
    assert done.stderr.count("cannot be preloaded") <= 1
    link = ground.host / "p" / "bin"
    assert "active: " in done.stdout
    open_to_others = [
        path
        for path in (ground.host / "p").rglob("*")
        if not path.is_symlink() and path.stat().st_mode & 0o022
    ]
    assert open_to_others == []
    subprocess.run([link.resolve() / "python", "-I", "-c", "import airgap, pydantic"], check=True)


def shared(ground):
    place = ground.folder / "tmp"
    place.mkdir()
    place.chmod(0o777)
    return place


def of_another(ground):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    place = ground.folder / "tmp"
    place.mkdir()
    os.chown(place, 65534, 65534)
    place.chmod(0o1777)
    return place


def below_a_shared_one(ground):
    place = shared(ground) / "mine"
    place.mkdir(mode=0o700)
    return place


@pytest.mark.parametrize("make", [shared, of_another, below_a_shared_one])
def test_temporary_files_lie_where_nobody_can_exchange_them(ground, make):
    """openssl reads there what it is asked about: who exchanges it there, signs."""
    words = [*words_for(ground), "--fingerprint", PRINT]
    mine = ground.folder / "own"
    mine.mkdir(mode=0o700)
    told(script(ground.media, *words, TMPDIR=str(mine)).stderr, "install.target")
    place = make(ground)
    done = script(ground.media, *words, TMPDIR=str(place))
    assert done.returncode == 3
    assert "TMPDIR" in told(done.stderr, "host.io")
    told(script(ground.media, *words, TMPDIR="/nowhere").stderr, "install.target")


def test_no_home_no_input_and_nobody_who_reads_are_told_and_not_stumbled_over(ground):
    bare = ["--bundle", ground.media / "good.agb"]
    done = script(ground.media, *words_for(ground), stdin="")
    assert done.returncode == 1
    told(done.stderr, "trust.fingerprint")
    closed = 'exec <&- >&-; exec sh "$@"'
    argv = ["sh", "-c", closed, "x", ground.media / "install.sh", "--python", sys.executable]
    done = subprocess.run(
        [*argv, *map(str, words_for(ground))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    told(done.stderr, "trust.fingerprint")
    done = script(ground.media, *bare, "--fingerprint", PRINT, *PAST_THE_CHECKS, HOME=None)
    assert done.returncode == 1
    told(done.stderr, "install.target")


def test_names_on_a_medium_do_not_steer_the_terminal(ground):
    bundle = ground.folder / "\x1b[2Jsealed and whole\u202e.agb"
    bundle.write_bytes(b"no bundle")
    done = script(ground.media, *words_for(ground, bundle), "--fingerprint", PRINT)
    assert done.returncode == 1
    assert not {"\x1b", "\u202e"} & set(done.stderr + done.stdout)
    told(done.stderr, "archive.header")


# -- the medium changes, and other forms ----------------------------------------------------------


def test_a_medium_that_is_exchanged_after_the_check_gives_no_wheel(ground, house, capsys):
    other = sealed(
        house, ground.folder / "other.agb", "alice", "bob", facts=replace(TODAY, version="2.0")
    )
    bundle = ground.folder / "x.agb"
    shutil.copyfile(ground.media / "good.agb", bundle)
    swap = ground.folder / "openssl"
    swap.write_text(f'#!/bin/sh\ncat {other} > {bundle}\nexec openssl "$@"\n')
    swap.chmod(0o755)
    raw = bytearray(other.read_bytes())
    at = raw.index(house.wheels[0].path.read_bytes()[:200])
    raw[at + 100] ^= 1
    other.write_bytes(raw)
    words = ("--prefix", str(ground.host / "p"), "--root", str(ground.host / "t"))
    now = datetime.now(UTC)
    assert install(ground.folder, bundle, *words, *PAST_THE_CHECKS, now=now) == 1
    capsys.readouterr()
    assert install(ground.folder, bundle, *words, "--openssl", str(swap), now=now) == 1
    told(capsys.readouterr().err, "install.wheel")
    assert list(ground.host.iterdir()) == []


def delta(ground):
    """Return a delta of wheels, as one file."""
    base = bundles.make_bundle(ground.folder / "one.agb", members=bundles.make_members())
    bundles.make_bundle(
        ground.folder / "two.agb",
        members=bundles.make_members(),
        base=Base(bundle_id="tiny-line", manifest_digest=str(base.digest)),
        version="2.0",
        epoch=2,
    )
    medium, older = open_medium(ground.folder / "two.agb"), open_medium(ground.folder / "one.agb")
    try:
        write_delta(medium, BundleBase(older), ground.folder / "d.agb")
    finally:
        medium.close()
        older.close()
    return ground.folder / "d.agb"


def encrypted(ground, name="x.agb.enc"):
    transit.new_transit_key(ground.folder, "lab")
    key = transit.parse_transit_key((ground.folder / "lab.transit.pub.json").read_bytes())
    source = PlainFile(ground.media / "good.agb")
    try:
        transit.encrypt_file(source, ground.folder / name, [key])
    finally:
        source.close()
    return ground.folder / name


def volumes(ground, parity=1):
    discs = ground.folder / "discs"
    discs.mkdir()
    medium = open_medium(ground.media / "wide.agb")
    try:
        made = split_medium(medium, discs, volume_size=2 * bundles.CHUNK_SIZE, parity_count=parity)
    finally:
        medium.close()
    return made


def volume_renamed(ground):
    volumes(ground)[0].rename(ground.folder / "x.agb")
    return ground.folder / "x.agb"


def encrypted_folder(ground):
    place = ground.folder / "closed"
    place.mkdir()
    encrypted(ground).rename(place / "x.agb.enc")
    return place


FORMS = {
    "a delta": (delta, "delta.base", "full bundle"),
    "an encrypted bundle": (encrypted, "transit.key", "plain"),
    "an encrypted bundle with another name": (
        lambda ground: encrypted(ground, "x.agb"),
        "transit.key",
        "plain",
    ),
    "a folder of encrypted files": (encrypted_folder, "transit.key", "plain"),
    "a volume with another name": (volume_renamed, "volume.missing", "its name again"),
}


@pytest.mark.parametrize(("make", "code", "step"), FORMS.values(), ids=FORMS.keys())
def test_a_form_that_a_bare_host_cannot_take_says_what_can_be_done(
    ground, capsys, make, code, step
):
    bundle = make(ground)
    before = state(ground.folder)
    words = [*map(str, words_for(ground, bundle))]
    assert install(ground.folder, bundle, *words, now=datetime.now(UTC)) == 1
    assert step in told(capsys.readouterr().err, code)
    assert state(ground.folder) == before


@pytest.mark.parametrize("lost", [1, 2, -1], ids=["first", "one between", "last"])
def test_one_lost_volume_is_made_from_the_parity_volume(ground, capsys, lost):
    made = volumes(ground, parity=2)
    count = len(made) - 2
    assert count > 2
    number = lost if lost > 0 else count
    words = [*map(str, words_for(ground, made[-1]))][2:]
    now = datetime.now(UTC)
    made[number - 1].unlink()
    medium = bootstrap_medium.open_medium(made[-1], [])
    _, start = bootstrap_medium.read_head(ground.media / "wide.agb")
    size = json.loads(medium.head["META/manifest.json"])["body"]["size"]
    whole = (ground.media / "wide.agb").read_bytes()[start : start + size]
    assert b"".join(medium.read(0, size)) == whole
    assert install(ground.folder, made[-1], *words, now=now) == 1
    said = capsys.readouterr()
    assert f"note: {made[number - 1].name} is not here" in said.out
    told(said.err, "install.target")
    # two are too many, and the second parity volume alone stands in for nothing here
    made[count].unlink()
    assert install(ground.folder, made[-1], *words, now=now) == 1
    assert made[number - 1].name in told(capsys.readouterr().err, "volume.missing")


# -- wheels that may not enter, though people signed them ----------------------------------------


def with_wheel(house, path, name):
    """Return members and runtime of the house with one wheel more."""
    runtime = house.runtimes[0]
    found = {w.name: (w.version, w.sha256) for w in house.wheels}
    found[name] = ("1.0", wheel_index.sha256(path))
    runtime = runtime.model_copy(update={"packages": {n: v for n, (v, _) in found.items()}})
    raw = list_text(runtime, found)
    members = [
        replace(m, source=raw, sha256=None) if m.path == list_path(runtime) else m
        for m in house.members
    ]
    return [*members, Member(f"{FOLDER}/{path.name}", path, "wheel", "application/zip")], runtime


WHEELS = {
    "a file of another wheel": {"pydantic/__init__.py": b"evil\n"},
    "a module in another's package": {"airgap/evil.py": b""},
    "a path file": {"evil.pth": b"import os\n"},
    "a program named python": {
        "evil-1.0.dist-info/entry_points.txt": b"[console_scripts]\npython = evil:x\n"
    },
    "data in place of the interpreter": {"evil-1.0.data/data/bin/python3": b"x"},
    "a path that leaves": {"evil/../../x.py": b""},
}


def test_wheels_that_may_not_enter_are_refused_before_pip_starts(ground, house, capsys):
    words = ["--prefix", str(ground.host / "p"), "--root", str(ground.host / "t")]
    for name, files in {"nothing": {}, **WHEELS}.items():
        path = wheel_index.make_wheel(ground.folder, "evil", "1.0", files=files)
        members, runtime = with_wheel(house, path, "evil")
        bundle = ground.folder / "x.agb"
        bundles.make_bundle(
            bundle,
            members=[*bundles.make_members(), *members],
            runtimes=(runtime,),
            expires=TODAY.expires,
        )
        before = state(ground.folder)
        more = PAST_THE_CHECKS if name == "nothing" else ()
        assert install(ground.folder, bundle, *words, *more, now=datetime.now(UTC)) == 1, name
        said = capsys.readouterr()
        told(said.err, "scan.wheel" if files else "install.target")
        assert "runtime:" not in said.out
        assert state(ground.folder) == before


# -- bad moments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_installer_that_is_interrupted_takes_back_what_it_began(ground, number):
    # A shell cannot trap what it inherits as ignored, as under nohup.
    argv = ["env", "--default-signal", "sh", ground.media / "install.sh"]
    argv += ["--python", sys.executable]
    argv += ["--bundle", ground.media / "good.agb", "--fingerprint", PRINT]
    argv += ["--prefix", ground.host / "deep" / "p", "--root", ground.host / "t"]
    before = state(ground.folder)
    with subprocess.Popen(
        argv,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        wheels = ground.host / "deep" / "p" / "runtimes"
        while child.poll() is None and not list(wheels.glob("*/bin")):
            time.sleep(0.01)
        os.killpg(child.pid, number)
        said = child.stderr.read()
    assert child.returncode == 130, said
    assert said.strip().splitlines()[-2:] == ["interrupted", "nothing was changed"]
    assert state(ground.folder) == before


def test_two_installers_at_once_leave_one_whole_program(ground):
    argv = ["sh", ground.media / "install.sh", "--python", sys.executable]
    argv += ["--bundle", ground.media / "good.agb", "--fingerprint", PRINT]
    argv += ["--prefix", ground.host / "p", "--root", ground.host / "t"]
    pair = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [child.communicate() for child in pair]
    ends = sorted(child.returncode for child in pair)
    assert ends in ([0, 0], [0, 3]), said
    if ends == [0, 3]:
        told(
            next(err for (_, err), child in zip(said, pair, strict=True) if child.returncode),
            "host.state",
        )
    assert len(list((ground.host / "p" / "runtimes").iterdir())) == 1
    link = ground.host / "p" / "bin"
    subprocess.run([link.resolve() / "python", "-I", "-c", "import airgap"], check=True)


def test_a_disk_that_fills_up_in_the_middle_is_taken_back(ground):
    """The space was there when it was looked at: a limit on the size of files stands for that."""
    words = ["--bundle", ground.media / "good.agb", "--fingerprint", PRINT]
    words += ["--prefix", ground.host / "p", "--root", ground.host / "t"]
    before = state(ground.folder)
    done = script(ground.media, *words, by=("sh", "-c", 'ulimit -f 200; exec sh "$@"', "x"))
    assert done.returncode == 3
    told(done.stderr, "host.io")
    assert state(ground.folder) == before
