"""One decode step of a tensor-parallel Hugging Face model, compiled with and without fusion_core.

    torchrun --nproc-per-node 2 benchmarks/decode_step.py --json benchmarks/results/decode_step_h200x2.json

The model has the layer shapes of --shape, random weights, `tp_plan="auto"` and a `StaticCache` whose position advances
with every step. Both sides are the same `torch.compile(..., mode="reduce-overhead", fullgraph=True, dynamic=False)` of
the same model over the same cache; one has `backend="fusion_core"`. Rounds of plain and of fused steps take turns, the
time of a step lies between two device events, and the slower rank counts. The record is written after every batch
size, and none is begun that --budget has no time for. `--shape tiny` tries the program on two CPU processes.

--beside adds fused sides that choose by other tables: files of `fusion-core tune`, or `none` for the backends' own
limits.

With --profile, rank 0 lists the kernels of one step of each. Exits with 1 where a step runs another number of
collectives than the report says: each fused site has one, and its own all_reduce or all_gathers are gone.
"""

import argparse
import datetime
import faulthandler
import itertools
import json
import os
import platform
import statistics
import sys
import time
import types
from collections import Counter
from pathlib import Path

import launch_environment  # before torch
import tables
import torch
import torch.distributed as dist
from ranks import device, elapsed, say, slower
from step_kernels import check_collectives, collectives, expected, kernels, profile_text
from step_model import SHAPES, TINY, make_cache, make_model, synchronise

CACHE, START = 512, 16  # positions of the cache, and the one at which every round begins


class Steps:
    """Decode steps of one compiled function over a cache that is shared with another one."""

    def __init__(self, compiled, ids, cache):
        self.compiled, self.ids, self.cache = compiled, ids, cache

    def rewind(self):
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(START)

    def step(self):
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(self.ids, self.cache)

    def logits(self):
        self.rewind()
        return self.step()[:, -1].float().clone()

    def times(self, count):
        """Microseconds of each step, after the first few."""
        self.rewind()
        warm = 3
        synchronise()
        dist.barrier()
        if self.ids.is_cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            for _ in range(warm):
                self.step()
            events[0].record()
            for event in events[1:]:
                self.step()
                event.record()
            torch.cuda.synchronize()
            return [a.elapsed_time(b) * 1000 for a, b in itertools.pairwise(events)]
        for _ in range(warm):
            self.step()
        clock = [time.perf_counter()]
        for _ in range(count):
            self.step()
            clock.append(time.perf_counter())
        return [(b - a) * 1e6 for a, b in itertools.pairwise(clock)]


def compiled_steps(model, ids, cache, beside):
    """The sides by name, each with code of its own, so that each has its own entry in Dynamo's cache."""
    import fusion_core

    def step(ids, cache):
        return model(ids, past_key_values=cache, use_cache=True).logits

    def copy(name):
        code = step.__code__.replace(co_name=name)
        return types.FunctionType(code, globals(), name, closure=step.__closure__)

    same = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
    sides = {
        "plain": torch.compile(copy("plain"), **same),
        "fused": torch.compile(copy("fused"), backend="fusion_core", **same),
    }
    for index, table in enumerate(beside):
        config = fusion_core.FusionConfig(table=table)
        sides[table] = fusion_core.compile(copy(f"beside_{index}"), config, **same)
    return {name: Steps(compiled, ids, cache) for name, compiled in sides.items()}


def difference(plain, fused):
    """How far apart the logits of the same step are: both round, in another order, so that neither is the truth."""
    return {
        "largest_over_largest_logit": float((plain - fused).abs().max() / plain.abs().max()),
        "same_token": float((plain.argmax(-1) == fused.argmax(-1)).float().mean()),
        "largest_logit": float(plain.abs().max()),
        "finite": bool(plain.isfinite().all() and fused.isfinite().all()),
    }


