"""Microseconds of one fused site: what users have today, FlashInfer called by hand, and fusion_core's operator.

    torchrun --nproc-per-node 2 benchmarks/site_latency.py --json benchmarks/results/site_latency_h200x2.json

Every column is a CUDA graph of 30 sites in one stream. A site begins with a producer, one elementwise kernel that
writes ``x`` anew, as a model's matrix product does. So NCCL may reduce ``x`` in place, which is what Inductor makes of
a buffer of the graph, and no column pays for a copy that another one is spared. Site i's residual is site i-1's
``residual_out``. A graph of producers alone is a column too, and its time per site is taken off the others': a figure
is what a site adds to a stream that has written ``x`` already, its launches within the graph included.

`nccl_inductor`
    NCCL on ``x`` in place, then what Inductor makes of the rest: one compiled function per shape, static. These are
    the calls and kernels that Inductor's own wrapper makes of the whole site; with --whole it compiles the whole site,
    collective and producer too, which takes longer and should show the same.
`symm_mem_one_shot`, `symm_mem_two_shot`
    torch's symmetric memory: copy ``x`` into its buffer, all_reduce, and the same compiled rest. No multicast.
`flashinfer_one_shot`, `flashinfer_two_shot`
    `flashinfer.comm.allreduce_fusion` by hand, outputs allocated beforehand; two-shot needs more tokens than ranks.
`fusion_core`
    Our operator, which allocates its outputs and chooses one-shot, two-shot or the unfused path itself.

The columns of one point take turns, replay by replay; before each the ranks meet in an all_reduce, outside the timed
events. The median over the replays counts, of the slower rank. Every column's results are compared with
`nccl_inductor`'s first, and one that fails or differs is no number but a note.

--overhead measures the CPU time of an eager call instead, ours against FlashInfer's by hand with torch.empty_like'd
outputs. With --check, exits with 1 where our operator takes over 1.02 times what the kernel that it chose takes by
hand, or over 10 µs more of the CPU; without FlashInfer in a column there is no bar. On a machine without GPUs: 2.
"""

import argparse
import datetime
import faulthandler
import functools
import gc
import json
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import launch_environment  # before torch
import tables
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol

from fusion_core.vocabulary import fp8

SITES = 30
EPS = 1e-5
GROUP_SIZE = 128
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
PATTERNS = [
    "all_reduce_add_rms_norm",
    "all_reduce_rms_norm",
    "all_reduce",
    "all_reduce_add_rms_norm_static_fp8",
    "all_reduce_add_rms_norm_token_fp8",
    "all_reduce_add_rms_norm_group_fp8",
]
MOST_RATIO = 1.02  # our operator to the same kernel by hand
MOST_OVERHEAD = 10.0  # microseconds of the CPU that an eager call may take longer
MOST_DIFFERENCE = 0.05  # mean distance to NCCL's result, as a share of its mean magnitude
BEGAN = time.monotonic()


def say(*words):
    if dist.get_rank() == 0:
        print(f"[{time.monotonic() - BEGAN:6.1f} s]", *words, flush=True)


def device():
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Pattern:
    """What a site computes, by the operator's name."""

    name: str

    @property
    def adds(self):
        return "_add_" in self.name

    @property
    def norms(self):
        return self.name != "all_reduce"

    @property
    def norm_out(self):
        return self.name.endswith("_out")

    @property
    def quantization(self):
        stem = self.name.removesuffix("_out")
        return next((q for q in ("static_fp8", "token_fp8", "group_fp8") if stem.endswith(q)), "")

    @property
    def code(self):
        """FlashInfer's ``AllReduceFusionPattern``."""
        if not self.norms:
            return 0
        plain, out = {"": (1, 1), "static_fp8": (2, 4), "group_fp8": (8, 9), "token_fp8": (10, 11)}[self.quantization]
        return out if self.norm_out else plain


