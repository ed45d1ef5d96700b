"""Vocabulary that all three packages share."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from types import MappingProxyType
from typing import Self

from policy.errors import RefusedError

# Predicate types and own media types hang under this base. `.invalid` is reserved (RFC 2606): the
# address can never resolve, nobody can register it, and no reader is tempted to fetch it.
URI_BASE = "https://airgap.invalid/"

_SIZES = {"sha256": 32, "sha384": 48}
_TEXT = re.compile(r"(sha256|sha384):([0-9a-f]+)")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A content address: `algorithm` is `sha256` or `sha384`, `raw` its 32 or 48 bytes.

    The text form is `sha256:<lower-case hex>`.
    """

    algorithm: str
    raw: bytes

    def __post_init__(self) -> None:
        if _SIZES.get(self.algorithm) != len(self.raw):
            raise ValueError(f"no {self.algorithm!r:.20} digest has {len(self.raw)} bytes")

    @classmethod
    def of(cls, content: bytes, algorithm: str = "sha256") -> Self:
        """Hash `content`."""
        return cls(algorithm, hashlib.new(algorithm, content).digest())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form; RefusedError `digest.malformed` for anything else."""
        found = _TEXT.fullmatch(text)
        if found is None or len(found[2]) != 2 * _SIZES[found[1]]:
            raise RefusedError(
                "digest.malformed", f"expected sha256:<64 lower-case hex>, found {text!r:.80}"
            )
        return cls(found[1], bytes.fromhex(found[2]))

    @property
    def hex(self) -> str:
        """The bare lower-case hex, for fields that are named after their algorithm."""
        return self.raw.hex()

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.raw.hex()}"


class Scope(StrEnum):
    """What is decided: whether a bundle may enter, or whether a task may run."""

    ADMISSION = "admission"
    USE = "use"


class Outcome(StrEnum):
    """The four answers, the strictest first."""

    DENY = "deny"
    NEEDS_APPROVAL = "needs_approval"
    PERMIT_WITH_OBLIGATIONS = "permit_with_obligations"
    PERMIT = "permit"

    @property
    def permitted(self) -> bool:
        """Whether work may go on; a hold may not."""
        return self in {Outcome.PERMIT, Outcome.PERMIT_WITH_OBLIGATIONS}

    @property
    def rank(self) -> int:
        """0 is the strictest; a larger number is more permissive."""
        return tuple(Outcome).index(self)


# -- facts ----------------------------------------------------------------------------------------

Value = bool | int | str | date | frozenset[str]


@dataclass(frozen=True, slots=True)
class Known:
    """A fact that somebody asserts, with its source; an empty set is a value like any other."""

    value: Value
    source: str
    asserted_by: str | None = None
    asserted_on: date | None = None
    evidence: Digest | None = None
    derivation: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unknown:
    """A fact that nobody has supplied. It never counts as yes, and never as no."""

    reason: str = "not supplied"
    source: str = "request"
    derivation: tuple[str, ...] = ()


Fact = Known | Unknown


class Kind(StrEnum):
    """Types of fact values."""

    BOOL = "bool"
    INT = "int"
    DATE = "date"
    ENUM = "enum"
    SET = "set"


_TYPES = {
    Kind.BOOL: bool,
    Kind.INT: int,
    Kind.DATE: date,
    Kind.ENUM: str,
    Kind.SET: frozenset,
}
_TYPE_NAMES = {
    Kind.BOOL: "true or false",
    Kind.INT: "an integer",
    Kind.DATE: "a date",
    Kind.ENUM: "a name",
    Kind.SET: "a set of names",
}


@dataclass(frozen=True, slots=True)
class FactSpec:
    """One registered fact.

    Args:
        kind: Type of its value.
        question: What to ask a person when it is missing.
        asked_of: Role that can answer.
        members: Allowed values of an enum or members of a set; None where any short text is one.
        derived: Computed by the engine; a request cannot supply it.

    """

    kind: Kind
    question: str
    asked_of: str
    members: frozenset[str] | None = None
    derived: bool = False

    def fault(self, value: object) -> str | None:
        """Say why `value` is not of this fact's type, or None when it is."""
        if type(value) is not _TYPES[self.kind]:  # exactly: True is no integer, datetime no date
            return f"expected {_TYPE_NAMES[self.kind]}, found {value!r:.60}"
        if isinstance(value, str):
            return self.fault_of_member(value)
        if isinstance(value, frozenset):
            if self.members is not None and value <= self.members:
                return None
            return next(filter(None, map(self.fault_of_member, sorted(value, key=repr))), None)
        return None

    def fault_of_member(self, value: object) -> str | None:
        """Say why `value` is no member of this enum or set, or None when it is."""
        if not isinstance(value, str):
            return "expected text"
        if self.members is None:
            good = _SHORT_NAME.fullmatch(value) is not None
            return None if good else f"expected a short name, found {value!r:.80}"
        if value in self.members:
            return None
        close = difflib.get_close_matches(value, self.members, n=1)
        known = f"; did you mean {close[0]!r}?" if close else ""
        return f"{value!r:.80} is not one of {', '.join(sorted(self.members))[:400]}{known}"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHORT_NAME = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,63}")

