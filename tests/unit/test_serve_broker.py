"""The broker's order: no answer without a permit, a durable intent and a durable outcome."""

import errno
import json
import os
import stat
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import pytest
from policy_site import deciding

from airgap.audit import Actor, open_log
from airgap.audit.query import read_records
from airgap.config import Limits, load_site
from airgap.demo import site_toml
from airgap.enclave.channel import PART, REPLY, Frame, ProgramError
from airgap.extras import EXTRAS, require_extras
from airgap.inference.protocol import Done, Progress, Sample
from airgap.install.record import actor_of
from airgap.rules import load_rules
from airgap.science.program import create
from airgap.serve import Job, check_outputs, present
from airgap.serve.broker import Broker, Model, printable
from airgap.serve.present import reasons_of, write_whole
from airgap.serve.session import choose_project, hazard_holds
from policy.errors import FaultError, RefusedError, UsageError
from policy.terms import Digest

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
TAGS = {
    tag: number
    for number, tag in enumerate(
        [
            *("<ProteinS>", "<ProteinE>", "<MoleculeS>", "<MoleculeE>", "<PocketS>", "<PocketE>"),
            *("<MaterialS>", "<MaterialE>", "<MetalS>", "<MetalE>"),
            *("<Trans>", "<Search>", "<React>", "<ReverseReact>"),
        ],
        4,
    )
}
MODEL = Model(
    id="tiny",
    bundle=Digest.of(b"bundle"),
    name="tiny",
    version="1",
    precision="fp32",
    context={"model": "tiny", "max_context": 512, "vocab_size": 150, "tags": TAGS},
    reference_model=True,
    scientific_use=False,
)
TEXTS = (
    "<MoleculeS>CC(=O)Cl<MoleculeE><MoleculeS>Nc1ccc(O)cc1<MoleculeE>",
    "<MoleculeS>CC<MoleculeE>",
)


class Helper:
    """The helper's program, answered in this process; its refusals become ours, as in the seal."""

    def __init__(self):
        self.program = create({})
        self.program.warm_up()
        self.broken = ""

    def request(self, payload, timeout):
        assert timeout > 0
        if self.broken and json.loads(payload)["op"] == self.broken:
            raise FaultError("enclave.worker", "the helper died")
        try:
            return self.program.handle(payload, lambda _part: None)
        except ProgramError as error:
            raise RefusedError(error.code, error.message, hint=error.hint) from error

    def stream(self, payload, timeout):
        assert timeout > 0
        parts = []
        if self.broken and json.loads(payload)["op"] == self.broken:
            raise FaultError("enclave.worker", "the helper died")
        reply = self.program.handle(payload, parts.append)
        yield from (Frame(PART, 1, part) for part in parts)
        yield Frame(REPLY, 1, reply)


class Worker:
    """Sends the frames that a test wants it to send."""

    rung = "A"

    def __init__(self, frames=None):
        self.frames = frames
        self.asked = []

    def stream(self, payload, timeout, *, total_s=None):
        assert timeout > 0
        assert total_s
        self.asked.append(json.loads(payload))
        yield from self.frames if self.frames is not None else good_frames()


def good_frames():
    yield Frame(PART, 1, Progress(tokens=10, finished=0, n=2).encode())
    for index, text in enumerate(TEXTS):
        ids = (6, 30, 7, 3)
        sample = Sample(index, text, ids, "eos", -3.5 - index, 0.0)
        yield Frame(PART, 1, sample.encode())
    yield Frame(REPLY, 1, Done(9, 8, 12, 4, 2).encode())


@pytest.fixture(scope="module")
def helper():
    return Helper()


@pytest.fixture
def broker(tmp_path, helper):
    helper.broken = ""
    (tmp_path / "site.toml").write_text(site_toml(0))
    site, rules = load_site(tmp_path), load_rules(tmp_path)

    day = site.legal_day(NOW)
    use_policy = deciding(site, rules, MODEL.bundle, day=(day.as_of, day.known_at))

    with open_log(tmp_path, site="Test Lab") as log:
        yield Broker(log, Worker(), helper, MODEL, Actor("Ada"), use_policy)


def job(**changes):
    base = Job(
        "retrosynthesis", {"smiles": "CC(=O)Nc1ccc(O)cc1"}, "route-design", {"n": 2, "seed": 5}
    )
    return replace(base, **changes)


def story(broker):
    """Return (kind, phase, result or code) of every record of a request, in order."""
    found = []
    for record in read_records(broker.log.folder):
        if record["kind"] in {"inference", "denial"}:
            end = record.get("data", {}).get("result") or record.get("err", {}).get("code", "")
            found.append((record["kind"], record["phase"], end))
    return found


