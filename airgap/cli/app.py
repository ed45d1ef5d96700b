"""Assembles the groups and turns every outcome into an exit status."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
from pathlib import Path

import structlog
import typer
from typer.exceptions import TyperException

from airgap.cli.common import show_error, stderr
from airgap.cli.streams import PIPE_CLOSED, lost, told
from policy.errors import AirgapError, FaultError, UsageError

# Each module defines `register(app)`. The order is that of `airgap --help`.
GROUPS = (
    "airgap.cli.staging",
    "airgap.cli.trust",
    "airgap.cli.bundle",
    "airgap.cli.evidence",
    "airgap.cli.media",
    "airgap.cli.install",
    "airgap.cli.bootstrap",
    "airgap.cli.lifecycle",
    "airgap.cli.runtimes",
    "airgap.cli.engine",
    "airgap.cli.run",
    "airgap.cli.serve",
    "airgap.cli.policy",
    "airgap.cli.hold",
    "airgap.cli.audit",
    "airgap.cli.report",
    "airgap.cli.enclave",
    "airgap.cli.demo",
    "airgap.cli.manual",
)
INTERRUPTED = 130


def build() -> typer.Typer:
    """Return the application with every group registered."""
    app = typer.Typer(
        name="airgap",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Carry an open-weight scientific model into a secured lab, and prove what runs there.",
    )
    for name in GROUPS:
        importlib.import_module(name).register(app)
    return app


def require_one_place() -> None:
    """Refuse to run when a package of this name came from elsewhere.

    `policy` and `bundle` are common words: a module of a working folder or of PYTHONPATH must not
    stand in for the one that decides (docs/design/architecture.md, 2).

    Raises:
        FaultError: `host.self`.

    """
    homes = {}
    for name in ("airgap", "bundle", "policy"):
        found = importlib.import_module(name).__file__
        homes[name] = Path(found).resolve().parents[1] if found else None
    if len(set(homes.values())) != 1 or None in homes.values():
        places = ", ".join(f"{name} in {home}" for name, home in homes.items())
        raise FaultError(
            "host.self",
            f"the three packages were expected in one folder, found {places:.600}",
            hint="run the installed `airgap` from another folder, without PYTHONPATH",
        )


def configure_log() -> None:
    """Send the operator's log to standard error as JSON lines: `AIRGAP_LOG=info` or `debug`.

    It is for diagnosis and is silent by default. It is not the audit log, and no evidence.
    """
    levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
    level = levels.get(os.environ.get("AIRGAP_LOG", "").lower(), logging.CRITICAL)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(sort_keys=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


def dispatch(argv: list[str]) -> int:
    """Run `argv` and return its exit status."""
    lost.clear()
    return told(_dispatch(argv))


def _dispatch(argv: list[str]) -> int:
    """Do so; the only broad `except` of the project is here."""
    configure_log()
    try:
        require_text(argv)
        require_one_place()
        outcome = build()(args=argv, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        stderr.print("interrupted", markup=False)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`): not an error of ours, but the output was cut.
        return PIPE_CLOSED
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer makes it a status 1 of its own
            return PIPE_CLOSED
        raise
    except Exception as error:  # noqa: BLE001 - a defect must end as a fault, not as a traceback
        ours = as_error(error)
        with contextlib.suppress(OSError):  # no standard error either: the status remains
            show_error(ours, json="--json" in argv)
        return ours.exit_status
    if outcome == INTERRUPTED:  # typer turns Ctrl-C into a status, without a word
        stderr.print("interrupted", markup=False)
    return outcome if isinstance(outcome, int) else 0


def require_text(argv: list[str]) -> None:
    """Refuse an argument that is no UTF-8 text: nothing could print or record it."""
    for number, argument in enumerate(argv, 1):
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UsageError(
                "usage.argument",
                f"argument {number} is not UTF-8 text: {argument[:60]!a}",
                hint="set the terminal to UTF-8; give a file with such a name a link to it",
            )


def as_error(error: Exception) -> AirgapError:
    """Return the coded form of any exception that reaches the top."""
    if isinstance(error, AirgapError):
        return error
    if isinstance(error, TyperException):
        message = error.format_message().strip() or "a command is missing"
        return UsageError("usage.argument", message, hint="airgap --help")
    if isinstance(error, OSError):
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        where = f" ({error.filename})" if error.filename else ""
        return FaultError(
            "host.space" if full else "host.io",
            f"{error.strerror or error}{where}",
            hint="free space or mend the permissions, then run the same command again",
        )
    if os.environ.get("AIRGAP_TRACEBACK") == "1":
        traceback.print_exception(error)
    return FaultError(
        "host.internal",
        f"unexpected {type(error).__name__}: {error!s:.300}",
        hint="run it again with AIRGAP_TRACEBACK=1 and report what it prints",
    )
