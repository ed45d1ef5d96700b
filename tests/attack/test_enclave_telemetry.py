"""Every process that imports onnxruntime is silent: watched in a fake internet, not only sealed.

The programs run here without a seal, in a network namespace of ours where every name resolves and
every address answers, and a packet socket sees whatever leaves. No variable of a CI system is set:
some libraries are silent only there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from covered import run_covered
from enclave_harness import HERE, needs_namespaces, run_as, starters

from airgap.enclave import host, plan

pytestmark = needs_namespaces

LISTEN = """
import os, socket, struct, subprocess, tempfile, threading
from airgap.enclave import fixture
assert fixture.enter_network()
seen = []
def names():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", 53))
    while True:
        query, sender = s.recvfrom(4096)
        seen.append(["dns", query[12:].split(b"\\0")[0].decode("latin1")])
        answer = b"\\xc0\\x0c\\0\\x01\\0\\x01\\0\\0\\0\\x3c\\0\\x04" + socket.inet_aton("192.0.2.1")
        s.sendto(query[:2] + b"\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0" + query[12:] + answer, sender)
def tcp(port):
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM); s.bind(("0.0.0.0", port)); s.listen(8)
    while True:
        made, _ = s.accept(); seen.append(["tcp", port]); made.close()
def packets(s):
    while True:
        frame = s.recv(2048)[14:]
        if frame[0] >> 4 == 4 and frame[16] != 127:
            seen.append(["packet", f"{socket.inet_ntoa(frame[16:20])} protocol {frame[9]}"])
        elif frame[0] >> 4 == 6 and frame[24:40] != b"\\0" * 15 + b"\\1":
            seen.append(["packet", f"{frame[24:40].hex()} protocol {frame[6]}"])
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
for target, arguments in ((names, ()), (tcp, (443,)), (tcp, (80,)), (packets, (wire,))):
    threading.Thread(target=target, args=arguments, daemon=True).start()
