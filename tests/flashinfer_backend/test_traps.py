"""Traps that users of FlashInfer fell into and that no other test here shows, and the page that lists them all."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusion_core.workspaces import Call
from fusion_core.workspaces.facts import difference
from fusion_flashinfer.calls import PARAMETERS, call_for
from fusion_flashinfer.fused import fused
from fusion_flashinfer.kernels import KERNELS, allocate
from tests.flashinfer_backend import stand_in
from tests.flashinfer_backend.forms import variants

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "flashinfer.md").read_text(encoding="utf-8")


def ranks(**differing):
    """What two ranks say of themselves before they make a workspace, one thing of it differing."""
    said = {"call": "all_reduce of (4, 256)", "tokens": 4096, "hidden": 256, "dtype": "torch.bfloat16", "mnnvl": False}
    said |= {"host": "one", "gpu": "GPU-0", "version": "0.7.2"}
    return [said, said | {"gpu": "GPU-1"} | differing]


def test_ranks_that_agree():
    assert difference(ranks()) is None
    assert difference([rank | {"gpu": None} for rank in ranks()]) is None


@pytest.mark.parametrize(
    ("differing", "words"),
    [
        ({"gpu": "GPU-0"}, "two ranks use one GPU, needs a GPU for each rank; call torch.cuda.set_device first"),
        ({"host": "two"}, "the group's ranks are on several hosts, needs one host, with its GPUs linked"),
        ({"version": "0.7.3"}, "version is '0.7.2' on rank 0 and '0.7.3' on rank 1, needs the same graphs,"),
        ({"hidden": 512}, "hidden is 256 on rank 0 and 512 on rank 1, needs the same graphs,"),
        ({"tokens": 8}, "tokens is 4096 on rank 0 and 8 on rank 1, needs the same graphs,"),
        ({"dtype": "torch.float16"}, "dtype is 'torch.bfloat16' on rank 0 and 'torch.float16' on rank 1, needs"),
        ({"mnnvl": True}, "mnnvl is False on rank 0 and True on rank 1, needs"),
        (
            {"call": "all_reduce of (5, 256)"},
            "call is 'all_reduce of (4, 256)' on rank 0 and 'all_reduce of (5, 256)' on",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ranks_that_do_not_agree_make_no_workspace(differing, words):
    assert str(difference(ranks(**differing))).startswith(words)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("past_the_public_function", [False, True])
def test_every_call_sums_in_float32_and_completes_at_its_end(kernel, pdl, past_the_public_function):
    """An early trigger gave NaN to kernels behind it (T5); sums in bfloat16 cost accuracy (T9)."""
    seen = []

    def below(*given):
        seen.append(dict(zip(PARAMETERS, given, strict=True)) | {"pattern": given[PARAMETERS.index("pattern_code")]})

    below.__signature__ = inspect.signature(stand_in.trtllm_allreduce_fusion)
    handle = SimpleNamespace(backend="trtllm", world_size=2, rank=0, workspace_tensor=None)
    call = call_for(handle, lambda **given: seen.append(given), below if past_the_public_function else None)
    workspace = SimpleNamespace(handle=SimpleNamespace(call=call), zeros=torch.zeros_like)
    x = torch.ones(4, 256, dtype=torch.bfloat16)
    tensors = {"x": x, "residual": x, "weight": x[0], "scale": torch.ones(()), "global_scale": torch.ones(())}
    tensors = {name: tensors[name] for name in kernel.definition.tensors}
    option = {name: {"group_size": 128, "scale_layout": "linear"}[name] for name in kernel.option}
    scalars = {"eps": 1e-5, "weight_bias": 0.0, **option}
    form = kernel.forms[True, pdl, False]
    fused(workspace, Call(kernel.definition, "", tensors, "", scalars, kernel=form), allocate(kernel, x))
    (given,) = seen
    assert given["trigger_completion_at_end"] is True
    assert given["fp32_acc"] is True
    assert given["launch_with_pdl"] is pdl
    assert given["use_oneshot"] is not None, "its own rule was measured on other GPUs, and raises with 16 ranks"
    assert given["pattern"] == kernel.code
    outputs = [
        given[name] for name in ("residual_out", "norm_out", "quant_out", "scale_out") if given.get(name) is not None
    ]
    assert len({each.data_ptr() for each in outputs}) == len(outputs), "results may not overlap"
    if kernel.norms:
        assert given["residual_in"] is not None, "not optional"
        assert given["scale_factor"] is None or given["scale_factor"].shape == (1,)


def test_what_is_not_asked_for_is_neither_mnnvl_nor_pdl():
    for strategy in variants():
        assert strategy.name.endswith(("_pdl", "_mnnvl")) == (strategy.option is not None)


def names_of_tests():
    found = set()
    for folder in ("tests/flashinfer_backend", "tests/gpu"):
        for path in (ROOT / folder).glob("*.py"):
            found |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return found


def test_the_page_has_every_trap_with_a_test_that_exists():
    rows = dict(re.findall(r"^\| (T\d+) \|(.*)\|$", PAGE, re.MULTILINE))
    assert list(rows) == [f"T{number}" for number in range(1, 14)]
    for number, text in rows.items():
        assert re.search(r"`test_\w+`|cannot arise", text), f"{number} has no test"
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named - names_of_tests() == set()
