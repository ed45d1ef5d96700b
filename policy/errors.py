"""Errors of all three packages: what is refused, what failed, and the stable code of each.

Every error says what was checked, what was expected and what was found, and carries a next step
that works without a network. Codes read `room.reason`; scripts and tests rely on them.
"""

from __future__ import annotations

from typing import ClassVar

CODE_LIMIT = 32


class AirgapError(Exception):
    """Base of every error that this project raises on purpose.

    Args:
        code: A key of `CODES`.
        message: What was checked, expected and found. The caller quotes and cuts
            untrusted text.
        hint: A next step that works offline; empty when there is none to give.

    Raises:
        KeyError: `code` is not listed; a mistake of the programmer.

    """

    exit_status: ClassVar[int] = 3

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        if code not in CODES:
            raise KeyError(code)
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class RefusedError(AirgapError):
    """We understood, and the answer is no. Nothing changed."""

    exit_status = 1


class UsageError(AirgapError):
    """The command line or a request cannot be understood. Nothing was tried."""

    exit_status = 2


class FaultError(AirgapError):
    """We could not find out: a full disk, an unreadable file, a dead process. Nothing changed."""

    exit_status = 3


CODES: dict[str, str] = {
    # -- audit log ------------------------------------------------------------------------------
    "audit.absent": "there is no audit log here",
    "audit.closed": "the audit log is closed",
    "audit.epoch": "a key of the audit log signed records of another epoch than its own",
    "audit.export": "an export of the audit log is not what its host signed",
    "audit.full": "only the reserve is left: the audit log admits no new work",
    "audit.halted": "the audit log stopped after a fault and admits nothing",
    "audit.history": "the audit log contradicts its own signed heads",
    "audit.key": "the audit key or verifier key cannot be used",
    "audit.locked": "another process holds the audit log",
    "audit.note": "a signed checkpoint is malformed or its signature does not hold",
    "audit.object": "a record cites an object that is not stored",
    "audit.order": "a record out of order: no open intent, or one that exists already",
    "audit.owner": "the log belongs to another account than its service's; root leaves it",
    "audit.payload": "an encrypted payload or its key is not what the record commits to",
    "audit.people": "an act of two people lacks a signature, or was signed for something else",
    "audit.policy": "a trust policy for the audit log is malformed",
    "audit.proof": "a receipt is malformed or proves something else",
    "audit.quorum": "too few of the witnesses that the policy names have cosigned",
    "audit.record": "a record breaks the schema",
    "audit.retention": "the retention policy does not let these records go",
    "audit.service": "the audit service is not there, or refuses what it was asked",
    "audit.tampered": "the audit log was changed",
    "audit.timeout": "the audit log did not become durable in time",
    "audit.unknown": "verification cannot tell: no outside head was compared, or a file is missing",
    "audit.witness": "a witness refuses to cosign, or its state cannot be read",
    # -- command line -------------------------------------------------------------------------
    "usage.argument": "a command-line argument has no meaning here",
    # -- shared vocabulary ----------------------------------------------------------------------
    "digest.malformed": "text is not a digest",
    # -- bundle: archive ------------------------------------------------------------------------
    "archive.header": "a header that the writer would not have written",
    "archive.limit": "the head or a part of it is too large",
    "archive.name": "a member with a name that stands twice or is not listed",
    "archive.order": "the members of the head do not stand in their order",
    "archive.padding": "bytes between members are not what the writer writes",
    "archive.trailing": "bytes after the end of the archive",
    "archive.truncated": "the archive ends too early",
    "archive.type": "a member of a type that a bundle never has",
    "chunk.leaf": "a chunk of the body is not the sealed one",
    "chunk.root": "the list of chunk hashes is not the sealed one",
    "bom.mismatch": "the bill of materials and the files differ",
    "delta.base": "the release that a delta builds on is missing, damaged or another one",
    "delta.malformed": "a delta contradicts the manifest or its base",
    "transit.key": "no key that was given opens the transit encryption",
    "transit.malformed": "the header of a transit encryption is not of the one allowed shape",
    "transit.tag": "an encrypted block is not the one that was encrypted there",
    "volume.missing": "a volume of the set is not there",
    "volume.order": "a volume lies about its place, or stands twice",
    "volume.set": "a volume of another set",
    # -- bundle: manifest -----------------------------------------------------------------------
    "manifest.canonical": "the manifest is not canonical JSON",
    "manifest.layout": "the archive and the list of files in the manifest differ",
    "manifest.paths": "a path that some host would read in another way",
    "manifest.schema": "the manifest breaks its schema",
    "manifest.vectors": "the parity vectors are not those that the manifest claims",
    "manifest.version": "the manifest has a format that this program does not read",
    "scan.graphs": "graphs.json breaks its schema or contradicts the manifest",
    # -- bundle: seal and trust -------------------------------------------------------------------
    "seal.algorithm": "a signature of a scheme that this program does not verify",
    "seal.malformed": "the seal is not an envelope of the one allowed shape",
    "seal.people": "enough signatures, but of too few distinct people beside the builder",
    "seal.profile": "the seal has another profile than this host demands",
    "seal.revoked": "without the signatures of revoked keys the seal does not hold",
    "seal.role": "a required role, or the builder, did not sign",
    "seal.subject": "the seal is that of another manifest or body",
    "seal.threshold": "too few approvers' signatures hold",
    "seal.type": "a signed document of another type",
    "trust.chain": "the chain of trust roots does not hold",
    "trust.clock": "the clock of this host lies before something that has happened",
    "trust.epoch": "an older or twin release of the same line",
    "trust.exists": "this host has a trust root already",
    "trust.expired": "the release has expired",
    "trust.fingerprint": "the root document is not the one whose fingerprint was typed",
    "trust.keyfile": "a key file is malformed, open to others, or locked",
    "trust.missing": "this host has no trust root",
    "trust.revocation": "the revocation list does not hold, or is older than one seen here",
    "trust.revoked": "the release, a model, a file or a wheel in it is revoked",
    "trust.rollback": "the approval of a rollback does not hold for this release on this host",
    "trust.stale": "the revocation list is missing or stale, and the root demands a newer one",
    "trust.root": "the trust root breaks its own rules",
    "trust.token": "a key in a token cannot be opened, made or used",
    "trust.time": "the release is not valid yet",
    # -- bundle: trees --------------------------------------------------------------------------
    "merkle.proof": "an inclusion or consistency proof does not lead to the root",
    # -- science: prompts and their fields ---------------------------------------------------------
    "prompt.g01": "a start tag is not closed",
    "prompt.g02": "an end tag closes what was not opened",
    "prompt.g03": "a value contains a tag",
    "prompt.g04": "an unknown tag, or wrong case or spaces",
    "prompt.g05": "the operator of the task is missing or in the wrong place",
    "prompt.g06": "a letter outside the residue alphabet",
    "prompt.g07": "a SMILES is empty or does not parse",
    "prompt.g08": "atom maps, salts or several fragments in a product",
    "prompt.g09": "a pocket holds more than one residue, or levels are mixed",
    "prompt.g10": "prompt and budget exceed the context of the model",
    "prompt.g11": "the checkpoint lacks a token that the task needs",
    "prompt.g12": "a reaction SMILES stands where a molecule is wanted",
    "prompt.input": "an input of the task is missing, unknown or unreadable",
    "prompt.option": "a sampling option is unknown or out of range",
    "prompt.size": "a prompt or field is larger than the limit",
    "prompt.structure": "a structure file does not give the chain, ligand or residues asked for",
    "prompt.task": "no task of that name",
    "prompt.unpublished": "the prompt format of this task is not published by the authors",
    # -- policy: rules, lists, lineage, decisions -----------------------------------------------
    "pack.duplicate": "one rule, list or party id stands twice",
    "pack.limit": "a pack is larger or deeper than a pack may be",
    "pack.schema": "a pack has an unknown field, a missing field or a wrong type",
    "pack.version": "a pack of a format that this version does not read",
    "pack.vocabulary": "a rule uses a name, value or form outside the closed vocabulary",
    "pack.yaml": "a pack is not the strict YAML that packs are written in",
    "policy.approval": "an approval is not the signed statement that it should be",
    "policy.denied": "the policy denies it",
    "policy.held": "the policy holds it until named people release it",
    "policy.model": "the lineage registry holds no such model",
    "policy.adjudication": "an adjudication is not the signed statement that it should be",
    "policy.list": "a notice does not have the form or the counts of the list that it should hold",
    "policy.known_at": "what was held at a time is not on record",
    "policy.record": "a decision record from which no question can be made again",
    "policy.review": "a review is not the signed statement that it should be",
    "policy.signature": "a file of rules or lists is not signed by the people who may",
    "policy.request": "a request names an unregistered fact or a value of a wrong type",
    # -- holds ----------------------------------------------------------------------------------
    "hold.file": "a hold, or the decision that it cites, is not the file that was written",
    "hold.key": "a key that does not open or receive what is held",
    "hold.model": "a hold is of another release than the one that is served",
    "hold.missing": "no hold answers to that name, or its output was not kept",
    "hold.waiting": "a hold is not released yet, or its answer is held under a later reference",
    "hold.release": "a release is not the signed statement that it should be, or cannot be made",
    # -- site: institution facts and settings ---------------------------------------------------
    "site.exists": "a site.toml is there already",
    "site.missing": "there is no site.toml",
    "site.person": "the account belongs to no person, or to several, of site.toml",
    "site.project": "site.toml holds no such project",
    "site.schema": "site.toml has an unknown field, a missing field or a wrong type",
    "site.screener": "the sequence screener is not the one that site.toml pins",
    "site.toml": "site.toml is not TOML of a fit size",
    # -- staging: scan --------------------------------------------------------------------------
    "scan.config": "a configuration makes a loader run code, or is not strict JSON",
    "scan.onnx": "a graph breaks the schema, or is of a version that is not known",
    "scan.onnx.domain": "a graph uses operators that are not known",
    "scan.onnx.external": "a graph reads bytes outside its own files",
    "scan.pickle": "a pickle, or a format that can hold one",
    "scan.role": "no parser reads this file; executable formats have none",
    "scan.safetensors": "a weight file breaks the format",
    "scan.template": "a chat template does more than arrange messages",
    "scan.tripwire": "a scanner from outside reports a hit",
    "scan.text": "a document is not plain UTF-8 text",
    "scan.tokenizer": "a tokenizer is of an unknown kind or beyond its limits",
    "scan.wheel": "a wheel is not what its RECORD says, or runs code by itself",
    # -- staging: source, conversion, sealing ---------------------------------------------------
    "source.architecture": "the model is of an architecture that is not converted",
    "source.card": "the front matter of the model card cannot be read",
    "source.changed": "a file of the snapshot changed during the work",
    "source.empty": "the snapshot holds no model",
    "source.huge": "the snapshot is beyond the limits",
    "source.incomplete": "a file that the model needs is missing",
    "source.link": "a link that is not one of the hub's own cache",
    "source.missing": "there is no such folder",
    "source.name": "a file name that some host would read in another way",
    "source.values": "a weight is not a finite number",
    "source.shape": "the tensors are not those of the configuration",
    "source.type": "not a folder, or something in it is neither file nor folder",
    "evidence.anchor": "no anchor of this site fits a piece of evidence, or an anchor is malformed",
    "evidence.identity": "evidence was signed by somebody else than expected",
    "evidence.level": "a release claims more about its origin than its evidence proves",
    "evidence.malformed": "a piece of evidence is not of the form that it should have",
    "evidence.oms": "a model signature does not cover exactly the files that are there",
    "evidence.signature": "a signature over evidence does not hold",
    "evidence.subject": "evidence speaks of other files",
    "evidence.summary": "the summary of the evidence is missing, or contradicts the evidence",
    "pin.malformed": "the pin file is not in the form of sha256sum",
    "pin.mismatch": "the snapshot is not the one that was pinned",
    "convert.failed": "the conversion did not finish",
    "convert.none": "no graph can be made of this architecture",
    "convert.output": "the conversion left something else than a graph",
    "parity.device": "the parity vectors could not be run on this host",
    "parity.failed": "the graph does not answer like its source",
    "parity.run": "the parity run did not finish",
    "parity.vectors": "too few prompts can be used with this tokenizer",
    "build.output": "the output file cannot be made",
    "build.seal": "no sealed runner: conversion is not done without one",
    "build.facts": "a fact that the manifest needs is missing",
    "build.target": "no such kind of host, or none is named",
    "build.wheels": "the wheels that a host needs cannot be gathered",
    "build.bom": "the bill of materials breaks its schema",
    "sign.confirm": "the confirmation is not the model's name or digest",
    # -- inference: the loaded model and the requests to it ----------------------------------------
    "model.reply": "the sealed worker broke the protocol",
    "model.config": "the configuration of the worker cannot be understood",
    "model.deadline": "a request was not done in its time",
    "model.engine": "engines of a GPU are not signed, have changed, or are another machine's",
    "model.facts": "graphs.json breaks its schema or contradicts itself",
    "model.file": "a file of the model is missing, unreadable or too large",
    "model.grammar": "no grammar can be applied with this tokenizer, or it does not compile",
    "model.graph": "the graph does not load, or is not the one that graphs.json describes",
    "model.memory": "not enough memory for one sample",
    "model.nan": "the model gave logits that are not numbers",
    "model.precision": "the model does not come in the precision that was demanded",
    "model.provider": "the execution provider that was demanded does not run",
    "model.run": "the graph failed while it ran",
    "model.stop": "a stop tag is not in the vocabulary of the model",
    "model.tags": "a tag is missing, clashes or is not special in the tokenizer",
    "model.tokenizer": "the tokenizer does not load or contradicts graphs.json",
    "model.valence": "the filter `valence` is not installed, not loaded or not possible here",
    "request.busy": "every place for a request is taken, or an account was refused too often",
    "request.cancelled": "a request was cancelled by the person who sent it",
    "request.limit": "a request to the worker exceeds a limit",
    "request.malformed": "a request to the worker cannot be understood",
    # -- service: the daemon -------------------------------------------------------------------
    "service.absent": "there is no daemon at the socket",
    "service.client": "the other end of the socket does not keep to the protocol",
    "service.draining": "the daemon is ending and takes no new request",
    "service.failed": "sealed workers end one after the other; the daemon starts no more",
    "service.locked": "another daemon serves this tree",
    "service.reloading": "the daemon changes to another release or worker",
    "service.roles": "the file of roles is malformed or may be written by others",
    # -- science: the sealed helper ----------------------------------------------------------
    "science.reply": "the sealed helper sent what is no reply",
    "science.svg": "a drawing holds what no drawing may hold",
    # -- enclave: the layers of the seal --------------------------------------------------------
    "enclave.arch": "no filter is enabled for this architecture",
    "enclave.channel": "the sealed process broke the frame protocol, or a frame is over its cap",
    "enclave.deadline": "the sealed process did not come up in time",
    "enclave.descriptors": "the sealed process holds a descriptor that it should not",
    "enclave.dumpable": "the sealed process can be read by others of its uid",
    "enclave.environment": "the environment of the sealed process is not the one that was built",
    "enclave.evidence": "the facts about the sealed process cannot be read",
    "enclave.exec": "the program could not be started inside the seal",
    "enclave.files": "the sealed process cannot read what it needs",
    "enclave.gpu": "there is no GPU that the sealed process could use",
    "enclave.identity": "the sealed process would keep an id or a capability",
    "enclave.incident": "the sealed process made a call that its seal kills for",
    "enclave.job": "a conversion job cannot be sealed as it was asked for",
    "enclave.landlock": "the file rules are not in force",
    "enclave.limits": "a resource limit could not be set",
    "enclave.namespaces": "the namespaces could not be made, or are the host's own",
    "enclave.network": "the sealed process has a network",
    "enclave.nnp": "the sealed process could gain privileges by exec",
    "enclave.output": "a sealed conversion left something that is not accepted",
    "enclave.parent": "the sealed process would outlive its parent",
    "enclave.probe": "the probe found an open channel, or its control proved nothing",
    "enclave.probe_file": "the file of an auditor's probe cannot be used",
    "enclave.program": "the program inside the seal failed",
    "enclave.root": "the private root is not closed",
    "enclave.rung": "this host cannot reach the least rung that is allowed",
    "enclave.stage1": "the first system call filter is not in force",
    "enclave.stage2": "the second system call filter is not in force",
    "enclave.start": "the launcher did not start as a fresh process",
    "enclave.telemetry": "onnxruntime would phone home",
    "enclave.worker": "the sealed process died or was ended",
    # -- install ----------------------------------------------------------------------------------
    "install.digest": "an installed file differs from the manifest after it was written",
    "install.target": "the bundle has no wheels for this host",
    "install.wheel": "a wheel is missing, or is not the sealed one",
    "install.io": "writing to the store failed",
    "install.needed": "something on this host still needs that environment",
    "install.update": "there is no release of that line to update",
    "start.digest": "an installed bundle is damaged",
    "store.active": "the release answers by default",
    "store.missing": "no installed bundle, or no model, answers to that name",
    "store.state": "the state of the store is damaged",
    # -- demonstration ------------------------------------------------------------------------
    "demo.step": "a step of the demonstration did not end as it must",
    # -- host: the machine that runs the command ------------------------------------------------
    "host.self": "the three packages do not lie in one directory, or one is missing",
    "host.io": "a file could not be read or written",
    "backup.digest": "a file of a backup is not the one that was backed up",
    "backup.format": "the file holds no backup that can be read",
    "backup.log": "the log of a backup does not verify, or its key is another",
    "backup.target": "something lies where a backup shall be restored",
    "backup.tree": "the tree holds what a backup cannot hold",
    "host.state": "the state of this host is in use or unreadable",
    "host.space": "not enough free space",
    "host.extra": "an optional dependency is not installed",
    "host.internal": "an unexpected error: a defect of this program",
}


def describe(code: str) -> str:
    """Return the one-line meaning of `code`; KeyError when it is not listed."""
    return CODES[code]
