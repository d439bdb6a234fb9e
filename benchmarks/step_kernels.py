"""Which kernels a decode step runs, and whether it has one reduction for each site."""

from collections import Counter

import torch
import torch.distributed as dist
from llama import synchronise
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


def reductions(table):
    """How many collectives that sum, by whose they are."""
    counts = Counter()
    for name, count, _ in table:
        if "allreduce_fusion" in name:
            counts["flashinfer"] += count
        elif ("nccl" in name.lower() and "allreduce" in name.lower()) or name == "gloo:all_reduce":
            counts["nccl"] += count
    return dict(counts)


def check_reductions(rows):
    """What is wrong with the numbers of collectives, as text."""
    for row in rows:
        if "reductions" not in row:
            continue
        plain, fused = (Counter(row["reductions"][name]) for name in ("plain", "fused"))
        where = f"batch {row['batch']}"
        by_flashinfer = any("flashinfer." in name for name in row["strategies"])
        if plain["nccl"] != row["sites"]:
            yield f"{where}: the plain step runs {plain['nccl']} all_reduces, needs {row['sites']}, one a site"
        if fused.total() != row["sites"]:
            yield f"{where}: the fused step runs {fused.total()} reductions, needs {row['sites']}, one a site"
        if fused["flashinfer"] and fused["flashinfer"] != row["fused_sites"]:
            yield f"{where}: {fused['flashinfer']} fused kernels run, needs {row['fused_sites']}, one a site"
        if by_flashinfer and not fused["flashinfer"]:
            yield f"{where}: FlashInfer was chosen and none of its kernels runs (its unfused branch, at this size?)"


def profile_text(record):
    """The kernels of a step as Markdown."""
    lines = [f"# Kernels of one decode step\n\n{record['machine']}, `{record['command']}`\n"]
    for row in record["rows"]:
        for name, table in row.get("kernels", {}).items():
            total = sum(time for _, _, time in table)
            lines.append(f"\n## batch {row['batch']}, {name}: {sum(n for _, n, _ in table)} kernels, {total:.0f} µs\n")
            lines.append(f"Reductions: {row['reductions'][name]}\n\n| kernel | count | µs |\n|---|--:|--:|")
            lines += [f"| `{kernel[:120].replace('|', '/')}` | {count} | {time} |" for kernel, count, time in table]
    return "\n".join(lines) + "\n"
