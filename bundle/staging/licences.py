"""Which licences a snapshot states, where, and in which words; and the front matter of its card.

Reports every statement with place and digest; decides nothing: whether they go together is for the
policy. A card is a claim of its publisher, so every fact from it is `declared`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from policy.errors import RefusedError

FRONT_LIMIT = 64 * 1024
MAX_DEPTH = 12

# The licence texts that we recognise, by words that stand near their beginning.
_TEXTS = (
    ("Apache-2.0", r"apache license\s+version 2\.0, january 2004"),
    ("CC-BY-NC-SA-4.0", r"creative commons attribution-noncommercial-sharealike 4\.0"),
    ("CC-BY-NC-4.0", r"creative commons attribution-noncommercial 4\.0"),
    ("CC-BY-SA-4.0", r"creative commons attribution-sharealike 4\.0"),
    ("CC-BY-4.0", r"creative commons attribution 4\.0|attribution 4\.0 international"),
    ("CC0-1.0", r"cc0 1\.0 universal"),
    ("LicenseRef-Llama-3.3", r"llama 3\.3 community license agreement"),
    ("LicenseRef-Llama-3.2", r"llama 3\.2 community license agreement"),
    ("LicenseRef-Llama-3.1", r"llama 3\.1 community license agreement"),
    ("LicenseRef-Llama-3", r"meta llama 3 community license agreement"),
    ("LicenseRef-Llama-3.2-AUP", r"llama 3\.2 acceptable use policy"),
    ("MIT", r"\bmit license\b|permission is hereby granted, free of charge, to any person"),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms[\s\S]*neither the name"),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms"),
    ("GPL-3.0-only", r"gnu general public license\s+version 3"),
)
# The complete texts that we know: where one begins and ends, in lower case with single spaces, and
# the SHA-256 of what lies between. Only these are `verified`: a title alone says little.
_COMPLETE = {
    "Apache-2.0": (
        "apache license version 2.0",
        "end of terms and conditions",
        ("9c6f54e87f5a04ff70048fc03eef7aa52cfec009f514f44bda9912f31ff9a814",),
    ),
    "MIT": (
        "permission is hereby granted, free of charge",
        "dealings in the software.",
        ("56959050891f7b737ac4e803051170c7197f02df73d80bd9a78d968e305bf558",),
    ),
}
# The hub's own spelling of licences, in the front matter of cards.
_HUB = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "cc0-1.0": "CC0-1.0",
    "bsd-3-clause": "BSD-3-Clause",
    "llama3": "LicenseRef-Llama-3",
    "llama3.1": "LicenseRef-Llama-3.1",
    "llama3.2": "LicenseRef-Llama-3.2",
    "llama3.3": "LicenseRef-Llama-3.3",
    "gemma": "LicenseRef-Gemma",
}


# What weights derived from a base model bring along, by its name; the first that fits.
_BASES = (
    (r"llama-?3\.3", "LicenseRef-Llama-3.3"),
    (r"llama-?3\.2", "LicenseRef-Llama-3.2"),
    (r"llama-?3\.1", "LicenseRef-Llama-3.1"),
    (r"llama-?3", "LicenseRef-Llama-3"),
    (r"gemma", "LicenseRef-Gemma"),
    (r"qwen-?3|qwen2\.5-7b", "Apache-2.0"),
    (r"mistral-7b|mixtral-8x7b", "Apache-2.0"),
)
_DUTIES = {
    "llama": "sets conditions on use, on naming and on very large users, and binds derivatives",
    "non-commercial": "forbids commercial use",
    "attribution": "demands attribution and a note of changes",
    "own": "is a licence of its own",
    "permissive": "asks for its text and notices to be kept",
}


@dataclass(frozen=True, slots=True)
class LicenceFound:
    """One statement of a licence; `sha256` is that of the file it stands in."""

    spdx: str
    place: str
    sha256: str
    status: str


def licence_text(path: str, text: str) -> LicenceFound | None:
    """Recognise the licence of a file that is named like one; None when the words are others.

    `verified` says that the complete text is there, word for word; `declared` that its title is.
    """
    plain = re.sub(r"\s+", " ", text.lower()).strip()
    for spdx, pattern in _TEXTS:
        if re.search(pattern, plain):
            status = "verified" if _is_complete(spdx, plain) else "declared"
            return LicenceFound(spdx, path, hashlib.sha256(text.encode()).hexdigest(), status)
    return None


def _is_complete(spdx: str, plain: str) -> bool:
    if spdx not in _COMPLETE:
        return False
    begin, end, digests = _COMPLETE[spdx]
    start, stop = plain.find(begin), plain.find(end)
    # Apache's last words stand after the part that counts, those of MIT belong to it.
    stop += len(end) if spdx == "MIT" else 0
    return 0 <= start < stop and hashlib.sha256(plain[start:stop].encode()).hexdigest() in digests


def parse_card(text: str, what: str = "README.md") -> dict[str, Any]:
    """Return the YAML front matter of a model card, empty where there is none.

    Raises:
        RefusedError: `source.card`; aliases, tags, a key twice, too large, or not a mapping.

    """
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        raise _no(what, "the front matter has no end")
    front = "\n".join(lines[1:end])
    if len(front) > FRONT_LIMIT:
        raise _no(what, f"the front matter has over {FRONT_LIMIT:,} characters")
    try:
        value = yaml.load(front, Loader=_Strict)  # noqa: S506 - a SafeLoader, made stricter
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise _no(what, f"the front matter is not strict YAML: {reason:.160}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _no(what, "the front matter is not a mapping of names")
    return value


def card_licences(card: Mapping[str, Any], what: str, sha256: str) -> list[LicenceFound]:
    """Return the licences that the front matter states."""
    value = card.get("license", card.get("licence"))
    names = value if isinstance(value, list) else [] if value is None else [value]
    found = []
    for name in names:
        text = str(name).strip()
        if text.lower() == "other":
            text = str(card.get("license_name", "other"))
        spdx = _HUB.get(text.lower())
        if spdx is None:
            spdx = text if re.fullmatch(r"[A-Za-z0-9.+-]{1,64}", text) else "LicenseRef-unknown"
            if spdx.lower() == "other":
                spdx = "LicenseRef-unknown"
        found.append(LicenceFound(spdx, f"{what}#license", sha256, "declared"))
    return found


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two licences that are stated for one model, and why a person has to look at them."""

    first: str
    second: str
    reason: str

    @property
    def text(self) -> str:
        """One line for a report."""
        return f"{self.first} against {self.second}: {self.reason}"


