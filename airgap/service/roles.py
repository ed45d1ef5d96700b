"""Who a local account is: roles and projects from a file that root owns.

`site.toml` says what is known of people; `roles.toml` gives roles and projects to accounts and to
groups, local ones or those of a directory service that NSS knows (SSSD, LDAP). A person of the file
who stands in no `[[person]]` of site.toml has roles and projects and no other fact: what the rules
must know of her is unknown, and an unknown never counts as yes.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from airgap.config import Account, NameSet, Person, Site
from policy.errors import RefusedError
from policy.strict import Frozen, Source

FILE_NAME = "roles.toml"
SYSTEM_FILE = Path("/etc/airgap") / FILE_NAME
MAX_BYTES = 1 << 20
MAX_ENTRIES = 10_000
GROUPS_LIMIT = 65_536
CODE = "service.roles"


class Grant(Frozen):
    """Roles and projects of one account, or of the members of one group."""

    account: Account | None = None
    uid: int | None = Field(default=None, ge=0, le=2**32 - 2)
    group: (
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_. @-]{0,63}$")] | None
    ) = None
    roles: NameSet = frozenset()
    projects: NameSet = frozenset()


class Roles(Frozen):
    """The whole file."""

    grant: tuple[Grant, ...] = Field(default=(), max_length=MAX_ENTRIES, strict=False)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end of the socket, by the word of the kernel and of NSS."""

    uid: int
    pid: int
    account: str
    groups: frozenset[str]


def caller_of(uid: int, pid: int) -> Caller:
    """Return what NSS knows of an account; one that it does not know has a number and no group.

    The group that the kernel names counts for nothing: a program that is set to a group still bears
    it when its owner was taken out of that group.
    """
    try:
        entry = pwd.getpwuid(uid)
        account = entry.pw_name
        numbers = os.getgrouplist(account, entry.pw_gid)[:GROUPS_LIMIT]
    except (KeyError, OSError):
        return Caller(uid, pid, str(uid), frozenset())
    names = set()
    for number in numbers:
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    return Caller(uid, pid, account, frozenset(names))


def find_roles(root: Path) -> Path | None:
    """Return the file of the tree, else that of the system, None where neither is there."""
    return next((path for path in (root / FILE_NAME, SYSTEM_FILE) if path.exists()), None)


def load_roles(path: Path | None, site: Site) -> Roles:
    """Read the file, after its owner and mode; None gives nothing to anybody.

    Raises:
        RefusedError: `service.roles`, with what is wrong and where.

    """
    if path is None:
        return Roles()
    content = read_protected(path)
    try:
        value = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{path}: {error!s:.200}") from error
    roles = Source(str(path), value, dict).build(Roles, code=CODE)
    known = {project.id for project in site.project}
    seen: set[object] = set()
    for number, grant in enumerate(roles.grant, 1):
        named = [each for each in (grant.account, grant.uid, grant.group) if each is not None]
        if len(named) != 1:
            raise _wrong(f"{path}: grant {number} names {len(named)} of account, uid, group; one")
        if named[0] in seen:
            raise _wrong(f"{path}: grant {number}: {named[0]!r} stands twice")
        seen.add(named[0])
        if strange := sorted(grant.projects - known):
            raise _wrong(f"{path}: grant {number}: site.toml holds no project {strange[0]!r:.80}")
        if not grant.roles and not grant.projects:
            raise _wrong(f"{path}: grant {number} gives nothing")
    return roles


def read_protected(path: Path) -> bytes:
    """Return a file that only root, or who runs this, can have written, nor any folder above it.

    Raises:
        RefusedError: `service.roles`.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _wrong(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _wrong(f"{path} is no ordinary file")
        _require_protected(path, found)
        real = path.parent.resolve() / path.name  # a link above it may lead to folders of others
        for folder in dict.fromkeys((*path.absolute().parents, *real.parents)):
            above = folder.stat()
            sticky = above.st_mode & stat.S_ISVTX  # nobody but its owner replaces ours there
            _require_protected(folder, above, shared=bool(sticky))
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise _wrong(f"{path}: more than {MAX_BYTES} bytes")
    return content


def _require_protected(path: Path, found: os.stat_result, *, shared: bool = False) -> None:
    if found.st_uid not in {0, os.geteuid()}:
        raise _wrong(f"{path} belongs to uid {found.st_uid}, expected root")
    if found.st_mode & 0o022 and not shared:
        raise _wrong(f"{path} may be written by others (mode {stat.S_IMODE(found.st_mode):04o})")


def person_of(caller: Caller, site: Site, roles: Roles) -> tuple[Person, Site]:
    """Return the person behind a caller, and the site with what the grants add to her.

    Raises:
        RefusedError: `site.person`; neither file knows the account.

    """
    grants = [
        grant
        for grant in roles.grant
        if grant.uid == caller.uid
        or (grant.account is not None and grant.account == caller.account)
        or (grant.group is not None and grant.group in caller.groups)
    ]
    found = [each for each in site.person if each.uid == caller.uid]
    found = found or [
        each for each in site.person if each.uid is None and each.account == caller.account
    ]
    if not found and not grants:
        return site.require_account(caller.uid, caller.account), site  # raises, in its own words
    if not found and site.find_person(caller.account) is not None:
        raise RefusedError(
            "site.person",
            f"{caller.account!r:.80} is the id of another person in site.toml",
            hint="the administrator gives that [[person]] this uid or account, or another id",
        )
    base = found[0] if found else Person(id=caller.account, uid=caller.uid)
    person = base.model_copy(
        update={
            "roles": base.roles.union(*(grant.roles for grant in grants)),
            "projects": base.projects.union(*(grant.projects for grant in grants)),
        }
    )
    others = tuple(each for each in site.person if each.id != base.id)
    return person, site.model_copy(update={"person": (*others, person)})


def _wrong(message: str) -> RefusedError:
    return RefusedError(
        CODE,
        message,
        hint="chown root FILE; chmod 0644 FILE; then airgap roles lint",
    )
