"""Whether an installed bundle still counts: the revocation list is asked before each start.

An install is no pardon: a release, a model, a file, a wheel, or the people who sealed it may be
revoked later, and the list that says so comes by itself; FORMAT.md section 18.
"""

from __future__ import annotations

from datetime import datetime

from airgap.install.store import InstalledBundle, Store
from bundle.envelope import ENVELOPE_SIZE, find_signers, parse_seal
from bundle.keys import read_limited
from bundle.revocation import require_unrevoked, revoked_signers
from bundle.statement import PAYLOAD_TYPE, verify_seal
from bundle.trust import Trust
from policy.errors import RefusedError


def require_standing(bundle: InstalledBundle, trust: Trust, *, now: datetime) -> tuple[str, ...]:
    """Return what a person must hear about the list; refuse a bundle that is revoked.

    Raises:
        RefusedError: `trust.revoked`, `seal.revoked`; `trust.stale` where the root says so;
            `trust.chain`, `trust.revocation`, this host has held a newer root or list.

    """
    Store(bundle.folder.parents[1]).require_trust(trust)
    alarms = trust.alarms(now)
    if trust.revocations is None:
        return alarms
    require_unrevoked(trust.revocations, bundle.manifest, bundle.digest)
    path = bundle.folder / "META/envelope.dsse.json"
    raw = read_limited(path, ENVELOPE_SIZE, code="start.digest", what="the seal")
    envelope = parse_seal(raw)
    root = trust.document
    keyids = find_signers(envelope, root.public_keys(), payload_type=PAYLOAD_TYPE)
    # Keys that were rotated out since the install are no reason to stop; revoked ones are.
    if revoked_signers(trust.revocations, root, keyids):
        verify_seal(envelope, root, trust.revocations)
    return alarms


def require_valid(installed: InstalledBundle, now: datetime) -> None:
    """Refuse a release whose time is over: approval was given for that time and no longer.

    Raises:
        RefusedError: `trust.expired`.

    """
    expires = installed.manifest.expires
    if now >= expires:
        raise RefusedError(
            "trust.expired",
            f"{installed.manifest.name} {installed.manifest.version} was approved until "
            f"{expires:%Y-%m-%d %H:%M} UTC; it is {now:%Y-%m-%d %H:%M}",
            hint="install a release that is valid, or correct the clock: airgap list",
        )


def find_bar(bundle: InstalledBundle, trust: Trust | None, now: datetime) -> RefusedError | None:
    """Return why a release on disk would not start today; None where nothing is against it.

    A stale list bars every release alike and is no mark of one; without a root only time counts.
    """
    try:
        if trust is not None:
            require_standing(bundle, trust, now=now)
        require_valid(bundle, now)
    except RefusedError as error:
        return None if error.code == "trust.stale" else error
    return None


def require_clock(store: Store, now: datetime) -> None:
    """Refuse a clock that lies before what this host has seen: no time would ever be over.

    Raises:
        RefusedError: `trust.clock`.

    """
    floor = store.floors().clock
    if floor is not None and now < floor:
        raise RefusedError(
            "trust.clock",
            f"the clock of this host says {now:%Y-%m-%d %H:%M} UTC, but {floor:%Y-%m-%d %H:%M} "
            "has been",
            hint="set the clock of this host; if it ran ahead before: airgap trust clock",
        )
