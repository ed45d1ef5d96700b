"""`site.toml`: what an institution says about itself, its systems, projects and people.

Its facts are those of docs/design/policy.md, 2.

The file is the site's own statement, kept by its administrator. Tables bear the groups of policy's
facts; a key that is not given is an unknown fact, never a yes. Limits and settings of the enclave
have safe defaults. Every refusal names the line.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from policy.errors import RefusedError
from policy.strict import Frozen, Source, Words
from policy.terms import FACTS

FILE_NAME = "site.toml"
LOG_ACCOUNT = "airgap-audit"  # owns the log where its service does; made by the installation
MAX_BYTES = 1 << 20
MAX_PEOPLE = 10_000
MAX_SAMPLES = 10_000

ProjectId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Account = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
LogOrigin = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9./_-]{0,127}$")]
PersonId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


def _of_fact(fact: str) -> AfterValidator:
    """Validate a value against the registered type of a fact."""

    def check(value: Any) -> Any:
        fault = FACTS[fact].fault(value)
        if fault:
            raise ValueError(fault)
        return value

    return AfterValidator(check)


def _names(value: object) -> object:
    """Turn a list of names into a set; a repeated name is a mistake worth naming."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        return value
    if len(set(value)) != len(value):
        raise ValueError("a name stands twice")
    return frozenset(value)


NameSet = Annotated[frozenset[str], BeforeValidator(_names)]


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError("no such time zone on this machine; `UTC` always exists") from error
    return name


class Institution(Frozen):
    """The institution."""

    name: Words
    kind: Literal["university", "national_lab", "company", "nonprofit", "government"] | None = None
    state: Annotated[str, _of_fact("institution.state")] | None = None
    public: bool | None = None
    legal_zone: Annotated[str, AfterValidator(_zone)] = "UTC"


class Crypto(Frozen):
    """What is recorded of the cryptographic module; recording it says nothing of its merit."""

    module: Words
    certificate: Words | None = None
    status: Words
    checked_on: date


class System(Frozen):
    """This machine and its boundary."""

    id: ProjectId = "this-host"
    owner: Annotated[str, _of_fact("system.owner")] | None = None
    ic_nss: bool | None = None
    state_business: bool | None = None
    cui_authorised: bool | None = None
    in_ssp: bool | None = None
    crypto: Crypto | None = None


class Transaction(Frozen):
    """How a model is acquired."""

    buyer: Annotated[str, _of_fact("transaction.buyer")] | None = None
    kind: Annotated[str, _of_fact("transaction.kind")] | None = None
    interconnection_only: bool | None = None
    under_existing_contract: bool | None = None
    counterparty: Words | None = None


class Deliverable(Frozen):
    """What the project delivers."""

    to_dod: bool | None = None
    embeds_model_or_output: bool | None = None


class Performance(Frozen):
    """What the work performs."""

    dod_contract: bool | None = None


class Data(Frozen):
    """What the input data of the project are marked and classified as."""

    markings: Annotated[NameSet, _of_fact("data.markings")] | None = None
    export_class: Annotated[str, _of_fact("data.export_class")] | None = None


class Project(Frozen):
    """One project, as its award describes it."""

    id: ProjectId
    title: Words | None = None
    sponsors: Annotated[NameSet, _of_fact("project.sponsors")] | None = None
    instrument: Annotated[str, _of_fact("project.instrument")] | None = None
    federal_funds: bool | None = None
    award_date: date | None = None
    active: bool | None = None
    closed: bool | None = None
    principal_investigators: Annotated[frozenset[PersonId], BeforeValidator(_names)] = frozenset()
    actions: NameSet | None = None
    subjects: Annotated[NameSet, _of_fact("task.subjects")] | None = None
    transaction: Transaction | None = None
    deliverable: Deliverable = Deliverable()
    performance: Performance = Performance()
    data: Data = Data()


