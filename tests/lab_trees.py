"""Trees of a staging host and of a lab, made with the commands themselves, and their releases."""

import contextlib
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bundles

from airgap import cli
from bundle import envelope, keys, trust
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.write import write_archive

SITE = Path(__file__).parent / "data" / "site_demo.toml"  # its legal day is fixed
PEOPLE = (("root", "rita", "root"), ("builder", "ben", "builder"))
PEOPLE += (("alice", "alice", "approver"), ("bob", "bob", "isso"), ("reva", "reva", "revocation"))


def run(*words: object) -> int:
    """Call `airgap` in this process and return its exit status."""
    return cli.invoke([str(word) for word in words])


def make_staging(root: Path) -> Path:
    """Make the keys and the trust root of a staging host."""
    for name, person, role in PEOPLE:
        made = run("keys", "new", name, "--person", person, "--role", role, "--root", root)
        assert made == 0
    assert run("trust", "init", "--root", root) == 0
    for name, _, _ in PEOPLE[1:]:
        assert run("trust", "add", root / "keys" / f"{name}.pub.json", "--root", root) == 0
    return root


def make_lab(staging: Path, root: Path) -> Path:
    """Make the tree of a lab that trusts the staging host's people."""
    trusted = trust.load_trust(staging / "trust")
    root.mkdir(parents=True)
    words = ("--from", staging / "trust" / "root.json", "--fingerprint", trusted.fingerprint)
    assert run("trust", "init", *words, "--root", root) == 0
    shutil.copyfile(SITE, root / "site.toml")
    return root


def make_sealed(staging: Path, path: Path, *, epoch: int = 1, line: str = "tiny-line") -> Path:
    """Write a sealed release of the project's own model, which the packaged rules admit."""

    def seal(manifest):
        payload = seal_statement(manifest, builder="ben").to_bytes()
        made = envelope.Envelope(payload, PAYLOAD_TYPE, ())
        for name in ("builder", "alice", "bob"):
            signer = keys.load_signer(staging / "keys" / f"{name}.pem")
            made = envelope.add_signature(made, signer)
        return made

    licence = {"spdx": "Apache-2.0", "text_digest": "sha256:" + "1" * 64, "status": "declared"}
    found = {"spdx": "Apache-2.0", "place": "LICENSE", "sha256": "1" * 64, "status": "verified"}
    model = {
        "id": "logos-ref-tiny",
        "source": "local:logos-ref-tiny",
        "licence": licence,
        "licences_found": [found],
    }
    now = datetime.now(UTC).replace(microsecond=0)  # not before the keys were enrolled
    release = bundles.make_release(
        model=model,
        created=now,
        not_before=now,
        expires=now + timedelta(days=30),
        version=f"{epoch}.0",
        epoch=epoch,
        bundle_id=line,
        name=line,
    )
    members = bundles.make_members(bundles.make_weights(seed=epoch), model="logos-ref-tiny")
    chain = trust.chain_document(trust.load_trust(staging / "trust"))
    write_archive(path, release, members, trust_chain=chain, seal=seal)
    return path


@contextlib.contextmanager
def short_folder():
    """Yield a folder whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory(
        prefix="lab-", dir="/var/tmp", ignore_cleanup_errors=True
    ) as it:
        yield Path(it)
