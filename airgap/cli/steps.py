"""A next step for every refusal: what the raiser said, or what helps with an error of its kind."""

from __future__ import annotations

from policy.errors import AirgapError

# By code, else by room, which is the part of a code before its first full stop.
_BY_CODE = {
    "archive.type": "give the bundle itself: a plain file, NAME.agb",
    "audit.key": "give the right verifier key (keys/audit.vkey of the tree that keeps the log)",
    "audit.order": "nothing changed; begin the request again",
    "audit.export": "refuse this medium; ask the host that made the export for it again",
    "audit.owner": "airgap doctor --system compares owners; or run it as the owner (sudo -u)",
    "audit.payload": "airgap audit show --kind spill.purge; airgap audit open --help",
    "audit.people": "airgap trust show lists people and roles; airgap audit countersign",
    "audit.proof": "give the .tlog-proof file as `airgap run --receipt` wrote it",
    "audit.quorum": "bring back what the missing witnesses wrote: airgap audit witness import",
    "audit.retention": "airgap audit prune says what may go and what holds the rest",
    "audit.service": "start the service: airgap audit serve; nothing is admitted without a record",
    "audit.unknown": "name an outside head: airgap audit verify --anchors RECEIPTS",
    "audit.witness": "keep the request as evidence and ask the log's owner",
    "bom.mismatch": "refuse this release and ask its builder for one with a true bill of materials",
    "delta.malformed": "ask the staging host for a full bundle",
    "delta.base": "ask the staging host for a full bundle",
    "host.extra": "install the extra that the message names: pip install 'airgap[EXTRA]'",
    "host.internal": "run it again with AIRGAP_TRACEBACK=1 and report what it prints",
    "host.io": "check the path, its owner and its permissions, then run the same command again",
    "host.self": "install the package again in a fresh environment",
    "host.space": "free space, then run the same command again",
    "host.state": "wait until the other command has ended, then run it again",
    "policy.adjudication": "airgap policy adjudicate --help",
    "policy.list": "compare the notice with its printed edition; airgap policy load-list --help",
    "policy.known_at": "airgap audit show --kind policy.load",
    "policy.record": "give a whole record: airgap audit show --kind policy.decision",
    "policy.review": "airgap policy review --help",
    "policy.signature": "have it signed: airgap policy sign FILE --key KEY",
    "scan.graphs": "build the bundle again with `airgap build`",
    "store.missing": "airgap list shows what is installed",
    "trust.chain": "compare `airgap trust show` on this host and on the staging host",
    "trust.token": "check the PIN file, the labels and the module; pkcs11-tool -O -l lists a token",
    "trust.keyfile": "give a key file that `airgap keys new` made, and its own passphrase",
    "trust.time": "wait until then, or set the clock of this host right",
}
_BY_ROOM = {
    "archive": "copy the bundle from its medium again; if it stays so, ask the staging host",
    "audit": "keep the log as it is and run `airgap audit verify` on it",
    "backup": "take another copy of the backup; airgap restore --help says what it needs",
    "build": "airgap build --help",
    "chunk": "copy the bundle from its medium again; if it stays so, ask the staging host",
    "convert": "read the message above; `airgap inspect DIR` tells what is in the snapshot",
    "demo": "run the step that the message names by itself",
    "digest": "write sha256: and 64 hexadecimal digits",
    "enclave": "airgap doctor shows what this host offers",
    "evidence": "ask the publisher for the evidence again, or build from what is proved without it",
    "hold": "airgap hold list shows what is held, and what is missing for a release",
    "install": "check the disk of this host, then install again: it resumes",
    "manifest": "copy the bundle from its medium again; if it stays so, ask the staging host",
    "merkle": "keep both files as evidence and run `airgap audit verify --anchors`",
    "model": "airgap status; install the bundle again if it is damaged",
    "pack": "mend the file in policy/ of the tree that the message names",
    "parity": "do not release this graph; build again on an idle host with more memory",
    "pin": "make the pin file with sha256sum beside the snapshot that was chosen",
    "policy": "airgap policy explain '#NUMBER' shows rules and facts of a record of the log",
    "prompt": "airgap run --help",
    "request": "ask for less in one request",
    "scan": "take the file out or replace it by one that the format allows, then run it again",
    "science": "run it again; airgap doctor shows what this host offers",
    "seal": "airgap trust show lists people and roles; ask the staging host for the sealed bundle",
    "service": "ask the administrator for: systemctl status airgap",
    "sign": "read the report, then type the name of the model",
    "site": "mend site.toml of the tree; airgap site init writes a template",
    "source": "mend the snapshot or download it again, then run `airgap inspect DIR`",
    "start": "install the bundle again from its medium",
    "store": "airgap status",
    "trust": "airgap trust show",
    "transit": "give a key of a recipient (--transit-key), or ask for the file again",
    "usage": "airgap --help",
    "volume": "bring the volume that the message names, or a parity volume for it",
}


def next_step(error: AirgapError) -> str:
    """Return the hint of an error, or the usual step for its code."""
    return error.hint or usual_step(error.code)


def usual_step(code: str) -> str:
    """Return what usually helps after a code."""
    return _BY_CODE.get(code) or _BY_ROOM[code.partition(".")[0]]