class Person(Frozen):
    """One named person and the local account by which this machine knows the person."""

    id: PersonId
    name: Words | None = None
    account: Account | None = None
    uid: int | None = Field(default=None, ge=0, le=2**32 - 2)
    roles: NameSet = frozenset()
    projects: Annotated[frozenset[ProjectId], BeforeValidator(_names)] = frozenset()
    training_until: date | None = None
    us_person: bool | None = None
    export_licence: bool | None = None
    record: Words | None = None
    affiliations: tuple[Words, ...] | None = Field(default=None, strict=False)


class PolicySettings(Frozen):
    """How the rules apply here; `as_of` fixes the legal day, for a replay or a demonstration."""

    as_of: date | None = None


class EnclaveSettings(Frozen):
    """The weakest seal that is accepted, and how often a running one is looked at again.

    `min_rung` None: A for root and B for users. `reverify_s` is the timer that reads the host's
    facts and repeats the probe; the facts are read before each request in any case.
    """

    min_rung: Literal["A", "U", "B", "C"] | None = None
    reverify_s: int = Field(default=60, ge=5, le=3600)


class SequenceScreener(Frozen):
    """An installed screener for sequences; `mode` says how thorough it is, in its own words.

    `program_sha256` is the digest of that one file, `database_sha256` that over the sorted lines
    `SHA-256  NAME` of the files of the database.
    """

    program: Annotated[str, StringConstraints(pattern=r"^/[ -~]{1,400}\.py$")]
    program_sha256: Annotated[str, StringConstraints(pattern="^sha256:[0-9a-f]{64}$")]
    name: Words
    version: Words
    mode: Words
    database: Annotated[str, StringConstraints(pattern=r"^/[ -~]{1,400}$")]
    database_sha256: Annotated[str, StringConstraints(pattern="^sha256:[0-9a-f]{64}$")]
    kinds: tuple[Literal["protein", "nucleic_acid"], ...] = Field(
        default=("protein",), strict=False
    )
    seconds: int = Field(default=300, ge=1, le=86_400)


class ScreenSettings(Frozen):
    """Hazard screens of the site, beside those that are shipped."""

    sequences: SequenceScreener | None = None


class AuditSettings(Frozen):
    """The usage log: who writes it, what it keeps, and when it warns or stops."""

    origin: LogOrigin | None = None
    socket: Annotated[str, StringConstraints(pattern=r"^/[ -~]{1,100}$")] | None = None
    payloads: Literal["none", "sealed"] = "none"
    retention: Literal["m-26-14", "m-21-31-legacy", "site"] = "m-26-14"
    retention_months: int | None = Field(default=None, ge=1, le=1_200)
    quota_mb: int = Field(default=0, ge=0, le=1 << 30)
    refuse_overdue_export: bool = False


class InferenceSettings(Frozen):
    """In which precision the model runs, on which provider, and what it may use of the machine.

    The installed bundle must hold the precision; the provider is a demand and never a wish.
    """

    precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "fp32"
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: int | None = Field(default=None, ge=1, le=1_024)  # None: every core
    spin: bool = True
    arena: bool = True
    memory_mb: int | None = Field(default=None, ge=64, le=1 << 30)  # None: half of what is free
    device: int = Field(default=0, ge=0, le=63)
    device_mb: int | None = Field(default=None, ge=256, le=1 << 30)  # None: all of it
    deterministic: bool = True
    engine_rows: int = Field(default=32, ge=1, le=4_096)
    engine_positions: int = Field(default=2_048, ge=1, le=1 << 20)
    engine_piece: int = Field(default=256, ge=1, le=65_536)


class ServiceSettings(Frozen):
    """Where the daemon is that serves this site; `airgap run` asks it then."""

    socket: Annotated[str, StringConstraints(pattern=r"^/[ -~]{1,100}$")] | None = None
    per_person: int = Field(default=4, ge=1, le=256)  # requests at once


