"""Holds: kept without what was written, released by two named people, answered as held."""

import json
import os
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import bundles
import pytest
import typer
from policy_site import deciding
from test_approvals import LONG_AGO, enrolled
from test_serve_broker import EXACT, FAMILY, MODEL, Helper, Worker, good_frames, job

from airgap import holds
from airgap.audit import Actor, new_ulid, open_log
from airgap.audit.query import read_records
from airgap.cli import hold as commands
from airgap.cli.common import show_error
from airgap.config import parse_site
from airgap.demo import site_toml
from airgap.enclave.channel import PART, REPLY, Frame
from airgap.holds import Holds
from airgap.inference.protocol import Done, Sample
from airgap.release_desk import ReleaseDesk
from airgap.rules import load_rules
from airgap.science.views import screen_line
from airgap.serve.broker import Broker
from airgap.serve.present import reasons_of
from airgap.serve.session import hazard_holds
from bundle import keys, trust
from bundle.envelope import Envelope
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
MEMO = Digest.of(b"memo of the hazard board")
PEOPLE = enrolled(
    eve=("ehs",), xia=("export_control",), bob=("biosafety",), ada=("ehs",), tom=("approver",)
).document
THIODIGLYCOL = "OCCSCCO"


def tree_of(path, **changes):
    text = site_toml(os.getuid()).replace("as_of = ", "# as_of = ")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (path / "site.toml").write_text(text)
    return path


@pytest.fixture(scope="module")
def helper():
    return Helper()


@pytest.fixture
def broker(tmp_path, helper):
    helper.broken = ""
    tree_of(tmp_path)
    site, rules = parse_site((tmp_path / "site.toml").read_bytes()), load_rules(tmp_path)

    use_policy = deciding(site, rules, MODEL.bundle, day=(NOW.date(), NOW))

    with open_log(tmp_path, site="Test Lab") as log:
        made = Broker(log, Worker(), helper, MODEL, Actor("Ada"), use_policy)
        made.restricted = tmp_path / "restricted"
        made.holds = Holds(tmp_path, PEOPLE, "ada")
        yield made


def writes(smiles):
    """Frames of a model that writes this molecule."""
    return [
        Frame(
            PART,
            1,
            Sample(i, f"<MoleculeS>{smiles}<MoleculeE>", (6, 7, 3), "eos", -1.0, 0.0).encode(),
        )
        for i in range(2)
    ] + [Frame(REPLY, 1, Done(9, 6, 1, 1, 2).encode())]


def held(broker, asked=None, frames=None):
    """Run a job that is held and return its hold."""
    broker.worker.frames = frames
    with pytest.raises(RefusedError) as refused:
        broker.infer(asked or job())
    assert refused.value.code == "policy.held"
    found = broker.holds.every()[-1]
    assert found.reference in refused.value.message
    return found


def released(hold, *people, **changes):
    words = {
        "reason": "the board has seen it",
        "issued": datetime(2026, 11, 24, 9, tzinfo=UTC),
        "expires": date(2026, 12, 1),
        "document": MEMO,
        **changes,
    }
    envelope = holds.RELEASE.sign(holds.word_release(hold, **words), bundles.signer(people[0]))
    for person in people[1:]:
        envelope = holds.countersign_release(envelope, bundles.signer(person))
    return envelope


def taken_up(hold, **changes):
    inputs, options = hold.inputs_and_options()
    return job(inputs=inputs, options=options, **{"held": hold.request, **changes})


