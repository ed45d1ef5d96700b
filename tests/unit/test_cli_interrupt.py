"""Ctrl-C that falls into compiled code which cannot raise is not lost and leaves no trace."""

import signal
import subprocess
import sys

PROGRAM = """
import os, signal, sys, time
import airgap.cli

class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)  # raised here, where nothing can be raised
        time.sleep(0.01)

def slow(argv):
    del_me = Deaf()
    del del_me
    time.sleep(30)
    return 0

airgap.cli.invoke = slow
airgap.cli.main()
"""


def test_a_swallowed_interrupt_comes_again():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
    assert done.stderr == "interrupted\n"
