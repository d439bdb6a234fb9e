"""What the first load of the plugins takes, after ``import torch`` and ``import fusion_core``.

    python benchmarks/load_time.py --json benchmarks/results/load_time.json
    python benchmarks/load_time.py --against ../before --json benchmarks/results/load_time.json

Each fresh process loads them once. With ``--against`` another checkout is measured by turns with this one, so that a
busy machine disturbs both alike; exits with 1 where this one takes more than the bar of what that one takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from software import software

BAR = 0.60
ROOT = Path(__file__).parents[1]
CODE = """
import gc
import time
import torch
import fusion_core
gc.collect()  # else a collection of torch's objects, 0.1 s, falls into some loads by chance
wall, cpu = time.perf_counter(), time.process_time()
registry = fusion_core.Registry.load()
print(time.perf_counter() - wall, time.process_time() - cpu)
assert not registry.failures, registry.failures
assert len(registry.backends) >= 3, registry.backends
assert fusion_core.__file__.startswith(ROOT), fusion_core.__file__
"""


def load(root, bytecode):
    """Seconds by the wall clock and of the CPU, of one fresh process that finds this checkout first."""
    folders = (root, *(root / "backends" / name for name in ("reference", "flashinfer", "aiter")))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # an installed package has its bytecode: Python's compiler is not what is measured
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONPYCACHEPREFIX": bytecode}
    code = CODE.replace("ROOT", repr(str(root)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=root
    )
    return tuple(map(float, done.stdout.split()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21, help="fresh processes of each checkout")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    roots = {"now": ROOT} | ({"against": options.against.resolve()} if options.against else {})
    with tempfile.TemporaryDirectory() as bytecode:
        for root in roots.values():
            load(root, bytecode)  # writes the bytecode and warms the file cache
        turns = [{name: load(root, bytecode) for name, root in roots.items()} for _ in range(options.runs)]
    record = {
        **software(),
        "wall_s": {name: [turn[name][0] for turn in turns] for name in roots},
        "cpu_s": {name: [turn[name][1] for turn in turns] for name in roots},
    }
    for name in roots:
        wall, cpu = (statistics.median(record[kind][name]) for kind in ("wall_s", "cpu_s"))
        print(f"{name}: {wall:.3f} s by the wall clock, {cpu:.3f} s of the CPU, {options.runs} processes")
    if options.against:
        ratios = sorted(turn["now"][1] / turn["against"][1] for turn in turns)
        record |= {"median_ratio_of_cpu": statistics.median(ratios), "at_most": BAR}
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        print(f"now / against, of the CPU: {record['median_ratio_of_cpu']:.3f} ({spread}), at most {BAR}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(record.get("median_ratio_of_cpu", 0) > BAR)


if __name__ == "__main__":
    sys.exit(main())
