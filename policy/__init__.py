"""Vocabulary, errors, dated rules and decisions. Pure: no file, network, clock or environment.

The names below load on first use, because `policy.errors` and `policy.terms` serve commands that
decide nothing and should not pay for the rule engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy.approvals import Approval, Approvals, Approver
    from policy.engine import Decision, decide, require
    from policy.evaluator import Request
    from policy.lineage import Registry, parse_lineage, unite
    from policy.pack import Packs, PolicyPack, combine, parse_pack
    from policy.paths import Origin, Start
    from policy.snapshots import ListSnapshot, Snapshots, parse_lists

_HOMES = {
    "Approval": "approvals",
    "Approvals": "approvals",
    "Approver": "approvals",
    "Decision": "engine",
    "ListSnapshot": "snapshots",
    "Origin": "paths",
    "Packs": "pack",
    "PolicyPack": "pack",
    "Registry": "lineage",
    "Request": "evaluator",
    "Snapshots": "snapshots",
    "Start": "paths",
    "combine": "pack",
    "decide": "engine",
    "parse_lineage": "lineage",
    "parse_lists": "snapshots",
    "parse_pack": "pack",
    "require": "engine",
    "unite": "lineage",
}

__all__ = [
    "Approval",
    "Approvals",
    "Approver",
    "Decision",
    "ListSnapshot",
    "Origin",
    "Packs",
    "PolicyPack",
    "Registry",
    "Request",
    "Snapshots",
    "Start",
    "combine",
    "decide",
    "parse_lineage",
    "parse_lists",
    "parse_pack",
    "require",
    "unite",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"policy.{home}"), name)
