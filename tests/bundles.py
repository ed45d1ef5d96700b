"""Small real bundles for tests: fixed keys, fixed times, a payload that the scan accepts."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bundle import archive, envelope, keys, merkle, trust
from bundle.canonical import canonical_json
from bundle.graphs import FileRef, Graph, Graphs, canonical_graphs
from bundle.manifest import CHUNK_SIZE, Manifest, ModelEntry, Release
from bundle.source import PlainFile
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.write import Member, write_archive

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ENROLLED = NOW - timedelta(days=30)
CREATED = NOW - timedelta(days=1)
MODEL = "tiny"
WEIGHTS = 4 * 1024 * 1024 + 65536  # bytes: more than one chunk
VOCABULARY = ["<pad>", "<unk>", "<bos>", "<eos>", "<MoleculeS>", "<MoleculeE>", "C", "O"]

# name -> person, roles
CAST = {
    "root": ("rita", ("root",)),
    "builder": ("ben", ("builder",)),
    "alice": ("alice", ("approver",)),
    "bob": ("bob", ("isso", "approver")),
    "alice2": ("alice", ("approver",)),
    "carol": ("carol", ("builder", "approver")),
    "mallory": ("mallory", ("approver",)),  # never enrolled
}


def signer(name: str) -> keys.FileSigner:
    seed = hashlib.sha256(f"test key of {name}".encode()).digest()
    return keys.FileSigner(Ed25519PrivateKey.from_private_bytes(seed))


def public(name: str) -> keys.PublicKeyFile:
    person, roles = CAST[name]
    key = signer(name).public_key
    return keys.PublicKeyFile(
        keyid=key.keyid,
        person=person,
        public=keys.encode_base64(key.public),
        roles=roles,
        scheme=key.scheme,
    )


def make_trust(*names: str, people: int = 2, required_roles: tuple[str, ...] = ()) -> trust.Trust:
    names = names or ("builder", "alice", "bob", "alice2", "carol")
    made = trust.new_root(
        public("root"), signer("root"), now=ENROLLED, people=people, required_roles=required_roles
    )
    for name in names:
        made = trust.add_key(made, public(name), [signer("root")], now=ENROLLED)
    return made


# -- payload ----------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(raw)) + raw


def _value(name: str, elements: int) -> bytes:
    shape = _bytes(2, _bytes(1, _number(1, elements)))
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, 1) + shape))


def make_onnx(external: str = "model.onnx_data", length: int = WEIGHTS) -> bytes:
    """Encode a graph `logits = x + w` whose weight lies in another file."""
    elements = length // 4
    node = _bytes(1, "x") + _bytes(1, "w") + _bytes(2, "logits") + _bytes(4, "Add")
    pairs = {"location": external, "offset": "0", "length": str(length)}
    tensor = (
        _number(1, elements)
        + _number(2, 1)
        + _bytes(8, "w")
        + b"".join(_bytes(13, _bytes(1, k) + _bytes(2, v)) for k, v in pairs.items())
        + _number(14, 1)
    )
    graph = (
        _bytes(1, node)
        + _bytes(2, "g")
        + _bytes(5, tensor)
        + _bytes(11, _value("x", elements))
        + _bytes(12, _value("logits", elements))
    )
    return _number(1, 9) + _bytes(7, graph) + _bytes(8, _bytes(1, "") + _number(2, 17))


def make_tokenizer() -> bytes:
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {text: number for number, text in enumerate(VOCABULARY)},
                "unk_token": "<unk>",
            },
        }
    ).encode()


def size_of(source: bytes | Path) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def sha_of(source: bytes | Path) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_payload(weights: bytes | Path, model: str = MODEL) -> dict[str, tuple[str, bytes | Path]]:
    """Return role and content by plain name."""
    onnx, tokenizer = make_onnx(length=size_of(weights)), make_tokenizer()
    sha = {n: hashlib.sha256(c).hexdigest() for n, c in (("o", onnx), ("t", tokenizer))}
    graphs = Graphs(
        model=model,
        architecture="llama",
        vocab_size=len(VOCABULARY),
        layers=1,
        kv_heads=1,
        head_dim=4,
        max_context=64,
        bos_id=2,
        eos_ids=(3,),
        pad_id=0,
        unk_id=1,
        reference_model=True,
        scientific_use=False,
        tokenizer=FileRef(path="tokenizer.json", sha256=sha["t"]),
        tags={"<MoleculeS>": 4, "<MoleculeE>": 5},
        graphs=(
            Graph(
                name="reference",
                precision="fp32",
                path="model.onnx",
                sha256=sha["o"],
                external=(FileRef(path="model.onnx_data", sha256=sha_of(weights)),),
                inputs=("x",),
                outputs=("logits",),
                kv_layout="BHSD",
                interface="past",
            ),
        ),
    )
    return {
        "config.json": ("config", b'{"model_type": "llama"}'),
        "graphs.json": ("graphs", canonical_graphs(graphs)),
        "model.onnx": ("onnx", onnx),
        "model.onnx_data": ("external-data", weights),
        "tokenizer.json": ("tokenizer", tokenizer),
    }


def make_weights(size: int = WEIGHTS, seed: int = 0) -> bytes:
    block = hashlib.shake_256(b"%d" % seed).digest(65536)
    return (block * (size // len(block) + 1))[:size]


def make_bom(payload: list[Member]) -> bytes:
    files = [
        {
            "type": "file",
            "name": member.path,
            "hashes": [{"alg": "SHA-256", "content": sha_of(member.source)}],
        }
        for member in payload
    ]
    return canonical_json({"bomFormat": "CycloneDX", "specVersion": "1.7", "components": files})


def make_members(
    weights: bytes | Path | None = None, extra: tuple[Member, ...] = (), model: str = MODEL
) -> list[Member]:
    weights = make_weights() if weights is None else weights
    found = [
        Member(f"payload/{model}/{name}", content, role)
        for name, (role, content) in make_payload(weights, model).items()
    ]
    found += [
        Member("META/sbom/bom.cdx.json", make_bom(found), "sbom", "application/json"),
        Member("META/report.json", canonical_json({"findings": []}), "report", "application/json"),
        Member("META/evidence/pins.sha256", b"pins\n", "evidence", "text/plain"),
        Member("META/vectors/parity.json", canonical_json({"prompts": []}), "vectors"),
    ]
    return [*found, *extra]


RELEASE: dict[str, Any] = {
    "bundle_id": "tiny-line",
    "name": "tiny",
    "version": "1.0",
    "created": CREATED,
    "not_before": CREATED,
    "expires": NOW + timedelta(days=365),
    "epoch": 1,
}
MODEL_FACTS: dict[str, Any] = {
    "id": MODEL,
    "source": "local:tiny",
    "revision": "r1",
    "provenance_level": "L1",
    "precisions": ["fp32"],
    "licence": {"spdx": "Apache-2.0", "status": "declared"},
    "supplier": {"legal_name": "airgap project", "jurisdiction": "none", "status": "declared"},
    "modalities": ["molecule"],
    "intended_use": "tests",
    "reference_model": True,
    "scientific_use": False,
}


def make_release(**changes: Any) -> Release:
    model = {**MODEL_FACTS, **changes.pop("model", {})}
    entry = ModelEntry.model_validate_json(json.dumps(model))
    return Release(**{**RELEASE, "models": (entry,), **changes})


def seal_with(*names: str, builder: str = "ben", attested: bool = False):
    """Return a sealer: the first name is the builder's key, the rest approve."""

    def seal(manifest: Manifest) -> envelope.Envelope:
        payload = seal_statement(manifest, builder=builder, attested=attested).to_bytes()
        made = envelope.Envelope(payload, PAYLOAD_TYPE, ())
        for name in names:
            made = envelope.add_signature(made, signer(name))
        return made

    return seal


