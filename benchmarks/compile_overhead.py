"""What fusion_core costs at compile time: its share of Inductor's time, and how that grows with the model.

    python benchmarks/compile_overhead.py --json benchmarks/results/compile_overhead.json

Every model is transformers' own Llama, compiled in a fresh process with an empty compile cache. Exits with 1 where a
bar is missed. `benchmarks/README.md` says what the numbers mean.
"""

import argparse
import compileall
import contextlib
import copy
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

WORLD_SIZE = 2
TOKENS = (2, 16)
# Narrow: what a compiler does hangs on the number of nodes and hardly on their sizes, and 80 layers must fit anywhere.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 512,
}

MAX_SHARE = 0.01  # of Inductor's time
MAX_GROWTH = 5.0  # from 20 to 80 layers


class Clock:
    """Seconds by name, of the wall and of this process's CPU."""

    def __init__(self):
        self.wall = defaultdict(float)
        self.cpu = defaultdict(float)
        self.open = []

    @contextlib.contextmanager
    def span(self, name):
        self.open.append(name)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] += time.perf_counter() - wall
            self.cpu[name] += time.process_time() - cpu
            self.open.pop()

    @contextlib.contextmanager
    def collections(self):
        """Spans for the garbage collections that start within a pass: a full one can take longer than the pass."""
        running = contextlib.ExitStack()

        def heard(phase, info):
            if phase == "start" and "pass" in self.open:
                running.enter_context(self.span("collections"))
            elif phase == "stop":
                running.close()

        gc.callbacks.append(heard)
        try:
            yield
        finally:
            gc.callbacks.remove(heard)


def load(layers, parallel):
    """A Llama with random bfloat16 weights; under tensor parallelism, the shard of rank 0."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers))
    model = model.to(torch.bfloat16).eval()
    if not parallel:
        return model
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers.distributed import DistributedConfig

    # A group whose collectives return at once: one process compiles what each of WORLD_SIZE processes would.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    config = DistributedConfig(tp_plan="auto", tp_size=WORLD_SIZE)
    # The CPU even where there is a GPU: the library takes whatever accelerator torch was built for.
    cpu = mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, cpu:
        model.save_pretrained(folder)
        sharded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, distributed_config=config
        )
    return sharded.eval()


def measure(layers, parallel):
    """Compile one model; what took how long."""
    import torch
    from torch._inductor import compile_fx

    from fusion_core import FusionPass
    from fusion_core._torch import inductor
    from fusion_core.dynamo import Backend
    from fusion_core.report import history

    model = load(layers, parallel)
    clock, nodes = Clock(), []
    originals = {
        name: getattr(owner, attribute)
        for name, owner, attribute in (
            ("backend", Backend, "__call__"),
            ("compile_fx", inductor, "compile_graph"),
            ("post_grad", compile_fx, "_recursive_post_grad_passes"),
            ("pass", FusionPass, "__call__"),
            ("uuid", FusionPass, "uuid"),
        )
    }

    def timed(name):
        def call(*args, **kwargs):
            with clock.span(name):
                return originals[name](*args, **kwargs)

        return call

    def uuid(own):
        # elsewhere it is a part of the backend's own time
        with clock.span("uuid" if "compile_fx" in clock.open else "other uuid"):
            return originals["uuid"](own)

    def run_pass(own, graph):
        nodes.append(len(graph.nodes))
        with clock.span("pass"):
            originals["pass"](own, graph)
        nodes.append(len(graph.nodes))

    with (
        mock.patch.object(Backend, "__call__", timed("backend")),
        mock.patch.object(inductor, "compile_graph", timed("compile_fx")),
        mock.patch.object(compile_fx, "_recursive_post_grad_passes", timed("post_grad")),
        mock.patch.object(FusionPass, "__call__", run_pass),
        mock.patch.object(FusionPass, "uuid", uuid),
        clock.collections(),
        torch.no_grad(),
    ):
        compiled = torch.compile(model, backend="fusion_core", fullgraph=True, dynamic=False)
        compiled(torch.zeros(TOKENS, dtype=torch.long), use_cache=False)

    if len(nodes) != 2:
        raise SystemExit(f"the pass ran {len(nodes) // 2} times, needs a model that compiles to one graph")
    report = history.last_report()
    fused = sum(site.strategy is not None for site in report.sites)
    if parallel and (len(report.sites) < 2 * layers or fused < len(report.sites)):
        raise SystemExit(f"{fused} of {len(report.sites)} sites fused, needs all of at least {2 * layers}")
    result = {
        "layers": layers,
        "world_size": WORLD_SIZE if parallel else 1,
        "nodes": nodes[0],
        "nodes_after": nodes[1],
        "sites": len(report.sites),
        "fused": fused,
        "decisions": sum(len(site.decisions) for site in report.sites),
    }
    for kind, seconds in (("wall", clock.wall), ("cpu", clock.cpu)):
        ours = {
            "pass": seconds["pass"],
            "uuid": seconds["uuid"],
            "backend": seconds["backend"] - seconds["compile_fx"],
        }
        inductor = seconds["compile_fx"] - seconds["pass"] - seconds["uuid"]
        result[kind] = {
            **ours,
            "collections": seconds["collections"],  # a part of "pass"
            "ours": sum(ours.values()),
            "inductor": inductor,
            "post_grad": seconds["post_grad"] - seconds["pass"],
            "share": sum(ours.values()) / inductor,
        }
    return result


def repeat(layers, parallel, repeats):
    """Seconds of the pass alone, on copies of the same graph. The copies are why `measure` does not do this as well."""
    import torch

    from fusion_core import FusionPass
    from fusion_core._torch import inductor

    class Repeat(inductor.CustomGraphPass):
        def __init__(self):
            self.seconds = []

        def __call__(self, graph):
            own = FusionPass()
            for each in [copy.deepcopy(graph) for _ in range(repeats)]:
                gc.collect()
                start = time.perf_counter()
                own(each)
                self.seconds.append(time.perf_counter() - start)

        def uuid(self):
            return None

        def __deepcopy__(self, memo):
            return self

    model, own = load(layers, parallel), Repeat()
    with torch.no_grad():
        compiled = torch.compile(model, backend=inductor.post_grad_only(own), fullgraph=True, dynamic=False)
        compiled(torch.zeros(TOKENS, dtype=torch.long), use_cache=False)
    return {"again": own.seconds, "again_median": statistics.median(own.seconds)}


def in_fresh_process(layers, parallel, repeats):
    """`measure`, or `repeat`, in a process of its own with an empty compile cache."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        ours = ("FUSION_CORE_", "PYTHONDONTWRITEBYTECODE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        arguments = ["--case", str(layers), str(int(parallel)), "--repeats", str(repeats), "--json", str(out)]
        load_before = os.getloadavg()[0]
        done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"compiling {layers} layers failed:\n{done.stderr[-4000:]}")
        load = {"load_average_repeats" if repeats else "load_average": [load_before, os.getloadavg()[0]]}
        return json.loads(out.read_text()) | load


