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
import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path

import launch_environment  # before torch
import tables
import torch
import torch.distributed as dist
from ranks import device, elapsed, say, slower
from site_columns import Columns, chosen
from site_overhead import overhead
from site_point import Pattern, Point
from site_timing import SITES, captured, distance, first_results, times

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


def goes_on(columns, options):
    """Whether rank 0 has time left."""
    answer = [elapsed() < options.budget]
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
