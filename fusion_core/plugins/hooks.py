"""One plugin's hooks, called by pluggy: each plugin alone, so that an error has an owner."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pluggy

from fusion_core.errors import BackendError, shown
from fusion_core.plugins import hookspecs

PROJECT = "fusion_core"
PREFIX = "fusion_"
HOOKS = tuple(sorted(name for name, value in vars(hookspecs).items() if hasattr(value, f"{PROJECT}_spec")))
"""The names of all hooks."""


class Hooks:
    """The hooks that one plugin implements, including wrappers and functions with another name than the hook.

    Args:
        plugin: A module, or an object whose methods are the hooks.
        name: The backend's name.

    Raises:
        BackendError: if a hook's name is unknown, or the plugin implements none.
        pluggy.PluginValidationError: if an implementation takes an argument that its hook does not have.
    """

    def __init__(self, plugin: ModuleType | Any, name: str) -> None:
        if plugin is None:
            raise BackendError("the entry point is None, needs a module or an object with hooks")
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(plugin, name)
        _check_names(self._manager)
        _check_marks(plugin)
        if not self._manager.get_hookcallers(plugin):
            needs = f"a function that is one of {', '.join(HOOKS)} and marked with @fusion_core.hookimpl"
            raise BackendError(f"{_named(plugin)} implements no hook, needs {needs}")

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """The answer of each implementation, including None, which pluggy leaves out."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        answers: list[Any] = caller(**arguments)
        if not isinstance(answers, list):
            raise BackendError(f"a wrapper of {hook} gave {shown(answers)}, needs a list with an answer for each hook")
        implementations = caller.get_hookimpls()
        plain = [each for each in implementations if not (each.wrapper or each.hookwrapper)]
        if len(plain) < len(implementations) and answers:  # a wrapper may leave answers out
            return answers
        return answers + [None] * (len(plain) - len(answers))

    def items(self, hook: str, kind: type, *, or_none: bool = False, **arguments: Any) -> Iterator[Any]:
        """The items in a hook's answers, one by one.

        Args:
            hook: The hook's name.
            kind: The type that each item must have.
            or_none: Whether None is a valid answer, without items.
            **arguments: The hook's arguments.

        Raises:
            BackendError: if an answer is anything else.
        """
        for answer in self.call(hook, **arguments):
            if answer is None and or_none:
                continue
            if answer is None or isinstance(answer, str | bytes) or not hasattr(answer, "__iter__"):
                raise BackendError(f"{hook} gave {shown(answer)}, needs several {kind.__name__} objects, as a list")
            for item in answer:
                if not isinstance(item, kind):
                    raise BackendError(f"{hook} gave {shown(item)}, needs {kind.__name__} objects")
                yield item


def _check_names(manager: pluggy.PluginManager) -> None:
    """Raise if a plugin implements an unknown hook: a misspelt one would never be called."""
    for name, caller in vars(manager.hook).items():
        if name.startswith("_") or caller.has_spec():
            continue
        for found in caller.get_hookimpls():
            if not found.optionalhook:
                near = difflib.get_close_matches(
                    name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in HOOKS], 1
                )
                hint = f"; did you mean {PREFIX + near[0]!r}?" if near else ""
                raise BackendError(f"unknown hook {name!r}, needs one of {', '.join(HOOKS)}{hint}")


def _check_marks(plugin: ModuleType | Any) -> None:
    """Raise if a function has a hook's name but no mark: it would never be called."""
    for name in HOOKS:
        function = inspect.getattr_static(plugin, name, None)
        own = getattr(function, "__module__", None) == getattr(plugin, "__name__", type(plugin).__module__)
        if inspect.isfunction(function) and own and not hasattr(function, f"{PROJECT}_impl"):
            raise BackendError(f"{name} is not marked, needs @fusion_core.hookimpl: without it nothing calls it")


def _named(plugin: Any) -> str:
    return str(getattr(plugin, "__name__", type(plugin).__qualname__))
