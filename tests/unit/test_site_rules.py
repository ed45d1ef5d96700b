"""Signed files of a site: who may sign, what a signature is worth, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import bundles
import pytest
from policy_cases import pack_text, rule
from policy_site import ISSUED, TRUST, put_signed

import policy.strict
from airgap import site_rules
from airgap.rules import DIGESTS, load_rules, shipped_files
from bundle import trust
from bundle.root import next_version
from policy.errors import RefusedError
from policy.terms import URI_BASE, Digest

PACK = pack_text(rule(id="SITE-1"), pack_id="site")


def sign(content=PACK, name="site.yaml", who="pat", **changes):
    fields = {"author": None, "issued": ISSUED, **changes}
    return site_rules.sign_file(content, name, bundles.signer(who), **fields)


@pytest.fixture
def root(tmp_path):
    """A tree with a trust root and one signed pack."""
    put_signed(tmp_path, "site.yaml", PACK)
    return tmp_path


def put(root, envelope, name="site.yaml"):
    (root / "policy" / f"{name}.sig.json").write_bytes(envelope.to_bytes())


def rules_of(root):
    return {each.id for each in load_rules(root).packs.rules}


def refused(root):
    with pytest.raises(RefusedError) as caught:
        load_rules(root)
    return caught.value


def test_a_signed_pack_counts(root):
    assert "SITE-1" in rules_of(root)
    about = site_rules.verify_file(PACK, "site.yaml", sign(author="ann"), TRUST.document)
    assert (about.author, about.issued) == ("ann", ISSUED)
    assert f"{URI_BASE}rules-file/v1" == site_rules.RULES.predicate_type


def test_a_pack_without_a_signature_is_refused(root):
    assert "SITE-1" in rules_of(root)
    (root / "policy" / "site.yaml.sig.json").unlink()
    error = refused(root)
    assert error.code == "policy.signature"
    assert "airgap policy sign" in error.hint


WORTHLESS = {
    "a changed pack": lambda: sign(PACK + b"# one more line\n"),
    "another name": lambda: sign(name="other.yaml"),
    "another role": lambda: sign(who="tom"),
    "the root itself": lambda: sign(who="root"),
    "an unknown key": lambda: sign(who="mallory"),
    "its author": lambda: sign(author="pat"),
    "its author in other letters": lambda: sign(author="PAT".lower()),
    "before the enrolment": lambda: sign(issued=datetime(2020, 1, 1, tzinfo=UTC)),
    "no signature at all": lambda: replace(sign(), signatures=()),
    "a broken signature": lambda: replace(
        sign(),
        signatures=tuple(replace(each, sig=bytes(len(each.sig))) for each in sign().signatures),
    ),
    "another payload": lambda: replace(sign(), payload=sign(PACK + b"#\n").payload),
}


@pytest.mark.parametrize("make", WORTHLESS.values(), ids=WORTHLESS)
def test_a_signature_that_does_not_fit_is_refused(root, make):
    assert "SITE-1" in rules_of(root)
    put(root, make())
    assert refused(root).code == "policy.signature"


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"\xff\xfe", b"{" * 500, b'{"payload":"","payloadType":"x"}']
)
def test_what_is_no_envelope_is_refused(root, raw):
    (root / "policy" / "site.yaml.sig.json").write_bytes(raw)
    assert refused(root).code == "policy.signature"


@pytest.mark.parametrize("payload", [b"{}", b"[]", b'{"_type":"https://in-toto.io/Statement/v1"}'])
def test_a_payload_that_is_no_statement_is_refused(root, payload):
    put(root, replace(sign(), payload=payload))
    assert refused(root).code == "policy.signature"


def test_two_people_where_the_root_asks_for_two():
    two = next_version(
        TRUST.document,
        now=bundles.ENROLLED,
        thresholds=TRUST.document.thresholds.model_copy(
            update={"policy": trust.Threshold(people=2)}
        ),
    )
    assert site_rules.verify_file(PACK, "site.yaml", sign(), TRUST.document)
    with pytest.raises(RefusedError, match="2 people"):
        site_rules.verify_file(PACK, "site.yaml", sign(), two)
    both = site_rules.countersign(sign(), PACK, "site.yaml", bundles.signer("polly"))
    assert site_rules.verify_file(PACK, "site.yaml", both, two)
    with pytest.raises(RefusedError, match="is about"):
        site_rules.countersign(sign(), PACK + b"#\n", "site.yaml", bundles.signer("polly"))
    with pytest.raises(RefusedError, match="already") as caught:
        site_rules.countersign(sign(), PACK, "site.yaml", bundles.signer("pat"))
    assert (caught.value.code, "signature file" in caught.value.hint) == ("policy.signature", True)


def test_a_tree_with_files_and_without_a_trust_root_loads_nothing(tmp_path):
    (tmp_path / "policy").mkdir()
    assert load_rules(tmp_path)
    (tmp_path / "policy" / "site.yaml").write_bytes(PACK)
    assert refused(tmp_path).code.startswith("trust.")


def test_a_draft_counts_only_where_it_is_named(root, tmp_path):
    draft = tmp_path / "draft.yaml"
    draft.write_bytes(pack_text(rule(id="DRAFT-1"), pack_id="draft"))
    assert "DRAFT-1" not in rules_of(root)
    assert "DRAFT-1" in {each.id for each in load_rules(root, drafts=[draft]).packs.rules}


def test_a_strange_file_name_cannot_be_signed():
    with pytest.raises(RefusedError) as caught:
        sign(name="../site.yaml")
    assert caught.value.code == "policy.signature"


def test_the_shipped_files_are_those_of_the_digest_list():
    home = Path(policy.strict.__file__).parent
    listed = json.loads((home / DIGESTS).read_bytes())
    found = {name: str(Digest.of(content)) for name, content in shipped_files().items()}
    assert listed == found, "python tests/policy_digests.py"
