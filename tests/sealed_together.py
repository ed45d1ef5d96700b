"""A program that takes several requests at once, with hostile variants; standard library only."""

# ruff: noqa: ARG002 - attacks of one shape

from __future__ import annotations

import json
import os
import time

from airgap.enclave.channel import ProgramError


class Together:
    """Each round gives every open request one part, until it has sent `parts` of `size` bytes."""

    def __init__(self, config):
        self.config = config
        self.open = {}
        self.paused = set()
        self.most = 0
        self.cancelled = []
        self.rounds = 0

    def warm_up(self):
        return {"pid": os.getpid()}

    def handle(self, payload, emit):
        return payload

    @property
    def runnable(self):
        return any(number not in self.paused for number in self.open)

    def begin(self, number, payload, emit, finish):
        wanted = json.loads(payload)
        what = wanted.get("op", "parts")
        if what == "refuse":
            raise ProgramError("prompt.g01", "no", "yes")
        if what == "raise":
            raise RuntimeError("broken")
        if what == "say":
            seen = {"most": self.most, "cancelled": self.cancelled, "paused": sorted(self.paused)}
            finish(json.dumps({**seen, "rounds": self.rounds}).encode())
            return
        if what == "raw":
            os.write(4, bytes.fromhex(wanted["frame"]))
            return
        if what == "exit":
            os._exit(wanted["status"])
        if what == "deaf":  # is not told of its end
            return
        self.open[number] = (wanted, emit, finish)
        self.most = max(self.most, len(self.open))

    def cancel(self, number):
        self.cancelled.append(number)
        if self.config.get("deaf"):
            time.sleep(60)
        self.open.pop(number, None)
        self.paused.discard(number)

    def pause(self, number, *, paused):
        (self.paused.add if paused else self.paused.discard)(number)

    def step(self):
        self.rounds += 1
        for number, (wanted, emit, finish) in list(self.open.items()):
            if number in self.paused:
                continue
            if wanted.get("op") == "step_raises" and len(self.open) > 1:
                raise RuntimeError("in a round")
            left = wanted.get("parts", 1)
            if left:
                wanted["parts"] = left - 1
                emit(wanted.get("letter", "x").encode() * wanted.get("size", 1))
            else:
                del self.open[number]
                finish(wanted.get("letter", "x").encode())
            time.sleep(wanted.get("sleep", 0))


def create(config):
    return Together(config)