class Limits(Frozen):
    """Caps of one request."""

    samples: int = Field(default=10_000, ge=1, le=MAX_SAMPLES)
    prompt_bytes: int = Field(default=65_536, ge=256, le=1 << 20)
    new_tokens: int = Field(default=1_024, ge=1, le=32_768)
    frame_bytes: int = Field(default=4 << 20, ge=65_536, le=64 << 20)
    seconds: int = Field(default=600, ge=1, le=86_400)


class Site(Frozen):
    """The whole file."""

    institution: Institution
    system: System = System()
    transaction: Transaction = Transaction()
    project: tuple[Project, ...] = Field(default=(), max_length=MAX_PEOPLE, strict=False)
    person: tuple[Person, ...] = Field(default=(), max_length=MAX_PEOPLE, strict=False)
    policy: PolicySettings = PolicySettings()
    enclave: EnclaveSettings = EnclaveSettings()
    audit: AuditSettings = AuditSettings()
    screen: ScreenSettings = ScreenSettings()
    inference: InferenceSettings = InferenceSettings()
    service: ServiceSettings = ServiceSettings()
    limits: Limits = Limits()

    def find_project(self, project: str) -> Project | None:
        """The project of this id, or None."""
        return next((each for each in self.project if each.id == project), None)

    def require_project(self, project: str) -> Project:
        """The project of this id; RefusedError `site.project`."""
        found = self.find_project(project)
        if found is None:
            known = ", ".join(each.id for each in self.project) or "none"
            raise RefusedError(
                "site.project",
                f"site.toml holds no project {project!r:.80}; it holds {known:.300}",
                hint="use one of them, or ask the administrator to add it",
            )
        return found

    def find_person(self, person: str) -> Person | None:
        """The person of this id, or None."""
        return next((each for each in self.person if each.id == person), None)

    def require_account(self, uid: int, account: str) -> Person:
        """The one person behind a local account; RefusedError `site.person`."""
        found = [
            each
            for each in self.person
            if each.uid == uid or (each.uid is None and each.account == account)
        ]
        if len(found) != 1:
            raise RefusedError(
                "site.person",
                f"the account {account!r:.80} (uid {uid}) is that of {len(found)} people in"
                " site.toml, expected one",
                hint="the administrator adds a [[person]] with this uid",
            )
        return found[0]

    def legal_day(self, now: datetime, as_of: date | None = None) -> LegalDay:
        """The day whose law applies, and where it came from.

        `now` is the clock, with a zone. A day `as_of` that the caller asked for goes before the
        file's own, and that before the clock.
        """
        fixed = as_of or self.policy.as_of
        if fixed is not None:
            source = "--as-of" if as_of is not None else "site.toml [policy] as_of"
            return LegalDay(fixed, datetime.combine(fixed, time(23, 59, 59), UTC), source)
        zone = self.institution.legal_zone
        return LegalDay(now.astimezone(ZoneInfo(zone)).date(), now, f"clock of this host in {zone}")


@dataclass(frozen=True, slots=True)
class LegalDay:
    """`as_of` and `known_at` of a decision, and where the date came from."""

    as_of: date
    known_at: datetime
    source: str


# -- reading --------------------------------------------------------------------------------------