def test_a_held_output_is_kept_as_a_commitment_and_answered_after_its_release(broker, tmp_path):
    hold = held(broker, frames=writes(FAMILY))
    assert (hold.stage, hold.seed, hold.person) == ("output", 5, "ada")
    kept = [path.read_bytes() for path in (tmp_path / "holds").iterdir()]
    assert len(kept) == 1
    assert FAMILY.encode() not in kept[0]
    assert (tmp_path / "holds").stat().st_mode & 0o777 == 0o700
    assert set(broker.holds.blocking(hold)) == {"HAZ-CWC1", "HAZ-RETRO"}

    held(broker, taken_up(hold), writes(FAMILY))  # nobody has released it
    broker.holds.add_release(released(hold, "eve", "xia"))
    answer = broker.infer(taken_up(hold))
    assert answer.assessed.summary.valid == 2
    assert answer.seed == hold.seed
    assert broker.holds.answered(hold) == f"{answer.outcome.origin}#{answer.outcome.seq}"


def test_a_held_input_runs_after_its_release_and_its_output_is_judged_anew(broker):
    asked = job(inputs={"smiles": THIODIGLYCOL}, options={"n": 2})
    hold = held(broker, asked)
    assert (hold.stage, hold.output, hold.seed) == ("input", None, None)
    assert broker.worker.asked == []
    broker.holds.add_release(released(hold, "eve", "xia"))
    assert broker.infer(taken_up(hold)).assessed.rows
    second = held(broker, taken_up(hold), writes(FAMILY))
    assert (second.stage, second.parent) == ("output", hold.request)
    broker.holds.add_release(released(second, "xia", "eve"))
    assert broker.infer(taken_up(second)).assessed.rows
    assert broker.holds.answered(hold)


def test_taking_up_before_the_release_is_told_on_record_and_opens_no_hold(broker, tmp_path):
    site, rules = parse_site((tmp_path / "site.toml").read_bytes()), load_rules(tmp_path)
    desk = ReleaseDesk(tmp_path, site, rules, PEOPLE, broker.holds, hazard_role=False)
    broker.require_released = lambda request: desk.require_released(broker.holds.taken_up(request))
    now = datetime.now(UTC)  # the day by which the desk goes
    broker.use_policy = deciding(site, rules, MODEL.bundle, day=(now.date(), now))
    hold = held(broker, job(inputs={"smiles": THIODIGLYCOL}, options={"n": 2}))

    def refused(found, *expected):
        kept, probing = broker.holds.every(), hazard_holds(broker.log, os.getuid(), now)
        with pytest.raises(RefusedError) as caught:
            broker.infer(taken_up(found))
        assert caught.value.code == "hold.waiting"
        assert all(each in caught.value.message for each in (found.reference, *expected))
        assert not any(each in caught.value.message for each in ("HAZ", "CWC", "role"))
        assert broker.holds.every() == kept
        assert hazard_holds(broker.log, os.getuid(), now) == probing
        return caught.value.message

    refused(hold, ": held")
    issued = (now - timedelta(minutes=1)).replace(microsecond=0)
    words = {"issued": issued, "expires": now.date() + timedelta(days=5)}
    envelope = released(hold, "eve", **words)
    broker.holds.add_release(envelope)
    refused(hold, "signed by eve")
    broker.holds.add_release(holds.countersign_release(envelope, bundles.signer("xia")))
    second = held(broker, taken_up(hold), writes(FAMILY))  # now it runs, and the answer is held
    for _ in range(4):
        refused(hold, "was released and run", second.reference)
        refused(second, ": held")
    *_, last = read_records(tmp_path / "audit")
    assert (last["kind"], last["err"]["code"]) == ("denial", "hold.waiting")
    broker.holds.add_release(released(second, "xia", "eve", **words))
    assert broker.infer(taken_up(second)).assessed.rows
    with pytest.raises(RefusedError) as caught:
        broker.infer(taken_up(second, held=new_ulid()))
    assert caught.value.code == "hold.missing"


WEAK = {
    "nobody": (),
    "one person": ("eve",),
    "the requester and another": ("ada", "eve"),
    "a role that does not release": ("eve", "tom"),
    "a role that does not release routes": ("eve", "bob"),
    "a stranger": ("eve", "mallory"),
}


