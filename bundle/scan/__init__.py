"""Strict parsers of foreign files: one enters only when the parser of its role accepts it all."""

from bundle.scan.payload import Finding, ScanReport, scan_payload

__all__ = ["Finding", "ScanReport", "scan_payload"]
