"""The places of vLLM that `register` changes, and the method that it adds to workers."""

from __future__ import annotations

import functools
from typing import Any

from vllm.compilation.backends import CompilerManager
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.config import VllmConfig
from vllm.v1.worker.worker_base import WorkerBase

from fusion_core import ConfigError, last_report
from fusion_vllm import kept, worker_reports
from fusion_vllm.equal_graphs import Graphs
from fusion_vllm.graph_pass import KEY, VllmFusion
from fusion_vllm.settings import NAME, config_of, given_in

_MARK = "_fusion_vllm"


def install() -> None:
    """Make the changes, once in a process."""
    if getattr(VllmConfig, _MARK, False):
        return
    setattr(VllmConfig, _MARK, True)
    _wrap_configuration()
    _wrap_pass_manager()
    _wrap_compiler_manager()
    setattr(WorkerBase, worker_reports.METHOD, worker_reports.of_worker)


def _wrap_configuration() -> None:
    """Put the pass into each configuration that asks for it.

    Every process of an engine gets the configuration, and vLLM's cache keys are hashes of it. They call the pass's
    ``uuid``. A wrong field is an error here, before the engine starts.
    """
    original = VllmConfig.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = given_in(self)
        if given is None:
            return
        try:
            config = config_of(given)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        passes = self.compilation_config.inductor_compile_config
        other = passes.get(KEY)
        if other is not None and not isinstance(other, VllmFusion):
            raise ValueError(
                f"compilation_config has a pass {other!r} of its own for {KEY}, and additional_config has {NAME!r}; "
                "needs one of the two"
            )
        passes[KEY] = VllmFusion(config)

    VllmConfig.__post_init__ = __post_init__


def _wrap_pass_manager() -> None:
    """Run the pass before vLLM's own: they fuse what it leaves."""
    original, configure_original = PostGradPassManager.add, PostGradPassManager.configure

    @functools.wraps(configure_original)
    def configure(self: PostGradPassManager, config: VllmConfig) -> None:
        configure_original(self, config)
        setattr(self, _MARK, config)

    @functools.wraps(original)
    def add(self: PostGradPassManager, pass_: InductorPass) -> None:
        if isinstance(pass_, VllmFusion):
            pass_.keep_reports_for(getattr(self, _MARK))
            self.passes.insert(0, pass_)
        else:
            original(self, pass_)

    PostGradPassManager.configure, PostGradPassManager.add = configure, add


def _wrap_compiler_manager() -> None:
    """Count the equal graphs that vLLM compiles once."""
    original = CompilerManager.compile

    @functools.wraps(original)
    def compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = last_report()
        compiled = original(self, *args, **kwargs)
        newest = last_report()
        graphs = self.__dict__.setdefault(_MARK, Graphs())
        again = graphs.returned(compiled, None if newest is before else newest)
        if again is not None:
            kept.count(again)
        return compiled

    CompilerManager.compile = compile
