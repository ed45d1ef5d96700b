"""Charts of counted things as inline SVG: no script, no colour that a printer would lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 900
_LABEL, _VALUE, _ROW = 250, 210, 26
_HEIGHT, _BASE = 190, 150
_LETTERS = 36


@dataclass(frozen=True, slots=True)
class Item:
    """One bar: its name, its length, and what stands beside it."""

    label: str
    value: int
    shown: str


@dataclass(frozen=True, slots=True)
class Shape:
    """A bar with its two texts, in units of the view."""

    x: str
    y: str
    width: str
    height: str
    label: str
    label_x: str
    label_y: str
    shown: str
    shown_x: str
    shown_y: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars beside each other (`upright`, for time) or below each other (for names)."""

    title: str
    items: Sequence[Item]
    upright: bool = False

    @property
    def view(self) -> str:
        """The view box."""
        return f"0 0 {WIDTH} {_HEIGHT if self.upright else max(1, len(self.items)) * _ROW}"

    @property
    def anchor(self) -> str:
        """Where the labels are held."""
        return "middle" if self.upright else "start"

    @property
    def shapes(self) -> list[Shape]:
        """The bars; the longest fills the room, and what is not nothing can be seen."""
        top = max((item.value for item in self.items), default=0) or 1
        return [
            self._column(index, item, top) if self.upright else self._bar(index, item, top)
            for index, item in enumerate(self.items)
        ]

    def _bar(self, index: int, item: Item, top: int) -> Shape:
        room = WIDTH - _LABEL - _VALUE
        width = max(2.0 if item.value else 0.0, room * item.value / top)
        y = index * _ROW
        cut = len(item.label) > _LETTERS
        return Shape(
            x=str(_LABEL), y=str(y + 4), width=f"{width:.1f}", height=str(_ROW - 8),
            label=f"{item.label[: _LETTERS - 1]}…" if cut else item.label,
            label_x="0", label_y=str(y + 18),
            shown=item.shown, shown_x=f"{_LABEL + width + 8:.1f}", shown_y=str(y + 18),
        )  # fmt: skip

    def _column(self, index: int, item: Item, top: int) -> Shape:
        step = min(80.0, WIDTH / max(1, len(self.items)))
        width = max(2.0, step * 0.7)
        height = max(2.0 if item.value else 0.0, (_BASE - 24) * item.value / top)
        middle = index * step + step / 2
        every = max(1, -(-len(self.items) * 60 // WIDTH))  # room for a label each 60 units
        told = index % every == 0
        return Shape(
            x=f"{middle - width / 2:.1f}", y=f"{_BASE - height:.1f}", width=f"{width:.1f}",
            height=f"{height:.1f}", label=item.label if told else "", label_x=f"{middle:.1f}",
            label_y=str(_BASE + 18), shown=item.shown if told else "", shown_x=f"{middle:.1f}",
            shown_y=f"{_BASE - height - 6:.1f}",
        )  # fmt: skip
