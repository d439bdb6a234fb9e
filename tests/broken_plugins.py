"""Plugins that are broken in one way each, and what the error must say."""

import sys
from typing import Any

import torch

from fusion_core import (
    Strategy,
    Tokens,
    pattern,
)
from fusion_core.vocabulary import all_reduce


def ran(x: torch.Tensor, *, group: str) -> torch.Tensor:
    return x


def strategy(name: str = "acme.one", pattern: str = "all_reduce", impl: Any = ran) -> Strategy:
    return Strategy(pattern=pattern, name=name, impl=impl)


def no_strategies() -> list[Strategy]:
    return []


def half_way() -> Any:
    yield strategy()
    raise OSError("libacme.so: cannot open shared object file")


def not_a_hook(word: str) -> Any:
    return []


def lacks_group(x: torch.Tensor) -> torch.Tensor:
    return x


def wants_more(x: torch.Tensor, streams: int, *, group: str) -> torch.Tensor:
    return x


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def raises_mute() -> Any:
    raise Mute


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a hook that raises": ({"fusion_strategies": lambda: 1 / 0}, "ZeroDivisionError"),
    "a generator that raises half-way": ({"fusion_strategies": half_way}, "cannot open shared object file"),
    "a misspelt hook": ({"fusion_strategy": no_strategies}, "unknown hook 'fusion_strategy'"),
    "a hook with a wrong argument": ({"fusion_strategies": not_a_hook}, "{'word'} are declared in the hookimpl"),
    "two strategies of one name": (
        {"fusion_strategies": lambda: [strategy(), strategy()]},
        "'acme.one' is declared twice",
    ),
    "a strategy without its backend's name": (
        {"fusion_strategies": lambda: [strategy("other.one")]},
        "needs 'acme.<name>'",
    ),
    "a strategy without a name of its own": ({"fusion_strategies": lambda: [strategy("acme.")]}, "needs 'acme.<name>'"),
    "a strategy for no pattern": (
        {"fusion_strategies": lambda: [strategy(pattern="all_red")]},
        "needs one of all_gather_shard, all_reduce, ",
    ),
    "what is no strategy": ({"fusion_strategies": lambda: ["acme.one"]}, "needs Strategy objects"),
    "an impl that lacks a parameter": (
        {"fusion_strategies": lambda: [strategy(impl=lacks_group)]},
        "does not take ['group']",
    ),
    "an impl that wants more": ({"fusion_strategies": lambda: [strategy(impl=wants_more)]}, "requires ['streams']"),
    "an output its pattern lacks": (
        {"fusion_strategies": lambda: [Strategy("all_reduce", "acme.one", ran, outputs=("normed",))]},
        "has outputs ['normed']",
    ),
    "an option that is no word": (
        {"fusion_strategies": lambda: [Strategy("all_reduce", "acme.one", ran, option="a b")]},
        "has option 'a b', needs a word of letters, digits and underscores",
    ),
    "a module without a hook": ({}, "implements no hook, needs a function that is one of"),
    "a misspelt hook, with the right spelling": (
        {"fusion_strategy": no_strategies},
        "did you mean 'fusion_strategies'?",
    ),
    "a hook that gives None": ({"fusion_strategies": lambda: None}, "gave None, needs several Strategy objects"),
    "a hook that ends the process": ({"fusion_strategies": lambda: sys.exit(3)}, "SystemExit: 3"),
    "an error without a text": ({"fusion_strategies": raises_mute}, "Mute: its text cannot be had"),
    "a name with an escape": (
        {"fusion_strategies": lambda: [strategy("acme.\x1b[2J")]},
        "needs text of printable characters",
    ),
    "requirements that are one": (
        {"fusion_strategies": lambda: [Strategy("all_reduce", "acme.one", ran, requires=Tokens(most=8))]},
        "needs a tuple of requirements",
    ),
    "a requirement that is none": (
        {"fusion_strategies": lambda: [Strategy("all_reduce", "acme.one", ran, requires=("bfloat16",))]},
        "has 'bfloat16' among requires",
    ),
    "outputs that are one text": (
        {"fusion_strategies": lambda: [Strategy("all_reduce", "acme.one", ran, outputs="reduced")]},
        "has outputs 'reduced', needs a tuple of names",
    ),
    "a rank that is no number": (
        {"fusion_strategies": lambda: [Strategy("all_reduce", "acme.one", ran, rank="first")]},
        "has rank 'first', needs a whole number",
    ),
    "a pattern of core's name": (
        {"fusion_patterns": lambda: [pattern(outputs=("reduced",))(named("all_reduce"))]},
        "'all_reduce' is defined by 'fusion_core' already",
    ),
}


def named(name: str) -> Any:
    def function(x: torch.Tensor, *, group: str) -> torch.Tensor:
        return all_reduce(x, group)

    function.__name__ = name
    return function
