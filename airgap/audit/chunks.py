"""An answer that leaves in pieces, each on record before it leaves (docs/design/audit.md, 4).

The record of a piece commits to all output so far, under the one nonce of the output, and carries
the number of the piece. The outcome commits to what the last piece did, so its receipt stands for
every piece, and whoever keeps output and nonce can check each of them.

Nothing in this program streams: an answer is screened as a whole, so it leaves as a whole. The
records are part of the format all the same, because verifiers that lie elsewhere judge a log for as
long as it is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from airgap.audit.record import Actor, Commit, Event
from policy.errors import RefusedError
from policy.terms import Digest

if TYPE_CHECKING:
    from airgap.audit.service import Log

MAX_PARTS: Final = 65_536


class Streamed:
    """The output of one inference on its way out. One caller at a time.

    Use it between the two records of an inference, with what its intent said::

        streamed = Streamed(log, req=req, project=project, nonce=os.urandom(32), actor=actor)
        for piece in pieces:
            send(streamed.release(piece))  # durable before it leaves
        log.append(Event("inference", "outcome", req=req, out=streamed.commit(), ...))

    The pieces are bytes of the output itself: what `commit` names is their concatenation, and the
    outcome takes no other `out`. An answer that is cut short has an outcome like any other
    (`failed`, `cancelled`), with `out=streamed.commit()`: what has left is on record. A piece whose
    record failed must not leave; then `commit` gives None, and the answer cannot be complete.
    """

    def __init__(
        self,
        log: Log,
        *,
        req: str,
        project: str,
        nonce: bytes,
        actor: Actor | None = None,
        model: Digest | str = "",
    ) -> None:
        """Begin; the intent of `req` is on record already.

        Args:
            log: Where the intent is.
            req: Its request.
            project: As in the intent.
            nonce: 32 random bytes, for this output alone; they go to the person who asked.
            actor: As in the intent.
            model: As in the intent.

        """
        self._log, self._req, self._nonce = log, req, nonce
        self._common: dict[str, Any] = {"project": project, "actor": actor, "model": model}
        self._content = bytearray()
        self._parts = 0
        self._last: Commit | None = None

    @property
    def content(self) -> bytes:
        """All output whose record is durable."""
        return bytes(self._content[: self._last.bytes]) if self._last is not None else b""

    def release(self, piece: bytes, *, tok: tuple[int, int] | None = None) -> bytes:
        """Return `piece` once its record is durable; nothing of it may leave before.

        Args:
            piece: The next bytes of the output, at least one.
            tok: Tokens read and written so far, for the record.

        Raises:
            RefusedError: `audit.order`; an empty piece, or more than `MAX_PARTS`, or the intent is
                not open.
            FaultError: As `AuditLog.append`: the piece does not leave, and the answer ends here.

        """
        if not piece or self._parts == MAX_PARTS or len(self._content) != len(self.content):
            raise RefusedError(
                "audit.order",
                f"piece {self._parts} of {self._req} is empty, one too many, or follows a failure",
            )
        self._content += piece
        out = self._log.commit(bytes(self._content), self._nonce, req=self._req, side="out")
        fields = self._common | {"part": self._parts, "out": out, "tok": tok}
        self._log.append(Event("inference", "chunk", req=self._req, **fields))
        self._parts, self._last = self._parts + 1, out
        return piece

    def commit(self) -> Commit | None:
        """Return the `out` of the outcome: what the last piece committed to.

        None after a record failed: it may still appear, so only the chunks say what was on record.
        """
        if len(self._content) != len(self.content):
            return None
        if self._last is None:
            return self._log.commit(b"", self._nonce, req=self._req, side="out")
        return self._last
