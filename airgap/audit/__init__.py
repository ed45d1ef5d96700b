"""The audit log: append-only, tamper-evident, verifiable with public keys alone (`audit.md`)."""

from airgap.audit.checkpoint import create_log_key, load_vkey, parse_vkey, site_name
from airgap.audit.log import AuditLog, Clock, Peer, State, open_log
from airgap.audit.receipt import Receipt, parse_receipt, verify_receipt
from airgap.audit.record import Actor, Commit, DecisionRef, Event, Record, commitment, new_ulid

__all__ = [
    "Actor",
    "AuditLog",
    "Clock",
    "Commit",
    "DecisionRef",
    "Event",
    "Peer",
    "Receipt",
    "Record",
    "State",
    "commitment",
    "create_log_key",
    "load_vkey",
    "new_ulid",
    "open_log",
    "parse_receipt",
    "parse_vkey",
    "site_name",
    "verify_receipt",
]
