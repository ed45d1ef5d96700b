"""Which SVG may enter a page: an allow-list of elements and attributes, each with a strict value.

A drawing comes from the sealed helper, which reads hostile text, so the page does not believe it.
There is no script, link, style, image, font, foreign element, entity or event attribute in this
language at all. What is not listed is a refusal and not a repair: our own helper never sends it.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape, quoteattr

from policy.errors import FaultError

SVG_LIMIT = 400_000
ELEMENT_LIMIT = 60_000
DEPTH_LIMIT = 8

_NUMBER = r"-?\d{1,6}(?:\.\d{1,4})?"
_LENGTH = re.compile(_NUMBER)
_COLOUR = re.compile(r"none|#[0-9a-f]{6}")
_RULES: dict[str, re.Pattern[str]] = {
    "class": re.compile(r"[a-z]{1,10}(?: [a-z]{1,10}){0,3}"),
    "d": re.compile(r"[MLHVCQAZ0-9 .\-]{1,200000}"),
    "viewBox": re.compile(rf"{_NUMBER}(?: {_NUMBER}){{3}}"),
    "transform": re.compile(rf"translate\({_NUMBER} {_NUMBER}\)"),
    "fill": _COLOUR,
    "stroke": _COLOUR,
    "stroke-linecap": re.compile("round|butt"),
    "text-anchor": re.compile("start|middle|end"),
    "font-family": re.compile("monospace|sans-serif"),
    **dict.fromkeys(
        (
            *("width", "height", "x", "y", "x1", "x2", "y1", "y2", "rx", "ry"),
            *("stroke-width", "fill-opacity", "font-size"),
        ),
        _LENGTH,
    ),
}
_COMMON = ("class", "fill", "stroke", "stroke-width", "stroke-linecap", "fill-opacity")
_ELEMENTS: dict[str, tuple[str, ...]] = {
    "svg": ("class", "width", "height", "viewBox"),
    "g": ("class", "transform"),
    "path": (*_COMMON, "d"),
    "rect": (*_COMMON, "x", "y", "width", "height", "rx", "ry"),
    "line": (*_COMMON, "x1", "x2", "y1", "y2"),
    "text": (*_COMMON, "x", "y", "text-anchor", "font-size", "font-family"),
    "title": (),
}
_TEXT = frozenset({"text", "title"})
_NAMESPACE = "{http://www.w3.org/2000/svg}"


def clean_svg(text: str, *, title: str = "") -> str:
    """Return `text` written again from the allow-list, with `title` as its name for readers.

    Raises:
        FaultError: `science.svg`; anything that is not listed, too large or too deep.

    """
    if len(text) > SVG_LIMIT:
        raise _refuse(f"{len(text)} characters, more than {SVG_LIMIT}")
    if "<!" in text or "<?" in text:
        raise _refuse("a declaration, comment or instruction")
    try:
        root = ET.fromstring(text)  # noqa: S314 - declarations are refused above: no entity can exist
    except (ET.ParseError, ValueError) as error:
        raise _refuse("not well-formed") from error
    if root.tag != f"{_NAMESPACE}svg":
        raise _refuse("the outermost element is not svg")
    count = [0]
    inner = "".join(_write(child, 1, count) for child in root)
    name = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img"{_attributes(root, "svg")}>'
        f"{name}{inner}</svg>"
    )


def _write(element: ET.Element, depth: int, count: list[int]) -> str:
    count[0] += 1
    if depth > DEPTH_LIMIT or count[0] > ELEMENT_LIMIT:
        raise _refuse("too deep or too many elements")
    name = str(element.tag).removeprefix(_NAMESPACE)
    if name not in _ELEMENTS or name == "svg":
        raise _refuse(f"element {name!a:.40}")
    texts = [element.text or "", *[child.tail or "" for child in element]]
    if name not in _TEXT and any(text.strip() for text in texts):
        raise _refuse(f"text in {name}")
    inner = escape(element.text or "") if name in _TEXT else ""
    inner += "".join(_write(child, depth + 1, count) for child in element)
    return f"<{name}{_attributes(element, name)}>{inner}</{name}>"


def _attributes(element: ET.Element, name: str) -> str:
    out = []
    for key, value in element.attrib.items():
        if key not in _ELEMENTS[name] or _RULES[key].fullmatch(value) is None:
            raise _refuse(f"attribute {key!a:.40} of {name}")
        out.append(f" {key}={quoteattr(value)}")
    return "".join(out)


def _refuse(what: str) -> FaultError:
    return FaultError(
        "science.svg",
        f"a drawing of the sealed helper holds what no drawing may hold: {what}",
        hint="the report is made without drawings: --no-drawings; report the defect",
    )
