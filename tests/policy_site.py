"""Trees with signed files of rules and lists, for tests."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import bundles
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from airgap import site_rules
from airgap.gate import TaskFacts, decide_use, registry_facts
from bundle import keys, trust
from policy.approvals import Approvals

ISSUED = datetime(2026, 11, 20, tzinfo=UTC)


def enrol(made: trust.Trust, *people: str, role: str = "policy") -> trust.Trust:
    """Enrol people with one key of the same name each."""
    for name in people:
        key = bundles.signer(name).public_key
        public = keys.PublicKeyFile(
            keyid=key.keyid,
            person=name,
            public=keys.encode_base64(key.public),
            roles=(role,),
            scheme=key.scheme,
        )
        made = trust.add_key(made, public, [bundles.signer("root")], now=bundles.ENROLLED)
    return made


def new_trust(*people: str) -> trust.Trust:
    """A trust root in which these people have the role `policy`, and tom another one."""
    first = trust.new_root(bundles.public("root"), bundles.signer("root"), now=bundles.ENROLLED)
    return enrol(enrol(first, *people), "tom", role="approver")


def put_key(path: Path, name: str) -> Path:
    """Write the private key of that test person, for commands that sign."""
    seed = hashlib.sha256(f"test key of {name}".encode()).digest()
    path.write_bytes(
        Ed25519PrivateKey.from_private_bytes(seed).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
    )
    path.chmod(0o600)
    return path


TRUST = new_trust("pat", "polly")


def put_signed(root: Path, name: str, content: bytes, who: str = "pat") -> Path:
    """Write `<root>/policy/NAME` with its signature, and the trust root where there is none."""
    if not (root / "trust").exists():
        trust.save_trust(TRUST, root / "trust")
    path = root / "policy" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    signed = site_rules.sign_file(content, name, bundles.signer(who), author=None, issued=ISSUED)
    path.with_name(name + site_rules.ENDING).write_bytes(signed.to_bytes())
    return path


def deciding(site, rules, bundle, *, day=None):
    """The broker's question to the rules, for ada and the reference model, installed and admitted.

    `day` is the date of the law and the moment of the decision; default: those of each question.
    """

    def use_policy(job, *, modality, screen, released=()):
        now = datetime.now(UTC)
        as_of, known_at = day or (site.legal_day(now).as_of, now)
        return decide_use(
            site,
            rules,
            registry_facts("logos-ref-tiny", rules.registry),
            bundle_digest=bundle,
            person="ada",
            project=job.project,
            task=TaskFacts(job.task, modality),
            screen=screen,
            as_of=as_of,
            known_at=known_at,
            admitted=True,
            hazard_holds=0,
            approvals=Approvals(released),
        )

    return use_policy
