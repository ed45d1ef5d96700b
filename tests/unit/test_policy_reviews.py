"""Citations: what can be seen offline, who read them, and what a signed review is worth."""

from __future__ import annotations

import json
import os
from datetime import UTC, date, datetime

import bundles
import pytest
import typer
from policy_cases import DEMO, RULES
from policy_site import TRUST, enrol, put_key

from airgap import reviews, rulework
from airgap.cli import policy as commands
from airgap.cli.common import show_error
from bundle import trust
from policy.citations import faults, is_identified
from policy.errors import AirgapError, RefusedError
from policy.pack import Packs

ISSUED = datetime(2026, 11, 20, 9, tzinfo=UTC)
PEOPLE = enrol(
    enrol(enrol(TRUST, "hana", role="hazard_officer"), "rita", role="research_security"),
    *("gwen",),
    role="general_counsel",
)


def fault_of(text, url=None, *, rule="SITE-1", begins=None, editions=()):
    return list(faults(text, url, rule=rule, begins=begins, editions=editions))


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("Pub. L. 119-60 s.1532", {"rule": "US-NDAA24-805-A"}, "is of FY2026"),
        ("Pub. L. 118-31 s.805", {"begins": date(2023, 12, 21)}, "before Pub. L. 118-31"),
        ("Pub. L. 119-60 s.851 (FY2025)", {}, "FY2025: the law that is cited is of FY2026"),
        ("90 FR 35189, FR Doc 2026-11571 (2026-06-10)", {}, "90 FR is of 2025"),
        ("91 FR 35189 (2025-06-10)", {}, "no day of that year"),
        ("91 FR 35189, FR Doc 2024-11571 (2026-06-10)", {}, "FR Doc 2024-11571 is not"),
        ("51 CFR 745", {}, "titles go from 1 to 50"),
        ("55 U.S.C. 4663", {}, "titles go from 1 to 54"),
        ("NIH NOT-OD-25-081 (2023-03-28)", {}, "another fiscal year"),
        ("direction of 2025-02-30", {}, "2025-02-30 is no day"),
        ("91 FR 35189, FR Doc 2026-11571 (2026-06-10)", {"url": "http://x.example"}, "no https"),
        (
            "91 FR 35189, FR Doc 2026-11571 (2026-06-10)",
            {"url": "https://www.federalregister.gov/documents/2026-11572.xml"},
            "not that of FR Doc 2026-11571",
        ),
        (
            "91 FR 35189, FR Doc 2026-11571 (2026-06-10)",
            {"editions": ["91 FR 1, FR Doc 2026-00001 (2026-01-02)"]},
            "cites FR Doc 2026-00001",
        ),
    ],
)
def test_what_cannot_be_right_is_seen_without_the_text(text, more, words):
    more = dict(more)
    found = fault_of(text, more.pop("url", None), **more)
    assert len(found) >= 1
    assert words in " ".join(found)


def test_what_is_shipped_has_no_such_fault():
    held = [each for each in RULES.lists.snapshots if each.list_id == "dod-1260h"]
    citations = [each.text.citation for each in held]
    assert "FR Doc 2026-11571" in " ".join(citations)
    for rule in RULES.packs.rules:
        starts = [window.start for window in rule.text.valid]
        begins = None if None in starts else min(starts)
        cited = rule.text.citation
        assert (
            fault_of(
                cited.text,
                cited.url,
                rule=rule.id,
                begins=begins,
                editions=citations if "1260H" in rule.id else [],
            )
            == []
        )


def test_a_number_of_the_law_identifies_a_text_and_a_mood_does_not():
    assert is_identified("Pub. L. 118-31 s.805(a)(1)(A)")
    assert is_identified("15 CFR 734.13; 22 CFR part 120")
    assert not is_identified("a direction on state devices")


# -- reviews --------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    tree = tmp_path / "lab"
    tree.mkdir()
    (tree / "site.toml").write_text(DEMO.read_text().replace("uid = 0 ", f"uid = {os.getuid()} "))
    trust.save_trust(PEOPLE, tree / "trust")
    return tree


def item(root, name="US-NDAA24-805-A"):
    (found,) = [each for each in rulework.review_items(root) if each.id == name]
    return found


def signed(about, who="pat", **changes):
    fields = {
        "finding": "confirmed",
        "read_on": date(2026, 11, 19),
        "next_review": date(2027, 11, 19),
        "text": None,
        "note": "read in the printed volume",
        "issued": ISSUED,
        **changes,
    }
    return reviews.sign(reviews.word(about, **fields), about, bundles.signer(who))


def state(root):
    items = rulework.review_items(root)
    return {each.item: each for each in rulework.site_reviews(root, items)}


def test_a_signed_review_counts_for_this_wording_alone(root):
    about = item(root)
    assert state(root) == {}
    reviews.write(signed(about), root)
    read = state(root)[about.id]
    assert (read.confirmed, read.people, read.read_on) == (True, ("pat",), date(2026, 11, 19))
    other = item(root, "US-NDAA24-805-B")
    assert other.digest != about.digest
    assert reviews.verify(signed(about), PEOPLE.document, [other]) is None


