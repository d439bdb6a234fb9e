"""What fusion_core chooses at every size, beside what torch.compile gives without it and beside every single path.

    torchrun --nproc-per-node 2 benchmarks/chosen_path.py --json benchmarks/results/chosen_path_h200x2.json

Microseconds that one site adds to a stream, by the method of `fusion-core tune` (fusion_core/tune/measure.py): CUDA
graphs of up to 16 sites, before each of which the GPU's caches are flushed and a kernel writes x anew, whose time is
taken off; all columns of a point take turns in one run; medians, of the slowest rank.

`compiled`
    ``torch.compile`` of the site and its producer for this size, without fusion_core: NCCL, then Inductor's kernel.
`chosen`
    The same with ``backend="fusion_core"`` and the table that this machine has.
`chosen_dynamic`
    The same, one graph for all token counts, compiled with 1000 (torch compiles another for a size of 1).
`unfused` and the strategies' names
    Every single path, by the functions that the operator of a dynamic graph runs. `unfused` is NCCL and Inductor's
    kernel for any number of rows.

With --check, exits with 1 where `chosen` or `chosen_dynamic` takes over 1.02 times what `compiled` takes, over 1.03
times the fastest single path, or, up to 32 tokens, over 0.68 (2 ranks) or 0.66 (4 ranks) times `compiled`.
"""

import argparse
import datetime
import faulthandler
import json
import os
import sys
import time
from pathlib import Path

import launch_environment  # noqa: F401  # before torch
import torch
import torch.distributed as dist

from fusion_core import Device, FusionConfig, Registry, compile, last_report
from fusion_core.tables.machine import Machine
from fusion_core.tune.measure import Bench
from fusion_core.tune.plan import Plan, tensors
from fusion_core.tune.ranks import Ranks
from fusion_core.tune.timers import timer_for

PATTERNS = ["all_reduce_add_rms_norm", "all_reduce_add_rms_norm_static_fp8"]
MOST_OF_COMPILED = 1.02
MOST_OF_BEST = 1.03
SMALL = 32
MOST_WHEN_SMALL = {2: 0.68, 4: 0.66}
OURS = ("chosen", "chosen_dynamic")
NOT_PATHS = (*OURS, "compiled")
BEGAN = time.monotonic()


@torch.library.custom_op("fusion_core_benchmarks::produce", mutates_args=())
def produce(source: torch.Tensor) -> torch.Tensor:
    """What writes x anew in every column: an operator, so that no compiler makes a faster or slower one of its own."""
    return torch.mul(source, 1.0)


@produce.register_fake
def _(source):
    return torch.empty_like(source)


