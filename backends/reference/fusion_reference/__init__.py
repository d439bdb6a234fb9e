"""The pure-torch backend: every core pattern by its own definition, on any device, dtype and world size.

Under ``torch.compile`` the definition is put into the graph operator by operator, where Inductor fuses it as it fuses
everything else: choosing it costs nothing and gains nothing.
"""

from collections.abc import Iterator

from fusion_core import Strategy, hookimpl
from fusion_core.patterns import CORE_PATTERNS


@hookimpl
def fusion_strategies() -> Iterator[Strategy]:
    """One strategy for each core pattern: the pattern itself."""
    for pattern in CORE_PATTERNS:
        yield Strategy(pattern=pattern.name, name=f"reference.{pattern.name}", impl=pattern.function)
