"""An auditor's program inside the seal of the worker (docs/auditor.md; docs/design/enclave.md, 7).

The contract, for FILE.py:

- A file that defines `main()` at its top level is imported (with `__name__ == "airgap_probe"`), its
  `prepare()` is called where there is one, then `main()`. At stage 2 the last filter comes between
  the two. An integer that `main` returns is its exit status.
- Any other file is a plain script and runs as `__main__`. At stage 2 whatever it imports, anywhere
  in it, is imported first, and the whole script runs after the last filter.
- What it prints goes to the error pipe, which is capped. Nothing is injected: no argument and no
  input.

This process is hostile from the first line of that file on: what it reports of itself is labelled
so, and the broker's own look at /proc comes before and after. Standard library only.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import io
import json
import linecache
import os
import signal
import sys
import traceback
import types

from airgap.enclave import channel, tables, worker
from airgap.enclave.tables import CHANNEL_IN, CHANNEL_OUT

TYPE_CHECKING = False  # the worker has no use for the `typing` module; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SOURCE_LIMIT = 1 << 20  # bytes of a probe
IMPORT_LIMIT = 200
_NAME = "airgap_probe"


def main() -> None:
    """Report as alive, take the probe from the broker, run it at its stage; never returns."""
    os.set_inheritable(CHANNEL_IN, False)
    os.set_inheritable(CHANNEL_OUT, False)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        channel.send(CHANNEL_OUT, channel.LOADED, b"{}")
        wanted = json.loads(channel.receive(CHANNEL_IN, worker.PROGRAM_LIMIT).payload)
        print_to_error_pipe()
        ended = run(wanted)
        channel.send(CHANNEL_OUT, channel.REPLY, json.dumps(ended).encode(), wanted["request"])
        channel.receive(CHANNEL_IN, 0)  # the broker looks once more, then closes the channel
    except EOFError:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the broker must hear of any failure
        worker.fault(error)
    os._exit(worker.PROTOCOL_STATUS)


def print_to_error_pipe() -> None:
    """Let `print` write to the one pipe that a worker may write to beside the channel."""
    raw = io.FileIO(tables.STDERR, "w", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
    sys.stdout = sys.stderr = text


def run(wanted: dict[str, Any]) -> dict[str, Any]:
    """Run a probe at its stage; returns how it ended."""
    found: list[Callable[[], object]] = []
    ended = attempt(lambda: found.append(load(wanted["name"], bytes.fromhex(wanted["source"]))))
    if wanted["stage"] == 2:  # noqa: PLR2004 - the number of the stage
        gc.collect()
        channel.send(CHANNEL_OUT, channel.LOADED, b"{}")
        worker.seal(wanted["stage2"])
        channel.receive(CHANNEL_IN, 0)  # the broker has looked
    return ended if ended["outcome"] != "returned" else attempt(found[0])


class NotPythonError(Exception):
    """The source cannot be compiled; the cause says where."""


def load(name: str, source: bytes) -> Callable[[], object]:
    """Do what comes before the last filter; returns what comes after it."""
    # A traceback shows its lines although the file is not in here.
    lines = source.decode("utf-8", errors="replace").splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)
    try:
        tree = ast.parse(source, name)
        code = compile(tree, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise NotPythonError from error
    sys.argv = [name]
    entered = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    module = types.ModuleType(_NAME if entered else "__main__")
    module.__file__ = name
    sys.modules[module.__name__] = module
    if not entered:
        import_ahead(tree)
        return lambda: exec(code, module.__dict__)  # noqa: S102 - what the auditor asked for
    exec(code, module.__dict__)  # noqa: S102
    prepare = getattr(module, "prepare", None)
    if prepare is not None:
        prepare()
    return lambda: sys.exit(module.main())


def import_ahead(tree: ast.Module) -> None:
    """Import what a script will import: nothing can be loaded after the last filter."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names[:IMPORT_LIMIT]:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # the script meets this itself, if it gets there


def attempt(action: Callable[[], object]) -> dict[str, Any]:
    """Run a part of the probe; returns how it ended, with its trace on the error pipe."""
    try:
        action()
    except SystemExit as leaving:
        return leave(leaving.code)
    except NotPythonError as error:
        return failed(error.__cause__ or error, "syntax")
    except MemoryError as error:
        return failed(error, "memory")
    except BaseException as error:  # noqa: BLE001 - any end of a probe is an answer
        return failed(error, "raised")
    finally:
        with contextlib.suppress(Exception):  # it may be anything by now
            sys.stdout.flush()
    return {"outcome": "returned", "status": 0, "error": ""}


def leave(code: object) -> dict[str, Any]:
    """Return what `sys.exit(code)` means, as the interpreter has it."""
    if code is None or isinstance(code, int):
        outcome = "returned" if code is None else "exited"
        return {"outcome": outcome, "status": int(code or 0) & 0xFF, "error": ""}
    return {"outcome": "exited", "status": 1, "error": str(code)[: channel.ERROR_TEXT_LIMIT]}


def failed(error: BaseException, outcome: str) -> dict[str, Any]:
    """Print the trace; returns the outcome."""
    with contextlib.suppress(Exception):  # a probe that has closed its pipe says no more
        traceback.print_exception(error, file=sys.stderr)
    words = f"{type(error).__name__}: {error}"[: channel.ERROR_TEXT_LIMIT]
    return {"outcome": outcome, "status": 1, "error": words}


# -- a worker that is held open for inspection ----------------------------------------------------


class Held:
    """Loads nothing and answers what it is asked: the seal itself is what there is to look at."""

    def warm_up(self) -> dict[str, Any]:
        """Do nothing."""
        return {"name": "reference"}

    def handle(self, payload: bytes, emit: Callable[[bytes], None]) -> bytes:
        """Return the request."""
        del emit
        return payload


def create(config: dict[str, Any]) -> Held:
    """Make the program of `airgap enclave hold`."""
    del config
    return Held()
