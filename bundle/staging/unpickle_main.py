"""The program that reads pickled weights: sealed, with the restricted loader, once. Runs sealed.

`python -I unpickle_main.py SOURCE OUT`, started by `bundle.staging.unpickle` through the sealed
runner and by nothing else. SOURCE holds the pickles alone. Each becomes a safetensors file in OUT.
The loader takes tensors and plain containers only (`weights_only`); the seal holds whatever gets
past it. The parent believes nothing: it parses what is left as foreign input.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

REFUSED = 4  # exit status: the restricted loader took a file for more than weights
_NESTS = ("state_dict", "model_state_dict", "model", "module")


def main(argv: list[str]) -> int:
    """Convert every file of `argv[0]` into the folder `argv[1]`."""
    os.environ.update(
        {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    )
    warnings.simplefilter("ignore")
    source, out = (Path(argument) for argument in argv)
    import safetensors
    import torch
    from safetensors.torch import save_file

    names: dict[str, str] = {}
    for path in sorted(source.iterdir()):
        try:
            value = torch.load(path, map_location="cpu", weights_only=True)
            tensors = flatten(value)
        except (pickle.UnpicklingError, ValueError, RuntimeError, EOFError, KeyError) as error:
            sys.stderr.write(f"{path.name}: {type(error).__name__}: {reason(error)}\n")
            return REFUSED
        target = f"{path.stem.replace('pytorch_model', 'model')}.safetensors"
        save_file(tensors, out / target, metadata={"format": "pt"})
        names[path.name] = target
    versions = {"torch": torch.__version__, "safetensors": safetensors.__version__}
    record = {"names": names, "versions": versions}
    (out / "unpickle.json").write_text(json.dumps(record, sort_keys=True))
    return 0


def reason(error: Exception) -> str:
    """Return what the loader found, without its advice to load the file in a careless way."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    return text.partition(". ")[0][:400]


def flatten(value: Any) -> dict[str, Any]:
    """Return name and tensor of a state dict, each with storage of its own; ValueError else."""
    import torch

    seen = 0  # a dictionary may hold itself
    while isinstance(value, dict) and not any(isinstance(v, torch.Tensor) for v in value.values()):
        seen += 1
        inner = [value[name] for name in _NESTS if isinstance(value.get(name), dict)]
        if len(inner) != 1 or seen > len(_NESTS):
            raise ValueError("it holds no dictionary of tensors")
        value = inner[0]
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a dictionary of tensors")  # noqa: TRY004
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r:.80} is no tensor under a name")  # noqa: TRY004
    return {name: tensor.detach().contiguous().clone() for name, tensor in value.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
