"""Programs of the documentation, run by workers as `torchrun` would run them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers


@contextlib.contextmanager
def as_torchrun() -> Iterator[None]:
    """Within this block the environment says which rank this is, as under ``torchrun``."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with mock.patch.dict(os.environ, place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}):
        yield


def run(program: Path, arguments: list[str], eager: bool = False) -> str:
    """What a program prints on this rank; with ``eager``, where ``torch.compile`` changes nothing."""
    transformers.utils.logging.disable_progress_bar()
    printed = io.StringIO()
    with (
        as_torchrun(),
        mock.patch.object(sys, "argv", [str(program), *arguments]),
        torch.compiler.set_stance("force_eager" if eager else "default"),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(program), run_name="__main__")
    return printed.getvalue()


def exact_logits(folder: Path, text: str, adapter: bool) -> torch.Tensor:
    """The logits for the token behind a text, in float64 and on one rank."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / "lora"), autocast_adapter_dtype=False)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.double().eval()(ids, use_cache=False).logits[0, -1]  # type: ignore[no-any-return]


def token(folder: Path, word: str) -> int:
    """The token of a word."""
    return int(transformers.AutoTokenizer.from_pretrained(folder)(word)["input_ids"][0])


def failure(folder: Path, config: str) -> str:
    """How loading a model in FP8 ends on this rank; empty if it does not fail."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    configs: dict[str, Callable[[], Any]] = {
        "fine-grained": transformers.FineGrainedFP8Config,
        "dequantized": lambda: transformers.CompressedTensorsConfig(dequantize=True),
        "torchao": lambda: transformers.TorchAoConfig(Float8DynamicActivationFloat8WeightConfig()),
    }
    said = io.StringIO()
    handler = logging.StreamHandler(said)  # transformers prints why it could not convert a weight
    transformers.utils.logging.add_handler(handler)
    try:
        with as_torchrun(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.AutoModelForCausalLM.from_pretrained(
                folder, tp_plan="auto", dtype=torch.bfloat16, quantization_config=configs[config]()
            )
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}\n{said.getvalue()}"
    finally:
        transformers.utils.logging.remove_handler(handler)
    return ""