def test_an_answer_stands_between_two_durable_records(broker):
    told = []
    answer = broker.infer(job(), lambda *state: told.append(state))
    assert story(broker) == [("inference", "intent", ""), ("inference", "outcome", "complete")]
    assert answer.intent.seq < answer.outcome.seq
    assert answer.assessed.summary.valid == 2
    assert told[-1][1:] == (2, 2)
    assert answer.seed == 5
    request = broker.worker.asked[0]
    assert request["prompt"][0] == {"tag": "<MoleculeS>"}
    assert request["grammar"] == {"mode": "structure", "task": "retrosynthesis"}


def test_the_openings_open_the_commitments(broker):
    from airgap.audit import commitment

    answer = broker.infer(job())
    records = [r for r in read_records(broker.log.folder) if r["kind"] == "inference"]
    opening = answer.opening
    assert records[0]["in"]["commit"] == commitment(opening.content_in, opening.nonce_in).commit
    assert records[1]["out"]["commit"] == commitment(opening.content_out, opening.nonce_out).commit


def test_nobody_chose_a_seed_so_it_is_drawn_and_told(broker):
    first = broker.infer(job(options={"n": 2}))
    second = broker.infer(job(options={"n": 2}))
    assert first.seed != second.seed
    seeds = [
        r["data"]["seed"]
        for r in read_records(broker.log.folder)
        if r["kind"] == "inference" and r["phase"] == "intent"
    ]
    assert seeds == [first.seed, second.seed]


def test_a_refused_prompt_never_reaches_the_worker(broker):
    with pytest.raises(RefusedError) as refused:
        broker.infer(job(inputs={"smiles": "CC(=O"}))
    assert refused.value.code == "prompt.g07"
    assert broker.worker.asked == []
    assert story(broker) == [("denial", "event", "prompt.g07")]


def deep(levels):
    value = "C"
    for _ in range(levels):
        value = [value]
    return value


HOSTILE = [
    float("nan"), float("inf"), 10**400, -(10**30), None, True, "\0", "C\udc80", ["\ud800"],
    {"\ud800": "x"}, {"a": [float("nan")]}, deep(500), deep(100_000), ["C" * 1000] * 1000, {},
]  # fmt: skip


@pytest.mark.parametrize("where", ["input", "new input", "option", "new option"])
@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_value_that_is_none_has_a_code_and_is_on_record(broker, where, value):
    changed = {
        "input": {"inputs": {"smiles": value}},
        "new input": {"inputs": {"smiles": "CCO", "x": value}},
        "option": {"options": {"n": 2, "seed": value}},
        "new option": {"options": {"n": 2, "x": value}},
    }[where]
    with pytest.raises(RefusedError) as refused:
        broker.infer(job(**changed))
    assert refused.value.code.startswith(("prompt.", "request."))
    assert broker.worker.asked == []
    assert story(broker) == [("denial", "event", refused.value.code)]


def test_a_denied_use_never_reaches_the_worker(broker):
    with pytest.raises(RefusedError) as refused:
        broker.infer(job(project="sensor-coatings"))
    assert refused.value.code == "policy.denied"
    assert broker.worker.asked == []
    assert [kind for kind, _, _ in story(broker)] == ["denial"]


def test_an_output_that_the_screen_holds_is_not_released(broker):
    held = "<MoleculeS>CP(=O)(F)OC<MoleculeE>"
    broker.worker.frames = [
        Frame(PART, 1, Sample(i, held, (6, 7, 3), "eos", -1.0, 0.0).encode()) for i in range(2)
    ] + [Frame(REPLY, 1, Done(9, 6, 1, 1, 2).encode())]
    with pytest.raises(RefusedError) as refused:
        broker.infer(job())
    assert refused.value.code == "policy.held"
    assert "Reference" in refused.value.message
    assert story(broker) == [
        ("inference", "intent", ""),
        ("denial", "event", ""),
        ("inference", "outcome", "refused"),
    ]
    assert hazard_holds(broker.log, 0, datetime.now(UTC)) in {0, 1}  # by this test's uid


BROKEN_STREAMS = {
    "one sample too few": lambda f: [*f[:2], f[3]],
    "one sample twice": lambda f: [*f[:2], f[1], *f[2:]],
    "no reply": lambda f: f[:3],
    "no JSON": lambda f: [Frame(PART, 1, b"{"), *f],
    "an index that was not asked for": lambda f: [
        Frame(PART, 1, Sample(7, "x", (3,), "eos", -1.0, 0.0).encode()),
        *f,
    ],
    "a positive log-likelihood": lambda f: [
        Frame(PART, 1, f[1].payload.replace(b"-3.5", b"3.5")),
        *f[2:],
    ],
    "scores instead of samples": lambda f: [
        *f[:3],
        Frame(
            REPLY, 1, b'{"event":"scores","prompt_tokens":9,"scores":[{"logprob":-1.0,"tokens":1}]}'
        ),
    ],
}


