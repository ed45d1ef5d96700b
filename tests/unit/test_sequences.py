"""The adapter for a sequence screener: what it reports, and that whatever goes wrong holds."""

import json
from pathlib import Path

import pytest
from science_runs import assess, run
from test_serve_broker import broker, helper, job  # noqa: F401 - fixtures

from airgap.config import SequenceScreener, parse_site
from airgap.demo import site_toml
from airgap.enclave import run_sealed
from airgap.enclave.channel import PART, REPLY, Frame
from airgap.inference.protocol import Done, Sample
from airgap.science import sequences
from airgap.science.sequences import SequenceScreen, folder_digest
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

# A screener for tests: it knows one harmless word, and starts no process.
PROGRAM = """
import argparse, json
parser = argparse.ArgumentParser()
for name in ("--input", "--database", "--output"):
    parser.add_argument(name, required=True)
options = parser.parse_args()
words = open(options.database + "/words.txt").read().split()
asked = json.load(open(options.input))["sequences"]
results = [
    {"id": each["id"], "status": "hit" if any(w in each["sequence"] for w in words) else "clear",
     "classes": ["biorisk"] if any(w in each["sequence"] for w in words) else []}
    for each in asked
]
json.dump({"format": "airgap/sequence-result/1", "name": "word screen", "version": "1",
           "mode": "words only", "results": results}, open(options.output, "w"))
"""
WORD = "WWTESTWW".replace("T", "C").replace("E", "D").replace("S", "N")


def digest_of(path):
    return str(Digest.of(path.read_bytes()))


@pytest.fixture
def installed(tmp_path):
    program, database = tmp_path / "bin" / "screen.py", tmp_path / "db"
    program.parent.mkdir()
    database.mkdir()
    program.write_text(PROGRAM)
    (database / "words.txt").write_text(WORD + "\n")
    return SequenceScreener(
        program=str(program),
        program_sha256=digest_of(program),
        name="word screen",
        version="1",
        mode="words only",
        database=str(database),
        database_sha256=folder_digest(database),
    )


class Result:
    def __init__(self, files, status=0):
        self.status, self.files, self.evidence = status, files, {"rung": "A"}


def inline(change=lambda reply: reply, status=0):
    """Run the program in this process, and let a test change its reply."""
    import subprocess
    import sys

    def call(job):
        job.out.mkdir()
        subprocess.run([sys.executable, *job.argv[1:]], check=True)
        path = job.out / "result.json"
        reply = change(json.loads(path.read_text()))
        if reply is None:
            return Result((), status)
        path.write_text(reply if isinstance(reply, str) else json.dumps(reply))
        return Result((path,), status)

    return call


def screen_of(installed, tmp_path, call=None, kept=None):
    return SequenceScreen(
        installed,
        run=call or inline(),
        scratch=tmp_path / "scratch",
        on_evidence=(kept if kept is not None else []).append,
    )


def test_a_clear_sequence_and_a_hit_and_who_looked(installed, tmp_path):
    kept = []
    screen = screen_of(installed, tmp_path, kept=kept)
    clear = screen(["MKTAYIAK"])
    assert (clear.status, clear.tier, clear.classes) == ("complete", "H0", [])
    hit = screen(["MKTAYIAK", f"MK{WORD}"])
    assert (hit.status, hit.tier, hit.classes) == ("complete", "H3", ["biorisk"])
    assert hit.mode.startswith("sequences: word screen 1, words only, program ")
    assert hit.pack == installed.database_sha256
    assert kept == [{"rung": "A"}] * 2
    assert list((tmp_path / "scratch").iterdir()) == []


