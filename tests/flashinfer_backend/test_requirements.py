"""What FlashInfer's strategies accept and refuse, by the reasons' words; no GPU and no FlashInfer is needed."""

import importlib.metadata
import math
import sys
from dataclasses import replace
from importlib.machinery import PathFinder

import pytest
import torch

from fusion_core import Device, FixedTokens, FusionConfig, KnownFaster
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.samples.sites import resized, with_outputs
from fusion_core.testing import example_site
from fusion_flashinfer import availability, strategies
from fusion_flashinfer.kernels import KERNELS
from fusion_flashinfer.limits import LIMITS, MIB, MOST, ONE_SHOT, TWO_SHOT
from fusion_flashinfer.requirements import (
    KernelPresent,
    MoreRowsThanRanks,
    MulticastAllowed,
    OneCluster,
    VectorForEachRank,
)
from fusion_flashinfer.strategies import STRATEGIES

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100, B200 = Device("cuda", "sm_90"), Device("cuda", "sm_100")
PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
KERNEL = {f"flashinfer.{kernel.name}": kernel for kernel in KERNELS}
PLAIN = [strategy for strategy in STRATEGIES if strategy.option is None]


def kernel_of(strategy):
    return KERNEL[strategy.name.removesuffix("_pdl").removesuffix("_mnnvl").removesuffix("_two_shot")]


def is_two_shot(strategy):
    return "_two_shot" in strategy.name


def site_of(strategy, device=None):
    device = device or (B200 if kernel_of(strategy).quantization == "nvfp4" else H100)
    return example_site(PATTERNS[strategy.pattern], strategy, device=device)


def said(strategy, site):
    return [str(reason) for reason in strategy.cannot(site, PATTERNS[strategy.pattern])]


def typed(site, dtype, *names):
    """The site with some tensors, or all but scales, in another dtype."""
    names = names or tuple(name for name in site.inputs if name not in ("scale", "global_scale"))
    inputs = {n: replace(meta, dtype=dtype) if n in names else meta for n, meta in site.inputs.items()}
    return with_outputs(PATTERNS[site.pattern], replace(site, inputs=inputs), site.outputs)


def untouched(site, name):
    """The site with one tensor in bfloat16; its definition would not take it."""
    return replace(site, inputs={**site.inputs, name: replace(site.inputs[name], dtype=BF16)})


def sized(site, *shape):
    return resized(PATTERNS[site.pattern], site, shape)


def given(site, **attributes):
    site = replace(site, attributes={**site.attributes, **attributes})
    return with_outputs(PATTERNS[site.pattern], site, site.outputs)


def live(site, *names):
    return with_outputs(PATTERNS[site.pattern], site, names)


@pytest.fixture(autouse=True)
def _nothing_is_imported():
    before = "flashinfer" in sys.modules
    yield
    assert ("flashinfer" in sys.modules) == before


