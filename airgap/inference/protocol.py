"""What the broker and the sealed worker say to each other; both sides import this module.

Standard library only. Every document is one JSON object in one frame of the channel
(docs/design/enclave.md, 3). Both sides parse strictly: `parse_request` inside the seal,
`parse_event` and `parse_reply` in the broker, which does not believe the worker.

**The prompt is a list of segments, never one string.** A segment is `{"tag": "<MoleculeS>"}` or
`{"text": "CCO"}`. A tag is looked up by name among the tags of the installed model and becomes
exactly that token id. A text is encoded as plain text, also where it reads `<MoleculeE>`, so no
value that a user typed can become a tag: on the reference model such a text is refused by
`prompt.g11`, on a byte-level vocabulary it stays letters. `segments_of` cuts *our own* tagged
strings, those that the grammar wrote; a user's value is checked before it enters one
(`prompt.g03`), or better, put into its own segment and never pasted. The worker adds the model's
start token itself, once, where the model has one.

Request `generate` (every field is required except `grammar`, which defaults to no constraint)::

    {"op": "generate", "prompt": [{"tag": "<MoleculeS>"}, {"text": "CCO"}, {"tag": "<MoleculeE>"},
     {"tag": "<ReverseReact>"}], "n": 32, "max_new_tokens": 200, "temperature": 1.2, "top_p": 0.85,
     "top_k": 50, "repetition_penalty": 1.05, "seed": 1, "stop": ["<ProteinE>"],
     "grammar": {"mode": "structure", "task": "retrosynthesis"}}

- `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch that cut off; the whole vocabulary is
  then in play. Order: logits, repetition penalty (over prompt and sample), grammar mask,
  temperature, top-k, top-p, draw (docs/design/science.md, 4).
- `stop` holds tags. The model's own end tokens always stop.
- `grammar` is `{"mode": "none"}`, `{"mode": "structure", "task": T}` with T one of `TASKS`, or
  `{"mode": "copy", "sequence": "MKV"}`: an exact copy, each residue bare or in a pocket pair, then
  `<ProteinE>`. A structure may carry `"valence": true`: a token after which no molecule can follow
  is taken out and drawn anew (`valence`).
- `"ppl_authors": true` asks for the authors' perplexity beside `logprob` (`authors`).
- `"deadline_ms": 600000` ends the request with `model.deadline` so long after it came.
- `"set": "5tQ..."` names the request set: what one person asks for together. The broker draws the
  name; it says nothing of the person. Prompts of one set share the keys and values of a common
  beginning (`prefixes`), and free slots go to the set that has the fewest.

Events of `generate`, in no fixed order among samples; `index` runs from 0 to n-1::

    {"event": "progress", "tokens": 812, "finished": 3, "n": 32}
    {"event": "sample", "index": 0, "text": "<MoleculeS>CC<MoleculeE>", "ids": [8, 28, 28, 9, 3],
     "finish_reason": "eos", "logprob": -4.1, "tokens": 5, "removed_mass": 0.0}

- `ids` are the sampled ids, all of them, the end or stop token included; `tokens` is their count.
- `text` keeps every special token except a final *end* token, which `finish_reason` states. A final
  stop tag is kept.
- `finish_reason`: `eos` an end token; `stop` a tag of `stop`; `length` the budget is used up;
  `dead_end` the grammar left no token.
- `logprob` is the natural logarithm of the probability of `ids` after the prompt, from raw logits
  at temperature 1, before penalty and mask, the end token included.
- `removed_mass` is the mean over steps of the raw probability that the grammar took away; with
  `valence` also that of each token that was drawn and refused: a lower bound, since what is never
  drawn is never tried.
- `ppl_authors` stands only where it was asked for.

Reply: `{"event": "done", "prompt_tokens": 9, "tokens": 1601, "elapsed_ms": 420, "runs": 77,
"rows": 32}`; `runs` counts calls of the graph, `rows` is the largest batch.

Request `score`: `{"op": "score", "prompt": [...], "completions": [[{"text": "CC"}, ...], ...]}`
gives the reply `{"event": "scores", "prompt_tokens": 9, "scores": [{"logprob": -4.1, "tokens": 5},
...]}`: each completion's own tokens after the prompt, no end token added. Request `{"op": "info"}`
gives the reply `{"event": "info", ...}`, the facts of the loaded model.

Request `{"op": "forget", "set": "5tQ..."}` lets go of the prefixes of a set and gives the reply
`{"event": "forgotten", "prefixes": 2}`.

**Several requests at once.** The request id of a frame tells requests apart; each gets its own
events and exactly one last frame: reply, error or fault. What a request gets does not depend on
what runs beside it nor on the order of arrival: a sample's tokens rest on its own request, its seed
and its index. Frames of the broker beside REQUEST are CANCEL, after which only the last frame comes
(`request.cancelled`, unless it was on its way), and CREDIT: events of a request may run ahead of
its reader by a window of bytes that the broker names at the start, each CREDIT gives some back, and
a request without credit is paused while the others go on. A sample leaves the seal as a whole: a
piece of a molecule could not be screened, so no smaller event exists.

A refusal is an error frame of the channel with a code: `request.malformed`, `request.limit`,
`request.cancelled`, `prompt.g03`, `prompt.g04`, `prompt.g10`, `prompt.g11` or `model.*`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from airgap.enclave.channel import ProgramError
from airgap.inference.strict import Fields, MalformedError, parse_object

SAMPLES_LIMIT = 10_000
NEW_TOKENS_LIMIT = 65_536
PROMPT_LIMIT = 65_536  # bytes of UTF-8 over all segments
REQUEST_LIMIT = 1024 * 1024  # bytes of one request
SEGMENTS_LIMIT = 20_000
STOPS_LIMIT = 16
SEQUENCE_LIMIT = 20_000  # residues of a copy
COMPLETIONS_LIMIT = 1_000
TEMPERATURE_LIMIT = 10.0
DEADLINE_LIMIT = 7 * 86_400_000  # milliseconds
SET_LIMIT = 64
PERPLEXITY_LIMIT = 1e300
SEED_LIMIT = 2**63 - 1
EVENT_LIMIT = 4 * 1024 * 1024  # bytes of one event or reply
TOKEN_ID_LIMIT = 2**24
TEMPERATURE_FLOOR = 1e-3  # smaller ones overflow: ask for 0, greedy

MODES = ("none", "structure", "copy")
TASKS = ("retrosynthesis", "molecule", "binding-site", "pocket-ligand", "material")
FINISH_REASONS = ("eos", "stop", "length", "dead_end")

TAG = re.compile(r"<[A-Za-z][A-Za-z0-9_]{0,62}>")
_CUT = re.compile(f"({TAG.pattern})")
_SET = re.compile(r"[A-Za-z0-9]+")
_RESIDUES = re.compile(r"[A-Z]+")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt: one tag by name, or plain text that can never become a tag."""

    text: str
    tag: bool = False

    def document(self) -> dict[str, str]:
        """Return the JSON form."""
        return {"tag" if self.tag else "text": self.text}


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the completion must obey; `task` belongs to `structure`, `sequence` to `copy`."""

    mode: str = "none"
    task: str = ""
    sequence: str = ""
    valence: bool = False

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        extra = {"structure": {"task": self.task}, "copy": {"sequence": self.sequence}}
        valence = {"valence": True} if self.valence else {}
        return {"mode": self.mode, **extra.get(self.mode, {}), **valence}


@dataclass(frozen=True, slots=True)
class Generate:
    """A request for `n` samples after one prompt."""

    prompt: tuple[Segment, ...]
    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...] = ()
    grammar: Grammar = field(default_factory=Grammar)
    ppl_authors: bool = False
    deadline_ms: int = 0
    request_set: str = ""

    def encode(self) -> bytes:
        """Return the bytes of the request."""
        return _encode(
            {
                "op": "generate",
                "prompt": [segment.document() for segment in self.prompt],
                "n": self.n,
                "max_new_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "repetition_penalty": self.repetition_penalty,
                "seed": self.seed,
                "stop": list(self.stop),
                "grammar": self.grammar.document(),
                **({"ppl_authors": True} if self.ppl_authors else {}),
                **({"deadline_ms": self.deadline_ms} if self.deadline_ms else {}),
                **({"set": self.request_set} if self.request_set else {}),
            }
        )


@dataclass(frozen=True, slots=True)
class Score:
    """A request for the log-likelihood of given completions."""

    prompt: tuple[Segment, ...]
    completions: tuple[tuple[Segment, ...], ...]

    def encode(self) -> bytes:
        """Return the bytes of the request."""
        return _encode(
            {
                "op": "score",
                "prompt": [segment.document() for segment in self.prompt],
                "completions": [[s.document() for s in one] for one in self.completions],
            }
        )


@dataclass(frozen=True, slots=True)
class Info:
    """A request for the facts of the loaded model."""

    def encode(self) -> bytes:
        """Return the bytes of the request."""
        return _encode({"op": "info"})


@dataclass(frozen=True, slots=True)
class Forget:
    """A request to let go of what a request set left: its person has gone."""

    request_set: str

    def encode(self) -> bytes:
        """Return the bytes of the request."""
        return _encode({"op": "forget", "set": self.request_set})


@dataclass(frozen=True, slots=True)
class Progress:
    """Event: work done so far."""

    tokens: int
    finished: int
    n: int

    def encode(self) -> bytes:
        """Return the bytes of the event."""
        return _encode(
            {"event": "progress", "tokens": self.tokens, "finished": self.finished, "n": self.n}
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """Event: one finished sample; the module's docstring defines each field."""

    index: int
    text: str
    ids: tuple[int, ...]
    finish_reason: str
    logprob: float
    removed_mass: float
    ppl_authors: float | None = None

    def encode(self) -> bytes:
        """Return the bytes of the event."""
        return _encode(
            {
                "event": "sample",
                "index": self.index,
                "text": self.text,
                "ids": list(self.ids),
                "finish_reason": self.finish_reason,
                "logprob": self.logprob,
                "tokens": len(self.ids),
                "removed_mass": self.removed_mass,
                **({} if self.ppl_authors is None else {"ppl_authors": self.ppl_authors}),
            }
        )


