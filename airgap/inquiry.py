"""Questions to the policy outside a run: `airgap policy explain` and `check`.

A what-if assumes the facts that only a run could supply (seal, installation, screens) and says so.
A check assumes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from airgap.config import LegalDay, Person, Site
from airgap.gate import TaskFacts, decide_admission, decide_use
from airgap.model_facts import BundleFacts, bundle_facts, registry_facts
from airgap.rules import Rules
from policy.approvals import Approvals
from policy.engine import NO_APPROVALS, Decision
from policy.errors import RefusedError, UsageError
from policy.strict import parse_day
from policy.terms import FACTS, Digest, Fact, Kind, Known, Scope, Value, unknown_name

_ASSUMED = "assumed for this question"


@dataclass(frozen=True, slots=True)
class Subject:
    """The bundle or model that is asked about; None means that nobody looked."""

    title: str
    facts: BundleFacts
    digest: Digest | None = None
    verified: bool | None = None
    admitted: bool | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about the subject."""

    scope: Scope
    project: str | None
    person: str | None
    task: TaskFacts | None
    assumed: Mapping[str, Fact] = field(default_factory=dict)

    @property
    def assumed_words(self) -> tuple[str, ...]:
        """The assumed facts, for the reader."""
        return tuple(f"{name} = {_words(fact)}" for name, fact in sorted(self.assumed.items()))

    def title_of(self, subject: Subject) -> str:
        """Name the question for a reader."""
        words = subject.title if self.task is None else f"{subject.title}, {self.task.name}"
        words += f", project {self.project}" if self.project else ", for all projects of the site"
        by_person = self.scope is Scope.USE and self.person
        return f"{words}, by {self.person}" if by_person else words


def ask(
    question: Question,
    subject: Subject,
    site: Site,
    rules: Rules,
    day: LegalDay,
    *,
    approvals: Approvals = NO_APPROVALS,
) -> Decision:
    """Decide; RefusedError as `airgap.gate` says."""
    if question.scope is Scope.ADMISSION:
        return decide_admission(
            site,
            rules,
            subject.facts,
            bundle_digest=subject.digest,
            project=question.project,
            submitter=question.person,
            verified=subject.verified,
            assumed=question.assumed,
            approvals=approvals,
            as_of=day.as_of,
            known_at=day.known_at,
            day_source=day.source,
        )
    if question.project is None or question.person is None or question.task is None:
        raise UsageError(
            "usage.argument",
            "a use is decided for a person, a project and a task",
            hint="add --project and --task, and --person where the account is not known",
        )
    return decide_use(
        site,
        rules,
        subject.facts,
        bundle_digest=subject.digest,
        person=question.person,
        project=question.project,
        task=question.task,
        screen=None,
        admitted=subject.admitted,
        assumed=question.assumed,
        approvals=approvals,
        as_of=day.as_of,
        known_at=day.known_at,
        day_source=day.source,
    )


def what_if(question: Question, subject: Subject) -> dict[str, Fact]:
    """Facts that a what-if assumes beside those that were asked for: all of them favourable."""
    if question.scope is Scope.ADMISSION:
        wanted: dict[str, Value] = {
            "bundle.verified": True,
            "bundle.manifest_complete": True,
            "bundle.provenance_level": 1,
            "bundle.licence_texts_recorded": True,
        }
        known = {name for name, fact in subject.facts.facts.items() if isinstance(fact, Known)}
        if subject.verified is not None:
            known.add("bundle.verified")
    else:
        wanted = {
            "bundle.admitted": True,
            "screen.status": "complete",
            "screen.tier": 0,
            "screen.target_tier": 0,
            "screen.classes": frozenset(),
            "screen.repeated_probing": False,
        }
        known = set() if subject.admitted is None else {"bundle.admitted"}
    return {name: Known(value, _ASSUMED) for name, value in wanted.items() if name not in known}


