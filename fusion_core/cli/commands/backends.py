"""``fusion-core backends``: which backends load, which can be used here, and why the others cannot."""

from __future__ import annotations

import warnings

import typer

from fusion_core.cli.options import Json, Order, Strict, make_config
from fusion_core.cli.output import print_json, show, table
from fusion_core.registry import Registry
from fusion_core.site import Device


def backends(order: Order = None, strict: Strict = False, as_json: Json = False) -> None:
    """List the backends in the order in which they are tried, and why one cannot be used on this device."""
    config = make_config(order, strict)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of backends that fail to load: they are printed below
        registry = Registry.load(config)
    device = Device.here()
    reasons = {name: registry.unavailable(name, device) for name in registry.backends}
    if as_json:
        print_json(
            {
                "device": str(device),
                "order": list(registry.backends),
                "backends": [
                    {
                        "name": backend.name,
                        "distribution": backend.distribution,
                        "strategies": len(backend.strategies),
                        "usable": not reasons[backend.name],
                        "reasons": [reason.to_dict() for reason in reasons[backend.name]],
                    }
                    for backend in registry.backends.values()
                ],
                "failures": [{"backend": f.backend, "reason": f.reason.to_dict()} for f in registry.failures],
                "config": config.to_dict(),
            }
        )
        return
    if registry.backends:
        typer.echo(f"backends on {device}, in the order in which they are tried\n")
        rows = table("backend", "from", "strategies", "usable here", right=("strategies",))
        for backend in registry.backends.values():
            why = "\n".join(map(str, reasons[backend.name]))
            rows.add_row(
                backend.name, backend.distribution, str(len(backend.strategies)), f"no: {why}" if why else "yes"
            )
        show(rows)
    else:
        typer.echo("no backend is in use (order is empty, or none loads)")
    if registry.failures:
        typer.echo("\nnot loaded")
        for failure in registry.failures:
            typer.echo(f"  {failure}")
