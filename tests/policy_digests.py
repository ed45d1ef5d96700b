"""Write the digest list of the shipped rules anew, and the schemas: after a change of either."""

from __future__ import annotations

import json
from pathlib import Path

import policy.strict
from airgap.rules import DIGESTS, shipped_files
from policy.schema import PUBLISHED, to_text
from policy.terms import Digest

HOME = Path(policy.strict.__file__).parent

if __name__ == "__main__":
    digests = {name: str(Digest.of(content)) for name, content in shipped_files().items()}
    (HOME / DIGESTS).write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
    for name, make in PUBLISHED.items():
        (HOME / "schema" / name).write_text(to_text(make()), encoding="utf-8")
