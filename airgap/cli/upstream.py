"""The options that say what a publisher signed about the weights, and whom this site believes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from airgap.cli import wheels

if TYPE_CHECKING:
    from bundle.evidence.levels import Kind
    from bundle.staging.upstream import Upstream

ModelSignatures = Annotated[
    list[Path] | None,
    typer.Option("--model-signature", help="OpenSSF model signature (model.sig) over the files."),
]
SigstoreBundles = Annotated[
    list[Path] | None,
    typer.Option("--sigstore", help="Sigstore bundle over a file, or an attestation about files."),
]
Checksums = Annotated[
    list[Path] | None,
    typer.Option(
        "--checksums", help="Publisher's SHA256SUMS; its signature lies beside it (.sig)."
    ),
]
Provenances = Annotated[
    list[Path] | None,
    typer.Option("--provenance", help="Signed SLSA provenance: what built the files, from what."),
]
SignerKeys = Annotated[
    list[Path] | None, typer.Option("--signer-key", help="Publisher's public key, PEM.")
]
SignerAuthorities = Annotated[
    list[Path] | None, typer.Option("--signer-ca", help="Publisher's certificate authority, PEM.")
]
SignerChannel = Annotated[
    str | None,
    typer.Option("--signer-channel", help="How that key or authority came here, in words."),
]
SignerIdentities = Annotated[
    list[str] | None,
    typer.Option("--signer-identity", help="The signer's name in the certificate (SAN), exact."),
]
SignerIssuer = Annotated[
    str | None,
    typer.Option("--signer-issuer", help="Who vouched for that identity (OIDC issuer), exact."),
]
TrustedRoot = Annotated[
    Path | None,
    typer.Option("--trusted-root", help="Sigstore's trusted_root.json, pinned by this site."),
]
BuilderId = Annotated[
    str | None, typer.Option("--builder-id", help="The build service that provenance must name.")
]
BuilderSource = Annotated[
    str | None, typer.Option("--builder-source", help="The source that provenance must name.")
]
Publishers = Annotated[
    Path | None,
    typer.Option("--publishers", help="TOML file of this site: keys, identities and builders."),
]


@dataclass(frozen=True)
class Publisher:
    """Evidence of the publisher, and the keys, authorities and identities that count."""

    model_signature: ModelSignatures = None
    sigstore: SigstoreBundles = None
    checksums: Checksums = None
    provenance: Provenances = None
    signer_key: SignerKeys = None
    signer_ca: SignerAuthorities = None
    signer_channel: SignerChannel = None
    signer_identity: SignerIdentities = None
    signer_issuer: SignerIssuer = None
    trusted_root: TrustedRoot = None
    builder_id: BuilderId = None
    builder_source: BuilderSource = None
    publishers: Publishers = None

    def read(self) -> Upstream:
        """Read the evidence, and whom to believe."""
        with wheels.staging():
            from bundle.evidence.anchors import load_anchors
            from bundle.staging.upstream import Upstream, anchors_of, read_items
        anchors = anchors_of(
            keys=self.signer_key or (),
            authorities=self.signer_ca or (),
            channel=self.signer_channel,
            identities=self.signer_identity or (),
            issuer=self.signer_issuer,
            trusted_root=self.trusted_root,
            builder=self.builder_id,
            source=self.builder_source,
        )
        if self.publishers is not None:
            anchors = load_anchors(self.publishers).joined(anchors)
        given: dict[Kind, list[Path] | None] = {
            "oms": self.model_signature,
            "sigstore": self.sigstore,
            "checksums": self.checksums,
            "slsa": self.provenance,
        }
        named = [(kind, path) for kind, paths in given.items() for path in paths or ()]
        return Upstream(read_items(named), anchors)
