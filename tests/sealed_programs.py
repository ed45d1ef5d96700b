"""Programs that tests run inside the seal. Loaded by file; standard library only."""

# ruff: noqa: ARG002, PTH123, SIM115, S606, TRY301 - attacks of one shape, written as plainly as can be
from __future__ import annotations

import _socket  # nothing can be imported after stage 2
import ctypes
import errno
import json
import mmap
import os
import signal
import sys
import threading
import time
import traceback


class Program:
    """Answers {"op": …}; every operation is an attack or its harmless twin."""

    def __init__(self, config):
        self.config = config

    def warm_up(self):
        getattr(self, "warm_" + self.config.get("warm", "nothing"))()
        return {"pid": os.getpid(), "argv": sys.argv[1:]}

    def handle(self, payload, emit):
        try:
            wanted = json.loads(payload)
        except ValueError:
            return payload
        return getattr(self, "do_" + wanted["op"])(wanted, emit)

    # -- before stage 2 ----------------------------------------------------------------------------

    def warm_nothing(self):
        pass

    def warm_thread(self):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()

    def warm_environment(self):
        self.environment = dict(os.environ)

    def warm_raise(self):
        raise ValueError("no model here \x1b[31m")

    def warm_refuse(self):
        from airgap.enclave.channel import ProgramError

        raise ProgramError("model.file", "the model is missing", "install it")

    def warm_exit(self):
        sys.exit(0)

    def warm_os_exit(self):
        os._exit(3)

    def warm_hang(self):
        time.sleep(100)

    def warm_segfault(self):
        ctypes.string_at(0)

    def warm_memory(self):
        bytearray(10 << 30)

    def warm_output(self):
        for _ in range(2000):
            os.write(2, b"x" * (1 << 16))

    def warm_fork_bomb(self):
        while True:
            os.fork()

    def warm_open(self):
        self.kept = open("/dev/null")

    def warm_write_channel(self):
        os.write(4, b"\0\0\0\0?\0\0\0\0")

    def warm_handler(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def warm_gate(self):
        from airgap.enclave import probe

        self.gate = probe.prepare_foreign_socket()

    # -- after stage 2 -----------------------------------------------------------------------------

    def do_echo(self, wanted, emit):
        for part in range(wanted.get("parts", 0)):
            emit(b"%d" % part)
        return json.dumps(wanted["value"]).encode()

    def do_environment(self, wanted, emit):
        return json.dumps(self.environment).encode()

    def do_size(self, wanted, emit):
        return b"x" * wanted["size"]

    def do_parts(self, wanted, emit):
        for _ in range(wanted["count"]):
            emit(b"x" * wanted["size"])
        return b""

    def do_raise(self, wanted, emit):
        raise RuntimeError("broken " * 2000)

    def do_refuse(self, wanted, emit):
        from airgap.enclave.channel import ProgramError

        raise ProgramError(wanted["code"], "no " * 5000, "hint " * 5000)

    def do_connect(self, wanted, emit):
        return self._try(lambda: _socket.socket().connect(("127.0.0.1", 9)))

    def do_open(self, wanted, emit):
        return self._try(lambda: open(wanted["path"], wanted.get("mode", "rb")))

    def do_fork(self, wanted, emit):
        return self._try(os.fork)

    def do_exec(self, wanted, emit):
        return self._try(lambda: os.execv("/usr/bin/true", ["true"]))

    def do_write_to(self, wanted, emit):
        return self._try(lambda: os.write(wanted["fd"], b"x"))

    def do_executable_memory(self, wanted, emit):
        return self._try(lambda: mmap.mmap(-1, 4096, prot=7))

    def do_thread(self, wanted, emit):
        found = []
        thread = threading.Thread(target=lambda: found.append(1))
        thread.start()
        thread.join()
        return json.dumps(found).encode()

    def do_gate_later(self, wanted, emit):
        """Answer first, then make a call that the seal kills for."""
        threading.Timer(0.3, self.gate).start()
        return b"soon"

    def do_traceback(self, wanted, emit):
        try:
            raise KeyError("late")
        except KeyError:
            return traceback.format_exc().encode()

    def do_hang(self, wanted, emit):
        while True:
            time.sleep(1)

    def do_spin(self, wanted, emit):
        while True:
            emit(b"")

    def do_segfault(self, wanted, emit):
        ctypes.string_at(0)

    def do_exit(self, wanted, emit):
        os._exit(wanted["status"])

    def do_memory(self, wanted, emit):
        return str(len(bytearray(wanted["size"]))).encode()

    def do_raw(self, wanted, emit):
        os.write(4, bytes.fromhex(wanted["frame"]))
        time.sleep(wanted.get("then", 0))
        if wanted.get("exit"):
            os._exit(0)
        return b"late"

    def do_stderr(self, wanted, emit):
        os.write(2, wanted["text"].encode())
        return b""

    def do_signals(self, wanted, emit):
        return self._try(lambda: os.kill(os.getppid() or 1, 0))

    @staticmethod
    def _try(action):
        try:
            action()
        except OSError as error:
            return errno.errorcode[error.errno].encode()
        return b"OPEN"


def create(config):
    return Program(config)
