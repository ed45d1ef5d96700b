"""The published JSON Schemas: equal to the code, and as strict as a form can be."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
from policy_cases import pack_text, rule

import policy.strict
from policy.schema import PUBLISHED, to_text
from policy.strict import read_yaml

HOME = Path(policy.strict.__file__).parent
KINDS = {
    "packs": "policy-pack-1.schema.json",
    "lists": "lists-1.schema.json",
    "registry": "lineage-1.schema.json",
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_schema_is_that_of_the_code(name):
    text = (HOME / "schema" / name).read_text(encoding="utf-8")
    assert text == to_text(PUBLISHED[name]()), "airgap policy schema --write policy/schema"
    jsonschema.Draft202012Validator.check_schema(PUBLISHED[name]())


@pytest.mark.parametrize("folder", sorted(KINDS))
def test_every_shipped_file_is_valid_by_its_schema(folder):
    validator = jsonschema.Draft202012Validator(PUBLISHED[KINDS[folder]]())
    paths = sorted((HOME / folder).glob("*.yaml"))
    assert paths
    for path in paths:
        assert list(validator.iter_errors(read_yaml(path.read_bytes()).value)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"when": "{eq: [project.active, 7]}"},
        {"when": "{eq: [project.aktive, true]}"},
        {"when": "{contains: [project.active, true]}"},
        {"when": "{in: [task.action, [infer, dance]]}"},
        {"when": "{any: []}"},
        {"when": "{known: [project.active]}"},
        {"when": "{any_path: {from: bundle, via: [loved_by], domicile_in: [CN]}}"},
        {"effect": "allow"},
        {"id": "lower-case"},
    ],
)
def test_what_the_form_forbids_the_schema_forbids(fields):
    validator = jsonschema.Draft202012Validator(PUBLISHED["policy-pack-1.schema.json"]())
    assert validator.is_valid(read_yaml(pack_text(rule())).value)
    assert not validator.is_valid(read_yaml(pack_text(rule(**fields))).value)