def machine():
    """Where and when the numbers were taken."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "fusion-core")},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def bars(record):
    """Every bar: what it asks, what was found, and whether that will do."""
    for case in record["cases"]:
        share = case["wall"]["share"]
        yield f"{title(case)}: our time / Inductor's", share, MAX_SHARE
    by_layers = {case["layers"]: case for case in record["cases"] if case["world_size"] > 1}
    if {20, 80} <= set(by_layers):
        small, large = by_layers[20], by_layers[80]
        yield "our time, 80 layers / 20 layers", large["wall"]["ours"] / small["wall"]["ours"], MAX_GROWTH
        growth = large["again_median"] / small["again_median"]
        yield "the pass alone again, 80 layers / 20 layers", growth, MAX_GROWTH


def title(case):
    return f"{case['layers']} layers" + ("" if case["world_size"] > 1 else ", not parallel")


def show(record):
    print("  ".join(f"{name} {value}" for name, value in record["machine"].items()))
    columns = (
        "model",
        "nodes",
        "sites",
        "pass",
        "of it gc",
        "uuid",
        "backend",
        "ours",
        "Inductor",
        "share",
        "post-grad",
        "again",
    )
    for kind, what in (("wall", "seconds by the wall clock"), ("cpu", "CPU seconds of the compiling process")):
        print(f"\n{what}")
        rows = [columns]
        for case in record["cases"]:
            s = case[kind]
            again = f"{case['again_median']:.4f}" if kind == "wall" else "–"
            ours = (f"{s[name]:.4f}" for name in ("pass", "collections", "uuid", "backend", "ours"))
            theirs = (f"{s['inductor']:.2f}", f"{s['share']:.2%}", f"{s['post_grad']:.2f}")
            rows.append((title(case), str(case["nodes"]), str(case["sites"]), *ours, *theirs, again))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *rest in rows:
            print(first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)))
    print()
    for text, found, bar in bars(record):
        print(f"{'met   ' if found <= bar else 'MISSED'}  {text}: {found:.4f}, at most {bar}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 20, 80], help="tensor-parallel models to compile")
    parser.add_argument("--repeats", type=int, default=5, help="runs of the pass on copies of each graph")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)  # one model, in this process
    options = parser.parse_args()
    if options.case:
        layers, parallel = options.case
        result = repeat(layers, parallel, options.repeats) if options.repeats else measure(layers, parallel)
        options.json.write_text(json.dumps(result))
        return 0
    from fusion_core.plugins.registry import GROUP

    for package in ("fusion_core", *(point.module for point in entry_points(group=GROUP))):
        # as pip does with what it installs; else our share would have Python's compiler in it
        compileall.compile_dir(Path(find_spec(package).origin).parent, quiet=1)
    record = {"machine": machine(), "cases": []}
    for layers, parallel in [*((layers, True) for layers in options.layers), (options.layers[0], False)]:
        case = in_fresh_process(layers, parallel, 0) | in_fresh_process(layers, parallel, options.repeats)
        record["cases"].append(case)
    show(record)
    record["bars"] = [{"what": w, "found": f, "at_most": b, "met": f <= b} for w, f, b in bars(record)]
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(bar["met"] for bar in record["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
