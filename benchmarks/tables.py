"""The Markdown tables of `site_latency.py`, `decode_step.py` and `chosen_path.py` from their records, and plots.

python benchmarks/tables.py
python benchmarks/tables.py --plot docs/site_latency.svg benchmarks/results/site_latency_h200x2.json
python benchmarks/tables.py --plot docs/chosen_path.svg benchmarks/results/chosen_path_h200x2.json
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SHORT = {
    "flashinfer_one_shot": "one-shot",
    "flashinfer_two_shot": "two-shot",
    "unfused": "unfused",
    "symm_mem_one_shot": "one-shot",
    "symm_mem_two_shot": "two-shot",
}


def markdown(heads, rows):
    """Lines of a table whose columns stand to the right."""
    lines = [f"| {' | '.join(heads)} |", f"|{'--:|' * len(heads)}"]
    return "\n".join(lines + [f"| {' | '.join('–' if cell is None else str(cell) for cell in row)} |" for row in rows])


def best(us, prefix, suffix=""):
    """The fastest of the columns ``prefix_one_shot`` and ``prefix_two_shot``, and which one it is."""
    found = [(us[name], name) for name in (f"{prefix}_{shot}_shot{suffix}" for shot in ("one", "two")) if name in us]
    return min(found, default=(None, None))


def ratio(a, b):
    return f"{a / b:.2f}" if a is not None and b else None


def site_latency(record):
    """All tables of one record."""
    parts = []
    with_pdl = any("fusion_core_pdl" in row["us"] for row in record["rows"])
    for (pattern, hidden), rows in groupby(record["rows"], key=lambda row: (row["pattern"], row["hidden"])):
        heads = ["tokens", "NCCL + Inductor", "symmetric memory + Inductor", "FlashInfer one-shot"]
        heads += ["FlashInfer two-shot", "fusion_core", "chosen", "to that by hand", "to the better by hand", "to NCCL"]
        if with_pdl:
            heads += ["fusion_core, PDL", "to the better by hand, PDL"]
        lines = []
        for row in rows:
            us, ours = row["us"], row["us"].get("fusion_core")
            symmetric, which = best(us, "symm_mem")
            line = [
                row["tokens"],
                us.get("nccl_inductor"),
                symmetric and f"{symmetric} {SHORT[which]}",
                us.get("flashinfer_one_shot"),
                us.get("flashinfer_two_shot"),
                ours,
                SHORT.get(row.get("chosen")),
                ratio(ours, us.get(row.get("chosen"))),
                ratio(ours, best(us, "flashinfer")[0]),
                ratio(ours, us.get("nccl_inductor")),
            ]
            if with_pdl:
                pdl = us.get("fusion_core_pdl")
                line += [pdl, ratio(pdl, best(us, "flashinfer", "_pdl")[0])]
            lines.append(line)
        parts.append(f"`{pattern}`, hidden {hidden}, {record['ranks']} GPUs, µs a site:\n\n{markdown(heads, lines)}")
    if record["overhead"]:
        heads = ["operator", "fusion_core", "FlashInfer by hand", "with outputs allocated before", "difference"]
        keys = ["fusion_core_us", "flashinfer_us", "flashinfer_preallocated_us", "difference_us"]
        lines = [[f"`{row['pattern']}`", *(row.get(key) for key in keys)] for row in record["overhead"]]
        parts.append(f"An eager call, {record['ranks']} GPUs, µs of the CPU:\n\n{markdown(heads, lines)}")
    if record["left_out"]:
        parts.append(f"Left out for want of time: {len(record['left_out'])} sizes.")
    return "\n\n".join(parts)


def decode_step(record):
    """The table of one record."""
    heads = ["batch", "plain µs", "fused µs", "gain", "in single rounds", "fused sites", "logits differ by"]
    lines = []
    for row in record["rows"]:
        rounds = row["gain_by_round"]
        lines.append(
            [
                row["batch"],
                row["plain_us"],
                row["fused_us"],
                f"{row['gain']:.3f}×",
                f"{min(rounds):.3f}–{max(rounds):.3f}",
                f"{row['fused_sites']} of {row['sites']}",
                f"{row['logits']['largest_over_largest_logit']:.3f}",
            ]
        )
    parts = [f"{record['layers']} layers, {record['ranks']} GPUs:", markdown(heads, lines)]
    beside = [
        [row["batch"], name, other["us"], f"{other['gain']:.3f}×", ", ".join(f"`{ran}`" for ran in other["strategies"])]
        for row in record["rows"]
        for name, other in row.get("beside", {}).items()
    ]
    if beside:
        parts += ["By other tables:", markdown(["batch", "table", "µs", "gain", "what ran"], beside)]
    if record["left_out"]:
        parts.append(f"Left out for want of time: batch {record['left_out']}.")
    return "\n\n".join(parts)


def chosen_path(record):
    """The table of one record."""
    parts = []
    heads = ["tokens", "torch.compile", "fusion_core", "one graph", "ratio", "ratio of one graph", "fastest path"]
    heads += ["its µs", "to that", "one graph to that"]
    for (pattern, hidden), rows in groupby(record["rows"], key=lambda row: (row["pattern"], row["hidden"])):
        lines = []
        for row in rows:
            us, fastest = row["us"], row["fastest"]
            cells = [row["tokens"], *(us.get(name) for name in ("compiled", "chosen", "chosen_dynamic"))]
            cells += [row.get("chosen_to_compiled"), row.get("chosen_dynamic_to_compiled")]
            cells += [f"`{fastest}`", us.get(fastest)]
            cells += [row.get("chosen_to_fastest"), row.get("chosen_dynamic_to_fastest")]
            lines.append(cells)
        parts.append(f"`{pattern}`, hidden {hidden}, {record['ranks']} GPUs, µs a site:\n\n{markdown(heads, lines)}")
    return "\n\n".join(parts)


def plot_chosen_path(record, path):
    """How many times faster than torch.compile alone; a panel per pattern and hidden size."""
    from fusion_core.cli import plotting

    panels = []
    columns = {"fusion_core": "chosen", "one graph for all": "chosen_dynamic", "the fastest path": None}
    for (pattern, hidden), of in groupby(record["rows"], key=lambda row: (row["pattern"], row["hidden"])):
        rows = list(of)
        lines = [
            plotting.Line(
                label, [(row["tokens"], row["us"]["compiled"] / row["us"][name or row["fastest"]]) for row in rows]
            )
            for label, name in columns.items()
        ]
        title = f"{pattern.removeprefix('all_reduce_')}, hidden {hidden}"
        panels.append(plotting.Panel(title, "tokens", "times faster than torch.compile", lines, 1.0))
    plotting.save(path, f"{record['machine']}, the chosen path", panels)


def plot(records, pattern, path):
    """How many times faster than NCCL + Inductor each column is; a panel per record and hidden size."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fusion_core"  # the same file for the same numbers
    from matplotlib import pyplot

    panels = []
    for record in records:
        rows = [row for row in record["rows"] if row["pattern"] == pattern and "nccl_inductor" in row["us"]]
        panels += [(record, hidden, list(of)) for hidden, of in groupby(rows, key=lambda row: row["hidden"])]
    if not panels:
        raise SystemExit(f"no record has {pattern} with a column nccl_inductor")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), sharey=True, squeeze=False)
    columns = {
        "fusion_core": ("fusion_core", {"linewidth": 2.5}),
        "FlashInfer one-shot, by hand": ("flashinfer_one_shot", {"linestyle": "--"}),
        "FlashInfer two-shot, by hand": ("flashinfer_two_shot", {"linestyle": ":"}),
        "symmetric memory + Inductor": ("symm_mem", {"linestyle": "-.", "color": "grey"}),
    }
    for axis, (record, hidden, rows) in zip(axes[0], panels, strict=True):
        for label, (name, style) in columns.items():
            found = [(row, best(row["us"], name)[0] if name == "symm_mem" else row["us"].get(name)) for row in rows]
            points = [(row["tokens"], row["us"]["nccl_inductor"] / us) for row, us in found if us]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3, **style)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_title(f"{record['machine']}, hidden {hidden}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times faster than NCCL + Inductor")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(pattern)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="*", help="JSON files; by default all of benchmarks/results")
    parser.add_argument("--plot", type=Path, help="an SVG file; needs matplotlib")
    parser.add_argument("--pattern", default="all_reduce_add_rms_norm", help="of the plot")
    options = parser.parse_args()
    paths = options.records or [
        *sorted(RESULTS.glob("site_latency_*.json")),
        *sorted(RESULTS.glob("decode_step_*.json")),
        *sorted(RESULTS.glob("chosen_path_*.json")),
    ]
    records = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for path, record in records.items():
        kind = decode_step if "layers" in record else chosen_path if "by_tokens" in record else site_latency
        text = kind(record)
        known = {key: record.get(key) for key in ("torch", "transformers", "flashinfer")} | record.get("versions", {})
        versions = ", ".join(f"{key} {value}" for key, value in known.items() if value)
        print(f"### {path.name}\n\n{record['machine']}, {versions}, {record['date']}\n\n{text}\n")
    if options.plot:
        chosen = [record for record in records.values() if "by_tokens" in record]
        if chosen:
            plot_chosen_path(chosen[0], options.plot)
        else:
            plot([record for record in records.values() if "layers" not in record], options.pattern, options.plot)


if __name__ == "__main__":
    main()