STATES = _names(
    "AL AK AZ AR CA CO CT DE DC FL GA HI ID IL IN IA KS KY LA ME MD MA MI MN MS MO MT NE NV NH NJ"
    " NM NY NC ND OH OK OR PA RI SC SD TN TX UT VT VA WA WV WI WY AS GU MP PR VI none"
)
SPONSORS = _names(
    "DoD DOE NASA NIH NSF NIST NOAA USDA VA DHS IC other_federal state foundation industry"
    " foreign internal"
)
INSTRUMENTS = _names("contract subcontract grant cooperative_agreement ota none")
OWNERS = _names(
    "institution DoD DOE NASA IC other_federal state contractor cloud_provider individual"
)
BUYERS = _names("institution DoD other_federal state contractor individual")
TRANSACTIONS = _names("purchase support_contract free_download own_work donation")
ACTIONS = _names(
    "infer evaluate finetune export_output export_weights share_weights retain_weights"
)
MODALITIES = _names(
    "molecule protein nucleic_acid antibody retrosynthesis annotation material text"
)
SUBJECTS = _names(
    "itar bwata_1989 cwcia_1997 military warfare nuclear agriculture medicine basic_research"
)
MARKINGS = _names("CUI ITAR EAR NIH-CA PHI proprietary")
EXPORT_CLASSES = _names("ITAR ECCN EAR99 fundamental_research unreviewed")
SCREEN_CLASSES = _names(
    "cwc1_exact cwc1_family cwc2 cwc3 ag_precursor eccn_1c350 dea_listed select_agent toxin"
    " biorisk similarity alert"
)
PRECISIONS = _names("fp32 fp16 bf16 fp8 int8 int4")

# Modalities whose new material is screened; `finetune` counts by the modality of its set.
SCREENED = _names("molecule protein nucleic_acid antibody retrosynthesis")


def _yes_no(question: str, asked_of: str) -> FactSpec:
    return FactSpec(Kind.BOOL, question, asked_of)


def _one_of(members: frozenset[str], question: str, asked_of: str) -> FactSpec:
    return FactSpec(Kind.ENUM, question, asked_of, members)


def _some_of(members: frozenset[str] | None, question: str, asked_of: str) -> FactSpec:
    return FactSpec(Kind.SET, question, asked_of, members)


def _number(question: str, asked_of: str) -> FactSpec:
    return FactSpec(Kind.INT, question, asked_of)


def _derived(kind: Kind, meaning: str, members: frozenset[str] | None = None) -> FactSpec:
    return FactSpec(kind, meaning, "engine", members, derived=True)


