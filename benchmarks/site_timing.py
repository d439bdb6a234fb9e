"""What a site computes is compared with another's, and CUDA graphs of sites are timed by turns."""

import statistics

import torch
import torch.distributed as dist
from ranks import device

SITES = 30


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
