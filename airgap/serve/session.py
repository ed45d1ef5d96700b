"""Opens everything that a broker needs, in an order in which each step may still refuse.

Site facts and rules; the installed bundle, hashed again; the log; then the two sealed processes,
whose evidence is in the log before the first request. Embedded mode: the user's own process is the
broker (docs/design/architecture.md, 4).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from airgap import gate
from airgap.approvals import load_approvals
from airgap.audit import Event, new_ulid
from airgap.audit.service import Log, RemoteLog
from airgap.audit.site import open_site_log
from airgap.config import Person, Site, load_site
from airgap.enclave import Caps, Enclave, SealSpec, launch, run_sealed
from airgap.enclave.inventory import take
from airgap.enclave.running import noted
from airgap.engine_store import Engines, Wanted, require
from airgap.extras import require_extras
from airgap.holds import Holds
from airgap.install import InstalledBundle, Store, verify_installed
from airgap.install.record import actor_of
from airgap.install.standing import require_clock, require_standing, require_valid
from airgap.release_desk import ReleaseDesk
from airgap.rules import Rules
from airgap.science.sequences import SequenceScreen
from airgap.serve.broker import Broker, Job, Model, canonical
from airgap.serve.provider import (
    SHOWN_ON,
    demanded,
    engine_settings,
    profile_of,
    require_host,
    worker_settings,
)
from airgap.serve.tree import Facts, Tree
from airgap.site_rules import read_signature, verify_file
from bundle.graphs import Graphs, parse_graphs
from bundle.root import RootDocument
from bundle.trust import load_trust
from policy.approvals import Approval, Approvals
from policy.engine import Decision
from policy.errors import AirgapError, RefusedError
from policy.terms import Digest

WORKER = "airgap.inference.program:create"
HELPER = "airgap.science.program:create"
IN_FLIGHT = 32  # requests at once at one worker
HOLDS_COUNT = timedelta(days=30)
SCREEN_PACKS = Path("policy") / "screens"

operator = structlog.get_logger("airgap.session")

Clock = Callable[[], datetime]
# The person behind an account in the site facts of the moment, and these with what is known of her;
# RefusedError `site.person`.
Identify = Callable[[Site], tuple[Person, Site]]


def utc_now() -> datetime:
    """Return the wall clock, UTC."""
    return datetime.now(UTC)


@contextlib.contextmanager
def open_broker(
    root: Path,
    *,
    model: str = "",
    project: str = "",
    valence: bool = False,
    provider: str = "",
    clock: Clock = utc_now,
) -> Iterator[tuple[Broker, str]]:
    """Open a broker on the tree `root` and yield it with the project that the job runs under.

    Args:
        root: The tree of this user.
        model: Digest, name or name-version of an installed bundle; empty for the current one.
        project: Its id in site.toml; empty where the person has exactly one.
        valence: Load the worker's filter of that name, for jobs that ask for it.
        provider: What is demanded of the worker; empty for that of site.toml.
        clock: Wall clock, UTC.

    Raises:
        RefusedError: Nothing is installed, a file of the bundle has changed, the account or the
            project is unknown, or the seal is refused.
        FaultError: The log cannot be opened.

    """
    require_extras("cpu", "science")
    house = House.of(root, model=model, valence=valence, provider=provider, clock=clock)

    def identify(site: Site) -> tuple[Person, Site]:
        return site.require_account(os.getuid(), account_name()), site

    person, _ = identify(house.site)
    chosen = choose_project(house.site, person, project)
    with open_site_log(root, house.site) as log, house.sealed_pair(log) as pair:
        yield house.broker(identify, log=log, pair=pair, uid=os.getuid()), chosen


@dataclass(frozen=True, slots=True)
class House:
    """What a broker of one tree needs before it knows whom it serves; checked, nothing started."""

    tree: Tree
    site: Site  # as it was when the processes were specified; a request reads it anew
    installed: InstalledBundle
    model: Model
    specs: tuple[SealSpec, SealSpec]
    clock: Clock

    @property
    def root(self) -> Path:
        """The tree."""
        return self.tree.root

    @classmethod
    def of(
        cls,
        root: Path,
        *,
        model: str = "",
        valence: bool = False,
        provider: str = "",
        clock: Clock = utc_now,
    ) -> House:
        """Load and check site, rules, trust and bundle; raises as `open_broker`."""
        site = load_site(root)
        demand = demanded(site.inference, provider)
        require_host(demand)
        tree = Tree(root)
        trusted = tree.read().trust
        installed = find_installed(root, model)
        require_clock(Store(root / "store"), clock())
        require_valid(installed, clock())
        for alarm in require_standing(installed, trusted, now=clock()):
            operator.warning("revocation", alarm=alarm)
        verify_installed(installed.folder)
        described = describe(installed, site.inference.precision, demand)
        engines = (
            signed_engines(root, installed, described, site, trusted.standing)
            if demand == "tensorrt"
            else None
        )
        packs = screen_packs(root)
        wanted = specs(
            installed,
            described,
            site,
            root / "enclave",
            packs,
            valence=valence,
            engines=engines,
        )
        return cls(tree, site, installed, described, wanted, clock)

    def require_standing(self) -> Facts:
        """Return what the tree says now; refuse a bundle that was revoked or has expired since.

        Raises:
            RefusedError: `trust.expired`, or as `require_standing` and `Tree.read`.

        """
        now, facts = self.clock(), self.tree.read()
        require_valid(self.installed, now)
        for alarm in require_standing(self.installed, facts.trust, now=now):
            operator.warning("revocation", alarm=alarm)
        return facts

    @contextlib.contextmanager
    def sealed_pair(
        self, log: Log, *, lasting: bool = False, why: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[tuple[Enclave, Enclave]]:
        """Start worker and helper, their evidence on record before they are given.

        `lasting`: an end that nobody asked for is an incident. `why`: `reason` and `previous` of
        the load, for its record.
        """
        with contextlib.ExitStack() as stack:
            self.tree.put_on_record(log, self.tree.read())
            with loading(log, self.installed, why):
                worker, helper = (
                    stack.enter_context(sealed(log, spec, lasting=lasting)) for spec in self.specs
                )
            yield worker, helper

    def broker(
        self,
        identify: Identify,
        *,
        log: Log,
        pair: tuple[Enclave, Enclave],
        uid: int,
        request_set: str = "",
        proceed: Callable[[], None] = lambda: None,
    ) -> Broker:
        """Return the broker of one person.

        Args:
            identify: Finds her in the site facts of the moment; see `Identify`.
            log: Where her records go.
            pair: Worker and helper.
            uid: Of her account.
            request_set: See `Broker`.
            proceed: Raises where the request must not go on, before each decision.

        """
        person, site = identify(self.require_standing().site)

        def facts() -> UseFacts:
            proceed()
            found = self.require_standing()
            self.tree.put_on_record(log, found)
            now, known = identify(found.site)
            approvals = load_approvals(self.root, found.trust.standing)
            return UseFacts(known, found.rules, now, approvals)

        def require_released(request: str) -> None:
            found = self.require_standing()
            trust, (_, known) = found.trust.standing, identify(found.site)
            holds = Holds(self.root, trust, person.id)
            desk = ReleaseDesk(self.root, known, found.rules, trust, holds, hazard_role=False)
            desk.require_released(holds.taken_up(request))

        holds = Holds(self.root, self.tree.read().trust.standing, person.id)
        policy = UseRules(
            facts, running(self.installed, self.model.precision), log, self.clock, holds, uid
        )
        return Broker(
            log=log,
            worker=pair[0],
            helper=pair[1],
            model=self.model,
            actor=actor_of(person),
            use_policy=policy,
            limits=site.limits,
            restricted=self.root / "restricted",
            holds=holds,
            require_released=require_released,
            screen_sequences=sequence_screen(log, site, self.root),
            request_set=request_set,
        )


def sequence_screen(log: Log, site: Site, root: Path) -> SequenceScreen | None:
    """Return the screener for sequences that the site names, sealed, its evidence on record."""
    if site.screen.sequences is None:
        return None

    def record(evidence: dict[str, Any]) -> None:
        kept, rung = log.put_object(canonical(evidence)), str(evidence["rung"])
        log.append(
            Event("enclave.seal", data={"rung": rung, "profile": "convert", "evidence": kept})
        )

    state = root / "enclave"
    run = functools.partial(run_sealed, min_rung=site.enclave.min_rung, state=state)
    return SequenceScreen(site.screen.sequences, run=run, scratch=state, on_evidence=record)


@contextlib.contextmanager
def loading(
    log: Log, installed: InstalledBundle, why: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Put the load of a model on record, before it begins and as it ended."""
    request = new_ulid()

    def record(phase: str, code: str = "", **result: str) -> None:
        log.append(
            Event(
                "model.load",
                phase,
                req=request,
                model=installed.digest,
                err=code,
                data={"digest": installed.digest, **why, **result},
            )
        )

    record("intent")
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, AirgapError) else ""
        with contextlib.suppress(AirgapError):
            record(
                "outcome", code, result="refused" if isinstance(error, RefusedError) else "failed"
            )
        raise
    record("outcome", result="complete")