class Point:
    """The tensors of one pattern at one size."""

    def __init__(self, pattern, hidden, tokens):
        self.pattern, self.hidden, self.tokens = pattern, hidden, tokens
        own = torch.Generator(device()).manual_seed(1 + dist.get_rank())
        common = torch.Generator(device()).manual_seed(0)
        shape = (tokens, hidden)

        def normal(generator, *shape):
            return torch.randn(shape, generator=generator, device=device()).to(torch.bfloat16)

        self.source = normal(own, *shape)
        self.x = torch.empty_like(self.source)
        self.residual = normal(common, *shape)
        self.weight = normal(common, hidden)
        self.scale = torch.full((1,), 0.02, device=device())

    def produce(self):
        torch.mul(self.source, 1.0, out=self.x)


def tail(pattern):
    """What stands behind the all_reduce, as Hugging Face's Llama writes it: to results and the next residual."""

    def rms_norm(x, weight):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * wide.to(x.dtype)

    def run(reduced, residual, weight, scale):
        total = residual + reduced if pattern.adds else reduced
        normed = rms_norm(total, weight)
        if not pattern.quantization:
            return (normed,), total
        if pattern.quantization == "static_fp8":
            results = (fp8.quantize_static_fp8(normed, scale),)
        elif pattern.quantization == "token_fp8":
            results = fp8.quantize_token_fp8(normed)
        else:
            results = fp8.quantize_group_fp8(normed, group_size=GROUP_SIZE, scale_format="ue8m0_packed")
        return (*results, normed) if pattern.norm_out else tuple(results), total

    return run


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


