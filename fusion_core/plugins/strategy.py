"""One backend's way to run one pattern, as a declaration."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusion_core._torch.operators import schema_of
from fusion_core.config import SETTINGS, FusionConfig
from fusion_core.errors import BackendError
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.patterns.means import MEANS
from fusion_core.plugins.asking import Answers
from fusion_core.plugins.requirements import Attribute, LiveOutputs, Present, Requirement
from fusion_core.plugins.variant import Variant
from fusion_core.reason import Reason
from fusion_core.site import Site


@dataclass(frozen=True)
class Strategy:
    """One backend's way to run one pattern.

    Attributes:
        pattern: The pattern's name.
        name: ``"<backend>.<something>"``, unique.
        impl: Takes the pattern's parameters and ``group`` by name and returns ``outputs`` in their order: a
            `torch.library` operator, or a function over operators that torch can trace. A scalar parameter with a
            default may be missing from it: the strategy then only runs sites that have that default, unless the
            parameter is among ``settled``. A parameter named ``max_tokens`` that the pattern does not have receives
            `FusionConfig.max_tokens`, an int or None; in a compiled graph that is a constant.
        requires: What makes it correct. Checked at every site; all unmet requirements are reported.
        worthwhile: What makes it faster than the unfused path, as far as it was measured.
        outputs: Names of what ``impl`` returns, in order; None for all outputs of the pattern. A site with another
            live output is refused.
        rank: Orders strategies of one backend and one pattern; the highest comes first.
        option: Name of an option without which it is not used, a word of letters, digits and underscores; the user
            switches it on as ``"<backend>.<option>"`` in `FusionConfig.options`. None if it needs none.
        batch_invariant: Whether it gives a row the same bits whatever other rows are in the batch, at every token
            count. With ``numerics="deterministic"`` only such strategies are used.
        untested: Why it has not been run on hardware yet; None if it has. Printed in the support table.
        arguments: Values of further parameters of ``impl``, by name: numbers, text, True, False or None.
        settled: Scalar parameters of the pattern that ``impl`` does not take because the kernel's results are correct
            for every value that meets ``requires``.
        reduces_means: Whether ``impl`` is only the all_reduce in a pattern of split vectors, such as
            `sharded_rms_norm`. It then takes ``x``, ``[..., k]`` in float32 (float64 for float64), and ``group``, and
            returns the sum of x over the ranks; it may overwrite x. The means of each rank before it and the rest of
            the pattern behind it are compiled into the graph, with what surrounds them.
        variants: Ways to launch the kernel, or sets of outputs that it writes. Each is chosen, measured, tested and
            reported by its own name; what they share is declared once, and asked once about a site. Empty for the one
            way that the other fields describe.

    Example:
        >>> from fusion_core import DType, MultipleOf, TensorMeta
        >>> from fusion_core.patterns.plain import all_reduce
        >>> def impl(x: torch.Tensor, *, group: str) -> torch.Tensor: ...
        >>> requires = (DType("x", torch.bfloat16), MultipleOf("x", dim=-1, of=8))
        >>> strategy = Strategy("all_reduce", "acme.one_shot", impl, requires)
        >>> x = TensorMeta((4, 20), torch.float64)
        >>> for reason in strategy.cannot(Site("all_reduce", "all_reduce", {"x": x}, {"reduced": x}), all_reduce):
        ...     print(reason)
        x is float64, needs bfloat16
        x.shape[-1] is 20, needs a multiple of 8
    """

    pattern: str
    name: str
    impl: Callable[..., Any]
    requires: tuple[Requirement, ...] = ()
    worthwhile: tuple[Requirement, ...] = ()
    outputs: tuple[str, ...] | None = None
    rank: int = 0
    option: str | None = None
    batch_invariant: bool = False
    untested: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    settled: tuple[str, ...] = ()
    reduces_means: bool = False
    variants: tuple[Variant, ...] = ()

    def expanded(self) -> tuple[Strategy, ...]:
        """A strategy without variants for each of its variants; itself if it has none."""
        return tuple(self._of(variant) for variant in self.variants) or (self,)

    def _of(self, own: Variant) -> Strategy:
        untested = "; ".join(why for why in (self.untested, own.untested) if why is not None)
        return replace(
            self,
            name=f"{self.name}_{own.name}" if own.name else self.name,
            impl=self.impl if own.impl is None else own.impl,
            # the same objects for all variants: `Answers` asks each object once
            requires=(*self.requires, *own.requires),
            worthwhile=(*self.worthwhile, *own.worthwhile),
            outputs=self.outputs if own.outputs is None else own.outputs,
            rank=self.rank + own.rank,
            option=self.option if own.option is None else own.option,
            batch_invariant=self.batch_invariant or own.batch_invariant,
            untested=untested or None,
            arguments={**self.arguments, **own.arguments},
            variants=(),
        )

    @property
    def backend(self) -> str:
        """The name of its backend."""
        return self.name.partition(".")[0]

    @property
    def switch(self) -> str | None:
        """The name of its option in `FusionConfig.options`; None if it needs no option."""
        return None if self.option is None else f"{self.backend}.{self.option}"

    def accepts(self, pattern: Pattern) -> frozenset[str]:
        """The scalar parameters of the pattern, and ``group``, that ``impl`` takes."""
        names = frozenset((*pattern.scalars, GROUP))
        return names if self._parameters is None else names & self._parameters.keys()

    def settings(self, pattern: Pattern, config: FusionConfig) -> dict[str, Any]:
        """What ``impl`` receives besides the parameters of the pattern: the user's settings, and ``arguments``."""
        taken = [name for name in SETTINGS if name in self._named and name not in pattern.parameters]
        return {**{name: getattr(config, name) for name in taken}, **self.arguments}

    @functools.cached_property
    def _parameters(self) -> dict[str, bool] | None:
        """Name → is required, for every parameter of ``impl``; None if it takes any by ``**``, or does not see them."""
        return None if self.reduces_means or _takes_anything(self.impl) else self._named

    @functools.cached_property
    def _named(self) -> dict[str, bool]:
        return _named(self.impl)

    @functools.cached_property
    def _tensors_needed(self) -> frozenset[str]:
        """Parameters of ``impl`` that are tensors and cannot be None; torch itself would let None through."""
        if (schema := schema_of(self.impl)) is not None:
            return frozenset(a.name for a in schema.arguments if isinstance(a.type, torch.TensorType))
        try:
            hints = typing.get_type_hints(self.impl)
        except (NameError, TypeError):
            return frozenset()
        return frozenset(name for name, hint in hints.items() if hint is torch.Tensor)

    def implied(self, pattern: Pattern) -> tuple[Requirement, ...]:
        """The requirements that follow from its outputs and the parameters of ``impl``."""
        if pattern.function not in self._implied:
            self._implied[pattern.function] = self._imply(pattern)
        return self._implied[pattern.function]

    @functools.cached_property
    def _implied(self) -> dict[Callable[..., Any], tuple[Requirement, ...]]:
        return {}

    def _imply(self, pattern: Pattern) -> tuple[Requirement, ...]:
        requirements: list[Requirement] = []
        if self.outputs is not None:
            requirements.append(LiveOutputs(*self.outputs))
        taken = (*self.accepts(pattern), *self.settled)
        missing = [pattern.parameters[name] for name in pattern.scalars if name not in taken]
        requirements.extend(Attribute(parameter.name, parameter.default) for parameter in missing)
        optional = [name for name in pattern.tensors if pattern.parameters[name].optional]
        declared = {each.arg for each in self.requires if isinstance(each, Present)}
        requirements.extend(Present(name) for name in optional if name in self._tensors_needed - declared)
        return tuple(requirements)

    def is_definition(self, pattern: Pattern) -> bool:
        """Whether it is its pattern's own definition: the unfused path under another name."""
        return self.impl is pattern.function

    def cannot(self, site: Site, pattern: Pattern) -> tuple[Reason, ...]:
        """Every reason why it cannot run ``site`` correctly, as far as it is known before a call."""
        return self.unmet(Answers(site), pattern)

    def should_not(self, site: Site) -> tuple[Reason, ...]:
        """Every reason why it is not known to be faster at ``site``, as far as it is known before a call."""
        return Answers(site).unmet(self.worthwhile)

    def unmet(self, answers: Answers, pattern: Pattern) -> tuple[Reason, ...]:
        """The reasons of `cannot`, from answers that strategies of one site share."""
        return answers.unmet((*self.implied(pattern), *self.requires))

    def switched_off(self, config: FusionConfig) -> tuple[Reason, ...]:
        """The reason if its option is not among those of ``config``; empty if it is, or if it needs none."""
        if self.switch is None or self.switch in config.options:
            return ()
        hint = f"FusionConfig(options=({self.switch!r},)) or FUSION_CORE_OPTIONS={self.switch} switches it on"
        return (Reason("option", f"the option {self.switch} is off", hint=hint),)

    def check(self, pattern: Pattern) -> None:
        """Raise `BackendError` if the declaration does not fit ``pattern``."""
        if self.option is not None and re.fullmatch("[A-Za-z0-9_]+", str(self.option)) is None:
            raise BackendError(
                f"strategy {self.name!r} has option {self.option!r}, needs a word of letters, digits and underscores"
            )
        outputs = pattern.outputs if self.outputs is None else self.outputs
        if unknown := [name for name in outputs if name not in pattern.outputs]:
            raise BackendError(
                f"strategy {self.name!r} has outputs {unknown}, needs some of {pattern.outputs} of {pattern.name!r}"
            )
        self._check_arguments(pattern)
        if self.reduces_means and pattern.collective not in MEANS:
            raise BackendError(
                f"strategy {self.name!r} reduces means, and {pattern.name!r} has the collective {pattern.collective}; "
                f"needs {' or '.join(MEANS)}"
            )
        accepted = self._parameters
        if accepted is None:
            return
        needed = [p.name for p in pattern.parameters.values() if p.is_tensor or p.required] + [GROUP]
        if lacking := [name for name in needed if name not in accepted]:
            raise BackendError(
                f"strategy {self.name!r} does not take {lacking}: its impl is {_head(self.impl)}, "
                f"needs the parameters of {pattern.signature()}"
            )
        known = (*pattern.parameters, GROUP, *SETTINGS, *self.arguments)
        extra = [name for name, required in accepted.items() if required and name not in known]
        if extra:
            raise BackendError(
                f"strategy {self.name!r} requires {extra}, which its pattern does not have: its impl is "
                f"{_head(self.impl)}, the pattern is {pattern.signature()}; needs a default for each"
            )

    def _check_arguments(self, pattern: Pattern) -> None:
        if taken := [name for name in self.arguments if name in (*pattern.parameters, GROUP, *SETTINGS)]:
            raise BackendError(
                f"strategy {self.name!r} has arguments {taken}, which a site or the user gives; needs other names"
            )
        if self._parameters is not None and (unknown := [n for n in self.arguments if n not in self._parameters]):
            raise BackendError(
                f"strategy {self.name!r} has arguments {unknown}, which its impl does not take: it is "
                f"{_head(self.impl)}"
            )
        if unknown := [name for name in self.settled if name not in pattern.scalars]:
            raise BackendError(
                f"strategy {self.name!r} has settled {unknown}, needs some of {pattern.scalars}, the scalar parameters "
                f"of {pattern.name!r}"
            )
        if taken := [name for name in self.settled if name in self.accepts(pattern)]:
            raise BackendError(
                f"strategy {self.name!r} has settled {taken}, needs parameters that its impl does not take: it is "
                f"{_head(self.impl)}"
            )


def _named(impl: Callable[..., Any]) -> dict[str, bool]:
    """Name → is required, for every parameter of ``impl``."""
    schema = schema_of(impl)
    if schema is not None:
        return {argument.name: not argument.has_default_value() for argument in schema.arguments}
    parameters = inspect.signature(impl).parameters.values()
    return {parameter.name: parameter.default is inspect.Parameter.empty for parameter in parameters}


def _takes_anything(impl: Callable[..., Any]) -> bool:
    if schema_of(impl) is not None:
        return False
    parameters = inspect.signature(impl).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _head(impl: Callable[..., Any]) -> str:
    schema = schema_of(impl)
    return str(schema) if schema is not None else f"{getattr(impl, '__name__', impl)}{inspect.signature(impl)}"