@dataclass(frozen=True, slots=True)
class UseFacts:
    """What a decision on a use rests on beside the job: read at each decision anew."""

    site: Site
    rules: Rules
    person: Person
    approvals: Approvals


@dataclass(slots=True)
class UseRules:
    """The rules with the facts of this site, this person and this bundle bound in."""

    facts: Callable[[], UseFacts]
    installed: InstalledBundle
    log: Log
    clock: Clock
    held: Holds
    uid: int = field(default_factory=os.getuid)
    holds: int | None = None  # counted on first use, while this process alone writes the log

    def __call__(
        self,
        job: Job,
        *,
        modality: str,
        screen: Mapping[str, Any] | None,
        released: tuple[Approval, ...] = (),
    ) -> Decision:
        """Return the decision on one use; see `broker.UsePolicy`."""
        facts, now = self.facts(), self.clock()
        day = facts.site.legal_day(now)
        if self.holds is None or isinstance(self.log, RemoteLog):
            settled = self.held.settled()
            self.holds = hazard_holds(self.log, self.uid, now, settled)
        decision = gate.decide_use(
            facts.site,
            facts.rules,
            self.installed.manifest.models,
            bundle_digest=self.installed.digest,
            person=facts.person.id,
            project=job.project,
            task=gate.TaskFacts(job.task, modality),
            screen=screen,
            as_of=day.as_of,
            known_at=day.known_at,
            day_source=day.source,
            admitted=True,  # the store activates nothing that was not admitted
            hazard_holds=self.holds,
            approvals=Approvals((*facts.approvals.approvals, *released)),
        )
        if not decision.permitted:
            self.holds = None  # the hold that follows counts from the next request on
        return decision


