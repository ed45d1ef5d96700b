"""The opt-in filter `valence`: every token leaves a molecule possible (docs/design/science.md, 4).

A SMILES that a sample is writing is read as far as it goes by partialsmiles, which knows common
valences and the rules of aromatic rings. It refuses metals and much real organometallic chemistry,
so node strings of materials are never shown to it and results say that it was on. It forces
validity, which moves the distribution: what it takes away is counted, and it is never the default.

The library is imported when the filter is made, which is before the seal closes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from airgap.enclave.channel import ProgramError
from airgap.inference.protocol import Segment

OPENS, CLOSES = "<MoleculeS>", "<MoleculeE>"


class Valence:
    """What partialsmiles says of a text: can it go on to be a molecule, and is it one."""

    def __init__(self) -> None:
        """Load the library and take both paths of it once.

        Raises:
            ProgramError: `model.valence`, it is not installed.

        """
        try:
            import partialsmiles  # noqa: PLC0415 - a worker without the filter is spared it
        except ImportError as error:
            raise ProgramError(
                "model.valence",
                "the filter `valence` needs partialsmiles, which is not installed",
                "install the extra `cpu` whole, or leave --valence out",
            ) from error
        self._parse = partialsmiles.ParseSmiles
        # Its own refusals, and what its reader raises on text that ends inside a number.
        self._refusals = (partialsmiles.Error, IndexError, KeyError, ValueError, RecursionError)
        for text in ("c1ccncc1", "[nH]", "C(C)(C)(C)(C)C"):
            self.may_begin(text)
            self.is_whole(text)

    def may_begin(self, text: str) -> bool:
        """Return whether some molecule begins with `text`."""
        return self._reads(text, partial=True)

    def is_whole(self, text: str) -> bool:
        """Return whether `text` is a molecule."""
        return bool(text) and self._reads(text, partial=False)

    def _reads(self, text: str, *, partial: bool) -> bool:
        try:
            self._parse(text, partial=partial)
        except self._refusals:
            return False
        return True


class Writing:
    """The SMILES that one sample has open, as far as it goes; None outside a molecule."""

    def __init__(
        self, valence: Valence, tags: Mapping[str, int], spelled: Sequence[bytes], text: str | None
    ) -> None:
        self._valence, self._tags, self._spelled = valence, tags, spelled
        self._special = frozenset(tags.values())
        self.text = text

    def copy(self) -> Writing:
        """Return one at the same place."""
        return Writing(self._valence, self._tags, self._spelled, self.text)

    def allows(self, token: int) -> bool:
        """Return whether a molecule can still come of it after `token`."""
        if self.text is None:
            return True
        if token == self._tags[CLOSES]:
            return self._valence.is_whole(self.text)
        if token in self._special:
            return True
        more = self._spell(token)
        return not more or self._valence.may_begin(self.text + more)

    def accept(self, token: int) -> None:
        """Go on by one id."""
        if token in self._special:
            self.text = "" if token == self._tags[OPENS] else None
        elif self.text is not None:
            self.text += self._spell(token)

    def _spell(self, token: int) -> str:
        # The grammar lets ASCII alone through, and no blank but the tokenizer's own after a tag.
        return self._spelled[token].decode("latin-1").replace(" ", "")


def open_text(prompt: Sequence[Segment]) -> str | None:
    """Return the SMILES that a prompt leaves open, None where it leaves none."""
    text: str | None = None
    for segment in prompt:
        if segment.tag:
            text = "" if segment.text == OPENS else None
        elif text is not None:
            text += segment.text
    return text
