"""Rows as OCSF 1.8.0 events, one a line (docs/design/audit.md, 10).

Every event leads back to its record: `metadata.sequence`, `metadata.uid` (the leaf hash) and
`metadata.log_name` (the origin). What OCSF has no attribute for stands in `unmapped`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import orjson

from airgap.audit.export.fields import (
    INFO,
    SERIOUS,
    WARNING,
    Record,
    epoch_us,
    flatten,
    gravity,
    summary,
)

VERSION: Final = "1.8.0"
_SEVERITY: Final = {INFO: 1, WARNING: 3, SERIOUS: 5}
_OTHER: Final = 99
_SERVER: Final = 1  # device.type_id
_ASSISTANT: Final = 2  # message_context.ai_role_id
# action_id and disposition_id: allowed, or denied and why.
_ALLOWED, _BLOCKED, _UNAUTHORIZED = (1, 1), (2, 2), (2, 26)
_VERDICTS: Final = {
    "permit": _ALLOWED,
    "permit_with_obligations": _ALLOWED,
    "needs_approval": _UNAUTHORIZED,
    "deny": _BLOCKED,
}
_STATUS: Final = {"complete": 1, "failed": 2, "refused": 2, "cancelled": 2, "unknown": 0}


class _Class(NamedTuple):
    """A class of OCSF with the activity that a kind stands for; 99 with its own name."""

    uid: int
    activity: int = _OTHER
    name: str = ""


_API, _LOG, _APP, _ENTITY, _POSTURE, _FINDING, _NETWORK, _LOGIN = (
    6003, 1008, 6002, 3004, 5019, 2004, 4001, 3002,
)  # fmt: skip
CLASSES: Final[dict[str, _Class]] = {
    "inference": _Class(_API, name="Inference"),
    "admission": _Class(_API, name="Admission"),
    "denial": _Class(_API, name="Denial"),
    "decision": _Class(_API, name="Decision"),
    "login": _Class(_LOGIN, 1),
    "boot": _Class(_LOG, 6),
    "shutdown": _Class(_LOG, 7),
    "halt": _Class(_LOG, 7),
    "recovery": _Class(_LOG, 8),
    "heartbeat": _Class(_LOG, name="Heartbeat"),
    "clock.step": _Class(_LOG, name="Clock Step"),
    "key.rotate": _Class(_LOG, 5),
    "export": _Class(_LOG, 3),
    "prune": _Class(_LOG, 2),
    "spill.purge": _Class(_LOG, 2),
    "import.cosign": _Class(_LOG, name="Cosignature"),
    "verify.result": _Class(_LOG, name="Verification"),
    "policy.load": _Class(_APP, 3),
    "model.load": _Class(_APP, 3),
    "admin.install": _Class(_APP, 1),
    "admin.update": _Class(_APP, 8),
    "admin.rollback": _Class(_APP, name="Rollback"),
    "admin.remove": _Class(_APP, 2),
    "admin.bootstrap": _Class(_APP, 1),
    "admin.backup": _Class(_APP, name="Backup"),
    "admin.restore": _Class(_APP, name="Restore"),
    "admin.trust": _Class(_ENTITY, 3),
    "admin.approval": _Class(_ENTITY, 1),
    "admin.hold": _Class(_ENTITY, 13),
    "admin.policy": _Class(_ENTITY, 3),
    "admin.keys": _Class(_ENTITY, 3),
    "enclave.seal": _Class(_POSTURE, 1),
    "enclave.exit": _Class(_POSTURE, 1),
    "enclave.incident": _Class(_FINDING, 1),
    "egress.probe": _Class(_NETWORK, 5),
}


def ocsf_row(origin: str, record: Record, line: bytes, leaf: bytes) -> bytes:
    """Return the event of a record."""
    del line
    event = ocsf_event(origin, record, leaf)
    return orjson.dumps(event, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def ocsf_event(origin: str, record: Record, leaf: bytes) -> dict[str, Any]:
    """Return the event of a record as an object."""
    chosen = _classify(record)
    data = record.get("data", {})
    event: dict[str, Any] = {
        "category_uid": chosen.uid // 1_000,
        "class_uid": chosen.uid,
        "activity_id": chosen.activity,
        "type_uid": chosen.uid * 100 + chosen.activity,
        "time": epoch_us(record["ts"]) // 1_000,
        "severity_id": _SEVERITY[gravity(record)],
        "message": summary(record),
        "metadata": {
            "version": VERSION,
            "product": {"name": "airgap audit", "vendor_name": "airgap"},
            "profiles": ["host"],
            "sequence": record["seq"],
            "uid": leaf.hex(),
            "log_name": origin,
            "event_code": f"{record['kind']}:{record['phase']}",
        },
        "device": {"type_id": _SERVER, "hostname": record["host"], "boot_uid": record["boot"]},
        "unmapped": flatten(record),
    }
    if chosen.name:
        event["activity_name"] = chosen.name
    if "req" in record:
        event["metadata"]["correlation_uid"] = record["req"]
    if record["phase"] == "outcome":
        event |= {"status_id": _STATUS[data["result"]], "status": str(data["result"]).capitalize()}
    if "err" in record:
        event["status_code"] = record["err"]["code"]
    if "lat_ms" in record:
        event["duration"] = record["lat_ms"]
    event["actor"] = _actor(record)
    event |= _BY_CLASS[chosen.uid](record, origin, leaf)
    return event


def _classify(record: Record) -> _Class:
    kind, result = record["kind"], record.get("data", {}).get("result")
    serious = gravity(record) == SERIOUS
    if serious and kind in {"egress.probe", "verify.result"}:
        return _Class(_FINDING, 1)  # an outside that answers, a log that was changed
    if kind == "egress.probe" and record["phase"] == "intent":
        return _Class(_NETWORK, name="Probe")
    if kind == "egress.probe" and result != "refused":
        return _Class(_NETWORK, 4)
    return CLASSES[kind]


def _actor(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {"app_name": "airgap"}
    if "actor" in record:
        found["user"] = _user(record)
    return found


def _user(record: Record) -> dict[str, Any]:
    actor = record.get("actor", {})
    user: dict[str, Any] = {"uid": str(actor.get("uid", ""))}
    return user | ({"name": actor["name"]} if "name" in actor else {})


def _api(record: Record, origin: str, leaf: bytes) -> dict[str, Any]:
    del origin, leaf
    found: dict[str, Any] = {
        "api": {
            "operation": f"{record['kind']}.{record['phase']}",
            "service": {"name": "airgap"},
        },
        "src_endpoint": {"name": record.get("src", "local"), "hostname": record["host"]},
    }
    if "req" in record:
        found["api"]["request"] = {"uid": record["req"]}
    return found | _verdict(record) | _ai(record)


def _verdict(record: Record) -> dict[str, Any]:
    """Return what the profile `security_control` says of a decision."""
    outcome = record.get("decision", {}).get("outcome")
    action = _VERDICTS.get(outcome or "") or (_BLOCKED if record["kind"] == "denial" else None)
    found: dict[str, Any] = {}
    if action is not None:
        found = {"action_id": action[0], "disposition_id": action[1]}
    if "policy" in record or "decision" in record:
        policy = {"name": "airgap policy", "uid": record.get("policy", "")}
        if rule := record.get("decision", {}).get("rule"):
            policy["desc"] = f"deciding rule {rule}"
        if "policy" in record:
            policy["version"] = record["policy"]
        found["policy"] = {name: value for name, value in policy.items() if value}
    return found


def _ai(record: Record) -> dict[str, Any]:
    """Return what the profile `ai_operation` says of a model's work."""
    found: dict[str, Any] = {}
    if "model" in record:
        found["ai_model"] = {
            "name": record["model"],
            "uid": record["model"],
            "ai_provider": "local",
        }
    if "tok" in record:
        read, written = record["tok"]["in"], record["tok"]["out"]
        found["message_context"] = {
            "ai_role_id": _ASSISTANT,
            "service": {"name": "airgap"},
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }
    return found