class Columns:
    """The sites: functions from a residual to ``(results, next residual)``, which find ``x`` written."""

    def __init__(self, options):
        self.options = options
        self.group = dist.group.WORLD.group_name
        self.gloo = dist.new_group(backend="gloo")
        self.workspace = self.symmetric = None

    def prepare(self):
        """Collective: memory for the largest size."""
        tokens, hidden = max(self.options.tokens), max(self.options.hidden)
        self.workspace, _ = self.attempt("FlashInfer's workspace", self.make_workspace, tokens, hidden)
        if not self.options.without_inductor:
            self.symmetric, _ = self.attempt("symmetric memory", self.make_symmetric, tokens * hidden)

    def attempt(self, what, function, *args):
        """``(what a function gives, None)``, or ``(None, why)`` on all ranks where it failed on any."""
        result = error = None
        try:
            result = function(*args)
        except Exception as caught:  # noqa: BLE001  a column that cannot run here leaves the others
            error = f"{type(caught).__name__}: {caught}"
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=self.gloo)
        if any(errors):
            say(f"{what} failed:", next(e for e in errors if e).splitlines()[0][:300])
            return None, next(e for e in errors if e)
        return result, None

    def make_workspace(self, tokens, hidden):
        import flashinfer.comm as comm
        from flashinfer.comm.mnnvl import TorchDistBackend

        workspace = comm.create_allreduce_fusion_workspace(
            backend="trtllm",
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            max_token_num=tokens,
            hidden_dim=hidden,
            dtype=torch.bfloat16,
            comm_backend=TorchDistBackend(self.gloo),
            group=self.gloo,
        )
        if workspace.backend != "trtllm":
            raise RuntimeError(f"the workspace is {workspace.backend}, needs trtllm: no multicast")
        return workspace

    def make_symmetric(self, elements):
        import torch.distributed._symmetric_memory as symm_mem

        memory = symm_mem.empty(elements, dtype=torch.bfloat16, device=device())
        symm_mem.rendezvous(memory, self.group)
        return memory

    def of(self, point):
        """Name → site."""
        found = {}
        two_shot = point.tokens > dist.get_world_size()
        if not self.options.without_inductor:
            rest = compiled(tail(point.pattern)) if point.pattern.norms else lambda reduced, *_: ((reduced,), reduced)
            found["nccl_inductor"] = self.whole(point) if self.options.whole else self.nccl(point, rest)
            if self.symmetric is not None:
                found["symm_mem_one_shot"] = self.symm_mem(point, rest, False)
                if two_shot:
                    found["symm_mem_two_shot"] = self.symm_mem(point, rest, True)
        for pdl in (False, True) if self.options.pdl else (False,):
            suffix = "_pdl" if pdl else ""
            if self.workspace is not None:
                found[f"flashinfer_one_shot{suffix}"] = self.flashinfer(point, True, pdl)
                if two_shot:
                    found[f"flashinfer_two_shot{suffix}"] = self.flashinfer(point, False, pdl)
            found[f"fusion_core{suffix}"] = self.ours(point, pdl)
        return found

    def nccl(self, point, rest):
        def site(residual):
            torch.ops._c10d_functional.all_reduce_(point.x, "sum", self.group)
            torch.ops._c10d_functional.wait_tensor(point.x)
            return rest(point.x, residual, point.weight, point.scale)

        return site

    def whole(self, point):
        """The definition with its producer; Inductor copies the input, then reduces the copy in place."""
        rest = tail(point.pattern) if point.pattern.norms else lambda reduced, *_: ((reduced,), reduced)

        @compiled
        def run(source, residual, weight, scale):
            return rest(funcol.all_reduce(source * 1.0, "sum", self.group), residual, weight, scale)

        def site(residual):
            return run(point.source, residual, point.weight, point.scale)

        site.produces = True
        return site

    def symm_mem(self, point, rest, two_shot):
        buffer = self.symmetric[: point.tokens * point.hidden].view(point.tokens, point.hidden)

        def site(residual):
            torch.mul(point.x, 1.0, out=buffer)
            if two_shot:
                reduced = torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self.group)
            else:
                reduced = torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", self.group)
            return rest(reduced, residual, point.weight, point.scale)

        return site

    def flashinfer(self, point, one_shot, pdl):
        outputs, call = Outputs(point), self.by_hand(point, one_shot, pdl)
        written = {"norm_out": outputs.normed, "quant_out": outputs.quantized, "scale_out": outputs.scale}

        def site(residual):
            total = outputs.total(residual)
            if point.pattern.norms:
                call(residual_in=residual if outputs.zeros is None else outputs.zeros, residual_out=total, **written)
            else:
                call(output=total)
            return outputs.results(total), total

        return site

    def by_hand(self, point, one_shot, pdl):
        """FlashInfer's function with all that does not change from call to call."""
        import flashinfer.comm as comm

        pattern, given = point.pattern, {}
        if pattern.norms:
            given = {"rms_gamma": point.weight, "rms_eps": EPS}
            if pattern.code < 10:
                given["output"] = torch.empty_like(point.x)  # not written, and without it allocated in every call
        if pattern.quantization == "static_fp8":
            given["scale_factor"] = point.scale
        if pattern.quantization == "group_fp8":
            given["block_quant_group_size"] = GROUP_SIZE
        return functools.partial(
            comm.allreduce_fusion,
            input=point.x,
            workspace=self.workspace,
            pattern=pattern.code,
            launch_with_pdl=pdl,
            trigger_completion_at_end=True,
            use_oneshot=one_shot,
            fp32_acc=True,
            **given,
        )

    def ours(self, point, pdl):
        def site(residual):
            *results, total = self.operator(point, pdl)(residual)
            return tuple(results) or (total,), total

        return site

    def operator(self, point, pdl):
        """Our operator as a function of the residual that gives a sequence."""
        import fusion_flashinfer.ops  # noqa: F401  registers them

        pattern, group = point.pattern, self.group
        operator = getattr(torch.ops.fusion_flashinfer, pattern.name).default
        more = {"pdl": True} if pdl else {}
        more |= {"two_shot": True} if chosen(point) == "flashinfer_two_shot" else {}
        x, weight = point.x, point.weight
        if not pattern.norms:
            return lambda residual: (operator(x, group, **more),)
        behind = [point.scale] if pattern.quantization == "static_fp8" else []
        behind += [EPS, 0.0, *([GROUP_SIZE] if pattern.quantization == "group_fp8" else []), group]
        if pattern.adds:
            return lambda residual: operator(x, residual, weight, *behind, **more)
        return lambda residual: operator(x, weight, *behind, **more)


