"""`airgap enclave profiles`: what each sealed process may read and ask of the kernel."""

from __future__ import annotations

import platform
from typing import Any

from airgap.cli.common import Json, show


def profiles(*, json: Json = False) -> None:
    """Print the four profiles of the seal, with the digests of their filters."""
    from airgap.enclave import tables
    from airgap.enclave.profiles import document

    arch = platform.machine()
    # The table can be reviewed on any machine; a seal is launched on x86-64 alone.
    found = document(arch if arch in tables.ARCHITECTURES else "x86_64")
    show(found, _page(found), json=json)


def _page(found: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    common = Table.grid(padding=(0, 2))
    for read in _shared(found):
        common.add_row(Text(read["kind"], style="dim"), read["what"])
    parts: list[Any] = [Text(f"every profile may read ({found['arch']})", "bold"), common]
    for row in found["profiles"]:
        grid = Table.grid(padding=(0, 2))
        for name, value in _lines(row):
            grid.add_row(Text(name, style="dim"), value)
        parts += ["", Text.assemble((row["name"], "bold"), f"  {row['purpose']}"), grid]
        # A digest is copied whole: it stands outside the columns, where no width breaks it.
        parts += [Text(f"sha256 {shown['sha256']} {shown['name']}") for shown in row["filters"]]
    never = ", ".join(found["never"]["nodes"])
    parts += ["", Text.assemble(("never bound  ", "dim"), never)]
    return Group(*parts)


def _shared(found: dict[str, Any]) -> list[dict[str, str]]:
    return [read for read in found["profiles"][0]["reads"] if read["kind"] != "kernel"]


def _lines(row: dict[str, Any]) -> list[tuple[str, str]]:
    kernel = [read["what"] for read in row["reads"] if read["kind"] == "kernel"]
    if row["own_proc"]:
        kernel.append("a /proc of its own")
    out = [
        ("rungs", ", ".join(row["rungs"])),
        ("kernel files", ", ".join(kernel)),
        ("nodes", ", ".join(row["nodes"])),
        ("writes to", row["writes"]),
    ]
    if row["environment"]:
        out.append(("variables", " ".join(f"{k}={v}" for k, v in row["environment"].items())))
    return out + [(f"filter {shown['name']}", _calls(shown)) for shown in row["filters"]]


def _calls(shown: dict[str, Any]) -> str:
    by_argument = ", ".join(shown["by_argument"]) or "none"
    size = f"{shown['instructions']} instructions"
    if "allows" in shown:
        allowed = len(shown["allows"])
        return f"{size}: {allowed} calls allowed; by argument: {by_argument}; no other call"
    denied = sum(len(calls) for calls in shown["denies"].values())
    groups = ", ".join(f"{name} {len(calls)}" for name, calls in shown["denies"].items())
    return f"{size}: {denied} calls denied ({groups}); by argument: {by_argument}"