# ---- what is accepted


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_every_strategy_has_a_site_that_it_can_and_should_run(strategy):
    if strategy.option == "mnnvl":
        strategy = replace(
            strategy, requires=tuple(r for r in strategy.requires if not isinstance(r, MulticastAllowed))
        )
    site = site_of(strategy)
    assert said(strategy, site) == []
    if is_two_shot(strategy):
        ranks, above = next((ranks, above) for arch, ranks, above, _ in TWO_SHOT if arch == site.device.arch)
        site = replace(sized(site, above // 512 + 1, 256), world_size=ranks)
        assert said(strategy, site) == []
    assert strategy.should_not(site) == ()


def test_there_is_a_kernel_for_every_pattern_but_mxfp4():
    assert {s.pattern for s in STRATEGIES} == {name for name in PATTERNS if "mxfp4" not in name}
    assert {s.option for s in STRATEGIES} == {None, "pdl", "mnnvl"}
    assert not [s.name for s in STRATEGIES if "group_fp8" in s.name and s.option == "mnnvl"]


def test_every_kernel_has_a_strategy_for_each_form():
    names = [s.name for s in STRATEGIES]
    assert len(set(names)) == len(names)
    for kernel in KERNELS:
        forms = ["", "_two_shot", "_pdl", "_two_shot_pdl"] + ["_mnnvl"] * (kernel.quantization != "group_fp8")
        expected = {f"flashinfer.{kernel.name}{form}" for form in forms}
        assert {s.name for s in STRATEGIES if kernel_of(s) is kernel} == expected


def test_what_is_preferred():
    """What the user asked for before what he did not, one-shot before two-shot, without the norm before with it."""
    for pattern in {strategy.pattern for strategy in STRATEGIES}:
        ranks = {strategy.name: strategy.rank for strategy in STRATEGIES if strategy.pattern == pattern}
        assert len(set(ranks.values())) == len(ranks)
        for name, rank in ranks.items():
            plain = name.removesuffix("_pdl").removesuffix("_mnnvl")
            assert (rank > ranks[plain]) == (name != plain)
            if "_two_shot" in name:
                assert rank < ranks[name.replace("_two_shot", "")]
            if "_out" in name:
                assert rank < ranks[name.replace("_out", "")]


def test_the_one_shot_sum_alone_is_batch_invariant():
    """With a norm the kernels share a row between more or fewer blocks as there are fewer or more rows."""
    assert [s.name for s in STRATEGIES if s.batch_invariant] == ["flashinfer.all_reduce"]
    (strategy,) = [s for s in STRATEGIES if s.batch_invariant]
    config = FusionConfig(numerics="deterministic", max_tokens=8)
    assert strategy.settings(PATTERNS["all_reduce"], config) == {"max_tokens": 8, "numerics": "deterministic"}


ACCEPTED = {
    "float16": lambda site: typed(site, FP16),
    "a weight bias, as Gemma has it": lambda site: given(site, weight_bias=1.0) if "weight" in site.inputs else site,
    "no rows": lambda site: sized(site, 0, 256),
    "one dimension": lambda site: sized(site, 256),
    "four dimensions": lambda site: sized(site, 2, 3, 4, 256),
    "hidden 7168": lambda site: sized(site, 4, 7168),
    "hidden 65536, the largest": lambda site: sized(site, 4, 65536),
    "four ranks": lambda site: replace(site, world_size=4),
    "eight ranks": lambda site: replace(site, world_size=8),
    "more rows than eight ranks": lambda site: replace(sized(site, 3, 3, 256), world_size=8),
    "another rounding of the norm that only the quantisation reads": lambda site: (
        given(site, norm_dtype=FP32) if "quantized" in site.outputs and "normed" not in site.outputs else site
    ),
    "attributes as the kernel has them": lambda site: given(
        site,
        **{
            name: value
            for name, value in {"fp8_max": 448.0, "residual_dtype": BF16, "norm_dtype": BF16}.items()
            if name in PATTERNS[site.pattern].parameters
        },
    ),
    "memory that is not contiguous, which the operator copies": lambda site: replace(
        site, inputs={**site.inputs, "x": replace(site.inputs["x"], stride=(1, 4))}
    ),
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.parametrize("strategy", PLAIN, ids=lambda s: s.name)
def test_accepted(strategy, change):
    site = change(site_of(strategy))
    rows, ranks = math.prod(site.inputs["x"].shape[:-1]), site.world_size
    too_few = is_two_shot(strategy) and 0 < rows <= ranks
    expected = [f"x has {rows} rows, needs more than the {ranks} ranks"] if too_few else []
    if many_registers(strategy) and site.inputs["x"].shape[-1] == 65536:
        expected.append("x.shape[-1] is 65536, which takes 1024 threads to a block, needs at most 512")
    assert said(strategy, site) == expected


def many_registers(strategy):
    """With 1024 threads to a block this kernel is not launched: "too many resources requested for launch"."""
    return strategy.name.endswith("_group_fp8_out_two_shot")


@pytest.mark.parametrize("hidden", [64, 2880])
def test_rows_that_are_no_whole_number_of_warps(hidden):
    """Partial warps were wrong in releases before 0.6.15 (T9); multiples of 128 are the group kernel's own rule."""
    for strategy in PLAIN:
        words = said(strategy, sized(site_of(strategy), 4, hidden)) if "group" not in strategy.name else []
        assert words == []


def test_float32_where_nothing_is_quantised():
    for strategy in [s for s in PLAIN if not kernel_of(s).quantization]:
        site = typed(site_of(strategy), FP32)
        assert said(strategy, site) == []
        assert said(strategy, sized(site, 4, 32768)) == []
        assert said(strategy, sized(site, 4, 65536)) == [
            "x.shape[-1] is 65536, which takes 2048 threads to a block, needs at most 1024"
        ]


# ---- what is refused


def everywhere(kernel):
    return True


def norms(kernel):
    return kernel.norms


def quantises(kernel):
    return bool(kernel.quantization)


def fp8(kernel):
    return kernel.quantization.endswith("fp8")


def only(quantization):
    return lambda kernel: kernel.quantization == quantization


def adds(kernel):
    return kernel.adds


def gives_norm(kernel):
    return quantises(kernel) and kernel.norm_out


def gives_no_norm(kernel):
    return quantises(kernel) and not kernel.norm_out


HALF = "bfloat16 or float16"
REFUSED = [
    (lambda k: not k.in_parts, lambda s: sized(s, MOST // 512 + 128, 256), "x has 64.06 MiB, needs at most 64 MiB",
     "scales with a layout of the whole"),
    (lambda k: not k.in_parts, lambda s: sized(s, 2 * MOST // 512, 256), "x has 128 MiB, needs at most 64 MiB", ""),
    (everywhere, lambda s: typed(s, FP64), "x is float64, needs bfloat16", "T6: the kernels know three dtypes"),
    (quantises, lambda s: typed(s, FP32), f"x is float32, needs {HALF}", "no FP8 or FP4 kernel takes float32"),
    (norms, lambda s: typed(s, FP32, "weight"), "weight is float32, needs bfloat16, the dtype of x", "T4"),
    (norms, lambda s: typed(s, FP16, "weight"), "weight is float16, needs bfloat16, the dtype of x", "T4"),
    (adds, lambda s: typed(s, FP32, "residual"), "residual is float32, needs bfloat16, the dtype of x", "T4"),
    (lambda k: not quantises(k), lambda s: sized(s, 4, 20), "x.shape[-1] is 20, needs a multiple of 8", "16 bytes"),
    (everywhere, lambda s: sized(s, 4, 128 * 1025),
     "x.shape[-1] is 131200, which takes 2050 threads to a block, needs at most 1024", "T6"),
    (lambda k: k.quantization in ("", "static_fp8", "token_fp8"), lambda s: sized(s, 4, 8200),
     "x.shape[-1] is 8200, which takes 1025 threads to a block, needs at most 1024", "T6"),
    (lambda k: k.quantization != "group_fp8", lambda s: sized(s, 4, 16400),
     "x.shape[-1] is 16400, which takes 1025 threads to a block, needs at most 1024", "T6"),
    (only("group_fp8"), lambda s: given(s, group_size=64), "group_size is 64, needs 128", "what the kernel has"),
    (only("group_fp8"), lambda s: given(s, scale_format="float32"), "scale_format is float32, needs ue8m0_packed", ""),
    (only("group_fp8"), lambda s: given(s, scale_format="ue8m0"), "scale_format is ue8m0, needs ue8m0_packed", ""),
    (only("group_fp8"), lambda s: given(s, scale_layout="column_major"),
     "scale_layout is column_major, needs row_major", ""),
    (only("group_fp8"), lambda s: given(s, min_scale=1e-4), "min_scale is 0.0001, needs None or 1e-10", ""),
    (only("token_fp8"), lambda s: given(s, min_scale=1e-12), "min_scale is 1e-12, needs None or", ""),
    (fp8, lambda s: given(s, fp8_dtype=torch.float8_e4m3fnuz), "fp8_dtype is float8_e4m3fnuz, needs float8_e4m3fn", ""),
    (fp8, lambda s: given(s, fp8_max=224.0), "fp8_max is 224.0, needs None or 448.0", ""),
    (only("static_fp8"), lambda s: untouched(s, "scale"), "scale is bfloat16, needs float32", ""),
    (only("nvfp4"), lambda s: untouched(s, "global_scale"), "global_scale is bfloat16, needs float32", ""),
    (adds, lambda s: given(s, residual_dtype=FP32), "residual_dtype is float32, needs bfloat16", ""),
    (lambda k: norms(k) and not quantises(k), lambda s: given(s, norm_dtype=FP32),
     "norm_dtype is float32, needs bfloat16", ""),
    (quantises, lambda s: given(s, norm_dtype=FP16), "norm_dtype is float16, needs bfloat16 or float32", ""),
    (gives_norm, lambda s: given(live(s, *s.outputs, "normed"), norm_dtype=FP32),
     "normed is float32, needs bfloat16, the dtype of x", "who reads the norm itself reads it as the model has it"),
    (gives_no_norm, lambda s: live(s, *s.outputs, "normed"), "normed is used outside the site, needs no other live", ""),
    (adds, lambda s: live(s, *s.outputs, "reduced"), "reduced is used outside the site, needs no other live outputs",
     "no pattern of FlashInfer gives the sum before the residual"),
    (norms, lambda s: replace(s, inputs={n: m for n, m in s.inputs.items() if n != "weight"}),
     "there is no weight, needs one", ""),
    (only("nvfp4"), lambda s: replace(s, device=H100), "device is cuda (sm_90), needs compute capability 10 or later",
     "B6: a silent no-op"),
    *((everywhere, lambda s, ranks=ranks: replace(s, world_size=ranks), f"world size is {ranks}, needs 2, 4 or 8", "T6")
      for ranks in (1, 3, 6, 16)),
]  # fmt: skip


@pytest.mark.parametrize(("applies", "change", "words", "why"), REFUSED, ids=[str(row[2]) for row in REFUSED])
def test_refused(applies, change, words, why):
    asked = [strategy for strategy in PLAIN if applies(kernel_of(strategy))]
    assert asked
    for strategy in asked:
        found = said(strategy, change(site_of(strategy)))
        assert any(each.startswith(words) for each in found), strategy.name


def test_more_than_one_launch_takes():
    assert {kernel.quantization for kernel in KERNELS if not kernel.in_parts} == {"group_fp8", "nvfp4"}
    for strategy in PLAIN:
        assert said(strategy, sized(site_of(strategy), MOST // 512, 256)) == []
        words = said(strategy, sized(site_of(strategy), 4 * MOST // 512, 256))
        assert words == ([] if kernel_of(strategy).in_parts else ["x has 256 MiB, needs at most 64 MiB"])


def test_the_two_forms_and_pdl_require_the_same():
    by_name = {s.name: s for s in STRATEGIES}
    for strategy in PLAIN:
        assert by_name[f"{strategy.name}_pdl"].requires == strategy.requires
        one_shot = by_name[strategy.name.removesuffix("_two_shot")]
        more = [VectorForEachRank("x"), MoreRowsThanRanks("x")] if is_two_shot(strategy) else []
        more += [OneCluster("x", 512)] if many_registers(strategy) else []
        assert [each for each in strategy.requires if each not in one_shot.requires] == more
        assert [each for each in one_shot.requires if each not in strategy.requires] == []


@pytest.mark.parametrize(("dtype", "ranks", "least"), [(BF16, 2, 16), (BF16, 8, 64), (FP32, 4, 16)])
def test_a_row_of_a_two_shot_kernel_has_a_vector_for_each_rank(dtype, ranks, least):
    """x of 3 x 8 on two ranks ended in FlashInfer's "not oneshot, or block_size < nranks"."""
    (strategy,) = [s for s in PLAIN if s.name == "flashinfer.all_reduce_two_shot"]
    site = replace(site_of(strategy), world_size=ranks)
    site = replace(site, inputs={"x": replace(site.inputs["x"], dtype=dtype)}, outputs={})
    assert said(strategy, sized(site, 9, least)) == []
    words = f"x.shape[-1] is {least - 8}, needs 16 bytes for each of the {ranks} ranks"
    assert said(strategy, sized(site, 9, least - 8)) == [words]


def test_nvfp4_rows_are_whole_blocks_of_16():
    (strategy,) = [s for s in PLAIN if s.name == "flashinfer.all_reduce_rms_norm_nvfp4"]
    site = site_of(strategy)
    odd = replace(site, inputs={**site.inputs, "x": replace(site.inputs["x"], shape=(4, 264), stride=(264, 1))})
    assert said(strategy, odd) == ["x.shape[-1] is 264, needs a multiple of 16"]


def test_a_hidden_size_known_only_at_run_time_is_refused():
    (strategy,) = [s for s in PLAIN if s.name == "flashinfer.all_reduce"]
    x = symbolic(4, 256, which=1)[1]
    site = replace(site_of(strategy), inputs={"x": x})
    assert any(
        "known only at run time, needs a fixed hidden size; mark it static" in each for each in said(strategy, site)
    )


# ---- multicast


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("NCCL_NVLS_ENABLE", "0", True),
        ("NCCL_NVLS_ENABLE", "1", False),
        ("NCCL_NVLS_ENABLE", "2", False),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1", True),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "true", True),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0", False),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "", False),
        ("NVSHMEM_DISABLE_NVLS", "1", True),
        ("NVSHMEM_DISABLE_NVLS", "0", False),
        ("UNRELATED", "1", False),
    ],
)
def test_where_multicast_is_switched_off_mnnvl_is_refused(monkeypatch, name, value, off):
    for each in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    declared = strategies._strategies()
    expected = [f"{name}={value} switches NVLink multicast off, needs it on"] if off else []
    for strategy in declared:
        site = site_of(next(s for s in PLAIN if s.name == f"flashinfer.{kernel_of(strategy).name}"))
        assert said(strategy, site) == (expected if strategy.option == "mnnvl" else [])
    assert (name in repr([s.requires for s in declared])) == off, "it is a part of the compile-cache key"


def test_what_nobody_ran_on_hardware_is_marked():
    for strategy in STRATEGIES:
        expected = [strategies.UNTESTED_FP4] if "nvfp4" in strategy.name else []
        expected += [strategies.UNTESTED_MNNVL] if strategy.option == "mnnvl" else []
        assert strategy.untested == ("; ".join(expected) or None)


# ---- what was measured


def measured(device, ranks, shape, dtype=BF16, form=""):
    """Why one form of the bare all_reduce is not known to be faster; None where it is."""
    (strategy,) = [s for s in STRATEGIES if s.name == f"flashinfer.all_reduce{form}"]
    site = replace(site_of(strategy), device=device, world_size=ranks)
    x = replace(site.inputs["x"], shape=shape, dtype=dtype, stride=None)
    reasons = [str(reason) for reason in strategy.should_not(replace(site, inputs={"x": x}))]
    return "; ".join(reasons) or None


def test_every_strategy_says_where_its_form_was_measured():
    for strategy in STRATEGIES:
        sizes = TWO_SHOT if is_two_shot(strategy) else ONE_SHOT
        assert strategy.worthwhile == (KnownFaster("x", sizes, "where it was measured to be faster"),)


@pytest.mark.parametrize("form", ["", "_two_shot", "_pdl", "_mnnvl"])
def test_what_nobody_measured_is_not_used(form):
    words = measured(Device("cuda", "sm_120"), 2, (4, 256), form=form)
    assert words == (
        "nobody has measured it to be faster on 2 ranks of cuda (sm_120), needs a measurement; fusion-core tune "
        "measures it on this machine"
    )
    words = measured(H100, 16, (4, 256), form=form)
    assert words.startswith("nobody has measured it to be faster on 16 ranks of cuda (sm_90)")


@pytest.mark.parametrize(("arch", "ranks"), LIMITS)
def test_the_largest_size_is_the_last(arch, ranks):
    limit = LIMITS[arch, ranks]
    device = Device("cuda", arch)
    assert limit.one_shot <= limit.most <= MOST
    ends = [("", 0, limit.one_shot)] + [("_two_shot", limit.one_shot, limit.most)] * (limit.one_shot < limit.most)
    for form, above, to in ends:
        first, last = above // 8192 + 1, to // 8192
        assert measured(device, ranks, (first, 4096), form=form) is None
        assert measured(device, ranks, (last, 4096), form=form) is None
        words = (
            f" on {ranks} ranks of cuda ({arch}), needs over {above / MIB:g} up to {to / MIB:g} MiB, where it was "
            "measured to be faster; fusion-core tune measures it on this machine"
        )
        too_large = f"x has {(to + 8192) / MIB:.3g} MiB"
        assert measured(device, ranks, (last + 1, 4096), form=form) == too_large + words
        assert (
            measured(device, ranks, (last // 2 + 1, 4096), FP32, form) == f"x has {(to + 16384) / MIB:.3g} MiB" + words
        )
        none = measured(device, ranks, (0, 4096), form=form)
        assert none == (f"x has 0 MiB{words}" if above else None)


def test_where_one_form_ends_the_other_begins():
    one, two = ({entry[:2]: entry[2:] for entry in sizes} for sizes in (ONE_SHOT, TWO_SHOT))
    assert one.keys() == LIMITS.keys()
    assert two.keys() == {place for place, limit in LIMITS.items() if limit.one_shot < limit.most}
    for place, (above, to) in two.items():
        assert one[place] == (0, above)
        assert to == LIMITS[place].most


def test_no_workspace_can_overflow_an_int():
    """B4: ``clear_offset * comm_size`` of the kernels. A workspace grows to the next power of two, in whole rows."""
    assert MOST & (MOST - 1) == 0
    widest_row = 65536 * 2
    assert max(strategies.WORLD_SIZES) * (MOST + widest_row) < 2**30


def symbolic(rows, hidden, which=0):
    """A tensor of which one size is a real backed symbol, and its environment."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    from fusion_core import TensorMeta

    env = ShapeEnv()
    dynamic = [DimDynamic.STATIC, DimDynamic.STATIC]
    dynamic[which] = DimDynamic.DYNAMIC
    fake = FakeTensorMode(shape_env=env).from_tensor(
        torch.empty(rows, hidden, dtype=BF16),
        symbolic_context=StatelessSymbolicContext(dynamic),
        source=ConstantSource("x"),
    )
    assert isinstance(fake.shape[which], torch.SymInt)
    return env, TensorMeta.of(fake)


@pytest.mark.parametrize("rows", [4, 100000], ids=["small", "larger than any limit"])
def test_a_run_time_number_of_rows_is_accepted_and_guards_nothing(rows):
    for strategy in PLAIN:
        env, x = symbolic(rows, 256)
        # two-shot was nowhere faster on two
        site = replace(site_of(strategy), world_size=4)
        inputs = {n: x if n in ("x", "residual") else meta for n, meta in site.inputs.items()}
        site = replace(site, inputs=inputs)
        assert said(strategy, site) == []
        assert strategy.should_not(site) == (), "the choice is made when it runs"
        assert env.guards == [], "a guard would compile the graph again for other token counts"


def test_fixed_sizes():
    site = site_of(PLAIN[0])
    assert FixedTokens("x").unmet(site) is None
    assert FixedTokens("y").unmet(site) is None
    x = symbolic(4, 256)[1]
    words = str(FixedTokens("x").unmet(replace(site, inputs={"x": x})))
    assert words.endswith(
        "needs fixed sizes: where it gets too large for the kernel, this quantisation takes several others; "
        "torch.compile(dynamic=False)"
    )


# ---- what is installed

SOURCE = """
class Other:
    kAllReduce = 77


class AllReduceFusionPattern:
    # NOTE: as FlashInfer writes them
    kAllReduce = 0
    kARResidualRMSNorm = 1
    kARResidualRMSNormFP8Quant = 2


class AllReduceFusionOp:
    kAllReduce = 99


raise RuntimeError("this must not be imported")
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a FlashInfer of this source, and what it imports, in front of what is installed."""

    def now(source=SOURCE, version="0.7.2.post1", lacking=()):
        files = {
            "flashinfer/__init__.py": "raise RuntimeError('this must not be imported')",
            "flashinfer/comm/trtllm_ar.py": source,
            "flashinfer_python-0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {version}\n",
            "tvm_ffi/__init__.py": "",
            "cuda/bindings/__init__.py": "",
        }
        for name, text in files.items():
            if text is not None and not name.startswith(tuple(lacking)):
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")

        def spec(module):
            path = [str(tmp_path)]
            for part in module.split("."):
                found = PathFinder.find_spec(part, path)
                path = None if found is None else list(found.submodule_search_locations or ())
                if found is None:
                    return None
            return found

        def version_of(name):
            found = [d for d in importlib.metadata.distributions(path=[str(tmp_path)]) if d.metadata["Name"] == name]
            if not found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[0].version

        monkeypatch.setattr(availability, "_spec", spec)
        monkeypatch.setattr(availability, "version", version_of)
        availability.pattern_codes.cache_clear()

    yield now
    monkeypatch.undo()
    availability.pattern_codes.cache_clear()


def test_codes_are_read_from_the_source(install):
    install()
    assert availability.pattern_codes() == {
        "kAllReduce": 0,
        "kARResidualRMSNorm": 1,
        "kARResidualRMSNormFP8Quant": 2,
    }


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SOURCE, None),
        (SOURCE.replace("    kARResidualRMSNorm = 1\n", ""), "the installed FlashInfer has no kARResidualRMSNorm"),
        (SOURCE.replace("RMSNorm = 1", "RMSNorm = 13"), "the installed FlashInfer has kARResidualRMSNorm as 13"),
        (SOURCE.replace("kARResidualRMSNorm = 1", "kFused = 1"), "the installed FlashInfer has no kARResidualRMSNorm"),
        ("", "the installed FlashInfer has no kARResidualRMSNorm"),
    ],
    ids=["as it is", "missing", "renumbered", "renamed", "no such class"],
)
def test_a_pattern_that_the_installed_release_lacks_is_refused(install, source, words):
    install(source)
    (strategy,) = [s for s in strategies._strategies() if s.name == "flashinfer.all_reduce_add_rms_norm"]
    found = said(strategy, site_of(PLAIN[0] if words else strategy))
    needs = ", needs kARResidualRMSNorm = 1, as flashinfer-python 0.7.2 has it"
    assert (f"{words}{needs}" in found) if words else found == []


def test_without_the_file_every_pattern_is_refused(install):
    install(lacking=("flashinfer/comm",))
    assert KernelPresent.here("kAllReduce", 0).installed is None


def test_without_flashinfer_the_declarations_are_whole(install):
    install(lacking=("flashinfer",))
    assert KernelPresent.here("kAllReduce", 0) == KernelPresent("kAllReduce", 0, 0)


def test_two_releases_give_two_cache_keys():
    assert repr(KernelPresent("k", 1, 1)) != repr(KernelPresent("k", 1, None))


HINT = "; pip install -U 'fusion-core[flashinfer]'"


@pytest.mark.parametrize(
    ("device", "lacking", "version", "words"),
    [
        (H100, (), "0.7.2.post1", []),
        (B200, (), "0.8.0", []),
        (Device("cuda", "sm_120"), (), "0.7.2", []),
        (Device("cuda", "sm_103"), (), "1.0", []),
        (Device("cpu"), (), "0.7.2", ["device is cpu, needs an NVIDIA GPU"]),
        (Device("xpu"), (), "0.7.2", ["device is xpu, needs an NVIDIA GPU"]),
        (Device("cuda", "sm_80"), (), "0.7.2", ["device is cuda (sm_80), needs compute capability 9, 10 or 12"]),
        (Device("cuda", "sm_89"), (), "0.7.2", ["device is cuda (sm_89), needs compute capability 9, 10 or 12"]),
        (Device("cuda", "sm_110"), (), "0.7.2", ["device is cuda (sm_110), needs compute capability 9, 10 or 12"]),
        (H100, ("flashinfer/",), "0.7.2", ["flashinfer is not installed, needs flashinfer-python >= 0.7.2" + HINT]),
        (H100, ("flashinfer_python",), "0.7.2",
         ["flashinfer has no metadata of flashinfer-python, needs flashinfer-python >= 0.7.2" + HINT]),
        (H100, (), "0.7.1", ["flashinfer-python is 0.7.1, needs 0.7.2 or later" + HINT]),
        (H100, (), "0.6.18.post1", ["flashinfer-python is 0.6.18.post1, needs 0.7.2 or later" + HINT]),
        (H100, (), "0.10.0", []),
        (H100, ("tvm_ffi",), "0.7.2",
         ["apache-tvm-ffi is not installed, which flashinfer.comm imports, needs apache-tvm-ffi; pip install apache-tvm-ffi"]),
        (H100, ("cuda",), "0.7.2",
         ["cuda-bindings is not installed, which flashinfer.comm imports, needs cuda-bindings; pip install cuda-bindings"]),
        (Device("cuda", "sm_80"), ("tvm_ffi",), "0.7.0",
         ["device is cuda (sm_80), needs compute capability 9, 10 or 12", "flashinfer-python is 0.7.0, needs 0.7.2 or later" + HINT,
          "apache-tvm-ffi is not installed, which flashinfer.comm imports, needs apache-tvm-ffi; pip install apache-tvm-ffi"]),
    ],
)  # fmt: skip
def test_why_it_cannot_be_used(install, device, lacking, version, words):
    install(lacking=lacking, version=version)
    assert [str(reason) for reason in availability.unavailable(device)] == words


def test_a_torch_for_amd(install, monkeypatch):
    install()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    words = [str(reason) for reason in availability.unavailable(Device("cuda", "gfx942"))]
    assert words == ["this torch is built for ROCm, needs a CUDA build"]


def test_packages_are_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "fusion_probe_me").mkdir()
    (tmp_path / "fusion_probe_me" / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert availability._spec("fusion_probe_me") is not None
    assert availability._spec("fusion_nowhere.at_all") is None
    assert "fusion_probe_me" not in sys.modules


@pytest.mark.parametrize(
    ("arch", "major"), [("sm_90", 9), ("sm_90a", 9), ("sm_100", 10), ("sm_120", 12), ("gfx942", 0), ("", 0), ("sm_", 0)]
)
def test_capability(arch, major):
    assert availability.capability(Device("cuda", arch)) == major
