"""Facts are gathered, never guessed: the sites of the demonstration, manifests, screens, files."""

import shutil
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from policy_cases import BUNDLE, DAY, NOW, RULES, blocking, demo_site, pack_text, rule
from policy_site import put_signed

from airgap.config import parse_site
from airgap.gate import ScreenFacts, TaskFacts, decide_admission, decide_use
from airgap.model_facts import bundle_facts, licence_ids, registry_facts
from airgap.rules import load_rules
from airgap.science.tasks import TASKS
from bundle.manifest import Licence, LicenceFound, Lineage, ModelEntry, Supplier
from policy import require
from policy.errors import RefusedError
from policy.facts import UNREAD
from policy.terms import Digest, Known, Outcome, Unknown

CLEAN = {
    "status": "complete",
    "tier": "H0",
    "pack": "sha256:00",
    "mode": "exact",
    "classes": [],
    "reason": "",
}
TEXT = str(Digest.of(b"licence text"))
FAIR, DEFENCE = "route-design", "sensor-coatings"


def entry(**changes):
    """A model as staging describes the reference model."""
    fields = {
        "id": "logos-ref-tiny",
        "source": "local:logos-ref-tiny",
        "revision": "1",
        "provenance_level": "L1",
        "precisions": ("fp32",),
        "licence": Licence(spdx="Apache-2.0", text_digest=TEXT, status="verified"),
        "supplier": Supplier(legal_name="airgap project", jurisdiction="none", status="declared"),
        "modalities": ("molecule", "retrosynthesis", "protein", "material"),
        "intended_use": "tests",
        "reference_model": True,
        "scientific_use": False,
        **changes,
    }
    return ModelEntry(**fields)


def admit(*entries, project=FAIR, verified=True, site=None, **options):
    return decide_admission(
        site or demo_site(),
        RULES,
        entries,
        bundle_digest=BUNDLE,
        project=project,
        as_of=DAY,
        known_at=NOW,
        verified=verified,
        **options,
    )


def run(task="retrosynthesis", *, project=FAIR, screen=CLEAN, person="ada", **options):
    facts = options.pop("task_facts", None) or TaskFacts(task, TASKS[task].modality)
    return decide_use(
        options.pop("site", None) or demo_site(),
        RULES,
        [options.pop("entry", None) or entry()],
        bundle_digest=BUNDLE,
        person=person,
        project=project,
        task=facts,
        screen=screen,
        as_of=options.pop("as_of", DAY),
        known_at=NOW,
        **{"admitted": True, "hazard_holds": 0, **options},
    )


# -- the demonstration ----------------------------------------------------------------------------


@pytest.mark.parametrize("project", [FAIR, DEFENCE, None])
def test_the_reference_model_may_enter(project):
    decision = admit(entry(), project=project)
    assert decision.outcome is Outcome.PERMIT_WITH_OBLIGATIONS
    if project == FAIR:
        assert [each.id for each in decision.obligations] == ["record-entry"]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_may_run_on_the_federal_grant(task):
    assert run(task).outcome is Outcome.PERMIT


@pytest.mark.parametrize("task", sorted(TASKS))
def test_no_task_may_run_on_the_defence_contract(task):
    decision = run(task, project=DEFENCE)
    assert (decision.outcome, blocking(decision)) == (Outcome.DENY, {"CUI-BOUNDARY"})
    with pytest.raises(RefusedError) as caught:
        require(decision)
    assert caught.value.code == "policy.denied"
    assert "DFARS 252.204-7012; 32 CFR part 170" in caught.value.message


def test_logos_is_held_for_its_licences_and_watched_for_its_maker():
    logos = entry(
        id="logos-8b",
        source="hf:LOGOS-Hub/LOGOS-8B",
        licence=Licence(spdx="CC-BY-4.0", text_digest=TEXT, status="declared"),
        supplier=Supplier(legal_name="LOGOS-Hub", jurisdiction="CN", status="declared"),
    )
    decision = admit(logos)
    assert (decision.outcome, blocking(decision)) == (Outcome.NEEDS_APPROVAL, {"LIC-CONFLICT"})
    assert {"US-1260H-WATCH", "US-NDAA26-851-BIO"} <= {
        each.rule for each in decision.reasons if each.effect is Outcome.PERMIT_WITH_OBLIGATIONS
    }
    assert {"US-NDAA26-1532-B", "US-NDAA26-1532-B-BASE"} <= blocking(admit(logos, project=DEFENCE))


# -- bundle ---------------------------------------------------------------------------------------


