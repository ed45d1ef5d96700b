"""Profile worker-gpu as it runs, with stand-ins for nodes and driver: no GPU was at hand.

The nodes are other names of /dev/null, and the driver's library is a few lines of C that open them
as CUDA does. What is proven is the seal of this profile, not that CUDA runs in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from enclave_harness import PROGRAMS, ROOT, needs_namespaces, run_as, starters

from airgap.enclave import twin

pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(not ROOT, reason="only root makes device nodes"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

# Opens the nodes and keeps them, makes a memfd, names a thread, reads /sys: what the driver does.
DRIVER = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int cuInit(unsigned f) {
  char name[64]; int fd;
  if (open(NODES "/nvidiactl", O_RDWR) < 0 || open(NODES "/nvidia0", O_RDWR) < 0) return 100;
  if ((fd = open(NODES "/nvidia-uvm", O_RDWR)) < 0 || open(NODES "/secret0", O_RDWR) >= 0) return 1;
  ioctl(fd, 0xc0de, 0);
  if ((fd = memfd_create("cuda", 0)) < 0 || ftruncate(fd, 4096)) return 304;
  DIR *modules = opendir("/sys/module");
  if (!modules || closedir(modules)) return 304;
  snprintf(name, sizeof name, "/proc/self/task/%d/comm", (int)syscall(SYS_gettid));
  if ((fd = open(name, O_WRONLY)) < 0 || write(fd, "cuda", 4) != 4) return 305;
  close(fd);
  return ANSWER;
}
int cuDriverGetVersion(int *n) { *n = 12040; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
"""
LAUNCH = """
from airgap.enclave import SealSpec, gpu, host, seal, twin
from policy.errors import AirgapError
rung, program, folder = ARGUMENTS
driver = gpu.Driver(devices=folder + "/dev", library=folder + "/libcuda.so.1")
spec = SealSpec(profile="worker-gpu", program=program + ":create", driver=driver,
                read_only=(program, folder + "/libcuda.so.1"), rung=rung, min_rung=rung)
try:
    with seal.start(rung, spec, host.survey()) as enclave:
        answers = {}
        for path in ("/etc/passwd", folder + "/dev/secret0", folder + "/dev/nvidia0", "/proc/1/mem",
                     "/dev/null"):
            wanted = json.dumps({"op": "open", "path": path, "mode": "wb"}).encode()
            answers[path.removeprefix(folder)] = enclave.request(wanted, 5.0).decode()
        wanted = json.dumps({"op": "connect"}).encode()
        answers["connect"] = enclave.request(wanted, 5.0).decode()
        enclave.reverify()
        print(json.dumps([enclave.evidence, answers, enclave.close()["incident"]]))
except AirgapError as error:
    print(json.dumps([error.code, error.message, None]))
"""
PROBE = """
from airgap.enclave import gpu, host, twin
rung, folder = ARGUMENTS
driver = gpu.Driver(devices=folder + "/dev", library=folder + "/libcuda.so.1")
print(json.dumps(twin.probe_rung(rung, None, host.survey(), None, profile="worker-gpu",
                                 driver=driver)))
"""


@pytest.fixture(scope="module")
def card():
    """A folder with device nodes and a driver's library, by the answer of its cuInit."""
    made = {}

    def make(answer=0):
        if answer not in made:
            # Beside the system's libraries: the twin has no input to bring its library in by.
            folder = Path(tempfile.mkdtemp(prefix="airgap-test-gpu-", dir="/usr/local/lib"))
            folder.chmod(0o755)
            (folder / "dev").mkdir()
            for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "secret0"):
                os.mknod(folder / "dev" / name, 0o020666, os.makedev(1, 3))
                (folder / "dev" / name).chmod(0o666)
            source = folder / "driver.c"
            source.write_text(DRIVER)
            words = [f'-DNODES="{folder}/dev"', f"-DANSWER={answer}"]
            command = ["cc", "-shared", "-fPIC", *words, "-o", folder / "libcuda.so.1", source]
            subprocess.run(command, check=True)
            made[answer] = folder
        return str(made[answer])

    yield make
    for folder in made.values():
        shutil.rmtree(folder)


@pytest.mark.parametrize("starter", starters())
@pytest.mark.parametrize("rung", ["A", "B"])
def test_a_gpu_worker_holds_its_nodes_and_nothing_else(starter, rung, card):
    record, answers, incident = run_as(starter, LAUNCH, rung, str(PROGRAMS), card())
    assert isinstance(record, dict), (record, answers)
    assert record["artifacts"]["gpu"] == {"cuInit": 0, "driver": 12040, "devices": 1}
    assert record["profile"] == "worker-gpu"
    assert answers["/dev/nvidia0"] == answers["/dev/null"] == "OPEN"
    assert answers["/dev/secret0"] in {"ENOENT", "EACCES", "EROFS"}
    assert answers["/etc/passwd"] in {"ENOENT", "EACCES", "EROFS"}
    assert answers["/proc/1/mem"] in {"ENOENT", "EACCES", "EPERM"}
    assert answers["connect"] == "EPERM"
    assert record["self_test"]["open"] in {"ENOENT", "EACCES"}
    assert incident is None


@pytest.mark.parametrize("rung", ["A", "B"])
def test_a_gpu_that_does_not_answer_inside_is_refused(rung, card):
    code, message, _ = run_as("root", LAUNCH, rung, str(PROGRAMS), card(304))
    assert code == "enclave.gpu"
    assert "304" in message


def test_a_host_without_a_gpu_is_refused_by_name(tmp_path):
    tmp_path.chmod(0o755)
    code, message, _ = run_as("root", LAUNCH, "A", str(PROGRAMS), str(tmp_path))
    assert code == "enclave.files" or (code == "enclave.gpu" and "nvidiactl" in message)


@pytest.mark.parametrize("starter", starters())
@pytest.mark.parametrize("rung", ["A", "B"])
def test_nothing_gets_out_of_a_gpu_worker(starter, rung, card):
    verdict = twin.judge(run_as(starter, PROBE, rung, card()))
    assert verdict.sealed, verdict.reason
    assert verdict.sealed_heard == 0
    # A program that starts from memory before stage 2 inherits the seal.
    assert {row.channel for row in verdict.rows if row.stage1 == "open"} <= {"memfd_exec"}
    assert not {"open", "LEAK"} & {a for row in verdict.rows for a in (row.stage2, row.convert)}
