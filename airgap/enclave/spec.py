"""What a caller wants sealed, and the limits of it (docs/design/enclave.md, 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airgap.enclave.gpu import Driver


@dataclass(frozen=True, slots=True)
class Caps:
    """Limits on what crosses the channel and on what the process may use."""

    request_bytes: int = 16 << 20
    frame_bytes: int = 4 << 20
    reply_bytes: int = 256 << 20  # all frames of one request together
    stderr_bytes: int = 64 << 10
    memory_mb: int = 0  # 0: 4 GiB and three times the inputs
    threads: int = 2
    descriptors: int = 256
    in_flight: int = 1  # requests at once; above 1 for a program that takes several


@dataclass(frozen=True, slots=True)
class SealSpec:
    """What to seal.

    Attributes:
        profile: `worker`, `worker-gpu` or `screen`; see `profiles`.
        program: `module:function` or `/path/to/file.py:function`; the function takes `config` and
            returns a Program. A file must lie in `read_only`.
        config: JSON-ready configuration.
        read_only: Inputs that the program may read: its model folder.
        min_rung: Least rung that is acceptable; None is A for root and B for a user.
        uid: The worker's uid when root starts it; None picks a free one.
        deadline_s: For start, load and proof together.
        caps: Limits.
        artifacts: Digests of what runs, recorded in the evidence.
        state: Folder that keeps the result of the twin probe between processes; None keeps it
            for this process alone.
        rung: Try this rung alone; it must not lie below `min_rung`.
        driver: Where the driver of a GPU lies, for `worker-gpu`.
        reverify_s: A timer reads the host's facts and repeats the twin probe this often; 0 for no
            timer. The facts are read before each request as well.

    """

    profile: str
    program: str
    config: dict[str, Any] = field(default_factory=dict)
    read_only: tuple[Path, ...] = ()
    min_rung: str | None = None
    uid: int | None = None
    deadline_s: float = 60.0
    caps: Caps = field(default_factory=Caps)
    artifacts: dict[str, Any] = field(default_factory=dict)
    state: Path | None = None
    rung: str | None = None
    driver: Driver = field(default_factory=Driver)
    reverify_s: float = 60.0