def make_bundle(
    out: Path,
    *,
    roots: trust.Trust | None = None,
    signers: tuple[str, ...] = ("builder", "alice", "bob"),
    members: list[Member] | None = None,
    progress: Any = None,
    kept: Any = None,
    attested: bool = False,
    **changes: Any,
) -> Manifest:
    return write_archive(
        out,
        make_release(**changes),
        make_members() if members is None else members,
        trust_chain=trust.chain_document(roots or make_trust()),
        seal=seal_with(*signers, attested=attested),
        progress=progress,
        kept=kept,
    )


# -- forging ----------------------------------------------------------------------------------


@dataclass
class Forge:
    """A bundle taken apart, to be altered and put together again, re-treed and re-signed."""

    trust: bytes
    manifest: dict[str, Any]
    body: bytearray
    signers: tuple[str, ...] = ("builder", "alice", "bob")
    builder: str = "ben"
    raw_manifest: bytes | None = None
    leaves: list[bytes] | None = None
    statement: dict[str, Any] | None = None

    @classmethod
    def of(cls, raw: bytes) -> Forge:
        with tempfile.NamedTemporaryFile(buffering=0) as stream:
            stream.write(raw)
            source = PlainFile(Path(stream.name))
            head = archive.read_head(source)
            source.close()
        return cls(head.trust, json.loads(head.manifest), bytearray(raw[head.body_start :]))

    def true_leaves(self) -> list[bytes]:
        size = CHUNK_SIZE
        return [
            merkle.leaf_hash(bytes(self.body[i : i + size])) for i in range(0, len(self.body), size)
        ]

    def sealed_manifest(self) -> dict[str, Any]:
        """Return the manifest with the true facts of the body as it stands."""
        leaves = self.true_leaves()
        facts = {"root": merkle.root(leaves).hex(), "leaves": len(leaves), "size": len(self.body)}
        self.manifest["body"] = {**self.manifest["body"], **facts}
        return self.manifest

    def assemble(self) -> bytes:
        raw = self.raw_manifest or canonical_json(self.sealed_manifest())
        payload = canonical_json(self.statement or self.make_statement(raw))
        made = envelope.Envelope(payload, PAYLOAD_TYPE, ())
        for name in self.signers:
            made = envelope.add_signature(made, signer(name))
        leaves = self.leaves if self.leaves is not None else self.true_leaves()
        head = archive.head_bytes(made.to_padded(), self.trust, raw, b"".join(leaves))
        return head + bytes(self.body)

    def make_statement(self, raw: bytes) -> dict[str, Any]:
        get = self.manifest.get
        report = next(
            (e["sha256"] for e in get("files", []) if e.get("path") == "META/report.json"), "0" * 64
        )
        return {
            "_type": "https://in-toto.io/Statement/v1",
            "predicateType": "https://airgap.invalid/seal/v1",
            "subject": [
                {
                    "name": "META/manifest.json",
                    "digest": {"sha256": hashlib.sha256(raw).hexdigest()},
                },
                {"name": "body", "digest": {"rfc6962-sha256": self.manifest["body"]["root"]}},
            ],
            "predicate": {
                "format": "airgap-seal/1",
                "profile": get("profile", "default"),
                "bundle_id": get("bundle_id"),
                "epoch": get("epoch"),
                "created": get("created"),
                "not_before": get("not_before"),
                "expires": get("expires"),
                "body_size": self.manifest["body"]["size"],
                "builder": self.builder,
                "policy_pack_digests": [],
                "report_digest": f"sha256:{report}",
            },
        }
