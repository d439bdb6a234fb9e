"""Sites with one change, from which the sides of a requirement are built."""

from __future__ import annotations

from dataclasses import replace

from fusion_core.site import Device, Site, TensorMeta


def tensor_of(site: Site, arg: str) -> TensorMeta:
    """The tensor, or one like x if the site has none, for a variant that has it."""
    tensor = site.tensor(arg)
    return site.inputs["x"] if tensor is None else tensor


def with_tensor(site: Site, arg: str, meta: TensorMeta) -> Site:
    """The site with another tensor of this name."""
    if arg in site.outputs and arg not in site.inputs:
        return replace(site, outputs={**site.outputs, arg: meta})
    return replace(site, inputs={**site.inputs, arg: meta})


def without(site: Site, arg: str) -> Site:
    """The site without any tensor of this name."""
    inputs, outputs = dict(site.inputs), dict(site.outputs)
    inputs.pop(arg, None)
    outputs.pop(arg, None)
    return replace(site, inputs=inputs, outputs=outputs)


def unknown_rows(site: Site, arg: str) -> Site:
    """The site with a number of rows that is known only at run time."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # imported late: it imports sympy

    tensor = tensor_of(site, arg)
    shape = (ShapeEnv().create_unbacked_symint(), *tensor.shape[-1:])
    return with_tensor(site, arg, replace(tensor, shape=shape, stride=None))


def on_arch(site: Site, arch: str) -> Site:
    """The site on a GPU of architecture ``arch``, or on a CPU if empty; a CPU with an architecture stays one."""
    kind = site.device.type if site.device.arch else "cuda"
    return replace(site, device=Device(kind if arch else "cpu", arch))
