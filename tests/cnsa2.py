"""Bundles of the profile `cnsa2` for tests: each person has an ML-DSA-87 and a P-384 key."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import bundles
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA87PrivateKey

from bundle import envelope, keys, trust
from bundle.manifest import Manifest
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.write import Member, write_archive

PEOPLE = ("builder", "alice", "bob")


@cache
def pair(name: str) -> tuple[keys.FileSigner, keys.FileSigner]:
    """Return both keys of a person of the cast."""
    seed = hashlib.sha256(f"test key of {name}".encode()).digest()
    point = int.from_bytes(hashlib.sha384(seed).digest()[:47])
    return (
        keys.FileSigner(MLDSA87PrivateKey.from_seed_bytes(seed)),
        keys.FileSigner(ec.derive_private_key(point, ec.SECP384R1())),
    )


def public(name: str) -> list[keys.PublicKeyFile]:
    person, roles = bundles.CAST[name]
    return [
        keys.PublicKeyFile(
            keyid=signer.public_key.keyid,
            person=person,
            public=keys.encode_base64(signer.public_key.public),
            roles=roles,
            scheme=signer.public_key.scheme,
        )
        for signer in pair(name)
    ]


@cache
def make_cnsa2_trust(people: int = 2) -> trust.Trust:
    """Return a trust root of the profile, signed by both keys of its owner."""
    made = trust.new_root(
        public("root"), pair("root"), now=bundles.ENROLLED, people=people, profile="cnsa2"
    )
    for name in PEOPLE:
        made = trust.add_key(made, public(name), pair("root"), now=bundles.ENROLLED)
    return made


def seal_with(*signers: keys.FileSigner):
    """Return a sealer that signs with exactly these keys."""

    def seal(manifest: Manifest) -> envelope.Envelope:
        payload = seal_statement(manifest, builder="ben").to_bytes()
        return envelope.add_signature(envelope.Envelope(payload, PAYLOAD_TYPE, ()), *signers)

    return seal


def everybody() -> list[keys.FileSigner]:
    return [signer for name in PEOPLE for signer in pair(name)]


def make_cnsa2_bundle(
    out: Path,
    *,
    members: list[Member] | None = None,
    signers: list[keys.FileSigner] | None = None,
    **changes: Any,
) -> Manifest:
    return write_archive(
        out,
        bundles.make_release(profile="cnsa2", **changes),
        bundles.make_members() if members is None else members,
        trust_chain=trust.chain_document(make_cnsa2_trust()),
        seal=seal_with(*(everybody() if signers is None else signers)),
    )
