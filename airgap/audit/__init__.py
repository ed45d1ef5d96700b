"""The audit log: append-only, tamper-evident, verifiable by key (docs/design/audit.md)."""

from airgap.audit.capacity import Capacity, State
from airgap.audit.checkpoint import (
    Ring,
    Vkey,
    create_log_key,
    load_ring,
    load_vkey,
    parse_vkey,
    site_name,
)
from airgap.audit.chunks import Streamed
from airgap.audit.clock import Clock, Peer
from airgap.audit.findings import Finding, Verdict
from airgap.audit.identity import open_log
from airgap.audit.log import AuditLog
from airgap.audit.receipt import Receipt, parse_receipt, verify_receipt
from airgap.audit.record import Actor, Commit, DecisionRef, Event, Record, commitment, new_ulid
from airgap.audit.verify import verify_log

__all__ = [
    "Actor",
    "AuditLog",
    "Capacity",
    "Clock",
    "Commit",
    "DecisionRef",
    "Event",
    "Finding",
    "Peer",
    "Receipt",
    "Record",
    "Ring",
    "State",
    "Streamed",
    "Verdict",
    "Vkey",
    "commitment",
    "create_log_key",
    "load_ring",
    "load_vkey",
    "new_ulid",
    "open_log",
    "parse_receipt",
    "parse_vkey",
    "site_name",
    "verify_log",
    "verify_receipt",
]
