"""What lies beside a bundle on a medium: its installer, and the digests of everything there."""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from pathlib import Path

from bundle.durable import write_beside
from bundle.media import Help
from bundle.scan.wheelhouse import INSTALLER
from bundle.trust import Trust
from bundle.verify import open_bundle
from policy.errors import FaultError, RefusedError

# A line break or a backslash in a name would write lines of its own into what people sign.
_PLAIN = re.compile(r"[^\\\x00-\x1f\x7f\u0080-\u009f\u2028\u2029\ud800-\udfff]+")
NAME, SUMS = "install.sh", "SHA256SUMS"


def write_medium(
    bundle: Path, out: Path, *, trust: Trust, now: datetime, more: Help
) -> dict[str, str]:
    """Write `install.sh` and `SHA256SUMS` into a folder; return the digests by name.

    The list names every plain file of the folder, bundle or volumes among them, but signatures.

    Raises:
        RefusedError: A code of the verification; `store.missing`, the bundle has no installer;
            `archive.type`, a file there has a name that a list cannot hold.
        FaultError: `host.io`.

    """
    with open_bundle(bundle, trust, now=now, more=more) as sealed:
        if sealed.manifest.find(INSTALLER) is None:
            raise RefusedError(
                "store.missing",
                f"{bundle.name!r:.100} carries no installer",
                hint="build it with --target",
            )
        script = sealed.read(INSTALLER)
    try:
        write_beside(out / NAME, script, mode=0o644)
        names = sorted(
            path.name
            for path in out.iterdir()
            if path.is_file() and path.name != SUMS and path.suffix not in {".sig", ".sshsig"}
        )
        for name in names:
            if not _PLAIN.fullmatch(name) or name == "-":
                raise RefusedError(
                    "archive.type",
                    f"{name!r:.120} lies in {out}, and a list of digests cannot name it plainly",
                    hint="rename it, or take it off the medium, then run it again",
                )
        sums = {name: _sha256(out / name) for name in names}
        listed = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        write_beside(out / SUMS, listed.encode(), mode=0o644)
    except OSError as error:
        raise FaultError("host.io", f"{out} cannot be written: {error.strerror}") from error
    return sums


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