@pytest.mark.parametrize("change", BROKEN_STREAMS.values(), ids=BROKEN_STREAMS.keys())
def test_a_worker_that_breaks_the_protocol_gives_no_answer(broker, change):
    assert broker.infer(job()).assessed.rows
    broker.worker.frames = change(list(good_frames()))
    with pytest.raises(FaultError) as failed:
        broker.infer(job())
    assert failed.value.code == "model.reply"
    assert story(broker)[-1] == ("inference", "outcome", "failed")


def test_a_helper_that_dies_while_assessing_gives_no_answer(broker):
    broker.helper.broken = "assess"
    with pytest.raises(FaultError):
        broker.infer(job())
    assert story(broker) == [("inference", "intent", ""), ("inference", "outcome", "failed")]


def test_an_interrupt_closes_the_intent(broker):
    def hit():
        yield Frame(PART, 1, Progress(tokens=1, finished=0, n=2).encode())
        raise KeyboardInterrupt

    broker.worker.frames = hit()
    with pytest.raises(KeyboardInterrupt):
        broker.infer(job())
    assert story(broker)[-1] == ("inference", "outcome", "cancelled")


def test_without_a_log_there_is_no_answer(broker):
    broker.log.close()
    with pytest.raises(FaultError) as failed:
        broker.infer(job())
    assert failed.value.code.startswith("audit.")
    assert broker.worker.asked == []


@pytest.mark.parametrize(
    ("limits", "changes"),
    [
        (Limits(samples=1), {}),
        (Limits(prompt_bytes=256), {"inputs": {"smiles": "C" * 300}}),
        (Limits(new_tokens=10), {}),
    ],
)
def test_the_caps_of_the_site_hold(broker, limits, changes):
    assert broker.infer(job()).assessed.rows
    broker.limits = limits
    with pytest.raises(RefusedError) as refused:
        broker.infer(job(**changes))
    assert refused.value.code == "request.limit"


def test_a_task_name_is_printable_in_the_record():
    assert printable("a\nb\x1b[31mü" + "x" * 99) == ("a?b?[31m?" + "x" * 99)[:32]


def test_a_person_with_two_projects_must_name_one(tmp_path):
    (tmp_path / "site.toml").write_text(site_toml(0))
    site = load_site(tmp_path)
    ada = site.find_person("ada")
    assert choose_project(site, ada, "route-design") == "route-design"
    with pytest.raises(RefusedError) as refused:
        choose_project(site, ada, "")
    assert refused.value.code == "site.project"


def test_the_extras_are_looked_up(monkeypatch):
    require_extras("cpu", "science")
    monkeypatch.setitem(EXTRAS, "cpu", ("no_such_module",))
    with pytest.raises(FaultError) as failed:
        require_extras("science", "cpu")
    assert failed.value.code == "host.extra"


# -- what a hazard hold may tell -------------------------------------------------------------------

EXACT, FAMILY, UNSCREENED = "CP(=O)(F)OC(C)C", "CCP(=O)(F)OCCCCCCC", "C." * 50 + "C"


def hold(broker, smiles):
    """Return everything that a user can read of a held run, and the files of its whole record."""
    before = set(broker.restricted.glob("*")) if broker.restricted.exists() else set()
    with pytest.raises(RefusedError) as refused:
        broker.infer(job(inputs={"smiles": smiles, "fix": True}))
    record = [r for r in read_records(broker.log.folder) if r["kind"] == "denial"][-1]
    digest = record["decision"]["id"].removeprefix("sha256:")
    public = json.loads((broker.log.folder / "log/objects" / digest[:2] / digest).read_bytes())
    (whole,) = set(broker.restricted.glob("*")) - before
    return refused.value, record, public, whole


@pytest.mark.parametrize("other", [FAMILY, UNSCREENED])
def test_two_hazard_holds_look_alike_everywhere_but_in_the_restricted_folder(broker, other):
    broker.restricted = broker.log.folder.parent / "restricted"
    (one, first, public, whole), (two, second, alike, another) = (
        hold(broker, EXACT),
        hold(broker, other),
    )
    number = f"#{first['seq']}.", f"#{second['seq']}."
    assert one.message.replace(number[0], "") == two.message.replace(number[1], "")
    assert (one.code, one.hint) == (two.code, two.hint) == ("policy.held", one.hint)
    assert first["decision"]["outcome"] == second["decision"]["outcome"] == "needs_approval"
    assert first["decision"]["rule"] == second["decision"]["rule"] == "HAZ"
    assert first["data"] == second["data"]
    commits = public.pop("restricted"), alike.pop("restricted")
    assert public == alike
    assert "cwc" not in json.dumps(public["facts"])
    for commit, path in zip(commits, (whole, another), strict=True):
        kept = json.loads(path.read_bytes())
        content = bytes.fromhex(kept["nonce"]) + kept["record"].encode()
        assert sha256(content).hexdigest() == commit == path.stem
        assert "HAZ-" in kept["record"]
        assert path.stat().st_mode & 0o777 == 0o600
    assert broker.restricted.stat().st_mode & 0o777 == 0o700


