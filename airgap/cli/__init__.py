"""The command line: one module a group, each command parses, calls one function and prints.

Exit status: 0 done, 1 refused, 2 usage, 3 fault, 130 interrupted (docs/design/architecture.md, 7);
4 refused or usage, and the document that `--json` asked for could not be written.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence

_AGAIN_S = 0.02


def main() -> None:
    """Entry point of the console script."""
    sys.unraisablehook = _interrupt_again
    try:
        from airgap.cli import streams  # keeps `airgap.cli` importable without rich loaded

        streams.prepare()
        status = streams.finish(invoke(sys.argv[1:]))
    except KeyboardInterrupt:  # while modules load, or twice
        if sys.stderr is not None:
            sys.stderr.write("interrupted\n")
        status = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is the interpreter going down
    sys.exit(status)


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Deliver Ctrl-C once more where it fell into code that cannot raise, and print no trace of it.

    pydantic's compiled core, which builds validators while modules load, swallows it.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        main_thread = threading.main_thread().ident or 0
        timer = threading.Timer(_AGAIN_S, signal.pthread_kill, (main_thread, signal.SIGINT))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def invoke(argv: Sequence[str]) -> int:
    """Run one command line and return its exit status; prints errors, never a traceback."""
    from airgap.cli.app import dispatch  # keeps `airgap.cli` importable without typer loaded

    return dispatch(list(argv))
