"""`airgap serve`: the broker as a daemon; `airgap roles lint`: who may do what there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr
from policy.errors import UsageError
from policy.wording import counted

RolesFile = Annotated[
    Path | None,
    typer.Option(
        "--roles",
        help="File of roles. Default: roles.toml of the tree, else /etc/airgap/roles.toml.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(name="serve")(serve)
    group = typer.Typer(help="Roles and projects of accounts and groups, for `airgap serve`.")
    group.command(name="lint")(lint)
    app.add_typer(group, name="roles")


def serve(
    *,
    socket: Annotated[
        Path | None, typer.Option("--socket", help="Default: [service] socket of site.toml.")
    ] = None,
    group: Annotated[
        str, typer.Option("--group", help="Whose members may connect. Default: you alone.")
    ] = "",
    roles: RolesFile = None,
    model: Annotated[str, typer.Option(help="Installed bundle; default the current one.")] = "",
    drain: Annotated[
        int, typer.Option(help="Seconds that requests under way get after SIGTERM.", min=0)
    ] = 600,
    root: Root = None,
) -> None:
    """Serve many people on a Unix socket, each decided and logged, until SIGTERM.

    SIGHUP loads release, rules and site facts anew; a second SIGTERM cuts off what is under way.
    """
    import grp

    from airgap.extras import require_extras
    from airgap.serve.session import House
    from airgap.service.keeper import Patience
    from airgap.service.start import Plan
    from airgap.service.start import serve as run
    from airgap.systemd import tell_systemd

    require_extras("cpu", "science")
    number = -1
    if group:
        try:
            number = grp.getgrnam(group).gr_gid
        except KeyError:
            raise UsageError("usage.argument", f"--group: no group {group!r:.40}") from None

    def ready(house: House) -> None:
        tell_systemd("READY=1")
        stderr.print(f"serving {house.model.name} {house.model.version}", markup=False)

    patience = Patience(drain_s=float(drain))
    run(Plan(root_folder(root), socket, number, roles, model, patience=patience), ready)


def lint(
    *,
    roles: RolesFile = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Check the file of roles: owner, mode, names, groups that this host knows."""
    import grp
    import pwd

    from airgap.config import load_site
    from airgap.service.roles import find_roles, load_roles

    tree = root_folder(root)
    site = load_site(tree)
    path = roles or find_roles(tree)
    if path is None:
        raise UsageError("usage.argument", "there is no roles.toml", hint="--roles FILE")
    found = load_roles(path, site)
    unknown: list[str] = []
    for grant in found.grant:
        try:
            if grant.account is not None:
                pwd.getpwnam(grant.account)
            if grant.group is not None:
                grp.getgrnam(grant.group)
        except KeyError:
            unknown.append(grant.account or grant.group or "")
    document = {"file": str(path), "grants": len(found.grant), "unknown": unknown}
    lines = [f"{path}: {counted(len(found.grant), 'grant')}, owner and mode as they must be"]
    lines += [
        f"this host knows no account or group {name}: nobody has that grant" for name in unknown
    ]
    show(document, "\n".join(lines), json=json)
