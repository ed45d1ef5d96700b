"""Screen packs of a site: signed like its rules, or the broker does not open."""

from datetime import UTC, datetime

import bundles
import pytest
from test_approvals import enrolled
from test_science_screens import SITE_PACK

from airgap import site_rules
from airgap.serve.session import SCREEN_PACKS, screen_packs
from bundle import trust
from policy.errors import RefusedError

PEOPLE = enrolled(paula=("policy",), ivy=("policy",), tom=("approver",))
WHEN = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def tree(tmp_path):
    trust.save_trust(PEOPLE, tmp_path / "trust")
    (tmp_path / SCREEN_PACKS).mkdir(parents=True)
    (tmp_path / SCREEN_PACKS / "lab.toml").write_bytes(SITE_PACK)
    return tmp_path


def sign(tree, who, content=SITE_PACK, name="lab.toml"):
    path = tree / SCREEN_PACKS / "lab.toml.sig.json"
    signer = bundles.signer(who)
    path.write_bytes(
        site_rules.sign_file(content, name, signer, author="ivy", issued=WHEN).to_bytes()
    )


def test_a_signed_pack_is_taken(tree):
    sign(tree, "paula")
    assert [path.name for path in screen_packs(tree)] == ["lab.toml"]


def test_a_tree_without_packs_needs_no_trust_root(tmp_path):
    assert screen_packs(tmp_path) == ()


BAD = {
    "no signature": lambda tree: (tree / SCREEN_PACKS / "lab.toml.sig.json").unlink(),
    "its author": lambda tree: sign(tree, "ivy"),
    "another role": lambda tree: sign(tree, "tom"),
    "a stranger": lambda tree: sign(tree, "mallory"),
    "another file": lambda tree: sign(tree, "paula", SITE_PACK + b"#"),
    "another name": lambda tree: sign(tree, "paula", name="other.toml"),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD.keys())
def test_a_pack_that_is_not_signed_as_it_must_be_is_refused(tree, spoil):
    sign(tree, "paula")
    assert screen_packs(tree)
    spoil(tree)
    with pytest.raises(RefusedError) as refused:
        screen_packs(tree)
    assert refused.value.code == "policy.signature"
