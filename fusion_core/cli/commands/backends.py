"""``fusion-core backends``: which backends load and can be used here, and why the others cannot."""

from __future__ import annotations

import warnings

import typer

from fusion_core.cli import machine
from fusion_core.cli.options import Json, Options, Order, Strict, make_config
from fusion_core.cli.output import print_json, show, table
from fusion_core.plugins.registry import Registry
from fusion_core.site import Device


def backends(order: Order = None, strict: Strict = False, options: Options = None, as_json: Json = False) -> None:
    """List the backends in the order in which they are tried, their device memory, and why any cannot be used here."""
    config = make_config(order, strict, options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # backends that fail to load are printed below
        registry = Registry.load(config)
    device = Device.here()
    reasons = {name: registry.unavailable(name, device) for name in registry.backends}
    held = [row for name in registry.backends if not reasons[name] for row in machine.held(registry, name, device)]
    if as_json:
        print_json(
            {
                "device": str(device),
                "order": list(registry.backends),
                "backends": [
                    {
                        "name": backend.name,
                        "distribution": backend.distribution,
                        "strategies": len(backend.declared),
                        "variants": len(backend.strategies),
                        "usable": not reasons[backend.name],
                        "reasons": [reason.to_dict() for reason in reasons[backend.name]],
                    }
                    for backend in registry.backends.values()
                ],
                "failures": [{"backend": f.backend, "reason": f.reason.to_dict()} for f in registry.failures],
                "status": held,
                "config": config.to_dict(),
            }
        )
        return
    if registry.backends:
        typer.echo(f"backends on {device}, in the order in which they are tried\n")
        counted = ("strategies", "variants")
        rows = table("backend", "from", *counted, "usable here", right=counted)
        for backend in registry.backends.values():
            why = "\n".join(map(str, reasons[backend.name]))
            counts = str(len(backend.declared)), str(len(backend.strategies))
            rows.add_row(backend.name, backend.distribution, *counts, f"no: {why}" if why else "yes")
        show(rows)
    else:
        typer.echo("no backend is in use (order is empty, or none loads)")
    if held:
        typer.echo("\ndevice memory\n")
        rows = table("backend", "subject", "MiB", "state", right=("MiB",))
        for row in held:
            memory = "?" if row["memory"] is None else f"{row['memory'] / 2**20:.1f}"
            rows.add_row(row["backend"], row["subject"], memory, row["state"])
        show(rows)
    if registry.failures:
        typer.echo("\nnot loaded")
        for failure in registry.failures:
            typer.echo(f"  {failure}")
