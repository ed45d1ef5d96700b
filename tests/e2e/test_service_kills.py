"""Kill -9 of an administrator's command and of the daemon: the old release answers, or the new."""

from __future__ import annotations

import random
import shutil
import signal
from datetime import UTC, datetime
from pathlib import Path

import kills
import pytest
from enclave_harness import needs_namespaces, needs_root
from service_lab import SIGNERS, ada, lab_of, must, place_of, repack, wait_for

from airgap.install import Store, verify_installed
from bundle.keys import load_signer
from bundle.rollback import sign_rollback

pytestmark = [needs_root, needs_namespaces]
OLD, NEW, OTHER = "logos-ref-tiny 1.0.0", "logos-ref-tiny 1.1.0", "other-model 1.0.0"


class Trees:
    """Trees in which an act can be killed, each copied anew, and the words of the act."""

    def __init__(self, road, base):
        self.base = base
        (folder,) = (road.lab / "store" / "installed").iterdir()
        epoch = Store(road.lab / "store").get(folder.name).manifest.epoch
        self.second, self.third = base / "second.agb", base / "third.agb"
        repack(road, self.second, version="1.1.0", epoch=epoch + 1)
        with lab_of(road) as lab:
            shutil.copytree(lab, base / "one", symlinks=True)

    def make_more(self, road, capsys):
        """Make the release of another line, and the tree that can be set back."""
        base = self.base
        repack(road, self.third, name="other-model", bundle_id="other-line")
        with lab_of(road) as lab:
            must(capsys, "update", self.second, "--root", lab)
            store = Store(lab / "store")
            target = store.get("logos-ref-tiny-1.0.0")
            mark = store.floors().epochs[target.manifest.bundle_id]
            people = [load_signer(road.staging / "keys" / f"{name}.pem") for name in SIGNERS[1:]]
            back = sign_rollback(
                target.manifest, mark, "it answers wrongly", people, now=datetime.now(UTC)
            )
            (base / "back.json").write_bytes(back.to_bytes())
            shutil.copytree(lab, base / "two", symlinks=True)

    def act(self, name):
        """Return the tree to begin with, the words, and both releases that may answer then."""
        return {
            "install": ("one", ("install", self.third), {OLD, OTHER}),
            "update": ("one", ("update", self.second), {OLD, NEW}),
            "rollback": (
                "two",
                ("rollback", "logos-ref-tiny-1.0.0", "--approval", self.base / "back.json"),
                {OLD, NEW},
            ),
        }[name]

    def fresh(self, name):
        """Return a copy that people with accounts cannot read."""
        copy = Path("/var/tmp") / f"airgap-kills-{self.base.parent.name}-{random.random()}"  # noqa: S108
        return shutil.copytree(self.base / name, copy, symlinks=True)


@pytest.fixture
def trees(road, tmp_path):
    return Trees(road, tmp_path)


def operations(trees, name, folder):
    """Return how many operations on files an act makes while a daemon serves."""
    start, words, _ = trees.act(name)
    lab = trees.fresh(start)
    try:
        with place_of(lab) as place:
            place.start()
            return kills.operations((*words, "--root", lab), folder)
    finally:
        shutil.rmtree(lab)


def kill_at(trees, name, point, folder):
    """Kill the act at an operation and then the daemon; start that again and ask it."""
    start, words, releases = trees.act(name)
    lab = trees.fresh(start)
    try:
        with place_of(lab) as place:
            place.start()
            ended = kills.run_killed((*words, "--root", lab), point, folder)
            assert ended in {-signal.SIGKILL, 0}, (name, point, ended)
            place.kill()
            place.start()
            answer = ada(place)
            assert answer["run"]["model"] in releases, (name, point)
            current = Store(lab / "store").current()
            assert answer["run"]["model_digest"] == str(current.digest)
            verify_installed(current.folder)
            place.verify()
            must_end(trees, name, lab)
            last = answer_after(place)
            assert place.stop() == 0
            place.verify()
            return ended, last
    finally:
        shutil.rmtree(lab)


def must_end(trees, name, lab):
    """Run the act again: whatever was left is taken up, or it was done already."""
    _, words, _ = trees.act(name)
    assert kills.run_killed((*words, "--root", lab), 0, lab) == 0


def answer_after(place):
    """Return the release that answers once the daemon has taken over what the store names."""
    current = Store(place.lab / "store").current()
    wait_for(lambda: place.told().get("bundle") == str(current.digest), "the release")
    wait_for(lambda: place.told().get("state") == "serving", "the pair")
    return ada(place)["run"]["model"]


def points(trees, name, count, folder):
    total = operations(trees, name, folder)
    assert total > 50
    return sorted(random.Random(f"service kills of {name}").sample(range(1, total + 1), count))


def test_a_killed_update_and_a_killed_daemon_leave_the_old_or_the_new(trees, tmp_path):
    assert kill_at(trees, "update", 320, tmp_path) == (-signal.SIGKILL, NEW)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["install", "update", "rollback"])
def test_ten_kills_of_each_act_under_a_daemon(name, trees, road, capsys, tmp_path):
    trees.make_more(road, capsys)
    ends = [kill_at(trees, name, point, tmp_path) for point in points(trees, name, 10, tmp_path)]
    assert {release for _, release in ends} == {
        {"install": OTHER, "update": NEW, "rollback": OLD}[name]
    }
    assert -signal.SIGKILL in {ended for ended, _ in ends}