class Outputs:
    """What a call by hand writes; ``residual_out`` goes back and forth between two buffers."""

    def __init__(self, point):
        pattern, x = point.pattern, point.x
        tokens, hidden = x.shape
        self.pattern = pattern
        self.turns = (torch.empty_like(x), torch.empty_like(x))
        self.zeros = torch.zeros_like(x) if pattern.norms and not pattern.adds else None
        self.normed = self.quantized = self.scale = None
        if pattern.norms and (pattern.norm_out or not pattern.quantization):
            self.normed = torch.empty_like(x)
        if pattern.quantization:
            self.quantized = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        if pattern.quantization == "token_fp8":
            self.scale = torch.empty(tokens, 1, device=x.device)
        if pattern.quantization == "group_fp8":
            rows, columns = (tokens + 3) // 4 * 4, (hidden // GROUP_SIZE + 3) // 4
            self.scale = torch.empty_strided((tokens, columns), (1, rows), dtype=torch.int32, device=x.device)

    def total(self, residual):
        return self.turns[residual is self.turns[0]]

    def results(self, total):
        found = tuple(each for each in (self.quantized, self.scale, self.normed) if each is not None)
        return found or (total,)


def first_results(point, site):
    """Of a site run eagerly: what it gives first, and what it hands on. This also compiles and warms up."""
    point.produce()
    results, total = site(point.residual)
    torch.cuda.synchronize()
    return results[0].float(), total.float().clone()


def distance(found, reference):
    """The larger mean distance of both results, as a share of the reference's mean magnitude."""
    return max(
        float((a - b).abs().mean() / b.abs().mean().clamp(min=1e-30)) if bool(a.isfinite().all()) else float("inf")
        for a, b in zip(found, reference, strict=True)
    )


def captured(point, site):
    """A CUDA graph of all sites; None for the site: of producers."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog, another thread, asks CUDA for its events meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        residual = point.residual
        for _ in range(SITES):
            if site is None or not hasattr(site, "produces"):
                point.produce()
            if site is not None:
                _, residual = site(residual)
    return graph


def times(graphs, replays):
    """Median microseconds per site and graph on this rank, and the spread of the replays over it."""
    token = torch.zeros(1, device=device())
    marks = {name: [] for name in graphs}
    dist.barrier()
    for turn in range(2 + replays):
        for name, graph in graphs.items():
            torch.cuda._sleep(250_000)  # cycles, in which the CPU gets ahead: its launches are not timed
            dist.all_reduce(token)  # the ranks begin together
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            if turn >= 2:
                marks[name].append((begin, end))
        torch.cuda.synchronize()
    found = {name: [a.elapsed_time(b) * 1000 / SITES for a, b in pairs] for name, pairs in marks.items()}
    return {name: (statistics.median(t), (max(t) - min(t)) / statistics.median(t)) for name, t in found.items()}


def slower(values):
    """The largest of all ranks, one by one."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def chosen(point):
    """The column of the form that our operator is asked for at this size: by FlashInfer's limits, without a table."""
    from fusion_flashinfer.limits import LIMITS

    major, minor = torch.cuda.get_device_capability()
    limit = LIMITS.get((f"sm_{major}{minor}", dist.get_world_size()))
    two_shot = limit is not None and point.x.numel() * point.x.element_size() > limit.one_shot
    return "flashinfer_two_shot" if two_shot and point.tokens > dist.get_world_size() else "flashinfer_one_shot"