def test_a_model_without_a_record_is_unknown_in_everything_that_only_a_record_says():
    facts = bundle_facts([entry(source="hf:somebody/else")], RULES.registry)
    assert UNREAD in facts.facts["bundle.licences"].value
    assert isinstance(facts.facts["bundle.tuned_on_nih_ca"], Unknown)
    assert "developed_by" in facts.starts["bundle"].unknown
    assert "developed_by" in facts.starts["base_bundles"].unknown
    assert blocking(admit(entry(source="hf:somebody/else"))) == {"LIC-CONFLICT"}


def test_the_name_alone_does_not_make_a_model_the_registered_one():
    assert blocking(admit(entry(source="hf:evil/logos-ref-tiny"))) == {"LIC-CONFLICT"}


def test_a_manifest_may_add_an_adverse_maker_to_a_registered_model():
    added = entry(lineage=(Lineage(relation="developed_by", party="DeepSeek", status="declared"),))
    assert "US-NDAA26-1532-A" in blocking(admit(added, project=DEFENCE))
    based = entry(base_models=("deepseek-ai/some-model",))
    assert "US-NDAA26-1532-A" in blocking(admit(based, project=DEFENCE))
    strange = entry(base_models=("nobody/some-model",))
    start = bundle_facts([strange], RULES.registry).starts["base_bundles"]
    assert "nobody/some-model" in start.unknown["developed_by"]


def test_only_a_verified_edge_settles_a_relation():
    edge = {"relation": "developed_by", "party": "meta"}
    for status, known in (("declared", False), ("verified", True)):
        model = entry(source="hf:a/b", lineage=(Lineage(**edge, status=status),))
        unknown = bundle_facts([model], RULES.registry).starts["bundle"].unknown
        assert ("developed_by" not in unknown) is known


def test_a_fact_names_the_document_it_comes_from():
    facts = bundle_facts([entry()], RULES.registry).facts
    record, manifest = "registry: logos-ref-tiny", "manifest of logos-ref-tiny"
    for name in ("provenance_level", "manifest_complete", "licence_texts_recorded", "precisions"):
        assert facts[f"bundle.{name}"].source == manifest
    assert facts["bundle.modalities"].source == manifest
    assert facts["bundle.tuned_on_nih_ca"].source == record
    assert facts["bundle.licences"].source == f"{record}; {manifest}"
    alone = registry_facts("logos-ref-tiny", RULES.registry).facts
    assert {each.source for each in alone.values()} == {record}


def test_a_second_licence_found_in_the_snapshot_is_a_conflict():
    found = LicenceFound(spdx="MIT", place="LICENSE.txt", sha256="0" * 64, status="verified")
    assert blocking(admit(entry(licences_found=(found,)))) == {"LIC-CONFLICT"}


NOT_YET = {
    "nobody verified it": ({}, {"verified": None}),
    "it does not verify": ({}, {"verified": False}),
    "provenance is only declared": ({"provenance_level": "L0"}, {}),
    "no licence text": (
        {"licence": Licence(spdx="Apache-2.0", text_digest=None, status="declared")},
        {},
    ),
    "nobody supplies it": (
        {"supplier": Supplier(legal_name="not stated", jurisdiction="x", status="declared")},
        {},
    ),
}


@pytest.mark.parametrize(("fields", "options"), NOT_YET.values(), ids=NOT_YET.keys())
def test_an_admission_without_its_papers_is_denied(fields, options):
    assert admit(entry()).permitted
    decision = admit(entry(**fields), **options)
    assert (decision.outcome, blocking(decision)) == (Outcome.DENY, {"DEFAULT-DENY"})


def test_no_model_at_all_is_no_permit():
    assert not admit().permitted


def test_the_weakest_of_several_models_counts():
    facts = bundle_facts([entry(), entry(id="b", provenance_level="L3")], RULES.registry)
    assert facts.facts["bundle.provenance_level"].value == 1
    facts = bundle_facts([entry(), entry(source="hf:a/b")], RULES.registry)
    assert isinstance(facts.facts["bundle.tuned_on_nih_ca"], Unknown)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Apache-2.0", {"apache-2.0"}),
        ("MIT OR Apache-2.0", {"mit", "apache-2.0"}),
        (
            "(GPL-3.0-only WITH GCC-exception-3.1) AND MIT",
            {"gpl-3.0-only", "gcc-exception-3.1", "mit"},
        ),
        ("LicenseRef-Llama-3.2", {"llama-3.2-community"}),
        ("llama3.2", {"llama-3.2-community"}),
        ("LicenseRef-Llama-3.2-AUP", {"llama-3.2-community"}),
        ("NOASSERTION", {UNREAD}),
        ("other", {UNREAD}),
        ("", {UNREAD}),
        ("a licence, of sorts", {UNREAD}),
    ],
)
def test_licences_are_the_union_of_what_is_stated(text, ids):
    assert licence_ids(text) == ids