def base_licence(party: str, basis: str) -> LicenceFound | None:
    """Return the licence that weights derived from this base model bring along, if we know it."""
    plain = party.lower().replace("_", "-")
    for pattern, spdx in _BASES:
        if re.search(pattern, plain):
            return LicenceFound(spdx, f"base model {party} ({basis})"[:400], "", "declared")
    return None


def licence_conflicts(found: Iterable[LicenceFound]) -> tuple[Conflict, ...]:
    """Say which stated licences differ, each pair once; which of them holds is for the policy.

    A licence of its own that only repeats another place (`-AUP` beside its agreement) is none.
    """
    places: dict[str, list[str]] = {}
    for item in found:
        name = item.spdx.removesuffix("-AUP")
        places.setdefault(name, []).append(item.place)
    names = list(places)
    return tuple(
        Conflict(
            f"{first} ({', '.join(places[first])[:200]})",
            f"{second} ({', '.join(places[second])[:200]})",
            _reason(first, second),
        )
        for at, first in enumerate(names)
        for second in names[at + 1 :]
    )


def _reason(first: str, second: str) -> str:
    """Say what differs, in plain words; no more than the texts themselves say."""
    duties = [f"{name} {_DUTIES[kind]}" for name in (first, second)
              for kind in [_kind(name)] if kind in _DUTIES]  # fmt: skip
    return "; ".join(duties) or "it is not stated which of them holds for which file"


def _kind(spdx: str) -> str:
    if spdx.startswith("LicenseRef-Llama"):
        return "llama"
    if "-NC" in spdx:
        return "non-commercial"
    if spdx.startswith("CC-BY"):
        return "attribution"
    if spdx.startswith("LicenseRef"):
        return "own"
    return "permissive" if spdx in {"Apache-2.0", "MIT", "BSD-3-Clause", "BSD-2-Clause"} else ""


class _Strict(yaml.SafeLoader):
    """YAML without aliases, merge keys, explicit tags, duplicate keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise yaml.YAMLError("an anchor or a tag")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [child.value for child, _ in node.value]
        if len(set(map(str, keys))) != len(keys):
            raise yaml.YAMLError("a key stands twice")
        return super().construct_mapping(node, deep=deep)


def _no(what: str, reason: str) -> RefusedError:
    return RefusedError(
        "source.card",
        f"{what}: {reason}",
        hint="mend the front matter between the two lines of `---`, pin it and inspect again",
    )