def measure(columns, pattern, hidden, tokens, options):
    """One row of the record."""
    torch._dynamo.reset()  # every shape compiles anew, and Dynamo has a limit for one function
    point = Point(pattern, hidden, tokens)
    graphs, notes, differences, reference = {}, {}, {}, None
    where = f"{pattern.name}, hidden {hidden}, {tokens} tokens"
    before = time.monotonic()
    sites, note = columns.attempt(where, columns.of, point)
    if sites is None:
        return {"pattern": pattern.name, "hidden": hidden, "tokens": tokens, "notes": {"all": note}, "us": {}}
    compile_s = 0.0
    for name, site in sites.items():
        result, note = columns.attempt(f"{where}: {name}", first_results, point, site)
        compile_s = compile_s or time.monotonic() - before  # that of the first column
        if note is None:
            reference = result if reference is None else reference
            (differences[name],) = slower([distance(result, reference)])
            if differences[name] > MOST_DIFFERENCE:
                note = f"differs from {next(iter(differences))} by {differences[name]:.2g} of its magnitude"
                say(f"{where}: {name} {note}")
        if note is None:
            graphs[name], note = columns.attempt(f"{where}: {name}, capture", captured, point, site)
        if note is not None:
            graphs.pop(name, None)
            notes[name] = note[:500]
    graphs["producer"] = captured(point, None)
    found = times(graphs, options.replays)
    names = list(graphs)
    medians = dict(zip(names, slower([found[name][0] for name in names]), strict=True))
    spreads = dict(zip(names, slower([found[name][1] for name in names]), strict=True))
    producer = medians.pop("producer")
    net = {name: round(median - producer, 2) for name, median in medians.items()}
    return {
        "pattern": pattern.name,
        "hidden": hidden,
        "tokens": tokens,
        "producer_us": round(producer, 2),
        "us": net,
        "spread": {name: round(spread, 3) for name, spread in spreads.items()},
        "chosen": chosen(point),
        "difference": {name: round(d, 4) for name, d in differences.items()},
        "notes": notes,
        "first_column_s": round(compile_s, 1),
    }


def call_time(call, calls=2000, batches=5):
    """Microseconds of the CPU for one call, of the fastest batch: the GPU is not waited for within one."""
    best = float("inf")
    for _ in range(1 + batches):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


def overhead(columns, pattern, hidden, tokens):
    """An eager call of ours against one of FlashInfer's by hand, microseconds of the CPU."""
    point = Point(pattern, hidden, tokens)
    point.produce()
    x, residual, operator = point.x, point.residual, columns.operator(point, False)
    outputs, call, empty_like = Outputs(point), columns.by_hand(point, True, False), torch.empty_like
    residual_in = residual if outputs.zeros is None else outputs.zeros
    old = {"norm_out": outputs.normed, "quant_out": outputs.quantized, "scale_out": outputs.scale}
    normed, quantized, scale = old.values()

    def by_hand():
        if not pattern.norms:
            call(output=empty_like(x))
            return
        call(
            residual_in=residual_in,
            residual_out=empty_like(x),
            norm_out=None if normed is None else empty_like(normed),
            quant_out=None if quantized is None else empty_like(quantized),
            scale_out=None if scale is None else empty_like(scale),
        )

    def preallocated():
        if pattern.norms:
            call(residual_in=residual_in, residual_out=outputs.turns[0], **old)
        else:
            call(output=outputs.turns[0])

    found = [call_time(each) for each in (lambda: operator(residual), by_hand, preallocated)]
    ours, hand, reused = (round(value, 2) for value in slower(found))
    return {
        "pattern": pattern.name,
        "hidden": hidden,
        "tokens": tokens,
        "fusion_core_us": ours,
        "flashinfer_us": hand,
        "flashinfer_preallocated_us": reused,
        "difference_us": round(ours - hand, 2),
    }