def hazard_holds(log: Log, uid: int, now: datetime, settled: frozenset[int] = frozenset()) -> int:
    """Return how often a hazard rule held this account in the last 30 days, from the log.

    `settled` are the records of holds that named people have released.
    """
    since = (now - HOLDS_COUNT).strftime("%Y-%m-%dT%H:%M:%S")
    return sum(
        1
        for record in log.denials(uid, since)
        if record.get("decision", {}).get("rule") == "HAZ" and record["seq"] not in settled
    )


def specs(
    installed: InstalledBundle,
    model: Model,
    site: Site,
    state: Path,
    packs: tuple[Path, ...] = (),
    *,
    valence: bool = False,
    engines: Engines | None = None,
) -> tuple[SealSpec, SealSpec]:
    """Return what to seal: the worker with the model, and the helper without it."""
    min_rung, reverify_s = site.enclave.min_rung, float(site.enclave.reverify_s)
    worker = SealSpec(
        profile=profile_of(model.provider),
        program=WORKER,
        config={
            "folder": str(installed.model_folder(model.id)),
            "precision": model.precision,
            **worker_settings(site.inference, model.provider),
            **engine_settings(engines),
            **({"valence": True} if valence else {}),
        },
        read_only=(installed.folder, *(() if engines is None else (engines.folder,))),
        caps=Caps(in_flight=IN_FLIGHT),
        artifacts={
            "bundle": str(installed.digest),
            **({} if engines is None else {"engines": str(engines.digest)}),
        },
        min_rung=min_rung,
        state=state,
        reverify_s=reverify_s,
    )
    helper = SealSpec(
        profile="screen",
        program=HELPER,
        config={"packs": [str(path) for path in packs]},
        read_only=packs,
        artifacts={f"screen pack {p.name}": str(Digest.of(p.read_bytes())) for p in packs},
        min_rung=min_rung,
        state=state,
        reverify_s=reverify_s,
    )
    return worker, helper


def signed_engines(
    root: Path, installed: InstalledBundle, model: Model, site: Site, trust: RootDocument
) -> Engines:
    """Return the engines of this host's GPU, all compared; RefusedError `model.engine`."""
    wanted = Wanted.of(installed, model.id, model.precision, site.inference, take())
    return require(root, wanted, trust)


def screen_packs(root: Path) -> tuple[Path, ...]:
    """Return the screen packs that the site adds, each signed like its rules.

    Raises:
        RefusedError: `policy.signature`, one is not signed by those whom the trust root asks for.

    """
    paths = tuple(sorted((root / SCREEN_PACKS).glob("*.toml")))
    if paths:
        trust = load_trust(root / "trust").standing
        for path in paths:
            verify_file(path.read_bytes(), path.name, read_signature(path), trust)
    return paths


