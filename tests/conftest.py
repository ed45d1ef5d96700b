"""Being here puts this folder on the path: every test may import its helper modules."""

import json
import signal

import pytest
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs deaf to Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: a shared machine is slow at times, and time is never what these laws are about.
# The same examples every time: a failure is a failure of the change, not of the draw.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.fixture
def call(capsys):
    """Return a caller of `airgap` in this process: exit status and the JSON document."""
    from airgap import cli

    def run(*argv):
        capsys.readouterr()
        status = cli.invoke([str(word) for word in (*argv, "--json")])
        out = capsys.readouterr().out
        return status, json.loads(out) if out.strip() else {}

    return run


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest: who gets one of them last works on alone."""
    items.sort(key=lambda item: item.path.parent.name != "e2e" and "staging" not in item.path.name)
