"""Evidence for people: reports by award and control, the dossier of one request, OSCAL documents.

Obeys docs/design/policy.md, 12. What is emitted supports a control; whether it is met is for the
institution's assessor, and no text here says so.
"""

from airgap.dossier.controls import FAMILIES, ROWS, Row
from airgap.dossier.page import NEVER_SAID, Page, Section, render
from airgap.dossier.reports import award_report, controls_report, not_used_report
from airgap.dossier.request import request_dossier
from airgap.dossier.totals import add_up, totals_report
from airgap.dossier.usage import Evidence, LogFacts, Usage, gather

__all__ = [
    "FAMILIES",
    "NEVER_SAID",
    "ROWS",
    "Evidence",
    "LogFacts",
    "Page",
    "Row",
    "Section",
    "Usage",
    "add_up",
    "award_report",
    "controls_report",
    "gather",
    "not_used_report",
    "render",
    "request_dossier",
    "totals_report",
]