# The closed vocabulary (docs/design/policy.md, 2): another name does not load.
FACTS: Mapping[str, FactSpec] = MappingProxyType(
    {
        "institution.state": _one_of(
            STATES, "In which US state is the institution?", "general_counsel"
        ),
        "institution.public": _yes_no(
            "Is the institution public (state-owned)?", "general_counsel"
        ),
        "institution.state_pack_loaded": _derived(
            Kind.BOOL, "Is a rule pack for the institution's state loaded?"
        ),
        "project.sponsors": _some_of(SPONSORS, "Who pays for the project?", "sponsored_programs"),
        "project.instrument": _one_of(
            INSTRUMENTS, "Under which kind of award does the project run?", "sponsored_programs"
        ),
        "project.federal_funds": _yes_no(
            "Does federal money pay for any part of the project?", "sponsored_programs"
        ),
        "project.award_date": FactSpec(
            Kind.DATE, "On which day was the award made?", "sponsored_programs"
        ),
        "project.active": _yes_no("Is the project active?", "principal_investigator"),
        "project.closed": _yes_no("Is the award closed out?", "sponsored_programs"),
        "person.on_project": _yes_no(
            "Is the person a member of the project?", "principal_investigator"
        ),
        "person.training_current": _yes_no(
            "Is the person's training current on that day?", "security_officer"
        ),
        "person.us_person": _yes_no(
            "Does the export office record the person as a US person?", "export_control"
        ),
        "person.export_licence": _yes_no(
            "Does an export licence or agreement cover the person?", "export_control"
        ),
        "system.owner": _one_of(OWNERS, "Who owns the system?", "security_officer"),
        "system.ic_nss": _yes_no(
            "Is it a national-security system of the intelligence community?", "security_officer"
        ),
        "system.state_business": _yes_no(
            "Is the system a state device or used for state business?", "security_officer"
        ),
        "system.cui_authorised": _yes_no("Is the system authorised for CUI?", "security_officer"),
        "system.in_ssp": _yes_no(
            "Is the system described in the system security plan?", "security_officer"
        ),
        "system.crypto_recorded": _yes_no(
            "Is the status of its cryptographic module recorded?", "security_officer"
        ),
        "bundle.verified": _yes_no(
            "Are the seal and every hash of the bundle verified?", "data_manager"
        ),
        "bundle.manifest_complete": _yes_no(
            "Does the manifest name supplier, licence and origin of every model?", "data_manager"
        ),
        "bundle.provenance_level": _number(
            "Which provenance level (0 to 4) has the weakest model?", "data_manager"
        ),
        "bundle.licence_texts_recorded": _yes_no(
            "Is the text of every licence recorded with its hash?", "data_manager"
        ),
        "bundle.admitted": _yes_no(
            "Was the bundle admitted and installed on this system?", "data_manager"
        ),
        "bundle.licences": _some_of(
            None, "Which licences do the bundle and its bases declare?", "data_manager"
        ),
        "bundle.licences_differ": _derived(
            Kind.BOOL, "Do the licences of the bundle and its bases differ?"
        ),
        "bundle.licence_terms": _derived(
            Kind.SET, "Which licence terms apply together to the bundle?"
        ),
        "bundle.modalities": _some_of(
            MODALITIES, "Which kinds of data does the bundle read or write?", "data_manager"
        ),
        "bundle.precisions": _some_of(
            PRECISIONS, "Which precisions does the bundle hold?", "data_manager"
        ),
        "bundle.tuned_on_nih_ca": _yes_no(
            "Was the model trained on NIH controlled-access data?", "data_manager"
        ),
        "task.action": _one_of(ACTIONS, "What is done with the model?", "principal_investigator"),
        "task.action_allowed": _yes_no(
            "Does the project list this action?", "principal_investigator"
        ),
        "task.modality": _one_of(
            MODALITIES, "Which kind of material does the task make?", "principal_investigator"
        ),
        "task.subjects": _some_of(
            SUBJECTS, "Which restricted subjects does the task touch?", "principal_investigator"
        ),
        "data.markings": _some_of(
            MARKINGS, "Which markings do the input data bear?", "principal_investigator"
        ),
        "data.export_class": _one_of(
            EXPORT_CLASSES, "How has the export office classified the data?", "export_control"
        ),
        "data.export_controlled": _derived(Kind.BOOL, "Are the data export-controlled?"),
        "transaction.buyer": _one_of(
            BUYERS, "Who acquires the model or the service around it?", "sponsored_programs"
        ),
        "transaction.kind": _one_of(
            TRANSACTIONS, "Is it a purchase, a support contract or a download?", "data_manager"
        ),
        "transaction.interconnection_only": _yes_no(
            "Is the contract for interconnection only?", "general_counsel"
        ),
        "transaction.under_existing_contract": _yes_no(
            "Does it run under a contract that existed before?", "general_counsel"
        ),
        "deliverable.to_dod": _yes_no("Is something delivered to DoD?", "principal_investigator"),
        "deliverable.embeds_model_or_output": _yes_no(
            "Does the deliverable contain the model or its output?", "principal_investigator"
        ),
        "performance.dod_contract": _yes_no(
            "Is the model used to perform a DoD contract?", "sponsored_programs"
        ),
        "screen.required": _derived(Kind.BOOL, "Must the task be screened for hazards?"),
        "screen.status": _one_of(
            frozenset({"complete", "incomplete"}), "Did the hazard screen finish?", "hazard_officer"
        ),
        "screen.tier": _number("Which hazard tier did the screen find?", "hazard_officer"),
        "screen.target_tier": _number(
            "Which hazard tier has the target of the synthesis?", "hazard_officer"
        ),
        "screen.classes": _some_of(
            SCREEN_CLASSES, "Which hazard classes did the screen find?", "hazard_officer"
        ),
        "screen.repeated_probing": _yes_no(
            "Has this person met repeated hazard holds?", "hazard_officer"
        ),
        "output.max_sequence_nt": _number(
            "How long is the longest sequence, in nucleotides?", "data_manager"
        ),
        "lists.max_age_days": _derived(Kind.INT, "How old is the oldest list screened against?"),
    }
)

# Where a lineage path may start, and the relations it may walk (docs/design/policy.md, 8).
STARTS = frozenset(
    {"bundle", "base_bundles", "bundle_and_bases", "counterparty", "personnel", "recipient"}
)
MAKER_RELATIONS = frozenset({"developed_by", "codeveloped_by", "fine_tuned_by", "distributed_by"})
PARTY_RELATIONS = frozenset(
    {"same_person_as", "subsidiary_of", "controlled_by", "affiliate_of", "owned_50_by"}
)
RELATIONS = MAKER_RELATIONS | PARTY_RELATIONS | {"affiliated_with"}


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Word the refusal of a name outside the vocabulary, with the nearest one that exists."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"no fact is called {name!r:.80}" + (f"; did you mean {close[0]!r}?" if close else "")
