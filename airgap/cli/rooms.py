"""What each room checks, and how things stand after its refusal: the words around an error code."""

from __future__ import annotations

from typing import NamedTuple


class Room(NamedTuple):
    """A room of codes: what is checked there, what holds after a refusal, where to read on."""

    checked: str
    after: str
    read: str


_VERIFY = (
    "Nothing was written but, with --resume, which chunks held; an install left the releases that "
    "answer as they were, and put the refusal on record."
)
_STAGING = "No draft was written; what was finished of a build is kept and taken up by the next."
_RUN = "No answer was released. What had begun is on record with how it ended."

ROOMS: dict[str, Room] = {
    "archive": Room(
        "The file as a container: one layout, padding of zeros, known names and types, its size to "
        "the byte. A reader compares bytes and interprets nothing that the writer would not write.",
        _VERIFY,
        "bundle/FORMAT.md, sections 2 and 3",
    ),
    "audit": Room(
        "The usage log: that one writer holds it, that its records and signed heads agree, that "
        "the disk takes what is written, and that outside heads are still part of it.",
        "A log that cannot be written admits nothing: no answer leaves without a durable record. "
        "Keep the folder as it is before anything else is tried.",
        "docs/design/audit.md; docs/auditor.md",
    ),
    "backup": Room(
        "A backup: its list of files, each digest, the log inside and its key against the one that "
        "was given.",
        "Nothing lies under the name of the restored tree; the tree that was backed up is as it "
        "was.",
        "docs/operator.md",
    ),
    "bom": Room(
        "The bill of materials against the files that are in the bundle.",
        _VERIFY,
        "docs/design/bundle.md",
    ),
    "build": Room(
        "What a build was asked for, and that its result is complete.",
        _STAGING,
        "docs/operator.md",
    ),
    "chunk": Room(
        "Every chunk of the body against the tree of hashes that was signed.",
        _VERIFY,
        "bundle/FORMAT.md, sections 3 and 11",
    ),
    "convert": Room(
        "The conversion to ONNX in its sealed process: what it may read, and that it left only the "
        "files that were expected, in the form that was expected.",
        _STAGING,
        "docs/design/inference.md, 3",
    ),
    "delta": Room(
        "A delta: its list of pieces, and the older release that it builds on.",
        _VERIFY,
        "bundle/FORMAT.md, section 15",
    ),
    "demo": Room(
        "The demonstration: that each step ended as it must.",
        "The folder of the demonstration holds what was done until then.",
        "README.md",
    ),
    "digest": Room("The form of a digest.", "Nothing was done.", "bundle/FORMAT.md, section 1"),
    "enclave": Room(
        "The seal of a process, before it gets a byte: namespaces, Landlock, filters of system "
        "calls, identity, descriptors. What cannot be shown to hold counts as open.",
        "The process was ended before it saw a request. There is no option that runs it unsealed.",
        "docs/design/enclave.md; docs/auditor.md",
    ),
    "evidence": Room(
        "What a publisher signed about the weights: model signatures, Sigstore bundles, checksums, "
        "and whom this host believes.",
        "What could not be verified is no evidence; the level of provenance is that of the rest.",
        "bundle/FORMAT.md, section 17; docs/design/bundle.md",
    ),
    "hold": Room(
        "What is held for review, and who may release it.",
        "What is held stays held.",
        "docs/design/policy.md, 7",
    ),
    "host": Room(
        "This host itself: its files, its disk, the installed package.",
        "What was being written is not under its name; running the command again goes on or begins "
        "anew.",
        "docs/operator.md",
    ),
    "install": Room(
        "What was written to the store, read back from the disk.",
        "The release before answers. What was copied is taken up by the next attempt.",
        "docs/operator.md; bundle/FORMAT.md, section 11",
    ),
    "manifest": Room(
        "The signed manifest: its fields, paths, sizes and how they fit the body.",
        _VERIFY,
        "bundle/FORMAT.md, section 5",
    ),
    "merkle": Room(
        "A proof of inclusion or consistency against a signed head.",
        "Nothing was changed. Both sides of the comparison are evidence: keep them.",
        "docs/design/audit.md",
    ),
    "model": Room(
        "The installed model: its graphs, tokenizer and settings, the provider that was asked for, "
        "and the memory that a request needs.",
        _RUN,
        "docs/design/inference.md",
    ),
    "pack": Room(
        "A pack of rules: its form, its signature, and that it only adds or tightens.",
        "No decision was made with it; without readable rules nothing is permitted.",
        "docs/policy-author.md",
    ),
    "parity": Room(
        "Whether a converted graph computes what the source model computes.",
        "The graph is in no bundle, or its release does not answer on this host.",
        "docs/design/inference.md, 3",
    ),
    "pin": Room(
        "The digests that were fixed before a snapshot was read.",
        _STAGING,
        "docs/operator.md",
    ),
    "policy": Room(
        "A decision of the rules: facts, lists, dates, approvals. A fact that is unknown never "
        "means yes.",
        "The refusal is on record with every rule that was asked. Nothing was admitted or "
        "released.",
        "docs/design/policy.md; docs/policy-author.md",
    ),
    "prompt": Room(
        "What a person typed, before a model sees it: structures, sequences, numbers, lengths.",
        "Nothing was sent to the model. The refusal is on record.",
        "docs/guide.md",
    ),
    "request": Room(
        "One request to the sealed worker: its limits and its time.",
        _RUN,
        "docs/design/inference.md, 5",
    ),
    "scan": Room(
        "Every file by a strict parser of its type; a type that has none may not enter.",
        _VERIFY,
        "docs/design/bundle.md, 5",
    ),
    "science": Room(
        "What a model wrote, read by chemistry in a sealed process.",
        _RUN,
        "docs/design/science.md",
    ),
    "seal": Room(
        "The signatures over the manifest: enough different people, in force, none revoked, and "
        "the builder not among them.",
        _VERIFY,
        "bundle/FORMAT.md, section 10",
    ),
    "service": Room(
        "The daemon and its socket: who connects, what the file of roles says, and who wrote it.",
        _RUN,
        "docs/operator.md",
    ),
    "sign": Room(
        "That the person who signs has read what she signs.",
        "Nothing was signed.",
        "docs/operator.md",
    ),
    "site": Room(
        "site.toml: what this institution says about itself, its people and its projects.",
        "Nothing was done: an act without a known site is an act without a known rule.",
        "docs/operator.md",
    ),
    "source": Room(
        "A snapshot from a hub: its files, configuration, shapes and licences.",
        _STAGING,
        "docs/design/bundle.md",
    ),
    "start": Room(
        "An installed release, hashed again before each start.",
        "It was not started. The damaged copy is set aside when the release is installed again.",
        "docs/operator.md",
    ),
    "store": Room(
        "The store of this host: what is installed, what answers, what has been.",
        "The store is as it was.",
        "docs/operator.md",
    ),
    "transit": Room(
        "An encrypted file: for whom it is, and each of its blocks.",
        "No plain file was written.",
        "bundle/FORMAT.md, section 16",
    ),
    "trust": Room(
        "Whose word counts here: the chain of roots, dates, epochs, the revocation list, the "
        "clock.",
        "The trust root is as it was, unless the refusal itself came with a newer list or root: "
        "bad news is kept.",
        "bundle/FORMAT.md, sections 9, 18, 19 and 21; SECURITY.md",
    ),
    "usage": Room("The words of the command.", "Nothing was done.", "airgap COMMAND --help"),
    "volume": Room(
        "The volumes of a set: which there are, which are whole, in which order.",
        _VERIFY,
        "bundle/FORMAT.md, section 14",
    ),
}
