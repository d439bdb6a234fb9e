"""What ``import fusion_core`` takes beside ``import torch``, which it includes.

    python benchmarks/import_time.py --json benchmarks/results/import_time.json

Each fresh process imports torch and then fusion_core; the ratio is taken within it, so that a busy machine disturbs
both sides alike. Exits with 1 where the median ratio is above the bar.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from software import software

BAR = 1.10
CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import fusion_core
print(middle - start, time.perf_counter() - start)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21, help="fresh processes")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    pairs = []
    for _ in range(options.runs + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        pairs.append(tuple(map(float, done.stdout.split())))
    del pairs[0]  # it warmed the file cache
    ratios = sorted(both / torch for torch, both in pairs)
    record = {
        **software(),
        "torch_s": [torch for torch, _ in pairs],
        "torch_and_fusion_core_s": [both for _, both in pairs],
        "median_ratio": statistics.median(ratios),
        "at_most": BAR,
    }
    print(f"import torch {statistics.median(torch for torch, _ in pairs):.3f} s, {options.runs} processes")
    spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
    print(f"import fusion_core / import torch: {record['median_ratio']:.3f} ({spread}), at most {BAR}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(record["median_ratio"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
