"""The weights of a model that small_model.py wrote, in FP8 as checkpoints have them.

    python examples/huggingface/small_fp8.py FOLDER

writes FOLDER/fine_grained (a scale for each block, as DeepSeek and Qwen do) and FOLDER/compressed_tensors (a scale for
each weight, as vLLM's llm-compressor does).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max
BLOCK = 16  # of 128 in real checkpoints; each rank's part of a weight has to be whole blocks

FINE_GRAINED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
ONE_SCALE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": ONE_SCALE, "input_activations": {**ONE_SCALE, "dynamic": True}}
    },
}


def by_block(weight: Tensor) -> dict[str, Tensor]:
    """A weight in FP8, and what a block of it is multiplied by."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / LARGEST
    return {
        "weight": (blocks / scales).to(torch.float8_e4m3fn).reshape(rows, columns),
        "weight_scale_inv": scales[:, 0, :, 0].contiguous(),
    }


def whole(weight: Tensor) -> dict[str, Tensor]:
    """A weight in FP8, and what it is multiplied by."""
    scale = weight.float().abs().max().reshape(1) / LARGEST
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.bfloat16()}


def write(source: Path, folder: Path, quantise: Any, config: dict[str, Any]) -> None:
    """A copy of the model with its projections in FP8."""
    shutil.copytree(source, folder, ignore=lambda _, names: [name for name in names if (source / name).is_dir()])
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix("weight")
            tensors |= {module + part: value for part, value in quantise(tensor).items()}
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"quantization_config": config, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[1]) / "fine_grained", by_block, FINE_GRAINED)
    write(Path(sys.argv[1]), Path(sys.argv[1]) / "compressed_tensors", whole, COMPRESSED_TENSORS)
