"""A build that is killed at any point goes on from its finished steps, to the very same bytes."""

import io
import os
import shutil
import signal
from pathlib import Path

import bundles
import pytest
import tiny_llama
from rich.console import Console
from staging_runs import Result, build_tiny, run_inline

from bundle.manifest import CHUNK_SIZE
from bundle.media import open_medium
from bundle.split import join
from bundle.staging.pipeline import Cut
from bundle.staging.resume import work_folder
from bundle.staging.sealed import SealedJob
from bundle.staging.views import built_view
from bundle.write import Kept, Member
from policy.errors import FaultError, RefusedError, UsageError


class Replay:
    """Gives back what the real programs once left; counts the runs; can be told what to do."""

    def __init__(self, left, at=None, act=None):
        self.left, self.at, self.act = left, at, act
        self.runs = []

    def __call__(self, job):
        name = job.out.name
        self.runs.append(name)
        for file, content in self.left[name].items():
            if (self.at, file) == (name, "model.onnx"):  # in the middle of a file
                (job.out / file).write_bytes(content[: len(content) // 2])
                self.act()
            (job.out / file).write_bytes(content)
        if self.at == name:
            self.act()
        return Result()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A snapshot, the undisturbed draft of it, and what the sealed programs left."""
    base = tmp_path_factory.mktemp("resume")
    folder = tiny_llama.write_snapshot(base / "model")
    left = {}

    def run(job):
        done = run_inline(job)
        left[job.out.name] = {path.name: path.read_bytes() for path in job.out.iterdir()}
        return done

    built = build_tiny(folder, base / "tiny.agb", run_sealed=run)
    assert built.resumed.runs == ()
    return folder, built.path.read_bytes(), left


@pytest.fixture
def place(made, tmp_path):
    """Another copy of the snapshot, and where the draft goes."""
    shutil.copytree(made[0], tmp_path / "model")
    (tmp_path / "out").mkdir()
    return tmp_path / "model", tmp_path / "out" / "tiny.agb"


def killed(call) -> None:
    """Run in a child until it kills itself."""
    child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(77)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """The builder's key; it kills the build that signs with it."""

    public_key = bundles.signer("builder").public_key

    def sign(self, _message):
        kill()


def stages(at):
    return lambda stage, done, _: kill() if (stage, done) == at else None


# where it is killed -> the sealed runs that the next build makes
POINTS = {
    "inspecting": (lambda _: {"progress": stages(("hash", 0))}, ["graph", "parity"]),
    "converting": (lambda left: {"run_sealed": Replay(left, "graph", kill)}, ["graph", "parity"]),
    "proving": (lambda left: {"run_sealed": Replay(left, "parity", kill)}, ["parity"]),
    "describing": (lambda _: {"progress": stages(("describe", 0))}, []),
    "writing": (
        lambda _: {"progress": lambda stage, *_: kill() if stage == "seal" else None},
        [],
    ),
    "signing": (lambda _: {"signer": Deadly()}, []),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_build_goes_on_to_the_same_bytes(made, place, point):
    _, wanted, left = made
    folder, out = place
    out.write_bytes(b"the release of last month")
    how, again = POINTS[point]
    killed(lambda: build_tiny(folder, out, **{"run_sealed": Replay(left), **how(left)}))
    assert out.read_bytes() == b"the release of last month"

    second = Replay(left)
    built = build_tiny(folder, out, run_sealed=second)
    assert out.read_bytes() == wanted
    assert second.runs == again
    assert built.resumed.runs == tuple(n for n in ("graph", "parity") if n not in again)
    assert list(out.parent.iterdir()) == [out]


def test_killed_again_and_again(made, place):
    _, wanted, left = made
    folder, out = place
    for how, _ in POINTS.values():
        killed(lambda how=how: build_tiny(folder, out, **{"run_sealed": Replay(left), **how(left)}))
    second = Replay(left)
    build_tiny(folder, out, run_sealed=second)
    assert (second.runs, out.read_bytes()) == ([], wanted)


def kept(out: Path) -> Path:
    return out.with_name(f".{out.name}.work") / "kept"


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    path.write_bytes(raw)


SPOILT = {
    "a file that a run left": (lambda at: flip(at / "graph" / "model.onnx"), "graph"),
    "a file cut": (lambda at: os.truncate(at / "graph" / "model.onnx", 9), "graph"),
    "a file too many": (lambda at: (at / "graph" / "more").write_bytes(b"x"), "graph"),
    "a file too few": (lambda at: (at / "parity" / "parity.json").unlink(), "parity"),
    "the record": (lambda at: flip(at / "parity.json"), "parity"),
    "the record gone": (lambda at: (at / "graph.json").unlink(), "graph"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_was_altered_meanwhile_is_made_again(made, place, what):
    _, wanted, left = made
    folder, out = place
    killed(
        lambda: build_tiny(folder, out, run_sealed=Replay(left), progress=stages(("describe", 0)))
    )
    spoil, redone = SPOILT[what]
    spoil(kept(out))
    second = Replay(left)
    build_tiny(folder, out, run_sealed=second)
    assert redone in second.runs
    assert out.read_bytes() == wanted


def test_another_snapshot_takes_nothing_over(made, place):
    _, _, left = made
    folder, out = place
    killed(lambda: build_tiny(folder, out, run_sealed=Replay(left, "parity", kill)))
    config = folder / "generation_config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    second = Replay(left)
    assert build_tiny(folder, out, run_sealed=second).resumed.runs == ()
    assert second.runs == ["graph", "parity"]


def test_a_failure_of_the_host_keeps_what_is_finished_and_says_so(made, place):
    _, wanted, left = made
    folder, out = place

    def full():
        raise FaultError("host.space", "the disk is full", hint="free space")

    with pytest.raises(FaultError, match="the finished steps are kept") as caught:
        build_tiny(folder, out, run_sealed=Replay(left, "parity", full))
    assert "free space; the same command goes on from .tiny.agb.work" in caught.value.hint
    second = Replay(left)
    build_tiny(folder, out, run_sealed=second)
    assert (second.runs, out.read_bytes()) == (["parity"], wanted)


@pytest.mark.parametrize("stop", [RefusedError("parity.failed", "no"), KeyboardInterrupt()])
def test_a_refusal_keeps_nothing_and_an_interrupt_keeps_what_is_finished(made, place, stop):
    _, _, left = made
    folder, out = place

    def act():
        raise stop

    with pytest.raises(type(stop)):
        build_tiny(folder, out, run_sealed=Replay(left, "parity", act))
    names = {path.name for path in kept(out).iterdir()} if kept(out).exists() else set()
    assert names == (set() if isinstance(stop, RefusedError) else {"graph", "graph.json"})


def as_link(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def as_file(place: Path, _: Path) -> None:
    place.write_text("x")


def open_to_all(place: Path, _: Path) -> None:
    place.mkdir()
    place.chmod(0o777)


def of_another(place: Path, _: Path) -> None:
    place.mkdir(mode=0o700)
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(place, 65534, 65534)


@pytest.mark.parametrize("inner", ["", "kept"])
@pytest.mark.parametrize("spoil", [as_link, as_file, open_to_all, of_another])
def test_a_work_folder_that_others_can_change_is_refused_and_left(tmp_path, inner, spoil):
    out, victim = tmp_path / "x.agb", tmp_path / "victim"
    (victim / "graph").mkdir(parents=True)
    (victim / "graph" / "mine").write_text("mine")
    place = tmp_path / ".x.agb.work"
    if inner:
        place.mkdir(mode=0o700)
        place /= inner
    spoil(place, victim)
    with pytest.raises(RefusedError) as caught, work_folder(out):
        pytest.fail("the build began")
    assert caught.value.code == "build.output"
    assert os.path.lexists(place)  # for people to look at
    assert (victim / "graph" / "mine").read_text() == "mine"


def test_a_link_among_what_a_killed_build_left_is_removed_and_not_followed(tmp_path):
    out, victim = tmp_path / "x.agb", tmp_path / "victim"
    victim.mkdir()
    (tmp_path / ".x.agb.work").mkdir(mode=0o700)
    (tmp_path / ".x.agb.work" / "graph").symlink_to(victim)
    (victim / "mine").write_text("mine")
    with work_folder(out) as work:
        assert [entry.name for entry in work.folder.iterdir()] == ["kept"]
    assert (victim / "mine").read_text() == "mine"


def test_two_builds_of_one_file_do_not_meet(tmp_path):
    out = tmp_path / "x.agb"
    with work_folder(out) as work:
        (work.folder / "mine").write_text("mine")
        with pytest.raises(RefusedError) as caught, work_folder(out):
            pytest.fail("the second build began")
        assert caught.value.code == "build.output"
        assert (work.folder / "mine").read_text() == "mine"
        with work_folder(tmp_path / "y.agb"):
            pass


def test_what_no_record_can_hold_is_not_kept(tmp_path):
    out = tmp_path / "x.agb"
    for evidence, more in (({"a": object()}, "file"), ({}, "folder")):
        with work_folder(out) as work:
            (work.folder / "a").mkdir()

            def run(job, evidence=evidence, more=more):
                (job.out / "f").write_bytes(b"x")
                if more == "folder":
                    (job.out / "g").mkdir()
                return Result(evidence=evidence)

            job = SealedJob(("x",), (), work.folder / "a", 1, 1.0)
            assert work.keeping(run)(job).status == 0
            assert not list(work.kept.glob("*.json"))


# -- volumes ----------------------------------------------------------------------------------


def test_a_draft_is_cut_into_volumes_at_once_and_a_killed_cut_goes_on(made, place):
    _, wanted, left = made
    folder, out = place
    cut = Cut(6_000_000, parity=1)
    how = {"run_sealed": Replay(left), "cut": cut}
    killed(
        lambda: build_tiny(
            folder, out, **how, progress=lambda stage, *_: kill() if stage == "volumes" else None
        )
    )
    assert not list(out.parent.glob("tiny.agb.*"))
    second = Replay(left)
    built = build_tiny(folder, out, run_sealed=second, cut=cut)
    assert second.runs == []
    assert sorted(out.parent.iterdir()) == list(built.volumes)
    assert built.path == built.volumes[0]
    assert "volumes" in screen(built_view(built))
    assert "the conversion, the proof of parity" in screen(built_view(built))
    built.volumes[0].unlink()  # made up for by parity
    medium = open_medium(built.volumes[1])
    join(medium, out)
    medium.close()
    assert out.read_bytes() == wanted


def test_a_size_that_holds_no_chunk_costs_no_conversion(made, place):
    _, _, left = made
    folder, out = place
    with pytest.raises(UsageError, match="no room for one chunk"):
        build_tiny(folder, out, run_sealed=Replay(left), cut=Cut(1_000_000))
    second = Replay(left)
    assert build_tiny(folder, out, run_sealed=second, cut=Cut(6_000_000)).size > 0
    assert second.runs == []


def screen(view) -> str:
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(view)
    return console.file.getvalue()


# -- the archive, chunk by chunk --------------------------------------------------------------

CHUNKS = 7


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Members of seven chunks, each with its digest; and the undisturbed archive."""
    base = tmp_path_factory.mktemp("chunks")
    weights = base / "weights"
    weights.write_bytes(os.urandom((CHUNKS - 1) * CHUNK_SIZE + 99))
    found = bundles.make_members(weights)
    found = [
        Member(m.path, m.source, m.role, m.media_type, sha256=bundles.sha_of(m.source))
        for m in found
    ]
    bundles.make_bundle(base / "whole.agb", members=found)
    return found, (base / "whole.agb").read_bytes()


def write(out, members, folder, progress=None, **more):
    state = Kept(folder)
    manifest = bundles.make_bundle(out, members=members, kept=state, progress=progress, **more)
    return manifest, state.resumed


@pytest.mark.parametrize("after", range(1, CHUNKS + 1))
def test_an_archive_goes_on_after_each_chunk(members, tmp_path, after):
    found, wanted = members
    out, folder = tmp_path / "x.agb", tmp_path / "kept"
    limit = after * CHUNK_SIZE

    def stop(done, total):
        if done >= min(limit, total):
            kill()

    killed(lambda: write(out, found, folder, stop))
    assert not out.exists()
    _, resumed = write(out, found, folder)
    assert out.read_bytes() == wanted
    # What is written is noted a few chunks later: those are written again.
    assert after - 2 - len(os.sched_getaffinity(0)) - 1 <= resumed <= after


def test_altered_chunks_are_written_again(members, tmp_path):
    found, wanted = members
    out, folder = tmp_path / "x.agb", tmp_path / "kept"
    killed(lambda: write(out, found, folder, lambda done, total: done == total and kill()))
    with (folder / "archive").open("r+b") as stream:
        for chunk in (1, 3):
            stream.seek(len(wanted) % CHUNK_SIZE + chunk * CHUNK_SIZE + 17)
            stream.write(b"altered")
    write(out, found, folder)
    assert out.read_bytes() == wanted


def test_the_same_files_serve_another_release(members, tmp_path):
    found, _ = members
    out, folder = tmp_path / "x.agb", tmp_path / "kept"
    killed(lambda: write(out, found, folder, lambda done, total: done == total and kill()))
    _, resumed = write(out, found, folder, version="1.1")
    bundles.make_bundle(tmp_path / "plain.agb", members=found, version="1.1")
    assert resumed > 0
    assert out.read_bytes() == (tmp_path / "plain.agb").read_bytes()


@pytest.mark.parametrize("change", ["another source", "no digest", "another head"])
def test_chunks_of_another_archive_are_not_taken(members, tmp_path, change):
    found, _ = members
    out, folder = tmp_path / "x.agb", tmp_path / "kept"
    killed(lambda: write(out, found, folder, lambda done, total: done == total and kill()))
    more = {}
    if change == "another head":
        more = {"version": "1.1-" + "x" * 40, "name": "y" * 60}
        found = [*found, Member("payload/tiny/README.md", b"x" * 5000, "document")]
    elif change == "no digest":
        found = [
            m if isinstance(m.source, bytes) else Member(m.path, m.source, m.role) for m in found
        ]
    else:
        found = [
            Member(m.path, b'{"findings":["x"]}', m.role, m.media_type)
            if m.path == "META/report.json"
            else m
            for m in found
        ]
    _, resumed = write(out, found, folder, **more)
    assert resumed == 0
    bundles.make_bundle(tmp_path / "plain.agb", members=found, **more)
    assert out.read_bytes() == (tmp_path / "plain.agb").read_bytes()


def test_a_source_that_was_altered_while_it_was_read_does_not_stay(members, tmp_path):
    """Else every later build would fail on the chunk that was taken from it."""
    found, wanted = members
    weights = tmp_path / "weights"
    index = next(n for n, m in enumerate(found) if isinstance(m.source, Path))
    shutil.copyfile(found[index].source, weights)
    moved = [
        Member(m.path, weights, m.role, m.media_type, sha256=m.sha256) if n == index else m
        for n, m in enumerate(found)
    ]
    good = weights.read_bytes()
    weights.write_bytes(b"x" + good[1:])
    out, folder = tmp_path / "x.agb", tmp_path / "kept"
    killed(lambda: write(out, moved, folder, lambda done, _: done >= 5 * CHUNK_SIZE and kill()))
    weights.write_bytes(good)
    with pytest.raises(FaultError, match="not the one that was measured"):
        write(out, moved, folder)
    write(out, moved, folder)
    assert out.read_bytes() == wanted


def test_one_file_has_one_writer(tmp_path):
    from bundle.write import fresh_file

    with fresh_file(tmp_path / "x", 1) as stream:
        stream.write(b"1")
        with (
            pytest.raises(FaultError, match="another command") as caught,
            fresh_file(tmp_path / "x", 1),
        ):
            pass
        assert caught.value.code == "host.state"
    assert (tmp_path / "x").read_bytes() == b"1"
