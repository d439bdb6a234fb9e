"""A check of one promise of a strategy, and the command that repeats a failed example."""

from __future__ import annotations

import base64
import json
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass

from fusion_core.errors import ConfigError
from fusion_core.samples.tensors import Values
from fusion_core.site import Site
from fusion_core.site.run_time import has_run_time_sizes, of_data, to_data
from fusion_core.testing.subject import Subject

Example = tuple[Site, Values | None]
"""A site, and the values of its tensors if they were drawn."""

_running: ContextVar[str] = ContextVar("_running", default="")
_only: ContextVar[Example | None] = ContextVar("_only", default=None)


@dataclass(frozen=True)
class Check:
    """The check of one promise.

    Attributes:
        name: The name of its function.
        title: The promise in one line.
        needs_device: Whether it runs kernels.
        function: Checks the promise for one strategy.
    """

    name: str
    title: str
    needs_device: bool
    function: Callable[[Subject], None]

    def run(self, subject: Subject, only: str | None = None) -> None:
        """Check the promise for one strategy.

        Args:
            subject: The strategy.
            only: The only example to check, as a failure prints it; None for all.

        Raises:
            ConfigError: if ``only`` is not such an example.
        """
        name, example = _running.set(self.name), _only.set(None if only is None else example_of(only))
        try:
            self.function(subject)
        finally:
            _running.reset(name)
            _only.reset(example)


CHECKS: list[Check] = []


def check(needs_device: bool) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Register a function as a check; its title is the first line of the docstring."""

    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        title = (function.__doc__ or "").partition("\n")[0].rstrip(".")
        CHECKS.append(Check(function.__name__, title, needs_device, function))
        return function

    return register


def only() -> Example | None:
    """The only example to check; None for all."""
    return _only.get()


def chosen(fixed: Iterable[Example]) -> Iterator[Example]:
    """A check's fixed examples, or the one that was asked for instead."""
    example = _only.get()
    if example is None:
        yield from fixed
    else:
        yield example


def command(subject: Subject, site: Site | None = None, values: Values | None = None) -> str:
    """The command that repeats the current check, on only this example if one is given."""
    words = ["fusion-core", "verify", subject.backend, "--strategy", subject.name, "--check", _running.get()]
    if subject.entry_point is not None:
        words += ["--entry-point", subject.entry_point]
    if site is not None and (text := text_of(site, values)) is not None:
        words += ["--example", text]
    switch = subject.strategy.switch
    return ("" if switch is None else f"FUSION_CORE_OPTIONS={switch} ") + shlex.join(words)


def text_of(site: Site, values: Values | None) -> str | None:
    """An example as one word of a command line; None if it cannot be encoded."""
    if has_run_time_sizes(site):
        return None
    try:
        document = json.dumps([to_data(site), None if values is None else asdict(values)], separators=(",", ":"))
    except TypeError:
        return None
    return base64.urlsafe_b64encode(zlib.compress(document.encode(), 9)).decode().rstrip("=")


def example_of(text: str) -> Example:
    """Decode the text of `text_of`.

    Raises:
        ConfigError: for any other text.
    """
    try:
        data, values = json.loads(zlib.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))))
        site = of_data(data, tuple(data[1]["x"][1]), "")
        return site, None if values is None else Values(**{**values, "rows": tuple(values["rows"])})
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error) as error:
        raise ConfigError(f"--example is {text[:40]!r}, needs the text that a failed check prints") from error