def sites(pattern, form, names, group):
    """The site behind its producer as a model writes it: from the producer's source and the other tensors.

    Three functions, since Dynamo keeps what it compiled by their code.
    """
    scalars = dict(form.scalars)
    live = [pattern.outputs.index(name) for name in form.live]

    def run(source, others):
        given = {**dict.fromkeys(pattern.tensors), "x": produce(source), **dict(zip(names, others, strict=True))}
        results = pattern.function(**given, **scalars, group=group)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(results[index] for index in live)

    def without(source, others):
        return run(source, others)

    def of_fixed_size(source, others):
        return run(source, others)

    def of_any_size(source, others):
        return run(source, others)

    return without, of_fixed_size, of_any_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--hidden", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1 << power for power in range(15)])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no further point is begun")
    parser.add_argument("--without-fixed", action="store_true", help="leave out what compiles for each size")
    parser.add_argument("--table", help="a file of fusion-core tune; by default the one that is in use here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() or "RANK" not in os.environ:
        print("needs torchrun and a GPU for each process", file=sys.stderr)
        return 2
    faulthandler.dump_traceback_later(options.budget + 200, exit=True)
    torch._dynamo.config.recompile_limit = 10_000  # one for each token count
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    ranks = Ranks()
    config = FusionConfig(table=options.table) if options.table else FusionConfig()
    registry = Registry.load(config)
    plan = Plan(registry, torch.bfloat16, device, ranks.name, ranks.size)
    bench = Bench(plan, ranks, timer_for(ranks, device), max(options.tokens))
    rows, left_out, by_tokens = [], [], {}
    for name in options.patterns:
        pattern = registry.patterns[name]
        for hidden in options.hidden:
            torch._dynamo.reset()
            form = plan.columns(pattern)[0].form
            # Inductor lays a graph's kernels out for the size that it first sees, the producer's too
            example = tensors(plan.site(pattern, form, hidden, 1000), ranks.rank, device)
            names = [each for each in pattern.tensors if each in example and each != "x"]
            without, of_fixed_size, of_any_size = sites(pattern, form, names, ranks.name)
            dynamic = compile(of_any_size, config, fullgraph=True)
            for each in example.values():
                if each.shape == example["x"].shape:
                    torch._dynamo.mark_dynamic(each, 0)
            with torch.no_grad():
                dynamic(example["x"], [example[each] for each in names])
            choices = last_report().sites[0].choices
            by_tokens[f"{name}, hidden {hidden}"] = [[each.first, each.strategy] for each in choices]
            columns = {"chosen_dynamic": dynamic}
            if not options.without_fixed:
                columns["compiled"] = torch.compile(without, fullgraph=True, dynamic=False)
                columns["chosen"] = compile(of_fixed_size, config, fullgraph=True, dynamic=False)
            for tokens in options.tokens:
                if ranks.broadcast(time.monotonic() - BEGAN > options.budget):
                    left_out.append({"pattern": name, "hidden": hidden, "tokens": tokens})
                    continue
                found = bench.measure(pattern, hidden, tokens, whole=columns)
                row = {"pattern": name, "hidden": hidden, "tokens": tokens, "us": found.us, "notes": found.notes}
                rows.append(row | ratios(found.us, ranks.size, tokens))
                if ranks.rank == 0:
                    print(f"[{time.monotonic() - BEGAN:6.1f} s]", line(rows[-1]), flush=True)
    missed = [row for row in rows if row["missed"]]
    if ranks.rank == 0:
        machine = Machine.here(ranks.size)
        record = {
            "machine": f"{ranks.size} x {machine.gpu}",
            "ranks": ranks.size,
            "links": machine.links,
            "versions": dict(machine.versions),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": f"torchrun --nproc-per-node {ranks.size} {' '.join(sys.argv)}",
            "table": registry.found_table(Device.of(device), ranks.size).origin,
            "by_tokens": by_tokens,
            "rows": rows,
            "left_out": left_out,
        }
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for row in missed:
            print("missed:", line(row), "; ".join(row["missed"]))
        print(f"{len(rows)} points, {len(missed)} miss a bar, {len(left_out)} left out")
    dist.barrier()
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(1 if options.check and (missed or left_out) else 0)  # graphs that hold NCCL's work outlive the group


def ratios(us, size, tokens):
    """Ours to what there is without us and to the fastest single path, and which bars that misses."""
    paths = {name: time for name, time in us.items() if name not in NOT_PATHS}
    fastest = min(paths, key=paths.get) if paths else None
    found = {"fastest": fastest, "missed": []}
    most = min(MOST_OF_COMPILED, MOST_WHEN_SMALL.get(size, 1.0)) if tokens <= SMALL else MOST_OF_COMPILED
    for name in OURS:
        if name not in us:
            continue
        for other, label, bar in (("compiled", "compiled", most), (fastest, "fastest", MOST_OF_BEST)):
            if against := us.get(other):
                found[f"{name}_to_{label}"] = round(us[name] / against, 3)
                if us[name] > bar * against:
                    found["missed"].append(f"{name} over {bar} of {label}")
    return found


def line(row):
    """A row in one line."""
    said = [f"{name} {row['us'][name]:.2f}" for name in ("compiled", *OURS) if name in row["us"]]
    said.append(f"fastest {row['fastest']} {row['us'].get(row['fastest'], 0):.2f}")
    said += [f"{key} {row[key]}" for key in row if "_to_" in key]
    said += [f"no {name}: {why[:160]}" for name, why in row["notes"].items() if name in NOT_PATHS]
    return f"{row['pattern']} {row['hidden']} {row['tokens']}: {', '.join(said)}"


if __name__ == "__main__":
    sys.exit(main())