def parse_assumptions(texts: Sequence[str]) -> dict[str, Fact]:
    """Read `fact=value` pairs; a set is written with commas, and nothing means the empty set.

    Raises:
        UsageError: `usage.argument`.

    """
    found: dict[str, Fact] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        spec = FACTS.get(name.strip())
        if spec is None or spec.derived or not equals:
            problem = (
                f"{name.strip()} is derived from other facts"
                if spec is not None and spec.derived
                else unknown_name(name.strip(), FACTS)
                if spec is None
                else "expected FACT=VALUE"
            )
            raise UsageError("usage.argument", f"--assume {text!r:.80}: {problem}")
        read = _read_value(spec.kind, value.strip())
        fault = spec.fault(read)
        if fault:
            raise UsageError("usage.argument", f"--assume {text!r:.80}: {fault}")
        found[name.strip()] = Known(read, _ASSUMED)  # type: ignore[arg-type]
    return found


def _read_value(kind: Kind, text: str) -> object:
    match kind:
        case Kind.BOOL:
            return {"true": True, "false": False}.get(text, text)
        case Kind.INT:
            return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else text  # noqa: PLR2004 - fits 2^53
        case Kind.DATE:
            return parse_day(text)
        case Kind.SET:
            return frozenset(part.strip() for part in text.split(",") if part.strip())
        case Kind.ENUM:
            return text


def _words(fact: Fact) -> str:
    if not isinstance(fact, Known):
        return "unknown"
    value = fact.value
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(value)) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_subject(*, bundle: str, model: str, root: Path, rules: Rules, now: datetime) -> Subject:
    """Find what is asked about: a bundle file, an installed bundle, or a registered model.

    Raises:
        UsageError: None or both were named.
        RefusedError: `policy.model`, `store.missing`, or whatever the head of the bundle is refused
            for.

    """
    if bool(bundle) == bool(model):
        raise UsageError(
            "usage.argument",
            "name one of --bundle and --model",
            hint="--model logos-8b asks about a model that the lineage registry knows",
        )
    if model:
        return Subject(model, registry_facts(model, rules.registry))
    path = Path(bundle)
    if path.is_file():
        return _bundle_file(path, root, rules, now)
    from airgap.install.store import Store  # noqa: PLC0415 - loads cryptography, which --model needs not

    installed = Store(root / "store").get(bundle)
    return Subject(
        title=f"{installed.manifest.name} {installed.manifest.version}",
        facts=bundle_facts(installed.manifest.models, rules.registry),
        digest=installed.digest,
        verified=True,
        admitted=True,
    )


def _bundle_file(path: Path, root: Path, rules: Rules, now: datetime) -> Subject:
    """Open the head of a bundle: its seal holds, its body has not been hashed."""
    from bundle.trust import load_trust  # noqa: PLC0415 - as above
    from bundle.verify import open_bundle  # noqa: PLC0415 - as above

    with open_bundle(path, load_trust(root / "trust"), now=now) as sealed:
        manifest, digest = sealed.manifest, sealed.digest
    return Subject(
        title=f"{manifest.name} {manifest.version}",
        facts=bundle_facts(manifest.models, rules.registry),
        digest=digest,
    )


def task_facts(task: str, action: str) -> TaskFacts:
    """What the task of this name makes; UsageError for an unknown task or action."""
    from airgap.science.tasks import find_task  # noqa: PLC0415 - only a use needs it

    fault = FACTS["task.action"].fault(action)
    if fault:
        raise UsageError("usage.argument", f"--action: {fault}")
    found = find_task(task)
    return TaskFacts(name=found.name, modality=found.modality, action=action)


def find_reader(site: Site, person: str, uid: int, account: str) -> Person | None:
    """The person who asks: the one named, else the one of the account, else nobody."""
    if person:
        found = site.find_person(person)
        if found is None:
            raise RefusedError("site.person", f"site.toml names nobody {person!r:.80}")
        return found
    try:
        return site.require_account(uid, account)
    except RefusedError:
        return None


def site_approvals(root: Path, known_at: datetime | None = None) -> Approvals:
    """The signed approvals of this tree; none where it has no folder for them.

    What was taken back after `known_at` still counted then.
    """
    if not (root / "policy" / "approvals").is_dir():
        return Approvals()
    # Signatures load cryptography, which a site without approvals need not.
    from airgap.approvals import load_approvals  # noqa: PLC0415
    from bundle.trust import load_trust  # noqa: PLC0415

    return load_approvals(root, load_trust(root / "trust").standing, known_at=known_at)