def account_name() -> str:
    """Return the name of the account that runs this process, or its number."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def choose_project(site: Site, person: Person, project: str) -> str:
    """Return the project that a job runs under; without a choice, the person's only one.

    Whether the person may work for it is for the policy to say.
    """
    if project:
        return site.require_project(project).id
    if len(person.projects) == 1:
        return next(iter(person.projects))
    known = ", ".join(sorted(person.projects)) or "none"
    raise RefusedError(
        "site.project",
        f"{person.id} is on {len(person.projects)} projects ({known}); name one",
        hint="--project PROJECT",
    )


def find_installed(root: Path, model: str) -> InstalledBundle:
    """Return the installed bundle that `model` names, or the current one."""
    store = Store(root / "store")
    if model:
        return store.get(model)
    current = store.current()
    if current is None:
        raise RefusedError(
            "store.missing",
            f"no model is installed in {root}",
            hint="airgap install BUNDLE.agb; or name another tree with --root",
        )
    return current


def running(installed: InstalledBundle, precision: str) -> InstalledBundle:
    """Return the bundle as the policy sees a use: of its precisions only the one that runs.

    A rule on `bundle.precisions` speaks at admission of all that a bundle holds, and at use of the
    one that is used.
    """
    manifest = installed.manifest
    models = tuple(
        entry.model_copy(update={"precisions": (precision,)}) for entry in manifest.models
    )
    return replace(installed, manifest=manifest.model_copy(update={"models": models}))


def require_precision(installed: InstalledBundle, precision: str, demand: str = "cpu") -> None:
    """Refuse a precision that the bundle does not hold, or not for the provider `demand`.

    Raises:
        RefusedError: `model.precision`.

    """
    entry = installed.manifest.models[0]
    claims = [each for each in installed.manifest.parity if each.precision == precision]
    if precision not in entry.precisions:
        problem = f"{entry.id} comes in {', '.join(entry.precisions)}, not in {precision}"
    elif claims and all(each.provider not in SHOWN_ON[demand] for each in claims):
        problem = (
            f"{entry.id} in {precision} is for {claims[0].provider}, and this worker runs "
            f"{SHOWN_ON[demand][0]}"
        )
    else:
        return
    raise RefusedError(
        "model.precision",
        problem,
        hint="name another in site.toml, [inference] precision, or build it: airgap build "
        f"--precision {precision}",
    )


def describe(installed: InstalledBundle, precision: str = "fp32", demand: str = "cpu") -> Model:
    """Return what the broker and the helper must know of the installed model.

    Raises:
        RefusedError: `model.precision`.

    """
    require_precision(installed, precision, demand)
    entry = installed.manifest.models[0]
    graphs: Graphs = parse_graphs((installed.model_folder(entry.id) / "graphs.json").read_bytes())
    return Model(
        id=entry.id,
        bundle=installed.digest,
        name=installed.manifest.name,
        version=installed.manifest.version,
        precision=precision,
        context={
            "model": graphs.model,
            "max_context": graphs.max_context,
            "vocab_size": graphs.vocab_size,
            "tags": dict(graphs.tags),
            "reference_model": entry.reference_model,
        },
        reference_model=entry.reference_model,
        scientific_use=entry.scientific_use,
        provider=demand,
    )


@contextlib.contextmanager
def sealed(log: Log, spec: SealSpec, *, lasting: bool = False) -> Iterator[Enclave]:
    """Start a sealed process; its evidence is in the log first, and its end as soon as it ends.

    `lasting`: an end before that of the block is an incident.
    """
    lock = threading.Lock()
    begun, ends = False, list[Mapping[str, Any]]()
    leaving = threading.Event()

    def record(rung: str) -> None:
        with contextlib.suppress(AirgapError, OSError):  # a log that fails has said so already
            record_end(log, spec, rung, ends.pop())

    def on_end(end: dict[str, Any]) -> None:
        # The timer may end a worker between two requests: that is on record at once, though never
        # before the record of its seal.
        with lock:
            if lasting and not leaving.is_set() and not end.get("incident"):
                end = end | {"incident": "it ended while it was to serve"}
            ends.append(end)
            if begun:
                record(enclave.rung)

    enclave = launch(spec, on_end)
    operator.info("enclave.sealed", profile=spec.profile, rung=enclave.rung, pid=enclave.pid)
    with contextlib.ExitStack() as stack:
        stack.callback(enclave.close)
        evidence = log.put_object(canonical(enclave.evidence))
        log.append(
            Event(
                "enclave.seal",
                data={"rung": enclave.rung, "profile": spec.profile, "evidence": evidence},
            )
        )
        with lock:
            begun = True
            if ends:
                record(enclave.rung)
        if spec.state is not None:
            stack.enter_context(noted(spec.state, enclave.evidence))
        try:
            yield enclave
        finally:
            leaving.set()


def record_end(log: Log, spec: SealSpec, rung: str, end: Mapping[str, Any]) -> None:
    """Append how a sealed process ended; an incident is a kind of its own."""
    data: dict[str, Any] = {
        "rung": rung,
        "profile": spec.profile,
        "evidence": log.put_object(json.dumps(end, sort_keys=True).encode()),
    }
    data |= {key: end[key] for key in ("status", "signal") if isinstance(end.get(key), int)}
    if end.get("incident"):
        operator.error("enclave.incident", profile=spec.profile, reason=end["incident"])
        log.append(Event("enclave.incident", data={**data, "reason": str(end["incident"])[:200]}))
    else:
        log.append(Event("enclave.exit", data=data))
