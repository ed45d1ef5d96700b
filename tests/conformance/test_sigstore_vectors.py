"""The public Sigstore vectors for bundle verification, through our adapter, without any network.

The whole run happens in a child in its own network namespace, which has not even a loopback that is
up: whatever asks the network fails. Allowed differences are listed with their reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

VECTORS = Path(__file__).parents[1] / "vectors/sigstore/bundle-verify.tar.xz"

# Not verified at all: the signature names no certificate, and the adapter takes identities only.
MANAGED = "needs verification by a bare public key, which sigstore-python 4.5 does not offer"
SKIPPED = {
    "managed-key-and-trusted-root": MANAGED,
    "managed-key-happy-path": MANAGED,
    "managed-key-no-key_fail": MANAGED,
    "managed-key-wrong-key_fail": MANAGED,
}
# Refused although the suite accepts them; nothing is accepted that the suite refuses.
STRICTER = {
    "intoto-with-custom-trust-root": "an entry of the log type `intoto`, which is retired: "
    "sigstore-python reads `dsse` and `hashedrekord` only",
    "trust-root-tsa-validity-end-inclusive": "a timestamp in the very last second of the "
    "authority's validity: sigstore-python treats the end as excluded",
}

CHILD = """
import hashlib, json, socket, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bundle.evidence.sigstore import verify_artifact, verify_attestation
from policy.errors import AirgapError

try:
    socket.create_connection(("192.0.2.1", 443), timeout=2)
    sys.exit("there is a network")
except OSError:
    pass
beacon = "https://github.com/sigstore-conformance/extremely-dangerous-public-oidc-beacon"
identity = beacon + "/.github/workflows/extremely-dangerous-oidc-beacon.yml@refs/heads/main"
issuer = "https://token.actions.githubusercontent.com"
base = Path(sys.argv[1])

def text(case, name, default):
    return (case / name).read_text().strip() if (case / name).exists() else default

results = {}
for case in sorted(p for p in base.iterdir() if p.is_dir()):
    root = case / "trusted_root.json"
    root = (root if root.exists() else base / "public_good_trusted_root.json").read_text()
    data = case / "artifact"
    data = (data if data.exists() else base / "a.txt").read_bytes()
    raw = (case / "bundle.sigstore.json").read_bytes()
    who = dict(identity=text(case, "identity", identity), issuer=text(case, "issuer", issuer))
    digest = hashlib.sha256(data).hexdigest()
    try:
        if b'"dsseEnvelope"' in raw:
            signed = verify_attestation(raw, root, **who)
            subjects = json.loads(signed.payload)["subject"]
            if not any(s["digest"].get("sha256") == digest for s in subjects):
                raise ValueError("another subject")
        else:
            verify_artifact(raw, root, digest, **who)
        results[case.name] = "accepted"
    except AirgapError as error:
        results[case.name] = error.code
    except ValueError as error:
        results[case.name] = "evidence.subject"
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if shutil.which("unshare") is None or subprocess.call(["unshare", "-rn", "true"]):
        pytest.skip("this host lets no user make a network namespace (unshare -rn)")
    folder = tmp_path_factory.mktemp("sigstore")
    with tarfile.open(VECTORS) as archive:
        archive.extractall(folder, filter="data")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", CHILD, folder / "bundle-verify", root],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_vector_matches_but_the_listed_ones(results):
    assert len(results) == 70
    wrong = {
        name: found
        for name, found in results.items()
        if name not in SKIPPED and (found == "accepted") == name.endswith("_fail")
    }
    assert set(wrong) == set(STRICTER), wrong
    assert all(found == "evidence.signature" for found in wrong.values())


def test_nothing_is_accepted_that_the_suite_refuses(results):
    assert not [n for n, found in results.items() if n.endswith("_fail") and found == "accepted"]


def test_vectors_with_a_managed_key_are_refused_not_passed(results):
    assert all(results[name] != "accepted" for name in SKIPPED)
