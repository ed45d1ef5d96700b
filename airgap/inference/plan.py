"""How many bytes rows, prompts and kept prefixes take, and how many of them fit.

Everything is counted before work begins (docs/design/inference.md, 5): what cannot fit is refused,
and nothing that was planned grows. All lengths are in positions, all sizes in bytes.
"""

from __future__ import annotations

from airgap.inference.graphs import ModelFacts
from airgap.inference.refusals import require_context, too_large

SCORE_BYTES = 64 * 1024 * 1024  # logits of one piece of a completion that is scored
AGAIN = 16  # positions that a text may grow by when it is tokenised again
_KEPT = 4  # a fourth of the memory may hold prefixes that no request needs now
_SCRATCH = 24  # bytes that the head needs for each entry of the vocabulary of a row
_KEY_AND_VALUE = 2 * 4  # bytes of a number and its partner, in fp32


class Plan:
    """The memory of one model's requests."""

    def __init__(self, facts: ModelFacts, *, budget: int, most_rows: int) -> None:
        """Take the shapes of the model, the bytes that all may take, and the widest batch."""
        self._facts = facts
        self._budget = budget
        self._most_rows = most_rows
        self.position = _KEY_AND_VALUE * facts.layers * facts.kv_heads * facts.head_dim

    def row(self, capacity: int) -> int:
        """Return what a slot of that length takes, with its share of the head."""
        return self.position * capacity + _SCRATCH * self._facts.vocab_size

    def prompt(self, length: int) -> int:
        """Return what a prompt takes beside the rows: its buffer, the head of its last position."""
        return self.position * length + self.row(0)

    def prefix(self, length: int) -> int:
        """Return what a kept prompt takes: its buffer, and a mask of a byte for each entry."""
        return self.position * length + self._facts.vocab_size

    def again(self, capacity: int) -> int:
        """Return what the authors' perplexity of one sample takes while the batch waits."""
        return self.position * (capacity + AGAIN) + SCORE_BYTES // 4

    def rows(self, capacity: int, *, wanted: int, beside: int) -> int:
        """Return how many rows of that length fit with `beside` bytes; one that was let in does."""
        least = self.row(capacity)
        left = self._budget - min(beside, self._budget - least)
        return min(wanted, self._most_rows, left // least)

    def left(self, used: int) -> int:
        """Return what is neither used nor spoken for; none is 0."""
        return max(0, self._budget - used)

    def for_prefixes(self, used: int) -> int:
        """Return how much prefixes may hold that no request needs now."""
        return min(self._budget // _KEPT, self.left(used))

    def require(self, prompt: int, new: int, *, again: bool = False) -> None:
        """Refuse what exceeds the context, or of which not one sample fits.

        Raises:
            ProgramError: `prompt.g10`, `model.memory`.

        """
        require_context(self._facts, prompt=prompt, new=new)
        capacity = prompt + new
        needed = self.prompt(prompt) + self.row(capacity) + self.again(capacity) * again
        if needed > self._budget or self._most_rows < 1:
            raise too_large(capacity, needed=needed, budget=self._budget)