threading.Event().wait(0.1)
seen.clear()
home = tempfile.mkdtemp()
environment = {"PATH": "/usr/bin:/bin", "HOME": home, **ARGUMENTS[2]}
done = subprocess.run([sys.executable, "-c", ARGUMENTS[0], str(ARGUMENTS[1])],
    env=environment, cwd=home, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
from pathlib import Path
left = sorted(str(path.relative_to(home)) for path in Path(home).rglob("*"))
ANSWER = [seen, [path for path in left if not path.startswith("ours")]]
"""
START = f"""
import os, subprocess, sys, time
assert not {{"CI", "GITHUB_ACTIONS", "ORT_RUNNING_UNIT_TESTS"}} & set(os.environ)
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
end = time.monotonic() + float(sys.argv[1])
os.mkdir("ours")
"""
MODEL = """
os.environ["TMPDIR"] = os.path.abspath("ours")
import inference_models
source, folder = inference_models.snapshot(), inference_models.model_folder()
"""
# name: what imports onnxruntime; each goes on until its time is over.
WATCHED = {
    "a session": """
import numpy as np, onnxruntime as ort
from onnxruntime import datasets
s = ort.InferenceSession(datasets.get_example("sigmoid.onnx"), providers=["CPUExecutionProvider"])
while True:
    s.run(None, {s.get_inputs()[0].name: np.random.rand(3, 4, 5).astype(np.float32)})
    if time.monotonic() > end: break
    time.sleep(0.2)
""",
    "the worker's program": MODEL
    + """
from airgap.inference import program
from airgap.inference.protocol import Generate, segments_of
wanted = Generate(prompt=segments_of("<MoleculeS>CCO<MoleculeE><ReverseReact><MoleculeS>"), n=2,
    max_new_tokens=20, temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.0, seed=1)
made = program.create({"folder": str(folder), "precision": "fp32", "threads": 2})
made.warm_up()
while True:
    made.handle(wanted.encode(), lambda part: None)
    if time.monotonic() > end: break
    time.sleep(0.2)
""",
    "the conversion": MODEL
    + """
for turn in range(10**6):
    out = os.path.abspath(f"ours/out{turn}"); os.mkdir(out)
    subprocess.run([sys.executable, "-I", inference_models.CONVERT, source, out], check=True)
    if time.monotonic() > end: break
""",
    "the parity check": MODEL
    + """
from bundle.staging import parity
import json, shutil
graphs = shutil.copytree(folder, os.path.abspath("ours/graphs"))
(one,) = json.load(open(f"{graphs}/graphs.json"))["graphs"]
plan = [{"codes": "", **{key: one[key] for key in ("name", "precision", "interface", "path")}}]
plan = json.dumps({"graphs": plan, "stops": parity.STOPS})
with open(f"{graphs}/{parity.PLAN}", "w") as file: file.write(plan)
for turn in range(10**6):
    out = os.path.abspath(f"ours/out{turn}"); os.mkdir(out)
    program = [sys.executable, "-I", parity.PROGRAM, source, graphs, parity.PROMPTS, out]
    subprocess.run(program, check=True)
    if time.monotonic() > end: break
""",
    "the fast graph of the tests": """
import random_models
from pathlib import Path
folder = Path("ours")
random_models.save_random(folder, "llama")
graph = random_models.FastGraph(folder, random_models.write_fast(folder))
while time.monotonic() < end:
    time.sleep(0.2)
""",
}
# As a sealed process on rung B, which shares the network of the fake internet.
SEALED = (
    MODEL
    + """
from airgap.enclave import SealSpec, host, seal
from airgap.inference.protocol import Info
spec = SealSpec(profile="worker", program="airgap.inference.program:create", read_only=(folder,),
    config={"folder": str(folder), "precision": "fp32", "threads": 2})
os.chmod(os.environ["HOME"], 0o755)
for path in (os.path.abspath("ours"), *(str(p) for p in folder.parents if "ours" in str(p))):
    os.chmod(path, 0o755)
with seal.start("B", spec, host.survey()) as enclave:
    while True:
        enclave.request(Info().encode(), 30.0)
        if time.monotonic() > end: break
        time.sleep(0.2)
"""
)
TALK = """
import socket
try: socket.getaddrinfo("collector.probe.invalid", 443)
except OSError: pass
socket.create_connection(("192.0.2.77", 443)).close()
"""
# A thread of a library, some time after the import, to a port that nobody listens on.
TALK_LATE = """
import socket, threading, time
def talk():
    time.sleep(0.3)
    try: socket.create_connection(("198.51.100.7", 8443)).close()
    except OSError: pass
threading.Thread(target=talk).start()
"""
SWITCHED_OFF = {"ORT_DISABLE_TELEMETRY": "1"}


def watch(program, seconds, environment, timeout=300):
    return run_covered(LISTEN, START + program, seconds, environment, timeout=timeout)


def test_the_fake_internet_hears_who_talks():
    seen, _ = watch(TALK, 0, {})
    assert ["tcp", 443] in seen
    assert any("collector" in what for kind, what in seen if kind == "dns")
    assert ["packet", "192.0.2.77 protocol 6"] in seen
    seen, _ = watch(TALK_LATE, 0, {})
    assert ["packet", "198.51.100.7 protocol 6"] in seen


@pytest.mark.parametrize("environment", [{}, SWITCHED_OFF], ids=["default", "switched off"])
def test_onnxruntime_is_silent_at_once(environment):
    pytest.importorskip("onnxruntime")
    assert watch(WATCHED["a session"], 2, environment) == [[], []]


@pytest.mark.soak
@pytest.mark.parametrize("environment", [{}, SWITCHED_OFF], ids=["default", "switched off"])
@pytest.mark.parametrize("program", WATCHED.values(), ids=WATCHED.keys())
def test_each_process_that_imports_onnxruntime_is_silent_for_a_minute(program, environment):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    seen, left = watch(program, 60, environment)
    assert seen == []
    assert not any("Microsoft" in path or "onnxruntime" in path for path in left), left


@pytest.mark.soak
def test_a_sealed_worker_is_silent_for_a_minute():
    pytest.importorskip("torch")
    code = LISTEN + "\nprint(json.dumps(ANSWER))\n"
    assert run_as(starters()[-1], code, START + SEALED, 60, {}, timeout=300)[0] == []


def test_no_import_of_onnxruntime_escapes_the_watch():
    """A new program that imports it must be added above."""
    import re

    known = {
        "airgap/inference/program.py",
        "airgap/inference/providers.py",
        "bundle/staging/parity_main.py",
        "tests/random_models.py",
        "tests/unit/test_inference_model.py",  # a graph is looked at, in the process of the tests
        "tests/unit/test_inference_options.py",  # a session is refused a GPU, there too
        "tests/unit/test_staging_graph.py",  # a part of a graph runs, there too
        "tests/unit/test_engine_store.py",  # an engine is not built, there too
        "benchmarks/bench_peers.py",  # the peer, in an environment of its own
        "tests/attack/test_enclave_telemetry.py",
    }
    wanted = re.compile(r"^\s*(?:import|from)\s+onnxruntime\b", re.MULTILINE)
    repository = HERE.parent
    found = {
        str(path.relative_to(repository))
        for room in ("airgap", "bundle", "policy", "tests", "benchmarks", "reference")
        for path in (repository / room).rglob("*.py")
        if wanted.search(path.read_text())
    }
    assert found <= known, found - known


# -- the libraries themselves ---------------------------------------------------------------------


def shared_objects():
    return sorted({p for folder in plan.site_folders() for p in Path(folder).rglob("*.so*")})


def test_no_library_of_a_sealed_process_carries_a_telemetry_client():
    hits = [
        hit
        for folder in plan.site_folders()
        for name in ("onnxruntime", "tokenizers", "llguidance", "rdkit", "gemmi", "numpy")
        for hit in host.scan_for_collector(Path(folder) / name)
    ]
    assert hits == []
    assert host.survey().telemetry == ()


@pytest.mark.soak
def test_no_shared_object_that_is_installed_carries_a_telemetry_client():
    folders = [Path(folder) for folder in plan.site_folders()]
    assert [hit for folder in folders for hit in host.scan_for_collector(folder)] == []
    assert len(shared_objects()) > 50
