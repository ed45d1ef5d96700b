"""Pages of evidence: one self-contained HTML file that reads on a screen and prints on paper."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from airgap.dossier.chart import Chart

NEVER_SAID = ("satisfies", "satisfied", "compliant", "cleared", "certified", "certifies", "safe")
"""Words that no text of this product says about a control, a law or a model."""


@dataclass(frozen=True, slots=True)
class Section:
    """One block of a page: facts by name, a chart, a table, paragraphs, or a text to be copied."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    words: Sequence[str] = ()
    text: str = ""
    empty: str = "none"
    chart: Chart | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """A page: what it is, what it is about, its figures, its sections, and what it cannot show."""

    kind: str
    title: str
    subject: str
    figures: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    limits: Sequence[str]
    author: str
    created: str
    version: str
    id: str
    banner: str = ""
    document: Mapping[str, Any] = field(default_factory=dict)


def render(page: Page) -> str:
    """Return the page as one HTML file without script, link, font or image."""
    style = _file("page.css")
    digest = base64.b64encode(sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FunctionLoader(_file),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text: str = environment.get_template("page.html.j2").render(
        style=style,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'",
        page=page,
    )
    return text


def _file(name: str) -> str:
    return (resources.files("airgap.dossier") / "templates" / name).read_text(encoding="utf-8")
