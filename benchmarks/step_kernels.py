"""Which kernels a decode step runs, and whether it has one reduction for each site."""

from collections import Counter

import torch
import torch.distributed as dist
from step_model import synchronise
from torch.autograd import DeviceType


def kernels(side):
    """``[name, count, microseconds]`` of one step, the longest first; every rank steps, rank 0 alone looks."""
    side.rewind()
    side.step()
    synchronise()
    dist.barrier()
    if dist.get_rank() != 0:
        side.step()
        synchronise()
        dist.barrier()
        return []
    kind = "CUDA" if side.ids.is_cuda else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
        side.step()
        synchronise()
    dist.barrier()
    found = [
        [event.key, event.count, round(event.self_device_time_total if kind == "CUDA" else event.cpu_time_total, 1)]
        for event in profile.key_averages()
        if (event.device_type == DeviceType.CUDA if kind == "CUDA" else event.key.startswith("gloo:"))
    ]
    return sorted(found, key=lambda row: -row[2])


def collectives(table):
    """How many collectives: those that sum by whose they are, and those that gather."""
    counts = Counter()
    for name, count, _ in table:
        if "allreduce_fusion" in name:
            counts["flashinfer"] += count
        elif ("nccl" in name.lower() and "allreduce" in name.lower()) or name == "gloo:all_reduce":
            counts["nccl"] += count
        elif ("nccl" in name.lower() and "allgather" in name.lower()) or name.startswith("gloo:all_gather"):
            counts["all_gather"] += count
    return dict(counts)


def expected(report):
    """How many collectives a report says there are."""
    norms = [site for site in report.sites if site.pattern.startswith("sharded_rms_norm") and site.strategy]
    parts = [site for site in report.sites if site.pattern == "all_gather_shard" and site.strategy]
    return {
        "plain": sum(site.collective == "all_reduce" for site in report.sites),
        "flashinfer": sum((site.strategy or "").startswith("flashinfer.") for site in report.sites),
        "means_of_squares": len(norms),
        "gathers_gone": len(parts) + sum(2 if site.pattern.endswith("_pair") else 1 for site in norms),
    }


def check_collectives(rows):
    """What is wrong with the numbers of collectives, as text."""
    for row in rows:
        if "collectives" not in row:
            continue
        plain, fused = (Counter(row["collectives"][name]) for name in ("plain", "fused"))
        where, needs = f"batch {row['batch']}", row["expected"]
        if plain["nccl"] != needs["plain"]:
            yield f"{where}: the plain step runs {plain['nccl']} all_reduces, needs {needs['plain']}, one a site"
        sums = needs["plain"] + needs["means_of_squares"]
        if (found := fused["nccl"] + fused["flashinfer"]) != sums:
            yield f"{where}: the fused step runs {found} reductions, needs {sums}, one a site that has any"
        if fused["flashinfer"] not in (0, needs["flashinfer"]):
            yield f"{where}: {fused['flashinfer']} fused kernels run, needs {needs['flashinfer']}, one a site"
        if needs["flashinfer"] and not fused["flashinfer"]:
            yield f"{where}: FlashInfer was chosen and none of its kernels runs (its unfused branch, at this size?)"
        left = plain["all_gather"] - needs["gathers_gone"]
        if fused["all_gather"] != left:
            yield f"{where}: the fused step runs {fused['all_gather']} all_gathers, needs {left}"


def profile_text(record):
    """The kernels of a step as Markdown."""
    lines = [f"# Kernels of one decode step\n\n{record['machine']}, `{record['command']}`\n"]
    for row in record["rows"]:
        for name, table in row.get("kernels", {}).items():
            total = sum(time for _, _, time in table)
            lines.append(f"\n## batch {row['batch']}, {name}: {sum(n for _, n, _ in table)} kernels, {total:.0f} µs\n")
            lines.append(f"Collectives: {row['collectives'][name]}\n\n| kernel | count | µs |\n|---|--:|--:|")
            lines += [f"| `{kernel[:120].replace('|', '/')}` | {count} | {time} |" for kernel, count, time in table]
    return "\n".join(lines) + "\n"
