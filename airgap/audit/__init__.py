"""The audit log: append-only, tamper-evident, verifiable by key (docs/design/audit.md)."""

from airgap.audit.checkpoint import Vkey, create_log_key, load_vkey, parse_vkey, site_name
from airgap.audit.log import AuditLog, Clock, Peer, State, open_log
from airgap.audit.receipt import Receipt, parse_receipt, verify_receipt
from airgap.audit.record import Actor, Commit, DecisionRef, Event, Record, commitment, new_ulid
from airgap.audit.verify import Finding, Verdict, verify_log

__all__ = [
    "Actor",
    "AuditLog",
    "Clock",
    "Commit",
    "DecisionRef",
    "Event",
    "Finding",
    "Peer",
    "Receipt",
    "Record",
    "State",
    "Verdict",
    "Vkey",
    "commitment",
    "create_log_key",
    "load_vkey",
    "new_ulid",
    "open_log",
    "parse_receipt",
    "parse_vkey",
    "site_name",
    "verify_log",
    "verify_receipt",
]