def test_the_operators_log_does_not_tell_holds_apart(broker, monkeypatch):
    lines = []

    class Recorder:
        def info(self, event, *, request, **fields):
            assert request
            lines.append((event, fields))

    monkeypatch.setattr("airgap.serve.broker.log", Recorder())
    for smiles in (EXACT, FAMILY):
        with pytest.raises(RefusedError):
            broker.infer(job(inputs={"smiles": smiles}))
    assert lines[0] == lines[1] == ("request.decided", {"permitted": False})


def test_duties_of_hazard_rules_do_not_stand_on_the_page(broker):
    broker.worker.frames = [
        Frame(PART, 1, Sample(i, "CP(=O)(OC)OC<MoleculeE>", (6, 7, 3), "stop", -1.0, 0.0).encode())
        for i in range(2)
    ] + [Frame(REPLY, 1, Done(9, 6, 1, 1, 2).encode())]
    answer = broker.infer(job(task="molecule", inputs={}))
    assert answer.assessed.output_screen.tier == "H2"
    assert any(each.hazard for each in answer.permit.decision.reasons)
    assert not any("notify" in line or "HAZ" in line for line in reasons_of(answer))
    assert answer.permit.ref.outcome == "permit"


# -- values that the channel does not carry --------------------------------------------------------


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused_and_on_record(broker, name, value):
    with pytest.raises(RefusedError) as refused:
        broker.infer(job(options={name: value}))
    assert refused.value.code == "prompt.option"
    assert story(broker) == [("denial", "event", "prompt.option")]


@pytest.mark.parametrize(("seed", "fits"), [(2**53 - 1, True), (2**53, False)])
def test_the_largest_seed_is_one_that_a_record_holds(broker, seed, fits):
    if fits:
        assert broker.infer(job(options={"n": 2, "seed": seed})).seed == seed
        return
    with pytest.raises(RefusedError) as refused:
        broker.infer(job(options={"n": 2, "seed": seed}))
    assert refused.value.code == "prompt.option"
    assert str(2**53 - 1) in refused.value.message


def test_an_input_of_another_encoding_is_refused(broker):
    with pytest.raises(RefusedError) as refused:
        broker.infer(job(inputs={"smiles": "CC\udcff"}))
    assert refused.value.code == "prompt.input"


# -- where results may be written ------------------------------------------------------------------


def test_a_result_never_replaces_a_device_or_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    long = tmp_path / ("n" * 300)
    for name in ("pipe", "link", "loop", long, "no/folder", "."):
        with pytest.raises(UsageError):
            check_outputs("molecule", {"csv": tmp_path / name})
    with pytest.raises(UsageError):
        check_outputs("molecule", {"csv": Path(os.devnull)})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_two_results_do_not_go_to_one_file(tmp_path):
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(UsageError) as refused:
        check_outputs("molecule", {"csv": tmp_path / "one", "html": tmp_path / "other"})
    assert "--csv" in refused.value.message


def test_a_link_keeps_pointing_to_the_result(tmp_path):
    (tmp_path / "link").symlink_to("real")
    check_outputs("molecule", {"csv": tmp_path / "link"})
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_result_that_does_not_fit_names_its_file_and_the_way_back(tmp_path, broker, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    answer = broker.infer(job())
    broker.worker.evidence = {}
    monkeypatch.setattr(import_module("airgap.serve.present"), "write_whole", full)
    with pytest.raises(FaultError) as fault:
        present(broker, job(), answer, {"csv": tmp_path / "a.csv"})
    assert fault.value.code == "host.space"
    assert "--csv" in fault.value.message
    assert "a.csv" in fault.value.message
    assert "--seed 5" in fault.value.hint


@pytest.mark.parametrize("name", ["José Åberg", "x" * 65, "李", "tab\tbed"])
def test_a_person_whose_name_a_record_cannot_hold_goes_by_the_id(broker, tmp_path, name):
    person = load_site(tmp_path).find_person("ada").model_copy(update={"name": name})
    assert actor_of(person).name == "ada"
    broker.actor = actor_of(person)
    assert broker.infer(job()).seed == 5
