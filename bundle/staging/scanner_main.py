"""Runs somebody else's scanner inside the seal. Runs sealed.

`python -I scanner_main.py SITE NAME OUT ARGUMENTS...`: SITE is the scanner's own site-packages,
NAME its command. What it prints and how it ends goes to OUT/result.json; nothing of it is believed
but a hit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from importlib import metadata
from pathlib import Path

TEXT_LIMIT = 4000
QUIET = {
    "PROMPTFOO_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "HOME": "/nonexistent",
}


def main(argv: list[str]) -> int:
    """Run the command and write down how it ended."""
    site, name, out, *arguments = argv
    os.environ.update(QUIET)
    sys.path.insert(0, site)
    found = metadata.entry_points(group="console_scripts", name=name)
    screen = io.StringIO()
    status: object = 0
    sys.argv = [name, *arguments]
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        try:
            status = next(iter(found)).load()()
        except SystemExit as error:
            status = error.code
        except BaseException as error:  # noqa: BLE001 - a scanner that breaks is not a clean scan
            screen.write(f"{type(error).__name__}: {error}")
            status = -1
    number = status if isinstance(status, int) else 0 if status is None else -1
    text = screen.getvalue()[-TEXT_LIMIT:]
    Path(out, "result.json").write_text(json.dumps({"status": number, "text": text}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
