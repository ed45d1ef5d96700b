"""A private Sigstore, made from nothing: certificate authority, CT key, log, timestamp authority.

Signs statements and artifacts the way the public services do, so that the real verifier accepts
them under its own trusted root. Every key is thrown away. The timestamp authority is `openssl ts`.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from bundle.envelope import pae

IN_TOTO = "application/vnd.in-toto+json"
ISSUER = "https://oidc.lab.example"
WHO = "publisher@lab.example"
LOG = "rekor.lab.example"
_ISSUER_V1 = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_ISSUER_V2 = ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
_SCTS = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_SHA256 = hashes.SHA256()
_DAY = dt.timedelta(days=1)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def new_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve or ec.SECP256R1())


def private_pem(key: Any) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: Any) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def key_usage(**true: bool) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: true.get(name, False) for name in USAGES})


def common_name(text: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, text),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "lab"),
        ]
    )


def make_ca(key, name: str, *, start: dt.datetime, end: dt.datetime) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(common_name(name))
        .issuer_name(common_name(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, _SHA256)
    )


def make_leaf(key, ca_key, ca_name: str, who: str, *, start, end, usage=None) -> x509.Certificate:
    """Make a plain signing certificate of an institution's authority."""
    return (
        x509.CertificateBuilder()
        .subject_name(common_name(who))
        .issuer_name(common_name(ca_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage or key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(who)]), critical=False)
        .sign(ca_key, _SHA256)
    )


def _spki(key) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _key_id(key) -> bytes:
    return hashlib.sha256(_spki(key)).digest()


def _sign(key, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(_SHA256))


