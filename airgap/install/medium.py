"""What lies beside a bundle on a medium: its installer, and the digests of everything there."""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path

from airgap.install.store import write_beside
from bundle.media import Help
from bundle.scan.wheelhouse import INSTALLER
from bundle.trust import Trust
from bundle.verify import open_bundle
from policy.errors import FaultError, RefusedError

NAME, SUMS = "install.sh", "SHA256SUMS"


def write_medium(
    bundle: Path, out: Path, *, trust: Trust, now: datetime, more: Help
) -> dict[str, str]:
    """Write `install.sh` and `SHA256SUMS` into a folder; return the digests by name.

    The list names every plain file of the folder, bundle or volumes among them, but signatures.

    Raises:
        RefusedError: A code of the verification; `store.missing`, the bundle has no installer.
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
        sums = {name: _sha256(out / name) for name in names}
        listed = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        write_beside(out / SUMS, listed.encode(), mode=0o644)
    except OSError as error:
        raise FaultError("host.io", f"{out} cannot be written: {error.strerror}") from error
    return sums


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