def test_words_outside_the_vocabulary_make_the_fact_unknown():
    facts = bundle_facts([entry(modalities=("song",))], RULES.registry).facts
    assert isinstance(facts["bundle.modalities"], Unknown)
    assert "song" in facts["bundle.modalities"].reason


def test_the_registry_alone_answers_for_its_models_in_any_case_of_letters():
    left, right = (
        registry_facts("LOGOS-8B", RULES.registry),
        registry_facts("logos-8b", RULES.registry),
    )
    assert left.facts == right.facts
    assert registry_facts("hf:LOGOS-Hub/LOGOS-8B", RULES.registry).facts == left.facts
    with pytest.raises(RefusedError) as caught:
        registry_facts("logos-9b", RULES.registry)
    assert (caught.value.code, "logos-8b" in caught.value.message) == ("policy.model", True)


# -- use ------------------------------------------------------------------------------------------

NO_USE = {
    "not installed": {"admitted": None},
    "a stranger": {"person": "eve"},
    "training that ends today": {"as_of": date(2027, 6, 30)},
    "no screen": {"screen": None},
    "nobody counted holds": {"hazard_holds": None},
    "an action that the project does not list": {
        "task_facts": TaskFacts("molecule", "molecule", action="export_weights")
    },
}


@pytest.mark.parametrize("options", NO_USE.values(), ids=NO_USE.keys())
def test_a_use_that_lacks_something_is_denied(options):
    assert run().permitted
    assert run(**options).outcome is Outcome.DENY


def test_repeated_holds_count_as_probing():
    assert run(hazard_holds=2).permitted
    assert run(hazard_holds=3).rule_for_log == "HAZ"


def test_a_task_may_be_stricter_than_its_project_and_never_looser():
    plain = TaskFacts("molecule", "molecule")
    assert run(task_facts=plain).permitted
    marked = TaskFacts("molecule", "molecule", markings=frozenset({"CUI"}))
    assert blocking(run(task_facts=marked)) == {"CUI-BOUNDARY"}
    loose = TaskFacts("molecule", "molecule", export_class="fundamental_research")
    decision = run(task_facts=loose, project=DEFENCE)
    assert decision.facts["data.export_class"].value == "ITAR"


def test_an_unknown_project_marking_stays_unknown_whatever_the_task_adds():
    project = "[[project]]\nid = 'p'\n"
    person = "[[person]]\nid = 'ada'\nprojects = ['p']\n"
    site = parse_site(f"[institution]\nname = 'U'\n{project}{person}".encode())
    for markings in (frozenset(), frozenset({"PHI"})):
        task = TaskFacts("molecule", "molecule", markings=markings)
        decision = run(site=site, project="p", task_facts=task)
        assert isinstance(decision.facts["data.markings"], Unknown)
        assert not decision.permitted


def test_a_project_that_is_not_there_is_refused():
    with pytest.raises(RefusedError) as caught:
        run(project="nope")
    assert caught.value.code == "site.project"


@pytest.mark.parametrize(
    ("changes", "status", "classes"),
    [
        ({}, "complete", set()),
        ({"classes": ["1a03.listed"], "tier": "H4"}, "complete", {"cwc1_exact"}),
        ({"classes": ["1a03"], "tier": "H3"}, "complete", {"cwc1_family"}),
        ({"classes": ["2b13", "3a01.listed"], "tier": "H2"}, "complete", {"cwc2", "cwc3"}),
        ({"classes": ["toxin"], "tier": "H3"}, "complete", {"toxin"}),
        ({"classes": ["something new"], "tier": "H0"}, "incomplete", set()),
        ({"classes": None}, "incomplete", set()),
        ({"classes": [3]}, "incomplete", set()),
        ({"tier": "H9"}, "incomplete", set()),
        ({"tier": 0}, "incomplete", set()),
        ({"status": "incomplete"}, "incomplete", set()),
        ({"status": "fine"}, "incomplete", set()),
    ],
)
def test_a_screen_that_cannot_be_read_is_incomplete(changes, status, classes):
    read = ScreenFacts.of(CLEAN | changes)
    assert (read.status, read.classes) == (status, classes)
    assert run("molecule", screen=CLEAN | changes).permitted is (
        status == "complete"
        and (read.tier < 3 and not classes & {"toxin", "cwc1_exact", "cwc1_family"})
    )