LIES = {
    "another name": lambda r: {**r, "name": "other"},
    "another version": lambda r: {**r, "version": "2"},
    "a weaker mode": lambda r: {**r, "mode": "nothing"},
    "another format": lambda r: {**r, "format": "airgap/sequence-result/2"},
    "a field more": lambda r: {**r, "sequences": []},
    "a result too few": lambda r: {**r, "results": r["results"][:1]},
    "a result too many": lambda r: {
        **r,
        "results": [*r["results"], {**r["results"][0], "id": "9"}],
    },
    "an id twice": lambda r: {**r, "results": [r["results"][0]] * 2},
    "not finished": lambda r: {
        **r,
        "results": [r["results"][0], {**r["results"][1], "status": "incomplete"}],
    },
    "an unknown class": lambda r: {**r, "results": [{**r["results"][0], "classes": ["fine"]}]},
    "no JSON": lambda _: "{",
    "nothing": lambda _: None,
    "too much": lambda _: " " * (sequences.REPLY_LIMIT + 1),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_screener_that_does_not_keep_to_the_protocol_holds(installed, tmp_path, lie):
    assert screen_of(installed, tmp_path)(["MK", "MA"]).status == "complete"
    found = screen_of(installed, tmp_path, inline(lie))(["MK", "MA"])
    assert (found.status, found.tier) == ("incomplete", "H0")
    assert found.reason


def test_an_unfinished_screen_still_reports_its_hits(installed, tmp_path):
    def half(reply):
        reply["results"][0]["status"] = "incomplete"
        return reply

    found = screen_of(installed, tmp_path, inline(half))(["MK", WORD])
    assert (found.status, found.tier, found.classes) == ("incomplete", "H3", ["biorisk"])


def broken(error):
    def call(_job):
        raise error

    return call


FAULTS = {
    "time": broken(FaultError("enclave.deadline", "it took too long")),
    "no seal": broken(RefusedError("enclave.rung", "no rung")),
    "disk": broken(OSError(28, "No space left")),
    "exit": inline(status=3),
    "signal": inline(status=None),
}


@pytest.mark.parametrize("call", FAULTS.values(), ids=FAULTS.keys())
def test_a_screener_that_fails_holds(installed, tmp_path, call):
    found = screen_of(installed, tmp_path, call)(["MK"])
    assert (found.status, "failed" in found.reason) == ("incomplete", True)


def test_another_database_or_kind_or_size_holds(installed, tmp_path):
    screen = screen_of(installed, tmp_path)
    assert screen(["MK"], "nucleic_acid").status == "incomplete"
    assert screen(["M" * (sequences.LENGTH_LIMIT + 1)]).status == "incomplete"
    assert screen(["M"] * (sequences.SEQUENCES_LIMIT + 1)).status == "incomplete"
    (Path(installed.database) / "words.txt").write_text("nothing\n")
    other = screen_of(installed, tmp_path)(["MK"])
    assert (other.status, "digest" in other.reason) == ("incomplete", True)
    missing = screen_of(installed.model_copy(update={"database": "/nowhere"}), tmp_path)(["MK"])
    assert missing.status == "incomplete"


def test_a_database_is_hashed_before_every_run(installed, tmp_path):
    screen, words = screen_of(installed, tmp_path), Path(installed.database) / "words.txt"
    assert screen(["MK"]).status == "complete"
    before = words.read_text()
    words.write_text("nothing\n")
    changed = screen(["MK"])
    assert (changed.status, "site.screener" in changed.reason) == ("incomplete", True)
    words.write_text(before)
    assert screen(["MK"]).status == "complete"
    (words.parent / "more.txt").write_text("")
    assert screen(["MK"]).status == "incomplete"


CHANGED = {
    "a byte more": lambda path: path.write_text(PROGRAM + "#"),
    "gone": lambda path: path.unlink(),
    "too large": lambda path: path.write_bytes(b" " * (sequences.PROGRAM_LIMIT + 1)),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED.keys())
def test_another_program_is_refused_at_the_start_and_holds_later(installed, tmp_path, change):
    calls = []
    screen = screen_of(installed, tmp_path, lambda job: calls.append(job) or inline()(job))
    assert screen(["MK"]).status == "complete"
    change(Path(installed.program))
    found = screen(["MK"])
    assert (found.status, "site.screener" in found.reason) == ("incomplete", True)
    assert len(calls) == 1
    with pytest.raises(RefusedError) as refused:
        screen_of(installed, tmp_path)
    assert refused.value.code == "site.screener"


def test_what_runs_is_a_copy_of_what_was_hashed_and_sees_nothing_beside_it(installed, tmp_path):
    beside = Path(installed.program).parent / "json.py"
    beside.write_text("raise SystemExit(7)\n")

    def late(job):
        Path(installed.program).write_text("raise SystemExit(8)\n")
        assert Path(job.argv[1]).read_text() == PROGRAM
        assert beside.parent not in {Path(each) for each in job.read_only}
        assert [each.name for each in Path(job.argv[1]).parent.iterdir()] == ["screener.py"]
        return inline()(job)

    assert screen_of(installed, tmp_path, late)(["MK"]).status == "complete"


def test_the_digest_of_a_folder_is_over_names_and_contents(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        folder_digest(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x")
    first = folder_digest(tmp_path)
    (tmp_path / "a" / "b").rename(tmp_path / "a" / "c")
    assert folder_digest(tmp_path) != first
    (tmp_path / "link").symlink_to("a/c")
    with pytest.raises(ValueError, match="neither"):
        folder_digest(tmp_path)


def test_it_runs_under_the_seal_without_a_network_or_a_new_process(installed, tmp_path):
    screen = SequenceScreen(
        installed,
        run=lambda job: run_sealed(job, state=tmp_path / "state"),
        scratch=tmp_path / "scratch",
    )
    assert screen(["MKTAYIAK"]).status == "complete"
    assert screen([f"MK{WORD}"]).tier == "H3"
    program = Path(installed.program)
    for escape in ("import socket; socket.socket()", "import os; os.fork()"):
        program.write_text(f"{escape}\n{PROGRAM}")
        pinned = installed.model_copy(update={"program_sha256": digest_of(program)})
        screen = SequenceScreen(
            pinned,
            run=lambda job: run_sealed(job, state=tmp_path / "state"),
            scratch=tmp_path / "scratch",
        )
        found = screen(["MKTAYIAK"])
        assert (found.status, "site.screener" in found.reason) == ("incomplete", False), escape


def test_site_toml_names_the_screener(installed):
    lines = "\n".join(
        f'{name} = "{getattr(installed, name)}"' for name in installed.model_fields_set
    )
    text = site_toml(0).replace("[policy]", f"[screen.sequences]\n{lines}\n\n[policy]")
    assert parse_site(text.encode()).screen.sequences == installed
    assert parse_site(site_toml(0).encode()).screen.sequences is None
    with pytest.raises(RefusedError, match="program"):
        parse_site(text.replace(".py", ".sh").encode())


# -- in a run -------------------------------------------------------------------------------------


def test_residues_beyond_a_copy_are_told_to_the_broker_and_to_nobody_else():
    _, exact, _ = run("binding-site", ["MKTA<ProteinE>", "M<PocketS>K"], sequence="MKTA")
    assert (exact.sequences, exact.output_screen.status) == ([], "complete")
    _, other, _ = run("binding-site", ["MKTA<ProteinE>", f"MK{WORD}<ProteinE>"], sequence="MKTA")
    assert other.sequences == [f"MK{WORD}"]
    assert other.output_screen.status == "incomplete"
    raw = assess("binding-site", [f"MK{WORD}<ProteinE>"], {"sequence": "MKTA"})
    assert raw["invalid"][0]["text"] is None


def site_job():
    return job(task="binding-site", inputs={"sequence": "MKTAYIAKQR"}, options={"n": 2, "seed": 1})


def frames(text):
    return [
        Frame(PART, 1, Sample(i, text, (6, 7, 3), "stop", -1.0, 0.0).encode()) for i in range(2)
    ] + [Frame(REPLY, 1, Done(9, 6, 1, 1, 2).encode())]


def test_a_new_sequence_holds_without_a_screener_and_passes_with_one(broker, installed, tmp_path):  # noqa: F811
    broker.worker.frames = frames("MKTAYIAKQR<ProteinE>")
    assert broker.infer(site_job()).assessed.summary.valid == 2
    broker.worker.frames = frames("MKTT<ProteinE>")
    with pytest.raises(RefusedError) as refused:
        broker.infer(site_job())
    assert refused.value.code == "policy.held"
    broker.screen_sequences = screen_of(installed, tmp_path)
    answer = broker.infer(site_job())
    assert answer.assessed.summary.invalid == 2
    assert answer.permit.decision.as_document()["screens"][0]["mode"].startswith("sequences: word")
    broker.worker.frames = frames(f"MK{WORD}<ProteinE>")
    with pytest.raises(RefusedError) as refused:
        broker.infer(site_job())
    assert refused.value.code == "policy.held"