@pytest.mark.parametrize("people", WEAK.values(), ids=WEAK.keys())
def test_a_release_by_too_few_or_the_wrong_people_releases_nothing(broker, people):
    hold = held(broker, frames=writes(FAMILY))
    if people:
        broker.holds.add_release(released(hold, *people))
    held(broker, taken_up(hold), writes(FAMILY))
    broker.holds.add_release(released(hold, "eve", "xia"))
    assert broker.infer(taken_up(hold)).assessed.rows


WORDS = {
    "expired": {"expires": date(2026, 11, 24)},
    "from tomorrow": {"issued": datetime(2026, 11, 25, tzinfo=UTC)},
    "too long": {"expires": date(2027, 6, 1)},
    "no document": {"document": None},
}


@pytest.mark.parametrize("changes", WORDS.values(), ids=WORDS.keys())
def test_a_release_outside_its_terms_releases_nothing(broker, changes):
    hold = held(broker, frames=writes(FAMILY))
    broker.holds.add_release(released(hold, "eve", "xia", **changes))
    held(broker, taken_up(hold), writes(FAMILY))


OTHERS = {
    "other inputs": lambda one: replace(one, inputs={"smiles": "CCOC(C)=O"}),
    "another project": lambda one: replace(one, project="sensor-coatings"),
    "another task": lambda one: replace(one, task="molecule", inputs={}),
    "another seed": lambda one: replace(one, options={**one.options, "seed": 6}),
    "other settings": lambda one: replace(one, options={**one.options, "temperature": 0.5}),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_a_release_is_for_the_very_job_that_was_held(broker, change):
    hold = held(broker, frames=writes(FAMILY))
    broker.holds.add_release(released(hold, "eve", "xia"))
    assert broker.infer(taken_up(hold)).assessed.rows
    broker.worker.frames = writes(FAMILY)
    with pytest.raises(RefusedError) as refused:
        broker.infer(change(taken_up(hold)))
    assert refused.value.code in {"policy.held", "policy.denied"}


def test_another_answer_than_the_held_one_is_held_anew(broker):
    hold = held(broker, frames=writes(FAMILY))
    broker.holds.add_release(released(hold, "eve", "xia"))
    again = held(broker, taken_up(hold), writes(FAMILY + "C"))
    assert (again.parent, again.stage) == (hold.request, "output")


def test_another_person_does_not_take_it_up(broker, tmp_path):
    hold = held(broker, frames=writes(FAMILY))
    broker.holds.add_release(released(hold, "eve", "xia"))
    broker.holds = Holds(tmp_path, PEOPLE, "eve")
    mine = held(broker, taken_up(hold, held=""), writes(FAMILY))
    before = sorted(path.name for path in (tmp_path / "holds").iterdir())
    (tmp_path / f"{mine.request}.json").write_bytes(mine.to_bytes())  # as if she had put it there
    harmless = job(inputs={"smiles": "CC(=O)Nc1ccccc1"})
    broker.worker.frames = None
    said = set()
    for name in (
        hold.request,
        new_ulid(),
        f"../{mine.request}",
        f"{tmp_path}/{mine.request}",
        "\0",
    ):
        for asked in (taken_up(hold, held=name), replace(harmless, held=name)):
            broker.worker.frames = writes(FAMILY) if asked.inputs == job().inputs else None
            with pytest.raises(RefusedError) as refused:
                broker.infer(asked)
            said.add((refused.value.code, refused.value.message))
    assert said == {("hold.missing", "you have no hold of that request")}
    assert sorted(path.name for path in (tmp_path / "holds").iterdir()) == before
    assert broker.holds.answered(hold) == ""


def test_what_no_approval_lifts_stays_held(broker):
    hold = held(broker, frames=writes(EXACT))
    assert "HAZ-CWC1-EXACT" in broker.holds.blocking(hold)
    broker.holds.add_release(released(hold, "eve", "xia"))
    held(broker, taken_up(hold), writes(EXACT))


def test_a_hold_that_was_altered_is_not_the_released_one(broker, tmp_path):
    hold = held(broker, frames=writes(FAMILY))
    broker.holds.add_release(released(hold, "eve", "xia"))
    path = tmp_path / "holds" / f"{hold.request}.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"seed":5', b'"seed":6'))
    (altered,) = broker.holds.every()
    assert broker.holds.releases(altered) == []
    for bad in (good + b" ", b"{}", good.replace(b"airgap-hold/1", b"airgap-hold/2")):
        path.write_bytes(bad)
        with pytest.raises(RefusedError) as refused:
            broker.holds.every()
        assert refused.value.code == "hold.file"
    path.write_bytes(good)
    path.rename(path.with_name("01" * 13 + ".json"))
    with pytest.raises(RefusedError):
        broker.holds.every()


def test_the_record_that_held_it_is_the_one_that_was_committed(broker, tmp_path):
    hold = held(broker, frames=writes(FAMILY))
    path = tmp_path / "restricted" / f"{hold.restricted}.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"HAZ-CWC1", b"HAZ-CWC9"))
    with pytest.raises(RefusedError) as refused:
        broker.holds.blocking(hold)
    assert refused.value.code == "hold.file"
    path.unlink()
    with pytest.raises(FaultError):
        broker.holds.blocking(hold)


def test_a_plain_denial_is_no_hold_and_without_a_desk_nothing_is_kept(broker):
    with pytest.raises(RefusedError):
        broker.infer(job(project="sensor-coatings"))
    assert broker.holds.every() == []
    broker.holds, broker.worker.frames = None, writes(FAMILY)
    with pytest.raises(RefusedError):
        broker.infer(job())


def test_holds_that_were_released_are_no_probing(broker):
    hold = held(broker, frames=writes(FAMILY))
    other = held(broker, frames=writes(FAMILY))
    now = datetime.now(UTC)
    assert hazard_holds(broker.log, os.getuid(), now, broker.holds.settled()) == 2
    broker.holds.add_release(released(hold, "eve", "xia"))
    broker.holds.add_release(released(other, "eve"))
    assert broker.holds.settled() == {hold.seq}
    assert hazard_holds(broker.log, os.getuid(), now, broker.holds.settled()) == 1


BAD_RELEASES = {
    "not canonical": lambda raw: raw + b" ",
    "another type": lambda raw: raw.replace(b"release/v1", b"override/v1"),
    "another format": lambda raw: raw.replace(b"airgap-release/1", b"airgap-release/2"),
    "a field more": lambda raw: raw.replace(b'"stage"', b'"rules":[],"stage"'),
    "no JSON": lambda _: b"{",
}


@pytest.mark.parametrize("change", BAD_RELEASES.values(), ids=BAD_RELEASES.keys())
def test_a_statement_that_is_no_release_is_refused(broker, change):
    good = released(held(broker, frames=writes(FAMILY)), "eve")
    assert [p.person for p in holds.verify_release(good, PEOPLE).people] == ["eve"]
    with pytest.raises(RefusedError) as refused:
        holds.RELEASE.parse(change(good.payload))
    assert refused.value.code == "hold.release"
    other = Envelope(good.payload, good.payload_type, ())
    assert holds.verify_release(other, PEOPLE).people == ()
    with pytest.raises(RefusedError):
        released(held(broker, frames=writes(FAMILY)), "eve", reason="")


def test_what_was_written_is_encrypted_to_the_reviewers_or_not_kept(broker, tmp_path):
    without = held(broker, frames=writes(FAMILY))
    public, private = holds.new_key()
    with pytest.raises(RefusedError) as refused:
        broker.holds.open_output(without, private)
    assert refused.value.code == "hold.missing"
    (tmp_path / holds.KEY_FILE).write_bytes(public)
    hold = held(broker, frames=writes(FAMILY))
    content = broker.holds.open_output(hold, private)
    assert FAMILY in content.decode()
    assert FAMILY.encode() not in (tmp_path / "holds" / f"{hold.request}.sealed").read_bytes()
    with pytest.raises(RefusedError) as refused:
        broker.holds.open_output(hold, holds.new_key()[1])
    assert refused.value.code == "hold.key"
    for bad in (b"no key", bundles.signer("eve").public_key.public):
        (tmp_path / holds.KEY_FILE).write_bytes(bad)
        with pytest.raises(RefusedError) as refused:
            broker.holds.public_key()
        assert refused.value.code == "hold.key"


def test_a_quiet_flag_is_kept_for_review_and_holds_nothing(broker, tmp_path):
    # A medicine with the core of a paragraph, and no member of it.
    broker.worker.frames = writes("CC(C)OP(=O)(F)OC(C)C")
    answer = broker.infer(job(task="molecule", inputs={}))
    assert answer.assessed.output_screen.tier == "H1"
    broker.worker.frames = writes("CC(C)OC(=O)OC(C)C")
    plain = broker.infer(job(task="molecule", inputs={}))
    assert plain.assessed.output_screen.tier == "H0"  # and its reader cannot tell
    assert reasons_of(answer) == reasons_of(plain)
    assert answer.permit.ref.outcome == plain.permit.ref.outcome
    assert screen_line(answer.assessed) == screen_line(plain.assessed)
    (alert,) = broker.holds.alerts()
    assert alert.classes == ("similarity",)
    assert alert.record["request"]["person"] == "ada"
    assert alert.drawn in {True, False}
    held(broker, frames=writes(FAMILY))
    assert len(broker.holds.alerts()) == 1
    (tmp_path / "restricted" / f"{alert.commit}.json").write_text('{"nonce": 1}')
    with pytest.raises(FaultError):
        broker.holds.alerts()


# -- two holds look alike to the one who asked ----------------------------------------------------

UNSCREENED = "C." * 50 + "C"


class Counting:
    """A helper that notes what it was asked to do."""

    def __init__(self, helper):
        self.helper, self.asked = helper, []

    def request(self, payload, timeout):
        self.asked.append(json.loads(payload)["op"])
        return self.helper.request(payload, timeout)

    def stream(self, payload, timeout):
        self.asked.append(json.loads(payload)["op"])
        return self.helper.stream(payload, timeout)


def seen_by_the_user(broker, capsys, asked, frames):
    """Return all that she sees of a held job, but for its number, and each step that was taken."""
    helper = broker.helper = Counting(broker.helper)
    broker.worker.frames, worked = frames, len(broker.worker.asked)
    before = len(list(read_records(broker.log.folder)))
    with pytest.raises(RefusedError) as refused:
        broker.infer(asked)
    broker.helper = helper.helper
    hold = broker.holds.every()[-1]
    told = []
    capsys.readouterr()
    for as_json in (False, True):
        show_error(refused.value, json=as_json)
        shown = capsys.readouterr()
        told.append((shown.out + shown.err).replace(hold.reference, "REF"))
    records = list(read_records(broker.log.folder))[before:]
    steps = [(each["kind"], each["phase"], each.get("err"), each.get("data")) for each in records]
    for *_, data in steps:
        data.pop("settings", None)
    decided = [
        (each["decision"]["outcome"], each["decision"]["rule"])
        for each in records
        if each["kind"] == "denial"
    ]
    kept = sorted(
        (each["task"], each["stage"], bool(each.get("output")))
        for each in (json.loads(hold.to_bytes()),)
    )
    return (
        told,
        refused.value.exit_status,
        helper.asked,
        len(broker.worker.asked) - worked,
        steps,
        decided,
        kept,
    )


@pytest.mark.parametrize("other", [EXACT, UNSCREENED], ids=["H4", "not screened to its end"])
@pytest.mark.parametrize("stage", ["input", "output"])
def test_tiers_are_told_alike_and_cost_the_same_steps(broker, capsys, stage, other):
    def run(smiles):
        if stage == "output":
            return seen_by_the_user(broker, capsys, job(), writes(smiles))
        asked = job(inputs={"smiles": smiles, "fix": True})
        return seen_by_the_user(broker, capsys, asked, None)

    family, another = run(FAMILY), run(other)
    assert family == another
    told, status, helped, worked, *_ = family
    assert (status, json.loads(told[1])["code"]) == (1, "policy.held")
    assert "Held for review. Reference REF." in told[0]
    assert helped == ["prepare"] + ["assess"] * (stage == "output")
    assert worked == (stage == "output")


# -- commands -------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, helper):
    """A tree with two holds: a family in an output, and a chemical that nobody can release."""
    root = tree_of(tmp_path / "lab") if (tmp_path / "lab").mkdir() is None else None
    made = trust.new_root(bundles.public("root"), bundles.signer("root"), now=LONG_AGO)
    for name, role in {"eve": "ehs", "xia": "export_control", "ada": "ehs"}.items():
        keys.new_key(root / "keys", name, person=name, roles=(role,))
        public = keys.parse_public_key((root / "keys" / f"{name}.pub.json").read_bytes())
        made = trust.add_key(made, public, [bundles.signer("root")], now=LONG_AGO)
    trust.save_trust(made, root / "trust")
    site, rules = parse_site((root / "site.toml").read_bytes()), load_rules(root)

    use_policy = deciding(site, rules, MODEL.bundle)

    with open_log(root, site="Test Lab") as log:
        broker = Broker(log, Worker(), helper, MODEL, Actor("Ada"), use_policy)
        broker.restricted = root / "restricted"
        broker.holds = Holds(root, made.document, "ada")
        for smiles in (FAMILY, EXACT):
            held(broker, frames=writes(smiles))
    return root


@pytest.fixture
def call(capsys, tree):
    app = typer.Typer()
    commands.register(app)

    def run(*argv, text=False):
        try:
            line = [*(str(each) for each in argv), "--root", str(tree)]
            status = app(args=line + ["--json"] * (not text), standalone_mode=False) or 0
        except AirgapError as error:
            show_error(error, json=True)
            status = error.exit_status
        out = capsys.readouterr().out
        return status, out if text else json.loads(out)

    capsys.readouterr()  # the operator's log of the fixture
    return run


def sign(call, reference, key, *more):
    return call("hold", "release", reference, "--key", key, "--confirm", "route-design", *more)


def first_words(tmp_path):
    memo = tmp_path / "memo.txt"
    memo.write_text("seen by the board")
    later = datetime.now(UTC).date() + timedelta(days=5)
    return ("--reason", "seen by the board", "--expires", later, "--document", memo)


def test_two_people_release_a_hold_by_its_reference(call, tree, tmp_path):
    status, listed = call("hold", "list")
    family, exact = listed["holds"]
    assert (status, family["state"], exact["state"]) == (0, "held", "held")
    assert "rules" not in family  # the reader is no hazard officer
    words = first_words(tmp_path)
    assert sign(call, family["reference"], "eve")[0] == 2  # the first signer words it
    status, first = sign(call, family["reference"], "eve", *words)
    assert (status, first["people"]) == (0, ["eve"])
    assert first["state"] == "held; signed by eve"
    assert sign(call, family["reference"], "xia", *words)[0] == 2  # the words stand already
    status, second = sign(call, family["reference"], "xia")
    assert (status, second["people"]) == (0, ["eve", "xia"])
    assert second["state"].startswith("released until")
    assert second["file"] == first["file"]
    acts = [
        (each["phase"], each["actor"]["name"])
        for each in read_records(tree / "audit")
        if each["kind"] == "admin.hold"
    ]
    assert acts == [(phase, who) for who in ("eve", "xia") for phase in ("intent", "outcome")]
    status, out = call("hold", "list", text=True)
    assert "released until" in out


def test_what_cannot_be_released_is_told_without_a_rule(call, tmp_path):
    family, exact = call("hold", "list")[1]["holds"]
    words = first_words(tmp_path)
    status, refused = sign(call, exact["reference"], "eve", *words)
    assert (status, refused["code"]) == (1, "hold.release")
    assert "HAZ" not in refused["error"]
    status, refused = sign(call, family["reference"], "ada", *words)  # she asked for it
    assert (status, refused["code"]) == (1, "hold.release")
    status, refused = call(
        *("hold", "release", family["reference"], "--key", "eve", "--confirm", "yes"), *words
    )
    assert (status, refused["code"]) == (1, "hold.release")
    assert call("hold", "show", "no-such")[1]["code"] == "hold.missing"
    assert [each["state"] for each in call("hold", "list")[1]["holds"]] == ["held", "held"]


def test_a_release_that_would_never_count_is_not_signed(call, tmp_path):
    family = call("hold", "list")[1]["holds"][0]["reference"]
    reason, why, expires, later, document, memo = first_words(tmp_path)
    far = later + timedelta(days=60)
    status, refused = sign(call, family, "eve", reason, why, expires, far, document, memo)
    assert (status, refused["code"]) == (1, "hold.release")
    assert "65 days" in refused["error"]
    status, refused = sign(call, family, "eve", reason, why, expires, later)
    assert (status, refused["code"]) == (1, "hold.release")
    assert "--document" in refused["hint"]
    words = (reason, why, expires, later, document, memo, "--key", "eve", "--confirm")
    status, told = call("hold", "release", family, *words, "route-design", text=True)
    assert status == 0
    assert "; too few people: 1 of 2" in told
    assert "HAZ" not in told


OUTSIDERS = {"she who asked": "ada", "a stranger": "mallory"}


@pytest.mark.parametrize("key", OUTSIDERS.values(), ids=OUTSIDERS.keys())
def test_who_may_not_release_learns_nothing_by_trying(call, tree, tmp_path, key):
    if key == "mallory":
        keys.new_key(tree / "keys", key, person=key, roles=("ehs",))
    told = []
    for hold in call("hold", "list")[1]["holds"]:
        status, refused = sign(call, hold["reference"], key, *first_words(tmp_path))
        told.append((status, refused, call("hold", "show", hold["reference"])[1]))
    (*family, family_row), (*exact, exact_row) = told
    assert family == exact
    assert family[1]["code"] == "hold.release"
    assert set(family_row) == set(exact_row)
    own = {"reference", "opened"}
    assert all(family_row[name] == exact_row[name] for name in set(family_row) - own)
    # Somebody who may release is told that there is nothing to sign.
    exact_reference = call("hold", "list")[1]["holds"][1]["reference"]
    _, refused = sign(call, exact_reference, "eve", *first_words(tmp_path))
    assert "admits no release" in refused["error"]


def test_the_status_of_a_tree_counts_what_is_held(tree):
    from airgap.cli.install import status_document, status_view
    from airgap.install import Store

    document = status_document(tree, Store(tree / "store"))
    assert document["held"] == 2
    assert "2 requests without an answer" in str(status_view(document))
    assert status_document(tree / "nothing", Store(tree / "none"))["held"] == 0


def test_a_hold_can_be_purged_and_stays_on_record(call, tree):
    family = call("hold", "list")[1]["holds"][0]
    status, done = call("hold", "purge", family["reference"])
    assert (status, len(done["removed"])) == (0, 1)
    assert family["reference"] not in {h["reference"] for h in call("hold", "list")[1]["holds"]}
    records = list(read_records(tree / "audit"))
    assert [r["phase"] for r in records if r["kind"] == "admin.hold"] == ["intent", "outcome"]
    assert any(r["kind"] == "denial" for r in records)


def test_only_the_hazard_officer_sees_rules_classes_and_inputs(call, tree, tmp_path):
    family, exact = call("hold", "list")[1]["holds"]
    assert {key: family[key] for key in ("stage", "task", "state")} == {
        key: exact[key] for key in ("stage", "task", "state")
    }
    status, out = call("hold", "show", family["reference"], text=True)
    assert (status, "HAZ" in out, "hazard officer" in out) == (0, False, True)
    assert call("hold", "alerts")[1]["code"] == "site.person"
    site = tree / "site.toml"
    site.write_text(site.read_text().replace('["principal_investigator"]', '["hazard_officer"]'))
    shown = call("hold", "show", exact["reference"].rpartition("#")[2])[1]
    assert "cwc1_exact" in shown["classes"]
    assert shown["inputs"] == {"smiles": "CC(=O)Nc1ccc(O)cc1"}
    assert shown["faults"] == ["no release"]
    text = call("hold", "show", exact["reference"], text=True)[1]
    assert "HAZ-CWC1-EXACT (fired): Held for review." in text
    assert "smiles: CC(=O)Nc1ccc(O)cc1" in text
    assert "[HAZ-CWC1" in call("hold", "list", text=True)[1]
    assert "HAZ-CWC1" in call("hold", "list")[1]["holds"][0]["rules"]
    assert call("hold", "alerts")[1] == {"alerts": [], "flags": 0}
    sign(call, family["reference"], "eve", *first_words(tmp_path))
    assert "too few people" in call("hold", "show", family["reference"])[1]["faults"][0]
    _, refused = sign(call, exact["reference"], "eve", *first_words(tmp_path))
    assert "HAZ-CWC1-EXACT" in refused["error"]


def test_the_key_of_the_reviewers_is_made_once_and_opens(call, tree, tmp_path):
    word = tmp_path / "word"
    word.write_text("open sesame, please\n")
    private = tmp_path / "hold.pem"
    status, made = call("hold", "key", "--out", private, "--passphrase-file", word)
    assert (status, (tree / holds.KEY_FILE).is_file()) == (0, True)
    assert private.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in private.read_bytes()
    assert call("hold", "key", "--out", tmp_path / "other.pem")[1]["code"] == "hold.key"
    document = keys and trust.load_trust(tree / "trust").document
    desk = Holds(tree, document)
    hold = desk.every()[0]
    desk.keep(hold, b'{"rows": []}')
    status, opened = call(
        *("hold", "open", hold.reference, "--key", private, "--out", tmp_path / "seen.json"),
        *("--passphrase-file", word),
    )
    assert (status, opened["bytes"]) == (0, 12)
    assert (tmp_path / "seen.json").read_bytes() == b'{"rows": []}'
    again = call(
        *("hold", "open", hold.reference, "--key", private, "--out", tmp_path / "seen.json"),
        *("--passphrase-file", word),
    )
    assert again[0] == 2
    assert call("hold", "open", hold.reference, "--key", private, "--out", tmp_path / "x")[0] == 1
    assert made["public"].endswith("hold.pub")
    assert good_frames()


def test_a_released_hold_leaves_no_hazard_rule_in_the_general_record(broker):
    hold = held(broker, frames=writes(FAMILY))
    broker.holds.add_release(released(hold, "eve", "xia"))
    answer = broker.infer(taken_up(hold))
    digest = str(answer.permit.ref.id).removeprefix("sha256:")
    record = (broker.log.folder / "log/objects" / digest[:2] / digest).read_bytes()
    assert b"HAZ-" not in record
    assert b"review-haz" not in record
    whole = answer.permit.decision.as_document()
    assert {each["rule"] for each in whole["approvals"]} == {"HAZ-CWC1", "HAZ-RETRO"}
