"""How fast this machine reads matrices: no runner can take a step of one sequence sooner.

A step of one sequence reads every matrix once and does two operations for each number, so memory
bounds it. The reader is the product of a matrix of 1 GiB, far beyond every cache, with a vector, in
torch's own kernel: faster here than a sum, and what such a step is at its best.
"""

from __future__ import annotations

import time

ROWS, WIDTH = 1 << 17, 1 << 11


class MemoryBound:
    """A matrix of 1 GiB that is read again and again."""

    def __init__(self, threads: int) -> None:
        """Make it, and read it once."""
        import torch

        torch.set_num_threads(threads)
        self._matrix, self._vector = torch.ones(ROWS, WIDTH), torch.ones(1, WIDTH)
        self._product = torch.nn.functional.linear
        self.seconds(1)

    def seconds(self, size: int) -> float:
        """Return the seconds in which `size` bytes are read, from whole reads of the matrix."""
        once, began, read = 4 * ROWS * WIDTH, time.perf_counter(), 0
        while read < size:
            self._product(self._vector, self._matrix)
            read += once
        return (time.perf_counter() - began) * size / read