@dataclass(frozen=True, slots=True)
class Done:
    """Reply of `generate`: totals."""

    prompt_tokens: int
    tokens: int
    elapsed_ms: int
    runs: int
    rows: int

    def encode(self) -> bytes:
        """Return the bytes of the reply."""
        return _encode(
            {
                "event": "done",
                "prompt_tokens": self.prompt_tokens,
                "tokens": self.tokens,
                "elapsed_ms": self.elapsed_ms,
                "runs": self.runs,
                "rows": self.rows,
            }
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """Reply of `score`: (natural log-likelihood, number of tokens) of each completion, in order."""

    prompt_tokens: int
    scores: tuple[tuple[float, int], ...]

    def encode(self) -> bytes:
        """Return the bytes of the reply."""
        return _encode(
            {
                "event": "scores",
                "prompt_tokens": self.prompt_tokens,
                "scores": [{"logprob": value, "tokens": count} for value, count in self.scores],
            }
        )


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Reply of `forget`: how many prefixes there were."""

    prefixes: int

    def encode(self) -> bytes:
        """Return the bytes of the reply."""
        return _encode({"event": "forgotten", "prefixes": self.prefixes})


def encode_info(facts: dict[str, Any]) -> bytes:
    """Return the reply of `info`."""
    return _encode({"event": "info", **facts})


def segments_of(tagged: str) -> tuple[Segment, ...]:
    """Cut a tagged string that our own grammar wrote into segments.

    Every `<Name>` becomes a tag, so a user's value must have passed `prompt.g03` before it was put
    into such a string.

    Raises:
        ProgramError: `prompt.g04`; a `<` or `>` that belongs to no tag.

    """
    found: list[Segment] = []
    at = 0
    for place, piece in enumerate(_CUT.split(tagged)):
        is_tag = place % 2 == 1
        if not is_tag and ("<" in piece or ">" in piece):
            stray = at + min(piece.find(mark) for mark in "<>" if mark in piece)
            raise ProgramError(
                "prompt.g04",
                f"character {stray} of the prompt is an angle bracket that belongs to no tag",
                "a tag reads <Name>, without spaces",
            )
        if piece:
            found.append(Segment(piece, tag=is_tag))
        at += len(piece)
    return tuple(found)


def tagged_of(segments: Iterable[Segment]) -> str:
    """Return the segments as one string, for display; it cannot be told apart again in general."""
    return "".join(segment.text for segment in segments)


def parse_request(raw: bytes) -> Generate | Score | Info | Forget:
    """Read a request.

    Raises:
        ProgramError: `request.malformed`, or `request.limit` where it is too long.

    """
    if len(raw) > REQUEST_LIMIT:
        raise ProgramError(
            "request.limit",
            f"the request has {len(raw)} bytes, more than {REQUEST_LIMIT}",
            "shorten the prompt",
        )
    try:
        fields = parse_object(raw, limit=REQUEST_LIMIT, what="request")
        operation = fields.one_of("op", ("generate", "score", "info", "forget"))
        request: Generate | Score | Info | Forget
        if operation == "generate":
            request = _generate(fields)
        elif operation == "score":
            request = _score(fields)
        elif operation == "forget":
            request = Forget(_set(fields))
        else:
            request = Info()
        fields.done()
    except MalformedError as error:
        raise ProgramError(
            "request.malformed", str(error), "the fields are listed in airgap/inference/protocol.py"
        ) from error
    return request


def parse_event(raw: bytes) -> Progress | Sample:
    """Read an event of an untrusted worker; MalformedError for anything that is not one."""
    fields = parse_object(raw, limit=EVENT_LIMIT, what="event")
    event: Progress | Sample
    if fields.one_of("event", ("progress", "sample")) == "progress":
        event = Progress(
            tokens=fields.integer("tokens", 0, SAMPLES_LIMIT * NEW_TOKENS_LIMIT),
            finished=fields.integer("finished", 0, SAMPLES_LIMIT),
            n=fields.integer("n", 1, SAMPLES_LIMIT),
        )
    else:
        event = Sample(
            index=fields.integer("index", 0, SAMPLES_LIMIT - 1),
            text=fields.text("text", EVENT_LIMIT),
            ids=fields.integers("ids", (0, NEW_TOKENS_LIMIT), TOKEN_ID_LIMIT),
            finish_reason=fields.one_of("finish_reason", FINISH_REASONS),
            logprob=fields.real("logprob", -1e9, 1e-6),
            removed_mass=fields.real("removed_mass", 0.0, 1.0),
            ppl_authors=fields.real("ppl_authors", 1.0 - 1e-6, PERPLEXITY_LIMIT)
            if "ppl_authors" in fields
            else None,
        )
        if fields.integer("tokens", 0, NEW_TOKENS_LIMIT) != len(event.ids):
            fields.fail("tokens", "the number of ids")
    fields.done()
    return event


def parse_reply(raw: bytes) -> Done | Scores | Forgotten | dict[str, Any]:
    """Read the reply of an untrusted worker (`info` stays a plain object); MalformedError else."""
    fields = parse_object(raw, limit=EVENT_LIMIT, what="reply")
    kind = fields.one_of("event", ("done", "scores", "info", "forgotten"))
    if kind == "info":
        return fields.rest()
    reply: Done | Scores | Forgotten
    if kind == "forgotten":
        reply = Forgotten(fields.integer("prefixes", 0, 2**31))
        fields.done()
        return reply
    prompt_tokens = fields.integer("prompt_tokens", 1, PROMPT_LIMIT + 1)
    if kind == "done":
        reply = Done(
            prompt_tokens=prompt_tokens,
            tokens=fields.integer("tokens", 0, SAMPLES_LIMIT * NEW_TOKENS_LIMIT),
            elapsed_ms=fields.integer("elapsed_ms", 0, 2**53),
            runs=fields.integer("runs", 1, 2**53),
            rows=fields.integer("rows", 1, SAMPLES_LIMIT),
        )
    else:
        reply = Scores(
            prompt_tokens=prompt_tokens,
            scores=tuple(_scored(one) for one in fields.items("scores", 1, COMPLETIONS_LIMIT)),
        )
    fields.done()
    return reply


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _generate(fields: Fields) -> Generate:
    request = Generate(
        prompt=_segments(fields.items("prompt", 1, SEGMENTS_LIMIT)),
        n=fields.integer("n", 1, SAMPLES_LIMIT),
        max_new_tokens=fields.integer("max_new_tokens", 1, NEW_TOKENS_LIMIT),
        temperature=fields.real("temperature", 0.0, TEMPERATURE_LIMIT),
        top_p=fields.real("top_p", 0.0, 1.0),
        top_k=fields.integer("top_k", 0, TOKEN_ID_LIMIT),
        repetition_penalty=fields.real("repetition_penalty", 0.01, 100.0),
        seed=fields.integer("seed", 0, SEED_LIMIT),
        stop=_stops(fields),
        grammar=_grammar(fields.take("grammar")) if "grammar" in fields else Grammar(),
        ppl_authors=fields.flag("ppl_authors") if "ppl_authors" in fields else False,
        deadline_ms=fields.integer("deadline_ms", 1, DEADLINE_LIMIT)
        if "deadline_ms" in fields
        else 0,
        request_set=_set(fields) if "set" in fields else "",
    )
    if 0.0 < request.temperature < TEMPERATURE_FLOOR:
        fields.fail("temperature", f"0 (greedy) or at least {TEMPERATURE_FLOOR}")
    if request.top_p == 0.0:
        fields.fail("top_p", "above 0")
    return request


def _score(fields: Fields) -> Score:
    return Score(
        prompt=_segments(fields.items("prompt", 1, SEGMENTS_LIMIT)),
        completions=tuple(
            _segments(_list(one)) for one in fields.items("completions", 1, COMPLETIONS_LIMIT)
        ),
    )


def _list(value: object) -> list[Any]:
    if type(value) is not list or not 1 <= len(value) <= SEGMENTS_LIMIT:
        raise MalformedError(f"request: a completion must be a list of 1 to {SEGMENTS_LIMIT}")
    return value


def _segments(values: list[Any]) -> tuple[Segment, ...]:
    found = []
    size = 0
    for value in values:
        one = Fields(value, "segment")
        if "tag" in one:
            text = one.text("tag", PROMPT_LIMIT)
            if not TAG.fullmatch(text):
                one.fail("tag", "a name in angle brackets")
            found.append(Segment(text, tag=True))
        else:
            text = one.text("text", PROMPT_LIMIT)
            found.append(Segment(text))
        one.done()
        size += len(text.encode())
    if size > PROMPT_LIMIT:
        raise ProgramError(
            "request.limit",
            f"the prompt has {size} bytes, more than {PROMPT_LIMIT}",
            "shorten the prompt",
        )
    return tuple(found)


def _set(fields: Fields) -> str:
    name = fields.text("set", SET_LIMIT)
    if not _SET.fullmatch(name):
        fields.fail("set", "letters and digits")
    return name


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.texts("stop", (0, STOPS_LIMIT), 64)
    if not all(TAG.fullmatch(stop) for stop in stops):
        fields.fail("stop", "names in angle brackets")
    return stops


def _grammar(value: object) -> Grammar:
    fields = Fields(value, "grammar")
    mode: str = fields.one_of("mode", MODES)
    task = fields.one_of("task", TASKS) if mode == "structure" else ""
    sequence = fields.text("sequence", SEQUENCE_LIMIT) if mode == "copy" else ""
    if mode == "copy" and not _RESIDUES.fullmatch(sequence):
        fields.fail("sequence", "one or more capital letters")
    valence = fields.flag("valence") if mode == "structure" and "valence" in fields else False
    fields.done()
    return Grammar(mode=mode, task=task, sequence=sequence, valence=valence)


def _scored(value: object) -> tuple[float, int]:
    fields = Fields(value, "score")
    row = (fields.real("logprob", -1e9, 1e-6), fields.integer("tokens", 0, PROMPT_LIMIT))
    fields.done()
    return row
