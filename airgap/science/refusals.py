"""What a refused prompt says: code, byte, a caret line, what could stand there, and the fix.

Standard library only: the broker imports this module, and so does the sealed helper.
"""

from __future__ import annotations

from collections.abc import Sequence

from policy.errors import RefusedError

_EXCERPT = 30


class PromptError(RefusedError):
    """A prompt or a field of it is not what the model can read.

    Args:
        code: `prompt.g01` to `prompt.g12`, or another `prompt.*` code.
        message: What is wrong, in one line; a caret line is added when `text` is given.
        hint: The fix.
        text: The text at fault.
        at: Character index of the fault in `text`.
        width: Characters to underline.
        expected: What could stand at that place.

    Attributes:
        at: Character index of the fault.
        offset: Byte offset of the fault in the UTF-8 form of `text`, or None.
        caret: Two lines, an excerpt and its underline; empty without `text`.

    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        text: str | None = None,
        at: int = 0,
        width: int = 1,
        expected: Sequence[str] = (),
    ) -> None:
        self.at = at
        self.offset = None if text is None else byte_offset(text, at)
        self.caret = "" if text is None else caret(text, at, width)
        self.expected = tuple(expected)
        lines = [message if self.offset is None else f"{message} (byte {self.offset})"]
        lines += self.caret.splitlines()
        if expected:
            lines.append(f"expected: {' '.join(expected)}")
        super().__init__(code, "\n".join(lines), hint=hint)


def byte_offset(text: str, at: int) -> int:
    """Return the UTF-8 byte offset of character `at`."""
    return len(text[:at].encode("utf-8", "surrogatepass"))


def caret(text: str, at: int, width: int = 1) -> str:
    """Return an excerpt around `at` and carets under it; only ASCII, so that they align."""
    start, end = max(0, at - _EXCERPT), min(len(text), at + _EXCERPT)
    before, after = "..." * (start > 0), "..." * (end < len(text))
    shown = "".join(c if " " <= c <= "~" else "?" for c in text[start:end])
    under = max(1, min(width, max(1, end - at)))
    return f"  {before}{shown}{after}\n  {' ' * (len(before) + at - start)}{'^' * under}"