def measure(model, batch, options):
    from torch._dynamo.utils import counters

    import fusion_core

    torch._dynamo.reset()
    counters.clear()
    ids = torch.randint(0, options.vocab, (batch, 1), generator=torch.Generator().manual_seed(batch))
    sides = compiled_steps(model, ids.to(device()), make_cache(model, batch, CACHE), options.beside)
    seconds, reports = {}, {}
    for name, side in sides.items():
        before = time.monotonic()
        for _ in range(3):  # compile, warm up, record the CUDA graph
            side.rewind()
            side.step()
        synchronise()
        seconds[name] = time.monotonic() - before
        if name != "plain":
            reports[name] = fusion_core.last_report()
            if reports[name] is None or reports[name] in list(reports.values())[:-1]:
                raise SystemExit(f"{name}: fusion_core made no report: its pass did not run")
        say(f"batch {batch}: {name} compiled in {seconds[name]:.1f} s")
    logits = {name: side.logits() for name, side in sides.items()}
    rounds = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:  # none always runs on the warmer chip
            rounds[name].append(sides[name].times(options.steps))
    # the slower rank's figure, round by round
    medians = {name: slower([statistics.median(times) for times in rounds[name]]) for name in sides}
    us = {name: statistics.median(found) for name, found in medians.items()}
    report = reports["fused"]
    row = {
        "batch": batch,
        **{f"{name}_us": round(us[name], 1) for name in ("plain", "fused")},
        "gain": round(us["plain"] / us["fused"], 4),
        # of neighbours in time, so that drift of the machine falls out
        "gain_by_round": [round(a / b, 4) for a, b in zip(medians["plain"], medians["fused"], strict=True)],
        **{f"{name}_rounds_us": [round(m, 1) for m in medians[name]] for name in ("plain", "fused")},
        **{f"{name}_quartiles_us": quartiles(rounds[name]) for name in ("plain", "fused")},
        "sites": len(report.sites),
        "fused_sites": len(report.fused),
        "strategies": strategies(report),
        "expected": expected(report),
        "beside": {
            name: {
                "us": round(us[name], 1),
                "gain": round(us["plain"] / us[name], 4),
                "rounds_us": [round(m, 1) for m in medians[name]],
                "strategies": strategies(reports[name]),
            }
            for name in options.beside
        },
        "logits": difference(logits["plain"], logits["fused"]),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "compile_s": {name: round(s, 1) for name, s in seconds.items()},
    }
    say(f"batch {batch}: plain {row['plain_us']} µs, fused {row['fused_us']} µs, gain {row['gain']}")
    for name, other in row["beside"].items():
        say(f"batch {batch}: {name} {other['us']} µs, gain {other['gain']}, {other['strategies']}")
    if row["cudagraph_skips"]:
        say(
            f"batch {batch}: CUDA graphs were skipped {row['cudagraph_skips']} times: the times are not those of graphs"
        )
    if options.profile:
        row["kernels"] = {name: kernels(side) for name, side in sides.items()}
        row["collectives"] = {name: collectives(row["kernels"][name]) for name in sides}
    return row


def strategies(report):
    """How often each runs, by pattern."""
    return dict(Counter(f"{site.pattern}: {site.strategy}" for site in report.sites))


def quartiles(rounds):
    """Of all steps of this rank."""
    return [round(q, 1) for q in statistics.quantiles([t for times in rounds for t in times], n=4)]


def enough_time(longest, options):
    """Whether another batch size fits, as rank 0 sees it."""
    spent = elapsed()
    answer = torch.tensor(int(spent + longest < options.budget), device=device())
    dist.broadcast(answer, 0)
    return bool(answer.item())


def run(options):
    import transformers

    import fusion_core  # noqa: F401  before a first compilation, whose time is printed

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    say(f"loading {options.layers} layers on {dist.get_world_size()} ranks")
    model = make_model(options.shape, options.layers, options.vocab)
    synchronise()
    say("loaded")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.processor()})"
    record = {
        "command": launch_environment.settings()
        + f"torchrun --nproc-per-node {dist.get_world_size()} {' '.join(sys.argv)}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{dist.get_world_size()} x {gpu}",
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": options.layers,
        "vocab": options.vocab,
        "shape": options.shape,
        "shapes": SHAPES[options.shape],
        "steps": options.steps,
        "rounds": options.rounds,
        "left_out": [],
        "rows": [],
    }
    longest = 0.0
    with torch.no_grad():
        for batch in options.batches:
            if not enough_time(longest, options):
                record["left_out"].append(batch)
                say(f"batch {batch}: left out, --budget {options.budget} is nearly used up")
                write(record, options)
                continue
            before = time.monotonic()
            record["rows"].append(measure(model, batch, options))
            longest = max(longest, time.monotonic() - before)
            write(record, options)
    failures = []
    if dist.get_rank() == 0:
        if options.profile:
            options.profile.parent.mkdir(parents=True, exist_ok=True)
            options.profile.write_text(profile_text(record))
        print(tables.decode_step(record))
        failures = list(check_collectives(record["rows"]))
        for failure in failures:
            print("FAILED", failure)
    return 1 if failures else 0


def write(record, options):
    if dist.get_rank() == 0 and options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    parser.add_argument("--rounds", type=int, default=7, help="each of plain and of fused steps, by turns")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="a Markdown file for the kernels of a step")
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-70b")
    parser.add_argument("--beside", nargs="+", default=[], metavar="TABLE", help="other tables, or none")
    options = parser.parse_args()
    if options.shape in TINY:
        options.vocab = min(options.vocab, 512)
    if START + options.steps + 3 > CACHE:
        parser.error(f"--steps is {options.steps}, needs at most {CACHE - START - 3}")
    faulthandler.dump_traceback_later(options.budget + 60, exit=True)  # a hang must not hold the machines
    if torch.cuda.is_available():
        rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    elif options.shape in TINY:
        dist.init_process_group("gloo")
    else:
        print("found no GPU; --shape tiny tries the program on CPUs", file=sys.stderr)
        sys.exit(2)
    code = torch.tensor(run(options), device=device())
    dist.broadcast(code, 0)
    dist.barrier()
    synchronise()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))  # destroy_process_group hangs while CUDA graphs hold NCCL work


if __name__ == "__main__":
    main()
