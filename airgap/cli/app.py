"""Assembles the groups and turns every outcome into an exit status."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback

import click
import typer

from airgap.cli.common import show_error, stderr
from policy.errors import AirgapError, FaultError, UsageError

# Each module defines `register(app)`. The order is that of `airgap --help`.
GROUPS = (
    "airgap.cli.staging",
    "airgap.cli.trust",
    "airgap.cli.bundle",
    "airgap.cli.install",
    "airgap.cli.run",
    "airgap.cli.policy",
    "airgap.cli.audit",
    "airgap.cli.enclave",
    "airgap.cli.demo",
)


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


def dispatch(argv: list[str]) -> int:
    """Run `argv` and return 0, 1, 2, 3 or 130. The only broad `except` of the project stands here."""
    json = "--json" in argv
    try:
        outcome = build()(args=argv, standalone_mode=False)
    except AirgapError as error:
        show_error(error, json=json)
        return error.exit_status
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.format_message() + "\n")
        return 2
    except click.ClickException as error:
        show_error(
            UsageError("usage.argument", error.format_message(), hint="airgap --help"), json=json
        )
        return 2
    except (click.Abort, KeyboardInterrupt):
        stderr.print("interrupted", markup=False)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`): not an error of ours, but the output was cut.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        code = "host.space" if error.errno in {28, 122} else "host.io"
        where = f" ({error.filename})" if error.filename else ""
        show_error(
            FaultError(
                code,
                f"{error.strerror or error}{where}",
                hint="free space or mend permissions, then run it again",
            ),
            json=json,
        )
        return 3
    except Exception as error:  # noqa: BLE001 - the last line of defence: a defect is a fault, not a traceback
        if os.environ.get("AIRGAP_TRACEBACK") == "1":
            traceback.print_exc()
        kind = f"{type(error).__name__}: {error}"
        show_error(
            FaultError(
                "host.internal",
                f"unexpected {kind:.300}",
                hint="set AIRGAP_TRACEBACK=1 and report the output",
            ),
            json=json,
        )
        return 3
    return outcome if isinstance(outcome, int) else 0