def read_plain(path: Path, limit: int) -> bytes:
    """Read at most `limit` bytes of an ordinary file; a pipe in its place is not waited for.

    Raises:
        OSError: It cannot be read; FileExistsError for a pipe, a device or a socket.

    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise FileExistsError(errno.EEXIST, "not an ordinary file", str(path))
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit)


def load_site(root: Path) -> Site:
    """Read `<root>/site.toml`.

    Raises:
        RefusedError: `site.missing`, `site.toml` or `site.schema`, with the line.

    """
    path = root / FILE_NAME
    try:
        content = read_plain(path, MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RefusedError(
            "site.missing",
            f"no {FILE_NAME} in {root}",
            hint="airgap site init writes a commented one to fill in; or name a tree with --root",
        ) from error
    except (FileExistsError, IsADirectoryError, PermissionError, NotADirectoryError) as error:
        raise RefusedError("site.missing", f"{path} cannot be read: {error.strerror}") from error
    return parse_site(content, str(path))


def parse_site(content: bytes, name: str = FILE_NAME) -> Site:
    """Parse the bytes of a site.toml; RefusedError `site.toml` or `site.schema`."""
    if len(content) > MAX_BYTES:
        raise RefusedError("site.toml", f"{name}: more than {MAX_BYTES} bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RefusedError(
            "site.toml",
            f"{name}: line {line}: byte 0x{content[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        ) from error
    try:
        value = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        problem = str(error) or type(error).__name__
        raise RefusedError("site.toml", f"{name}: {problem:.200}") from error
    source = Source(name, value, lambda: _places(text))
    site = source.build(Site, code="site.schema")
    _check(source, site)
    return site


def _check(source: Source, site: Site) -> None:
    """Check what ties the tables together."""
    groups: tuple[tuple[str, list[str | int | None]], ...] = (
        ("project", [each.id for each in site.project]),
        ("person", [each.id for each in site.person]),
        ("person", [each.uid for each in site.person]),
        ("person", [each.account for each in site.person if each.uid is None]),
    )
    for group, ids in groups:
        seen: set[str | int] = set()
        for at, each in enumerate(ids):
            if each is not None and each in seen:
                raise source.refusal("site.schema", (group, at), f"{each!r} stands twice")
            if each is not None:
                seen.add(each)
    projects = {each.id for each in site.project}
    people = {each.id for each in site.person}
    for at, project in enumerate(site.project):
        _check_members(
            source,
            ("project", at, "principal_investigators"),
            project.principal_investigators,
            people,
        )
        for action in sorted(project.actions or ()):
            fault = FACTS["task.action"].fault(action)
            if fault:
                raise source.refusal("site.schema", ("project", at, "actions"), fault)
    for at, person in enumerate(site.person):
        _check_members(source, ("person", at, "projects"), person.projects, projects)


def _check_members(
    source: Source, path: tuple[str | int, ...], named: frozenset[str], known: set[str]
) -> None:
    strange = sorted(named - known)
    if strange:
        raise source.refusal("site.schema", path, f"{strange[0]!r:.80} is not in this file")


_TABLE = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_.-]+)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"\s*([A-Za-z0-9_-]+)\s*=")


def _places(text: str) -> Mapping[tuple[str | int, ...], tuple[int, int]]:
    """Find the line of tables and keys: enough to point at a fault, since tomllib keeps none."""
    places: dict[tuple[str | int, ...], tuple[int, int]] = {}
    counts: dict[str, int] = {}
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.split("\n"), 1):
        if found := _TABLE.fullmatch(line.rstrip("\r")):
            head, *rest = found[2].split(".")
            if found[1] == "[[":
                counts[head] = counts.get(head, -1) + 1
            table = (head, counts[head], *rest) if head in counts else (head, *rest)
            places.setdefault(table, (number, 1))
        elif found := _KEY.match(line):
            places.setdefault((*table, found[1]), (number, found.start(1) + 1))
    return places


# -- the template ---------------------------------------------------------------------------------


def default_site_toml() -> str:
    """Return a commented site.toml in which every answer is open, so that nothing is permitted."""
    return Path(__file__).with_name("site_template.toml").read_text(encoding="utf-8")


def create_site(root: Path) -> Path:
    """Write the template to `<root>/site.toml`; RefusedError `site.exists` if one is there."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = root / FILE_NAME
    draft = root / f".{FILE_NAME}.{os.getpid()}"
    try:
        with draft.open("x", encoding="utf-8") as file:
            file.write(default_site_toml())
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike a rename it never replaces
    except FileExistsError as error:
        raise RefusedError(
            "site.exists", f"{path} is there already", hint="edit it, or move it away first"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def unnamed_site() -> Site:
    """A site about which nothing is known: what a question without a site.toml is held against."""
    return Site(institution=Institution(name="no site.toml"))