def goes_on(columns, options):
    """Whether rank 0 has time left."""
    answer = [time.monotonic() - BEGAN < options.budget]
    dist.broadcast_object_list(answer, 0, group=columns.gloo)
    return answer[0]


def run(options):
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    columns = Columns(options)
    columns.prepare()
    record = {
        "command": launch_environment.settings()
        + f"torchrun --nproc-per-node {dist.get_world_size()} {' '.join(sys.argv)}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{dist.get_world_size()} x {torch.cuda.get_device_name()}",
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "flashinfer": flashinfer_version(),
        "sites": SITES,
        "replays": options.replays,
        "left_out": [],
        "rows": [],
        "overhead": [],
    }
    gc.freeze()  # torch collects garbage before each capture: of what there is by now, there is none
    say("ready")
    patterns = [Pattern(name) for name in options.patterns]
    if options.overhead:
        for pattern in patterns:
            what = f"overhead of {pattern.name}"
            row, note = columns.attempt(what, overhead, columns, pattern, options.hidden[0], options.overhead_tokens)
            if row:
                say(what, row["fusion_core_us"], "µs, by hand", row["flashinfer_us"], "µs")
            record["overhead"].append(row or {"pattern": pattern.name, "note": note[:500]})
            write(record, options)
    else:
        for pattern in patterns:
            for hidden in options.hidden:
                for tokens in options.tokens:
                    if not goes_on(columns, options):
                        record["left_out"].append([pattern.name, hidden, tokens])
                        continue
                    record["rows"].append(measure(columns, pattern, hidden, tokens, options))
                gc.collect()
                say(f"{pattern.name}, hidden {hidden}: done")
                write(record, options)
    if dist.get_rank() != 0:
        return 0
    print(tables.site_latency(record))
    failures = list(failed_bars(record))
    for failure in failures:
        print("FAILED" if options.check else "note:", failure)
    return int(bool(failures) and options.check)


def failed_bars(record):
    for row in record["rows"]:
        where = f"{row['pattern']}, hidden {row['hidden']}, {row['tokens']} tokens"
        for name, note in row["notes"].items():
            yield f"{where}: {name}: {note.splitlines()[0]}"
        ours, kernel = row["us"].get("fusion_core"), row["us"].get(row.get("chosen"))
        if ours is not None and kernel is not None and ours > MOST_RATIO * kernel:
            yield f"{where}: {ours} µs, by hand {kernel} µs: {ours / kernel:.3f}, needs at most {MOST_RATIO}"
    for row in record["overhead"]:
        if "note" in row:
            yield f"overhead of {row['pattern']}: {row['note'].splitlines()[0]}"
        elif row["difference_us"] > MOST_OVERHEAD:
            yield f"overhead of {row['pattern']}: {row['difference_us']} µs, needs at most {MOST_OVERHEAD}"


def flashinfer_version():
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return None


def write(record, options):
    if dist.get_rank() == 0 and options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="names of our operators, also those in _out")
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--pdl", action="store_true", help="also with programmatic dependent launch")
    parser.add_argument("--whole", action="store_true", help="Inductor compiles the collective and the producer too")
    parser.add_argument("--without-inductor", action="store_true", help="only FlashInfer and ours: no compilation")
    parser.add_argument("--overhead", action="store_true", help="the CPU time of eager calls instead")
    parser.add_argument("--overhead-tokens", type=int, default=4)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget", type=float, default=240, help="seconds, after which no further size is begun")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("found no GPU, needs two or more: these are times of CUDA graphs", file=sys.stderr)
        sys.exit(2)
    faulthandler.dump_traceback_later(options.budget + 60, exit=True)  # a hang must not hold the machines
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    with torch.no_grad():
        code = torch.tensor(run(options), device=device())
    dist.broadcast(code, 0)
    dist.barrier()
    torch.cuda.synchronize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))  # destroy_process_group hangs while CUDA graphs hold NCCL work


if __name__ == "__main__":
    main()
