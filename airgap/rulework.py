"""What stands around the rules on a host: installed bundles, logged decisions, files on disk.

The pure work is in `policy.compare`, `policy.trial` and `policy.lint`; here its questions are
gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import airgap
from airgap import oscal, reviews
from airgap.config import LegalDay, Site, read_plain
from airgap.gate import decide_admission
from airgap.reviews import Item
from airgap.rules import Rules, load_rules
from policy.approvals import Approvals
from policy.canonical import canonical_bytes
from policy.compare import Question, Rulebook
from policy.errors import RefusedError
from policy.lint import Finding, Review
from policy.replay import request_of_record, times_of_record
from policy.terms import Digest
from policy.trial import request_of

MAX_LOGGED = 100_000


def rulebook(rules: Rules) -> Rulebook:
    """The rules of a host as the pure modules take them."""
    return Rulebook(rules.packs, rules.lists, rules.registry)


def golden_questions(rules: Rules, known_at: datetime) -> Iterator[Question]:
    """Every golden scenario of the packs, asked with what was held at `known_at`."""
    for pack in rules.packs.packs:
        for scenario in pack.scenarios:
            yield Question(f"scenario {scenario.key}", request_of(scenario), known_at)


@dataclass(frozen=True, slots=True)
class Logged:
    """The decisions of a log that can be asked again, and how many cannot."""

    questions: tuple[Question, ...]
    left_out: int


def logged_questions(root: Path, approvals: Approvals) -> Logged:
    """Every decision that the log under `root` keeps whole, each question once.

    Of a hazard decision the general log has the public part only; it is counted and left out.
    """
    from airgap.audit.query import read_records  # noqa: PLC0415 - a site without a log needs none
    from airgap.dossier.usage import read_object  # noqa: PLC0415 - as above

    folder = root / "audit"
    if not (folder / "log").is_dir():
        return Logged((), 0)
    found: dict[str, Question] = {}
    left_out = 0
    for record in read_records(folder):
        digest = record.get("decision", {}).get("id")
        if not isinstance(digest, str) or digest in found or len(found) >= MAX_LOGGED:
            continue
        try:
            document = read_object(folder, digest)
            request = request_of_record(document)
            _, known_at = times_of_record(document)
        except RefusedError:
            left_out += 1
            continue
        found[digest] = Question(f"decision {digest[:19]}", request, known_at, approvals)
    return Logged(tuple(found.values()), left_out)


def bundle_questions(
    root: Path, site: Site, rules: Rules, day: LegalDay, approvals: Approvals
) -> Iterator[Question]:
    """The admission of every installed bundle, for each active project of the site."""
    from airgap.install.store import Store  # noqa: PLC0415 - loads cryptography

    projects = [each.id for each in site.project if each.active is not False]
    for installed in Store(root / "store").list():
        for project in projects:
            decision = decide_admission(
                site,
                rules,
                installed.manifest.models,
                bundle_digest=installed.digest,
                project=project,
                as_of=day.as_of,
                known_at=day.known_at,
                verified=True,
                submitter=None,
                approvals=approvals,
                day_source=day.source,
            )
            name = f"{installed.manifest.name} {installed.manifest.version} for {project}"
            yield Question(name, decision.evaluator.request, day.known_at, approvals)


def packs_as_oscal(rules: Rules, head: oscal.Head) -> dict[str, Any]:
    """The loaded packs as an OSCAL component definition: which controls they bring evidence for."""
    from airgap.dossier.controls import ROWS  # noqa: PLC0415 - only the export needs it

    def statements(revision: str) -> Iterable[oscal.Statement]:
        texts: dict[str, oscal.Statement] = {}
        for row in ROWS:
            for control in row.r2 if revision == "r2" else row.r3:
                text = f"Evidence emitted: {row.evidence}."
                if control in texts:
                    text = f"{texts[control].text} {text}"
                texts[control] = oscal.Statement(control, text, row.part, row.rest)
        return texts.values()

    packs = rules.packs.packs
    props = {f"pack-{each.pack_id}-digest": str(each.digest) for each in packs}
    props |= {f"pack-{each.pack_id}-version": str(each.version) for each in packs}
    props |= {f"pack-{each.pack_id}-status": each.status for each in packs}
    counts = f"{len(rules.packs.rules)} rules in {len(packs)} packs"
    marked = sum(each.text.verify_before_release for each in rules.packs.rules)
    return oscal.component_definition(
        head,
        component="airgap policy packs",
        description=f"{counts}; {marked} of them are marked for verification before release.",
        r2=statements("r2"),
        r3=statements("r3"),
        props=props,
    )


# -- what a person has to read ------------------------------------------------------------------


def review_items(root: Path, rules: Rules | None = None) -> tuple[Item, ...]:
    """Every citation of the loaded rules, every screen pack and every edge, by kind and id."""
    rules = load_rules(root) if rules is None else rules
    found = [
        Item(
            "rule",
            rule.id,
            _wording(rule.text.model_dump(mode="json", by_alias=True)),
            rule.text.citation.text,
            rule.text.owner,
            rule.text.review_by,
        )
        for rule in rules.packs.rules
        if rule.text.citation.source != "institutional" or rule.text.verify_before_release
    ]
    found += [
        Item(
            "screen_pack",
            str(document["name"]),
            Digest.of(content),
            f"{document['source']}, {document['source_date']}",
            "hazard_officer",
            None,
        )
        for document, content in _screen_packs(root)
    ]
    found += [
        Item(
            "edge",
            edge.id,
            _wording(edge.model_dump(mode="json")),
            edge.citation,
            "research_security",
            None,
        )
        for edge in rules.registry.edges
    ]
    return tuple(found)


def site_reviews(root: Path, items: Iterable[Item]) -> tuple[Review, ...]:
    """The signed reviews of this tree; none where it has no folder for them."""
    if not (root / reviews.FOLDER).is_dir():
        return ()
    from bundle.trust import load_trust  # noqa: PLC0415 - loads cryptography

    return reviews.load(root, load_trust(root / "trust").standing, items)


def lint_screens(
    items: Iterable[Item], found: Iterable[Review], today: date
) -> Iterator[tuple[str, Finding]]:
    """Screen packs that nobody of the site has held against their source, by the pack's name."""
    read = {each.item: each for each in found if each.kind == "screen_pack"}
    for item in items:
        if item.kind != "screen_pack":
            continue
        review = read.get(item.id)
        if review is None:
            words = f"no named person has held it against {item.citation}: for {item.owner}"
            yield f"screen pack {item.id}", Finding(0, 0, "unread", words, error=False)
        elif (still := review.finding(today)) is not None:
            code, words, error = still
            yield f"screen pack {item.id}", Finding(0, 0, code, words, error)


def _wording(document: dict[str, Any]) -> Digest:
    return Digest.of(canonical_bytes(document))


def _screen_packs(root: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The screen packs that ship and those of the site; a bad one is refused where it is loaded."""
    from airgap.science.packs import PACK_LIMIT, read_pack  # noqa: PLC0415 - a review alone needs it

    shipped = sorted((Path(airgap.__file__).parent / "science" / "screen_packs").glob("*.toml"))
    for path in (*shipped, *sorted((root / "policy" / "screens").glob("*.toml"))):
        content = read_plain(path, PACK_LIMIT + 1)
        with contextlib.suppress(ValueError):
            yield read_pack(content), content
