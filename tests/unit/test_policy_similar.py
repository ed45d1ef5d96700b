"""Names that look alike: always a question, and remembered when a person has answered."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, date, datetime

import bundles
import pytest
from policy_cases import ADMISSION, DAY, HARMLESS, RULES, ask, known
from policy_site import TRUST, enrol

from airgap import adjudications
from airgap.rules import Rules, load_rules
from bundle import trust
from policy import Origin, Snapshots, Start, parse_lists
from policy.errors import RefusedError
from policy.lineage import unite
from policy.similar import find_alike, look_alike
from policy.snapshots import normal_name
from policy.terms import URI_BASE, Outcome

ROWS = [
    ("NIO Therapeutics", "NIO", True),  # a stranger: which is why it only asks
    ("Unicom", "China Unicom (Hong Kong) Limited", True),
    ("Alibabba Group", "Alibaba Group Holding Limited", True),
    ("Quiet Hill Models", "Quiet Hill Technologies Co., Ltd.", True),
    ("旷视", "北京旷视科技有限公司", True),
    ("阿里巴巴", "阿里巴巴集团控股有限公司", True),
    ("Meta", "NIO", False),
    ("Microsoft Research", "CEC Research Institute", False),
    ("Qwen", "Alibaba Group Holding Limited", False),
    ("Tongyi Lab", "Alibaba Group Holding Limited", False),
    ("LOGOS-Hub", "Alibaba Group Holding Limited", False),
    ("Renmin University of China", "China University of Mining", False),
    ("Shanghai Artificial Intelligence Laboratory", "Shanghai Laboratory", False),
    ("MGI", "MSI", False),
    ("中", "中国移动", False),
]


@pytest.mark.parametrize(("one", "other", "expected"), ROWS)
def test_what_looks_alike(one, other, expected):
    assert look_alike(normal_name(one), normal_name(other)) is expected
    assert look_alike(normal_name(other), normal_name(one)) is expected


def test_the_pair_is_the_first_by_name():
    assert find_alike(["b two", "a one"], ["x", "one a", "two b"]) == ("a one", "one a")
    assert find_alike(["a"], []) is None


def rules(*listed: str, rulings=()) -> Rules:
    """The shipped rules with a complete list of these names for 1260H."""
    always = {"from": None, "to": None}
    document = {
        "schema": "airgap/lists/1",
        "prepared_on": "2026-11-23",
        "snapshots": [
            {
                "list_id": "dod-1260h",
                "edition": "2026-11-01",
                "status": "in_force",
                "released": "2026-11-01",
                "published": "2026-11-01",
                "complete": True,
                "names_in_edition": len(listed),
                "citation": "a made-up edition",
                "source_url": None,
                "source_sha256": None,
                "source": "institutional",
                "retrieved_on": "2026-11-01",
                "next_review_by": None,
                "verify_before_release": False,
                "note": None,
                "entries": [
                    {
                        "names": [name],
                        "listed_as": "listed",
                        "released": always,
                        "published": always,
                        "source": "institutional",
                        "confidence": "high",
                        "verify_before_release": False,
                        "note": None,
                    }
                    for name in listed
                ],
            }
        ],
    }
    snapshots = (*RULES.lists.snapshots, *parse_lists(json.dumps(document).encode()))
    registry = unite(RULES.registry.files, rulings)
    return Rules(RULES.packs, Snapshots(snapshots), registry)


GRANT = {**ADMISSION, **known(project__sponsors=frozenset({"DoD"}), project__instrument="grant")}


def of(maker: str, book: Rules, day: date = DAY):
    origin = Origin("developed_by", maker, sure=True, source="test")
    decision = ask(GRANT, {**HARMLESS, "bundle": Start((origin,))}, rules=book, day=day)
    states = {each.rule.id: each.state for each in decision.results}
    return states["US-NDAA24-805-GRANT"], decision


def test_a_similar_name_is_a_question_and_neither_a_hit_nor_clear():
    assert of("mistral-ai", rules("Somebody Else Co., Ltd."))[0] == "not_fired"
    state, decision = of("mistral-ai", rules("Mistral Technologies Co., Ltd."))
    assert state == "unknown"
    assert decision.outcome is Outcome.NEEDS_APPROVAL
    questions = [each for missing in decision.missing for each in missing.questions]
    assert any("possible match, review: mistral" in each for each in questions)
    assert of("mistral-ai", rules("Mistral AI"))[0] == "fired"


def test_what_somebody_found_on_this_edition_goes_before_what_looks_alike():
    shipped = of("meta", RULES)[0]
    assert shipped == "not_fired"
    assert of("meta", rules("Meta Silicon Co., Ltd."))[0] == "unknown", "a new edition asks anew"


ISSUED = datetime(2026, 11, 20, tzinfo=UTC)
ROOT = enrol(TRUST, "rita", role="research_security")


def about(**changes):
    fields = {
        "name": "Mistral AI",
        "list_id": "dod-1260h",
        "edition": "2026-11-01",
        "against": "Mistral Technologies Co., Ltd.",
        "same": False,
        "reason": "another company in another country",
        "issued": ISSUED,
        "expires": date(2027, 6, 1),
        **changes,
    }
    return adjudications.adjudication(**fields)


def ruling(who="rita", **changes):
    return adjudications.verify(
        adjudications.sign(about(**changes), bundles.signer(who)), ROOT.document
    )


def test_an_answer_is_remembered_for_this_edition_until_its_day():
    listed = "Mistral Technologies Co., Ltd."
    assert of("mistral-ai", rules(listed))[0] == "unknown"
    answered = rules(listed, rulings=[ruling()])
    assert of("mistral-ai", answered)[0] == "not_fired"
    assert of("mistral-ai", answered, date(2027, 5, 31))[0] == "not_fired"
    assert of("mistral-ai", answered, date(2027, 6, 1))[0] == "unknown"
    same = rules(listed, rulings=[ruling(same=True)])
    state, decision = of("mistral-ai", same)
    assert state == "fired"
    assert "rita ruled so" in json.dumps(decision.as_document()["trace"])
    both = rules(listed, rulings=[ruling(), ruling(same=True)])
    assert of("mistral-ai", both)[0] == "fired", "of two answers the stricter counts"
    assert date(2027, 6, 1) in decision.evaluator.boundaries()


def test_an_answer_that_was_given_later_was_not_known():
    listed = "Mistral Technologies Co., Ltd."
    later = ruling(issued=datetime(2026, 11, 23, 13, tzinfo=UTC), name="Somebody Else")
    both = rules(listed, rulings=[ruling(), later])
    state, decision = of("mistral-ai", both)  # asked at noon of the 23rd
    assert state == "not_fired"
    before = of("mistral-ai", rules(listed, rulings=[ruling()]))[1]
    assert decision.canonical == before.canonical, "what came later leaves no trace"
    assert of("mistral-ai", rules(listed, rulings=[ruling(issued=later.issued)]))[0] == "unknown"


@pytest.mark.parametrize(
    "changes",
    [
        {"edition": "2026-06-08"},
        {"list_id": "dod-1286"},
        {"name": "Somebody Else"},
        {"against": "Somebody Else"},
    ],
)
def test_an_answer_to_another_question_changes_nothing(changes):
    listed = "Mistral Technologies Co., Ltd."
    assert of("mistral-ai", rules(listed, rulings=[ruling()]))[0] == "not_fired"
    assert of("mistral-ai", rules(listed, rulings=[ruling(**changes)]))[0] == "unknown"


def refused(call):
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.code


def test_who_may_answer_and_for_how_long():
    assert ruling().people == ("rita",)
    assert refused(lambda: ruling(who="tom")) == "policy.adjudication"
    assert refused(lambda: ruling(who="mallory")) == "policy.adjudication"
    assert refused(lambda: ruling(issued=datetime(2020, 1, 1, tzinfo=UTC))) == "policy.adjudication"
    assert refused(lambda: about(expires=date(2028, 6, 1))) == "policy.adjudication"
    assert refused(lambda: about(expires=ISSUED.date())) == "policy.adjudication"
    assert refused(lambda: about(list_id="No List")) == "policy.adjudication"
    assert f"{URI_BASE}adjudication/v1" == adjudications.KIND.predicate_type


def test_a_changed_or_foreign_statement_is_refused():
    good = adjudications.sign(about(), bundles.signer("rita"))
    assert adjudications.verify(good, ROOT.document).same is False
    for payload in (
        good.payload.replace(b"not_same", b"same"),
        b"{}",
        good.payload.replace(b"Mistral AI", b"Mistral BI"),
    ):
        bad = replace(good, payload=payload)
        assert refused(lambda bad=bad: adjudications.verify(bad, ROOT.document)) == (
            "policy.adjudication"
        )


def test_signed_answers_of_a_tree_are_read(tmp_path):
    trust.save_trust(ROOT, tmp_path / "trust")
    path = adjudications.write(adjudications.sign(about(), bundles.signer("rita")), tmp_path)
    loaded = load_rules(tmp_path).registry
    assert [each.people for each in loaded.rulings] == [("rita",)]
    assert loaded.digest != load_rules(None).registry.digest
    path.write_bytes(b"{}")
    assert refused(lambda: load_rules(tmp_path)) == "policy.approval"
