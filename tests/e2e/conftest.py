"""One staging tree and one lab for all end-to-end tests: the real commands, the reference model."""

import os
import shutil

import pytest
from conftest_road import PINS, SNAPSHOT, Capture, Road, call

from airgap.demo import APPROVERS, PEOPLE, site_toml


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    base = tmp_path_factory.mktemp("road")
    staging, lab = base / "staging", base / "lab"
    for tree in (staging, lab):
        tree.mkdir(mode=0o700)
        (tree / "site.toml").write_text(site_toml(os.getuid()))
    keys = staging / "keys"
    with Capture() as capture:

        def must(*argv):
            done = call(capture, *argv)
            assert done.status == 0, done.text
            return done.document

        for name, person, role in PEOPLE:
            must("keys", "new", name, "--person", person, "--role", role, "--root", staging)
        must("trust", "init", "--key", keys / "root.pem", "--root", staging)
        for name, _, _ in PEOPLE[1:]:
            public = keys / f"{name}.pub.json"
            must("trust", "add", public, "--key", keys / "root.pem", "--root", staging)
        fingerprint = must("trust", "show", "--root", staging)["fingerprint"]
        draft = base / "draft.agb"
        built = must(
            *("build", SNAPSHOT, "-o", draft, "--name", "logos-ref-tiny", "--version", "1.0.0"),
            *("--key", keys / "builder.pem", "--pin", PINS),
            *("--origin", "local:logos-ref-tiny", "--supplier", "airgap project"),
            *("--jurisdiction", "none", "--modality", "retrosynthesis", "--modality", "molecule"),
            *("--modality", "protein", "--modality", "material"),
            *("--root", staging),
        )
        half, bundle = base / "half.agb", base / "sealed.agb"
        shutil.copyfile(draft, bundle)
        for name in APPROVERS:
            must(
                *("sign", bundle, "--key", keys / f"{name}.pem"),
                *("--confirm", "logos-ref-tiny", "--root", staging),
            )
            if name == APPROVERS[0]:
                shutil.copyfile(bundle, half)
        root = staging / "trust" / "root.json"
        must("trust", "init", "--from", root, "--fingerprint", fingerprint, "--root", lab)
        installed = must("install", bundle, "--root", lab)
    return Road(staging, draft, half, bundle, lab, built, installed)