def test_the_record_names_the_screen_and_the_day():
    document = run(day_source="a test").as_document()
    assert document["screens"] == [{"mode": "exact", "pack": "sha256:00", "tier": 0}]
    assert document["as_of_source"] == "a test"


def test_people_counterparties_and_affiliations():
    site = demo_site()
    bought = site.model_copy(
        update={
            "transaction": site.transaction.model_copy(
                update={"buyer": "DoD", "kind": "purchase", "counterparty": "Alibaba Cloud"}
            )
        }
    )
    facts = {"interconnection_only": False, "under_existing_contract": False}
    bought = bought.model_copy(update={"transaction": bought.transaction.model_copy(update=facts)})
    assert "US-NDAA24-805-A" in blocking(admit(entry(), site=bought))
    nobody = bought.model_copy(
        update={"transaction": bought.transaction.model_copy(update={"counterparty": None})}
    )
    assert "US-NDAA24-805-A" in blocking(admit(entry(), site=nobody))
    person = site.person[0].model_copy(update={"affiliations": None})
    silent = site.model_copy(update={"person": (person,)})
    assert "DOD-1286-FR" in blocking(admit(entry(), site=silent, project=DEFENCE))
    assert "DOD-1286-FR" not in blocking(admit(entry(), project=DEFENCE))


# -- files ----------------------------------------------------------------------------------------


def site_folder(tmp_path, **files):
    for name, content in files.items():
        put_signed(tmp_path, f"{name}.yaml", content)
    return tmp_path


def test_a_site_adds_rules_and_they_count(tmp_path):
    no_fp32 = rule(
        id="SITE-NO-FP32", scope="admission", when="{contains: [bundle.precisions, fp32]}"
    )
    rules = load_rules(site_folder(tmp_path, own=pack_text(no_fp32, pack_id="site")))
    decision = decide_admission(
        demo_site(),
        rules,
        [entry()],
        bundle_digest=BUNDLE,
        project=FAIR,
        as_of=DAY,
        known_at=NOW,
        verified=True,
    )
    assert blocking(decision) == {"SITE-NO-FP32"}


def test_a_site_cannot_switch_a_shipped_rule_off(tmp_path):
    off = rule(id="CUI-BOUNDARY", version="9", when="{eq: [project.active, false]}")
    with pytest.raises(RefusedError) as caught:
        load_rules(site_folder(tmp_path, own=pack_text(off, pack_id="site")))
    assert caught.value.code == "pack.duplicate"


def test_a_newer_edition_of_a_list_is_brought_by_a_file(tmp_path):
    import policy.strict

    shipped = Path(policy.strict.__file__).parent / "lists" / "others.yaml"
    text = shipped.read_text(encoding="utf-8").replace('edition: "FY25"', 'edition: "FY26"')
    head, _, rest = text.partition("- list_id: dod-1286")
    body = "- list_id: dod-1286" + rest.partition("- list_id:")[0]
    body = body.replace("retrieved_on: null", 'retrieved_on: "2027-01-10"')
    root = site_folder(tmp_path, lists=(head + body).encode())
    rules = load_rules(root)
    before = rules.lists.held("dod-1286", datetime(2027, 1, 9, tzinfo=UTC))
    after = rules.lists.held("dod-1286", datetime(2027, 1, 10, tzinfo=UTC))
    assert (before.text.edition, after.text.edition) == ("FY25", "FY26")


def test_faulty_site_files_are_refused_with_file_line_and_column(tmp_path):
    root = site_folder(tmp_path, bad=b"schema: airgap/policy-pack/1\nrules: yes\n")
    with pytest.raises(RefusedError, match=r"bad\.yaml: line 2, column 8"):
        load_rules(root)
    shutil.rmtree(root / "policy")
    many = {f"f{at}": pack_text(pack_id="x") for at in range(65)}
    with pytest.raises(RefusedError) as caught:
        load_rules(site_folder(tmp_path, **many))
    assert caught.value.code == "pack.limit"


def test_without_site_files_the_shipped_rules_hold(tmp_path):
    assert load_rules(tmp_path).packs.rules == load_rules(None).packs.rules
    assert isinstance(
        registry_facts("logos-ref-tiny", RULES.registry).facts["bundle.licences"], Known
    )
