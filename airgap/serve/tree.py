"""What of a tree counts for one request: site facts, rules and trust, as the files are now.

A session may last for weeks (docs/design/architecture.md, 4). What a file says counts from the next
decision on, so the files are read at each; they are parsed and verified again only when their bytes
have changed. A file that cannot be read or judged permits nothing: its refusal is raised.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from airgap import rule_history
from airgap.audit.service import Log
from airgap.config import FILE_NAME, Site, load_site, read_plain
from airgap.rules import Rules, load_rules
from bundle.trust import Trust, load_trust
from policy.errors import AirgapError, FaultError
from policy.terms import Digest

FOLDERS = ("trust", "policy", "policy/adjudications")
MAX_FILE = 32 << 20
MAX_FILES = 20_000
TRIES = 5


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read, and the digest of the files that it was read from."""

    site: Site
    rules: Rules
    trust: Trust
    digest: Digest


class Tree:
    """The files of one tree; threads may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._facts: Facts | None = None
        self._recorded: Digest | None = None

    def read(self) -> Facts:
        """Return what the files say now.

        Raises:
            RefusedError: As `load_site`, `load_rules` and `load_trust`.
            FaultError: `host.state`, they are being changed all the time.

        """
        with self._lock:
            for _ in range(TRIES):
                digest = digest_of(self.root)
                if self._facts is not None and self._facts.digest == digest:
                    return self._facts
                try:
                    found = Facts(
                        load_site(self.root),
                        load_rules(self.root),
                        load_trust(self.root / "trust"),
                        digest,
                    )
                except AirgapError:
                    if digest_of(self.root) == digest:
                        raise
                    continue  # it was changed while it was read
                if digest_of(self.root) == digest:  # else it was changed while it was read
                    self._facts = found
                    return found
        raise FaultError(
            "host.state",
            f"the files of {self.root} change while they are read",
            hint="wait until whoever changes them is done, then send the request again",
        )

    def put_on_record(self, log: Log, facts: Facts) -> None:
        """Put the load of these rules on record, once, before anything is decided by them."""
        with self._lock:
            if self._recorded != facts.digest:
                rule_history.put_on_record(log, facts.rules)
                self._recorded = facts.digest


def digest_of(root: Path) -> Digest:
    """Return one digest over name and content of every file that `Tree.read` reads."""
    total = hashlib.sha256()
    for number, path in enumerate(_files(root)):
        if number >= MAX_FILES:
            break  # what reads them has limits of its own, and refuses
        try:
            content = read_plain(path, MAX_FILE)
            found = hashlib.sha256(content).digest()
        except OSError as error:  # told by whoever reads it
            found = f"{error.errno}".encode()
        name = path.relative_to(root).as_posix().encode()
        total.update(len(name).to_bytes(4) + name + len(found).to_bytes(4) + found)
    return Digest("sha256", total.digest())


def _files(root: Path) -> Iterator[Path]:
    yield root / FILE_NAME
    for name in FOLDERS:
        folder = root / name
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if not path.is_dir())