def _log(record: Record, origin: str, leaf: bytes) -> dict[str, Any]:
    del record, leaf
    return {"log_name": origin, "log_provider": "airgap audit"}


def _app(record: Record, origin: str, leaf: bytes) -> dict[str, Any]:
    del origin, leaf
    data = record.get("data", {})
    name = str(data.get("object") or data.get("digest") or record["kind"])
    return {"app": {"name": name}}


def _entity(record: Record, origin: str, leaf: bytes) -> dict[str, Any]:
    del origin, leaf
    data = record.get("data", {})
    return {
        "entity": {"name": str(data.get("object") or record["kind"]), "type": record["kind"]},
        "comment": f"old {data.get('old', '-')} new {data.get('new', '-')}",
    }


def _posture(record: Record, origin: str, leaf: bytes) -> dict[str, Any]:
    del record, origin, leaf
    return {}


def _finding(record: Record, origin: str, leaf: bytes) -> dict[str, Any]:
    return {
        "finding_info": {
            "uid": leaf.hex(),
            "title": summary(record),
            "desc": f"record {record['seq']} of {origin}",
            "types": [record["kind"]],
        },
        "is_alert": True,
    }


def _network(record: Record, origin: str, leaf: bytes) -> dict[str, Any]:
    del origin, leaf
    return {
        "src_endpoint": {"hostname": record["host"]},
        "dst_endpoint": {"name": str(record.get("data", {}).get("probe", "outside")) or "outside"},
    }


def _login(record: Record, origin: str, leaf: bytes) -> dict[str, Any]:
    del origin, leaf
    return {
        "user": _user(record),
        "service": {"name": "airgap"},
        "session": {"uid": str(record.get("data", {}).get("session", ""))},
    }


_BY_CLASS: Final = {
    _API: _api, _LOG: _log, _APP: _app, _ENTITY: _entity, _POSTURE: _posture,
    _FINDING: _finding, _NETWORK: _network, _LOGIN: _login,
}  # fmt: skip
