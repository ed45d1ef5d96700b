"""Make the environments of the peers: `python benchmarks/peers/make.py [genai] [llamacpp]`.

Needs a package index; llama.cpp is compiled and takes some ten minutes on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(
    os.environ.get("AIRGAP_BENCH_PEERS", Path(__file__).resolve().parents[2] / "build" / "peers")
)
PACKAGES = {
    "genai": ("onnxruntime-genai==0.18.0", "onnx-ir==1.1.0", "transformers==5.24.0", "torch"),
    "llamacpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors"),
}
CMAKE = (
    "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF"
)


def main(names: list[str]) -> None:
    """Make each environment that is named, or all."""
    for name in names or list(PACKAGES):
        folder = FOLDER / name
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *PACKAGES[name]]
        subprocess.run(pip, check=True, env={**os.environ, "CMAKE_ARGS": CMAKE})
        print(f"{name}: {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
