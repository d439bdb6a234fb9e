"""The pure-torch backend: every core pattern by its own definition, on any device, dtype and world size.

Under ``torch.compile`` the definition is put into the graph operator by operator, where Inductor fuses it as it fuses
everything else: choosing it costs nothing and gains nothing.
"""

from collections.abc import Iterator

from fusion_core import Attribute, Reason, Site, Strategy, hookimpl
from fusion_core.patterns import CORE_PATTERNS


class TorchCollective(Attribute):
    """The place calls torch's own all_reduce, so that the definition, which does too, is as fast."""

    def __init__(self) -> None:
        super().__init__("collective", None)

    def unmet(self, site: Site) -> Reason | None:
        """Which other collective the place calls."""
        if super().unmet(site) is None:
            return None
        found = f"the place calls {site.attributes[self.name]}, which may be faster than torch's all_reduce"
        return Reason("collective", found, "a backend with a kernel of its own", "x")

    def __str__(self) -> str:
        return "torch's own all_reduce"


@hookimpl
def fusion_strategies() -> Iterator[Strategy]:
    """One strategy for each core pattern: the pattern itself."""
    for pattern in CORE_PATTERNS:
        yield Strategy(
            pattern=pattern.name,
            name=f"reference.{pattern.name}",
            impl=pattern.function,
            worthwhile=(TorchCollective(),),
        )