@dataclass
class PrivateSigstore:
    """One instance. `now` is when everything it signs is signed."""

    now: dt.datetime
    ca: Any = field(default_factory=new_key)
    ct: Any = field(default_factory=new_key)
    log: Any = field(default_factory=new_key)
    tsa: Path | None = None  # folder of the timestamp authority, once it is made

    def identity(self, who: str = WHO, issuer: str = ISSUER) -> tuple[Any, x509.Certificate]:
        """Return a fresh key and its short-lived certificate, with a signed certificate stamp."""
        key = new_key()
        serial = x509.random_serial_number()
        san = x509.UniformResourceIdentifier(who) if "://" in who else x509.RFC822Name(who)

        def make(extra):
            builder = (
                x509.CertificateBuilder()
                .subject_name(x509.Name([]))
                .issuer_name(common_name("lab-ca"))
                .public_key(key.public_key())
                .serial_number(serial)
                .not_valid_before(self.now - dt.timedelta(minutes=1))
                .not_valid_after(self.now + dt.timedelta(minutes=10))
                .add_extension(key_usage(digital_signature=True), critical=True)
                .add_extension(
                    x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
                )
                .add_extension(
                    x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
                )
                .add_extension(
                    x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca.public_key()),
                    critical=False,
                )
                .add_extension(x509.SubjectAlternativeName([san]), critical=True)
                .add_extension(
                    x509.UnrecognizedExtension(_ISSUER_V1, issuer.encode()), critical=False
                )
                .add_extension(
                    x509.UnrecognizedExtension(
                        _ISSUER_V2, b"\x0c" + bytes([len(issuer)]) + issuer.encode()
                    ),
                    critical=False,
                )
            )
            if extra is not None:
                builder = builder.add_extension(extra, critical=False)
            return builder.sign(self.ca, _SHA256)

        tbs = make(None).tbs_certificate_bytes
        millis = int(self.now.timestamp() * 1000)
        body = _key_id(self.ca) + len(tbs).to_bytes(3, "big") + tbs
        stamp = _sign(self.ct, struct.pack("!BBQH", 0, 0, millis, 1) + body + struct.pack("!H", 0))
        sct = b"\0" + _key_id(self.ct) + struct.pack("!QH", millis, 0)
        sct += b"\x04\x03" + struct.pack("!H", len(stamp)) + stamp
        listed = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        length = bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])
        return key, make(x509.UnrecognizedExtension(_SCTS, b"\x04" + length + listed))

    def attest(self, statement: dict[str, Any], **who: str) -> dict[str, Any]:
        """Return a Sigstore bundle around a DSSE envelope with the statement."""
        key, certificate = self.identity(**who)
        payload = rfc8785.dumps(statement)
        signature = b64(_sign(key, pae(IN_TOTO, payload)))
        envelope = {
            "payload": b64(payload),
            "payloadType": IN_TOTO,
            "signatures": [{"sig": signature}],
        }
        pem = b64(certificate.public_bytes(Encoding.PEM))
        body = {
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": _hash(json.dumps(envelope).encode()),
                "payloadHash": _hash(payload),
                "signatures": [{"signature": signature, "verifier": pem}],
            },
        }
        return self._bundle(
            certificate, body, {"dsseEnvelope": envelope}, base64.b64decode(signature)
        )

    def sign(self, data: bytes, **who: str) -> dict[str, Any]:
        """Return a Sigstore bundle over an artifact."""
        key, certificate = self.identity(**who)
        signature = _sign(key, data)
        pem = b64(certificate.public_bytes(Encoding.PEM))
        body = {
            "apiVersion": "0.0.1",
            "kind": "hashedrekord",
            "spec": {
                "data": {"hash": _hash(data)},
                "signature": {"content": b64(signature), "publicKey": {"content": pem}},
            },
        }
        digest = {"algorithm": "SHA2_256", "digest": b64(hashlib.sha256(data).digest())}
        content = {"messageDigest": digest, "signature": b64(signature)}
        return self._bundle(certificate, body, {"messageSignature": content}, signature)

    def trusted_root(self) -> dict[str, Any]:
        """Return the document that a verifier pins."""
        valid = {"start": (self.now - _DAY).strftime("%Y-%m-%dT%H:%M:%SZ")}

        def entry(url: str, key) -> dict[str, Any]:
            public = {
                "rawBytes": b64(_spki(key)),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": valid,
            }
            return {
                "baseUrl": url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": public,
                "logId": {"keyId": b64(_key_id(key))},
            }

        def authority(name: str, uri: str, chain: list[bytes]) -> dict[str, Any]:
            return {
                "subject": {"organization": "lab", "commonName": name},
                "uri": uri,
                "certChain": {"certificates": [{"rawBytes": b64(der)} for der in chain]},
                "validFor": valid,
            }

        ca = make_ca(self.ca, "lab-ca", start=self.now - _DAY, end=self.now + 3650 * _DAY)
        stamps = []
        if self.tsa is not None:
            chain = [(self.tsa / f"{name}.der").read_bytes() for name in ("tsa", "tsa-ca")]
            stamps = [authority("lab-tsa", "https://tsa.lab.example", chain)]
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [entry(f"https://{LOG}", self.log)],
            "certificateAuthorities": [
                authority("lab-ca", "https://fulcio.lab.example", [ca.public_bytes(Encoding.DER)])
            ],
            "ctlogs": [entry("https://ct.lab.example", self.ct)],
            "timestampAuthorities": stamps,
        }

    def trust_config(self) -> dict[str, Any]:
        """Return the form in which client tools take a trusted root."""
        start = {"start": (self.now - _DAY).strftime("%Y-%m-%dT%H:%M:%SZ")}

        def service(url: str) -> dict[str, Any]:
            return {"url": url, "majorApiVersion": 1, "validFor": start, "operator": "lab"}

        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": self.trusted_root(),
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [service("https://fulcio.lab.example")],
                "oidcUrls": [service(ISSUER)],
                "rekorTlogUrls": [service(f"https://{LOG}")],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaUrls": [],
                "tsaConfig": {"selector": "ANY"},
            },
        }

    def make_tsa(self, folder: Path) -> None:
        """Make a timestamp authority in `folder`; its answers are those of `openssl ts`."""
        root, leaf = new_key(), new_key()
        start, end = self.now - _DAY, self.now + 3650 * _DAY
        ca = make_ca(root, "lab-tsa-ca", start=start, end=end)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(common_name("lab-tsa"))
            .issuer_name(common_name("lab-tsa-ca"))
            .public_key(leaf.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True
            )
            .sign(root, _SHA256)
        )
        folder.mkdir(parents=True, exist_ok=True)
        for name, cert in (("tsa", certificate), ("tsa-ca", ca)):
            (folder / f"{name}.der").write_bytes(cert.public_bytes(Encoding.DER))
            (folder / f"{name}.pem").write_bytes(cert.public_bytes(Encoding.PEM))
        (folder / "tsa.key").write_bytes(private_pem(leaf))
        (folder / "serial").write_text("01\n")
        (folder / "tsa.conf").write_text(
            "[tsa]\ndefault_tsa = one\n[one]\n"
            f"dir = {folder}\nserial = {folder}/serial\nsigner_cert = {folder}/tsa.pem\n"
            f"certs = {folder}/tsa-ca.pem\nsigner_key = {folder}/tsa.key\n"
            "signer_digest = sha256\ndefault_policy = 1.2.3.4.1\ndigests = sha256\n"
            "accuracy = secs:1\nordering = yes\ntsa_name = no\ness_cert_id_chain = no\n"
            "ess_cert_id_alg = sha256\n"
        )
        self.tsa = folder

    def _stamp(self, signature: bytes) -> list[dict[str, str]]:
        """Return the timestamp over a signature; of this moment, not of `now`."""
        if self.tsa is None:
            return []
        (self.tsa / "data").write_bytes(signature)
        query, reply = self.tsa / "q.tsq", self.tsa / "r.tsr"
        for argv in (
            ["-query", "-data", self.tsa / "data", "-sha256", "-cert", "-out", query],
            ["-reply", "-config", self.tsa / "tsa.conf", "-queryfile", query, "-out", reply],
        ):
            subprocess.run(["openssl", "ts", *map(str, argv)], check=True, capture_output=True)
        return [{"signedTimestamp": b64(reply.read_bytes())}]

    def _bundle(self, certificate, body, content, signature) -> dict[str, Any]:
        raw = rfc8785.dumps(body)
        root, when = hashlib.sha256(b"\0" + raw).digest(), int(self.now.timestamp())
        promise = {
            "body": b64(raw),
            "integratedTime": when,
            "logID": _key_id(self.log).hex(),
            "logIndex": 0,
        }
        note = f"{LOG} - 1\n1\n{b64(root)}\n"
        line = b64(_key_id(self.log)[:4] + _sign(self.log, note.encode()))
        entry = {
            "logIndex": "0",
            "logId": {"keyId": b64(_key_id(self.log))},
            "kindVersion": {"kind": body["kind"], "version": body["apiVersion"]},
            "integratedTime": str(when),
            "inclusionPromise": {
                "signedEntryTimestamp": b64(_sign(self.log, rfc8785.dumps(promise)))
            },
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": b64(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": f"{note}\n\u2014 {LOG} {line}\n"},
            },
            "canonicalizedBody": b64(raw),
        }
        material: dict[str, Any] = {
            "certificate": {"rawBytes": b64(certificate.public_bytes(Encoding.DER))},
            "tlogEntries": [entry],
        }
        stamps = self._stamp(signature)
        if stamps:
            material["timestampVerificationData"] = {"rfc3161Timestamps": stamps}
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": material,
            **content,
        }


def _hash(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def oms_statement(files: dict[str, str], name: str = "model", **changes: Any) -> dict[str, Any]:
    """Return a model-signing statement over path and SHA-256."""
    ordered = sorted(files.items())
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in ordered)).hexdigest()
    how = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": [],
        **changes,
    }
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": how,
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digest} for path, digest in ordered
            ],
        },
    }


def slsa_statement(files: dict[str, str], builder: str, source: str) -> dict[str, Any]:
    """Return SLSA provenance of the files."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(files.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://lab.example/build/v1",
                "externalParameters": {},
                "resolvedDependencies": [{"uri": source, "digest": {"gitCommit": "0" * 40}}],
            },
            "runDetails": {"builder": {"id": builder}},
        },
    }


def envelope_by(key, statement: dict[str, Any], algorithm=None) -> dict[str, Any]:
    """Return a plain DSSE envelope by a key."""
    payload = rfc8785.dumps(statement)
    message = pae(IN_TOTO, payload)
    signature = key.sign(message, ec.ECDSA(algorithm or _SHA256))
    return {
        "payload": b64(payload),
        "payloadType": IN_TOTO,
        "signatures": [{"keyid": "", "sig": b64(signature)}],
    }
