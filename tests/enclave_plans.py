"""Plans for tests: an ordinary host and short wishes."""

from __future__ import annotations

from dataclasses import replace

from airgap.enclave import host, plan

FACTS = replace(
    host.survey(),
    arch="x86_64",
    uid=1000,
    sys_admin=False,
    may_kill=True,
    uid_map=((0, 0, 1 << 32),),
    landlock_abi=7,
    autofs=(),
)


def make(*, facts=FACTS, rung="A", read_only=(), writable=(), uid=None, profile="worker", **more):
    return plan.build(
        facts,
        rung=rung,
        profile=profile,
        part="convert" if profile in {"convert", "engine"} else "worker",
        read_only=list(read_only),
        writable=list(writable),
        environment={},
        memory_mb=100,
        descriptors=64,
        file_mb=0,
        uid=uid,
        **more,
    )
