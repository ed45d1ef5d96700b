"""JSON Schemas of packs, lists and registry files: what an editor can check before we do.

They describe the form. What goes beyond a form (duplicate keys, plain scalars that readers type
differently, ids that stand twice, windows that overlap) is refused when a file is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from policy.lineage import SCHEMA as LINEAGE
from policy.lineage import LineageText
from policy.pack import SCHEMA as PACK
from policy.pack import PackText
from policy.snapshots import SCHEMA as LISTS
from policy.snapshots import FileText
from policy.terms import FACTS, RELATIONS, STARTS, URI_BASE, FactSpec, Kind

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DAY = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}
_LEAF_FORMS: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        Kind.BOOL: ("eq",),
        Kind.INT: ("eq", "lt", "lte", "gt", "gte"),
        Kind.DATE: ("eq", "before", "on_or_after"),
        Kind.ENUM: ("eq", "in"),
        Kind.SET: ("contains", "intersects"),
    }
)


def pack_schema() -> dict[str, Any]:
    """The schema of a rule pack."""
    schema = _schema(PackText, "policy-pack", PACK)
    defs = schema["$defs"]
    defs["Condition"] = {"oneOf": [*_junctions(), _path_form(), *_leaves()]}
    tree = {"$ref": "#/$defs/Condition"}
    defs["RuleText"]["properties"] |= {
        "applies_when": tree,
        "when": tree,
        "unless": {"anyOf": [tree, {"type": "null"}]},
    }
    facts = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: _value_of(spec) for name, spec in sorted(FACTS.items()) if not spec.derived
        },
    }
    for name in ("FactSetText", "ScenarioText", "CaseText"):
        properties = defs[name]["properties"]
        properties["facts" if "facts" in properties else "with"] = facts
    return schema


def lists_schema() -> dict[str, Any]:
    """The schema of a file of list snapshots."""
    return _schema(FileText, "lists", LISTS)


def lineage_schema() -> dict[str, Any]:
    """The schema of a lineage registry file."""
    return _schema(LineageText, "lineage", LINEAGE)


# File name below `policy/schema/` -> what makes it.
PUBLISHED: Mapping[str, Callable[[], dict[str, Any]]] = MappingProxyType(
    {
        "policy-pack-1.schema.json": pack_schema,
        "lists-1.schema.json": lists_schema,
        "lineage-1.schema.json": lineage_schema,
    }
)


def to_text(schema: dict[str, Any]) -> str:
    """The published form of a schema."""
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _schema(model: Any, name: str, version: str) -> dict[str, Any]:
    schema: dict[str, Any] = model.model_json_schema(by_alias=True)
    schema["properties"]["schema"] = {"const": version}
    schema.pop("title", None)
    return {"$schema": DIALECT, "$id": f"{URI_BASE}schema/{name}/1", **schema}


def _form(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: body},
        "required": [name],
        "additionalProperties": False,
    }


def _junctions() -> list[dict[str, Any]]:
    inner = {"$ref": "#/$defs/Condition"}
    return [
        _form("all", {"type": "array", "items": inner}),
        _form("any", {"type": "array", "items": inner, "minItems": 1}),
        _form("not", inner),
    ]


def _path_form() -> dict[str, Any]:
    body = {
        "type": "object",
        "properties": {
            "from": {"enum": sorted(STARTS)},
            "via": {"type": "array", "items": {"enum": sorted(RELATIONS)}, "minItems": 1},
            "hits_list": {"type": "string"},
            "domicile_in": {
                "type": "array",
                "items": {"type": "string", "pattern": "^[A-Z]{2}$"},
                "minItems": 1,
            },
            "basis": {"enum": ["published", "released"]},
        },
        "required": ["from", "via"],
        "oneOf": [{"required": ["hits_list", "basis"]}, {"required": ["domicile_in"]}],
        "additionalProperties": False,
    }
    return _form("any_path", body)


def _leaves() -> list[dict[str, Any]]:
    """One schema a form: a fact of the right kind, and a literal of that fact."""
    by_form: dict[str, list[dict[str, Any]]] = {}
    for name, spec in sorted(FACTS.items()):
        for form in _LEAF_FORMS[spec.kind]:
            literal = _member_of(spec) if spec.kind in {Kind.ENUM, Kind.SET} else _value_of(spec)
            if form in {"in", "intersects"}:
                literal = {"type": "array", "items": literal, "minItems": 1, "uniqueItems": True}
            pair = {
                "type": "array",
                "prefixItems": [{"const": name}, literal],
                "items": False,
                "minItems": 2,
            }
            by_form.setdefault(form, []).append(pair)
    return [_form(form, {"anyOf": pairs}) for form, pairs in sorted(by_form.items())]


def _member_of(spec: FactSpec) -> dict[str, Any]:
    if spec.members is None:
        return {"type": "string", "pattern": "^[a-z0-9][a-z0-9.+_-]{0,63}$"}
    return {"enum": sorted(spec.members)}


def _value_of(spec: FactSpec) -> dict[str, Any]:
    match spec.kind:
        case Kind.BOOL:
            value: dict[str, Any] = {"type": "boolean"}
        case Kind.INT:
            value = {"type": "integer"}
        case Kind.DATE:
            value = dict(_DAY)
        case Kind.ENUM:
            value = _member_of(spec)
        case Kind.SET:
            value = {"type": "array", "items": _member_of(spec)}
    return {**value, "description": spec.question}
