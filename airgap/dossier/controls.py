"""Controls of NIST SP 800-171 that evidence of this product supports (docs/design/policy.md, 12).

Identifiers of revision 2, with those of revision 3 beside them; titles are left to the publication.
Who has to act is stated by row. A count says how much evidence there is, never that it is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["inherited", "shared", "customer"]

FAMILIES: Mapping[str, str] = {
    "3.1": "03.01",
    "3.3": "03.03",
    "3.4": "03.04",
    "3.5": "03.05",
    "3.8": "03.08",
    "3.12": "03.12 and 03.15",
    "3.13": "03.13",
    "3.14": "03.14",
    "r3 only": "03.17",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: what is emitted, how it is counted, and whose part the rest is."""

    family: str
    r2: tuple[str, ...]
    r3: tuple[str, ...]
    evidence: str
    kinds: tuple[str, ...]
    part: Part
    rest: str
    """What stays with the institution."""

    def count(self, kinds: Mapping[str, int]) -> int:
        """Count the records of this row's kinds; a kind stands for its group as well."""
        return sum(
            number
            for kind, number in kinds.items()
            if any(kind == each or kind.startswith(f"{each}.") for each in self.kinds)
        )


ROWS: tuple[Row, ...] = (
    Row(
        "3.1",
        ("3.1.1", "3.1.2"),
        ("03.01.01", "03.01.02"),
        "table of users, roles and projects (site.toml); a decision record for each request",
        ("inference", "denial"),
        "shared",
        "accounts and their review",
    ),
    Row(
        "3.1",
        ("3.1.3",),
        ("03.01.03",),
        "markings of the input against the project in each decision; probe of the sealed process",
        ("enclave.seal", "denial"),
        "shared",
        "marking of data; flow outside this program",
    ),
    Row(
        "3.1",
        ("3.1.4",),
        ("03.01.04",),
        "distinct submitter and approvers in each signed approval and release",
        ("admin.approval", "admin.hold"),
        "shared",
        "who holds which role",
    ),
    Row(
        "3.1",
        ("3.1.5", "3.1.7"),
        ("03.01.05", "03.01.07"),
        "records of privileged acts: install, trust, policy, approval, release, keys",
        ("admin", "policy.load"),
        "shared",
        "privileges of the operating system",
    ),
    Row(
        "3.3",
        ("3.3.1", "3.3.2"),
        ("03.03.01", "03.03.02", "03.03.03"),
        "closed list of event kinds; each record names one person",
        ("inference", "denial", "admin", "login"),
        "shared",
        "logs of the host",
    ),
    Row(
        "3.3",
        ("3.3.3", "3.3.5", "3.3.6"),
        ("03.03.01", "03.03.05", "03.03.06"),
        "reports on demand; verification with public keys; exports",
        ("export", "verify.result"),
        "shared",
        "reviews, and who does them",
    ),
    Row(
        "3.3",
        ("3.3.4",),
        ("03.03.04",),
        "a log that cannot be written admits no work; halts and recoveries are records",
        ("halt", "recovery"),
        "shared",
        "reaction to an alert",
    ),
    Row(
        "3.3",
        ("3.3.7",),
        ("03.03.07",),
        "two clocks and a sequence in each record; steps of the clock are records",
        ("clock.step", "boot"),
        "shared",
        "the time source of the host",
    ),
    Row(
        "3.3",
        ("3.3.8", "3.3.9"),
        ("03.03.08",),
        "hash chain, signed heads, receipts, a verifier that needs public keys alone",
        ("boot", "key.rotate"),
        "shared",
        "where keys, heads and receipts are kept",
    ),
    Row(
        "3.4",
        ("3.4.1", "3.4.2", "3.4.3", "3.4.4", "3.4.5"),
        ("03.04.01", "03.04.02", "03.04.03", "03.04.04", "03.04.05"),
        "signed manifest with hashes; versions of packs in each decision; signed approvals",
        ("admission", "admin.install", "admin.update", "admin.rollback", "admin.remove"),
        "shared",
        "configuration of the host",
    ),
    Row(
        "3.4",
        ("3.4.6", "3.4.7", "3.4.8"),
        ("03.04.06", "03.04.08"),
        "admission by exception: without a permit rule nothing enters and nothing runs",
        ("admission", "model.load"),
        "shared",
        "the rules that the site adds",
    ),
    Row(
        "3.5",
        ("3.5.1", "3.5.2"),
        ("03.05.01", "03.05.02"),
        "uid of the kernel in each record",
        ("inference", "denial", "login"),
        "customer",
        "identity provider and authenticators",
    ),
    Row(
        "3.8",
        ("3.8.3", "3.8.4", "3.8.5", "3.8.6", "3.8.7"),
        ("03.08.03", "03.08.04"),
        "receipts of imports and exports with hashes",
        ("admin.install", "export"),
        "shared",
        "handling of media",
    ),
    Row(
        "3.12",
        ("3.12.2", "3.12.4"),
        ("03.12.02", "03.15.02"),
        "rows for a plan of action; statements for a system security plan",
        (),
        "shared",
        "the plan, and its approval",
    ),
    Row(
        "3.13",
        ("3.13.1", "3.13.4", "3.13.6", "3.13.11", "3.13.16"),
        ("03.13.01", "03.13.04", "03.13.06", "03.13.11", "03.13.08"),
        "seal and probe of each process; no network by construction; record of the crypto module",
        ("enclave.seal", "egress.probe"),
        "shared",
        "the boundary of the host",
    ),
    Row(
        "3.14",
        ("3.14.1", "3.14.3", "3.14.6", "3.14.7"),
        ("03.14.01", "03.14.03", "03.14.06"),
        "weights hashed before each load; age of lists; holds and incidents",
        ("model.load", "enclave.incident", "denial"),
        "shared",
        "advisories and their tracking",
    ),
    Row(
        "r3 only",
        (),
        ("03.17.01", "03.17.02", "03.17.03"),
        "register of models, makers and their lineage with citations",
        ("admission",),
        "shared",
        "the plan for supply-chain risk",
    ),
)
