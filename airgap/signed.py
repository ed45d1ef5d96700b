"""Signed statements that a site keeps in its tree: one file each, signatures by people of its root.

Obeys docs/design/policy.md, 3, 7 and 8. Approvals, notes on them, releases of holds, reviews and
adjudications lie below `<root>/policy`, named by what they say. Two keys of one person are one
person, and a signature by an unknown key is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

from bundle.durable import write_beside, write_new
from bundle.envelope import Envelope, find_signers, parse_envelope
from bundle.intoto import MAX_PAYLOAD, PAYLOAD_TYPE
from bundle.keys import read_limited
from bundle.root import RootDocument
from policy.approvals import Approver
from policy.errors import RefusedError
from policy.strict import parse_day
from policy.terms import Digest

CODE = "policy.approval"
MAX_FILES = 4_096

Day = Annotated[date, BeforeValidator(parse_day), PlainSerializer(date.isoformat, return_type=str)]


def signers_of(envelope: Envelope, root: RootDocument, *, at: datetime) -> tuple[Approver, ...]:
    """Return the people enrolled at that time whose signatures hold, each once, in order."""
    keyids = find_signers(envelope, root.public_keys(), payload_type=PAYLOAD_TYPE)
    people = root.people_of(keyids)
    return tuple(
        Approver(who, frozenset(root.people[who].roles))
        for who in sorted(people)
        if root.people[who].is_enrolled(at)
    )


def read_folder(folder: Path) -> list[Envelope]:
    """Read every signed file of a folder, signatures not yet verified; none where it is absent."""
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if len(paths) > MAX_FILES:
        raise RefusedError(CODE, f"more than {MAX_FILES} files in {folder}")
    return [read_signed(path) for path in paths]


def read_signed(path: Path) -> Envelope:
    """Read one file, its signatures not yet verified; RefusedError `policy.approval`."""
    raw = read_limited(path, MAX_PAYLOAD, code=CODE, what="the approval")
    try:
        return parse_envelope(raw, code=CODE)
    except RefusedError as error:
        raise RefusedError(
            error.code,
            f"{path}: {error.message}",
            hint="move what is no signed approval out of this folder",
        ) from error


def keep(envelope: Envelope, folder: Path) -> Path:
    """Put a statement where `read_folder` finds it; signatures added later replace the file."""
    path = _place(envelope, folder)
    write_beside(path, envelope.to_bytes(), 0o644)
    return path


def keep_new(envelope: Envelope, folder: Path) -> Path:
    """Put a statement where `read_folder` finds it; FileExistsError for one that says the same."""
    path = _place(envelope, folder)
    write_new(path, envelope.to_bytes(), 0o644)
    return path


def _place(envelope: Envelope, folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f"{Digest.of(envelope.payload).hex[:24]}.json"


@contextlib.contextmanager
def on_record(root: Path, kind: str, person: str, about: Digest) -> Iterator[None]:
    """Put an act of a signer on record, before and after it, where this tree keeps a log.

    Args:
        root: The tree.
        kind: `admin.approval` or `admin.hold`.
        person: Who signs, as the trust root names the person.
        about: Digest of what was signed.

    """
    if not (root / "audit" / "log").is_dir():
        yield  # a staging tree: nothing is decided there
        return
    # Reading approvals needs no log.
    from airgap.audit import Actor, Event, new_ulid  # noqa: PLC0415
    from airgap.audit.site import open_site_log  # noqa: PLC0415
    from airgap.config import load_site  # noqa: PLC0415

    request, actor = new_ulid(), Actor(person)
    with open_site_log(root, load_site(root)) as log:
        log.append(Event(kind, "intent", req=request, actor=actor, data={"object": about}))
        result = "failed"
        try:
            yield
            result = "complete"
        finally:
            data: dict[str, str | Digest] = {"object": about, "result": result}
            log.append(Event(kind, "outcome", req=request, actor=actor, data=data))