def test_the_later_reading_counts_and_of_one_day_the_stricter(root):
    about = item(root)
    for each in (
        signed(about),
        signed(about, finding="differs"),
        signed(about, read_on=date(2026, 11, 18)),
    ):
        reviews.write(each, root)
    assert not state(root)[about.id].confirmed
    reviews.write(signed(about, read_on=date(2026, 11, 20)), root)
    assert state(root)[about.id].confirmed


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("US-NDAA24-805-A", ("pat", "gwen"), ("tom", "hana", "mallory")),
        ("cwc", ("hana", "pat"), ("rita", "tom")),
        ("E-001", ("rita", "pat"), ("hana", "tom")),
    ],
)
def test_who_may_say_that_a_text_was_read(root, name, good, bad):
    about = item(root, name)
    for who in good:
        assert reviews.verify(signed(about, who), PEOPLE.document, [about]).people == (who,)
    for who in bad:
        with pytest.raises(RefusedError) as caught:
            reviews.verify(signed(about, who), PEOPLE.document, [about])
        assert caught.value.code == "policy.review"


@pytest.mark.parametrize(
    "changes",
    [
        {"read_on": date(2026, 11, 21)},
        {"next_review": date(2026, 11, 20)},
        {"next_review": date(2029, 11, 20)},
        {"finding": "fine"},
        {"note": ""},
    ],
)
def test_what_a_review_cannot_say(root, changes):
    with pytest.raises(RefusedError) as caught:
        signed(item(root), **changes)
    assert caught.value.code == "policy.review"


def test_a_changed_review_is_refused(root):
    about = item(root)
    good = signed(about, finding="differs")
    for payload in (
        good.payload.replace(b"differs", b"confirmed"),
        good.payload.replace(b"printed", b"painted"),
        b"{}",
    ):
        bad = type(good)(payload, good.payload_type, good.signatures)
        with pytest.raises(RefusedError):
            reviews.verify(bad, PEOPLE.document, [about])


# -- commands -------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys, root):
    app = typer.Typer()
    commands.register(app)
    keys = root / "keys"
    keys.mkdir()

    def run(*argv):
        line = ["policy", *map(str, argv), "--root", str(root), "--json"]
        try:
            status = app(args=line, standalone_mode=False) or 0
        except AirgapError as error:
            show_error(error, json=True)
            status = error.exit_status
        return status, json.loads(capsys.readouterr().out)

    return run


def unread(call):
    _, document = call("lint", "--as-of", "2026-11-25")
    assert document["failing"] == 0
    return [each["words"] for each in document["findings"] if each["code"] == "unread"]


def test_lint_counts_what_a_person_signed_and_the_list_names_the_rest(call, root):
    before = unread(call)
    assert any(each.startswith("US-NDAA24-805-A: no named person has read") for each in before)
    status, listed = call("review")
    assert (status, listed["not_read"]) == (0, len(listed["items"]))
    for name in ("US-NDAA24-805-A", "cwc"):
        reviews.write(signed(item(root, name), "pat"), root)
    assert len(unread(call)) == len(before) - 2
    _, listed = call("review")
    read = {each["item"]: each for each in listed["items"] if each["state"] != "not read"}
    assert set(read) == {"US-NDAA24-805-A", "cwc"}
    assert read["cwc"]["people"] == ["pat"]
    _, later = call("lint", "--as-of", "2027-11-19")
    due = [each["words"] for each in later["findings"] if "it was due again" in each["words"]]
    assert len(due) == 2


def test_a_text_that_says_otherwise_is_an_error_of_lint(call, root):
    reviews.write(signed(item(root), finding="differs"), root)
    reviews.write(signed(item(root, "E-001"), "rita", finding="differs"), root)
    status, document = call("lint", "--as-of", "2026-11-25")
    wrong = [each["words"] for each in document["findings"] if each["error"]]
    assert status == 1
    assert len(wrong) == 2
    assert all("it says otherwise" in each for each in wrong)


def test_a_review_is_signed_on_the_command_line(call, root, tmp_path):
    put_key(root / "keys" / "pat.pem", "pat")
    text = tmp_path / "statute.txt"
    text.write_bytes(b"No Department may enter into a contract")
    words = ("--finding", "confirmed", "--note", "read", "--next", "2027-11-01", "--key", "pat")
    status, made = call("review", "CUI-BOUNDARY", *words, "--text", text)
    assert (status, made["people"], made["finding"]) == (0, ["pat"], "confirmed")
    assert not any(each.startswith("CUI-BOUNDARY") for each in unread(call))
    assert call("review", "CUI-BOUNDARY")[0] == 2
    status, refused = call("review", "NO-SUCH-RULE", *words)
    assert (status, refused["code"]) == (1, "policy.review")


def test_another_wording_of_a_rule_is_asked_for_anew(root):
    about = item(root)
    reviews.write(signed(about), root)
    packs = RULES.packs
    rules = [
        type(each)(
            each.text.model_copy(update={"plain": "Another text."}),
            each.applies_when,
            each.when,
            each.unless,
            each.scopes,
        )
        if each.id == about.id
        else each
        for each in packs.rules
    ]
    changed = type(RULES)(
        Packs(packs.packs, tuple(rules), packs.programs, packs.list_ids),
        RULES.lists,
        RULES.registry,
    )
    items = rulework.review_items(root, changed)
    assert about.id not in {each.item for each in rulework.site_reviews(root, items)}
