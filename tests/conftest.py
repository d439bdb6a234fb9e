"""What every test shares: hypothesis profiles, skips for missing devices, a clean environment."""

import functools
import os
from collections.abc import Iterator

import pytest
import torch

from fusion_core.plugins import once
from fusion_core.workers import pool as workers
from tests.support import durations, forked, profiles
from tests.support.device import BACKEND, DEVICE

profiles.load()
os.environ.setdefault(
    "KINETO_LOG_LEVEL", "5"
)  # the profiler says on stderr when it starts; read when torch is imported


@functools.cache
def _devices(kind: str) -> int:
    """How many GPUs of this kind torch can use. Asked only for marked tests: asking wakes the driver."""
    built_for = torch.version.hip if kind == "rocm" else torch.version.cuda
    return torch.cuda.device_count() if built_for else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="the fault campaign whole, with a table of its verdicts")
    parser.addoption("--record-durations", action="store_true", help="write tests/durations.json anew")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(durations.Recorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    durations.apply(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for kind, name in (("cuda", "NVIDIA"), ("rocm", "AMD")):
        for marker in item.iter_markers(kind):
            needs = marker.kwargs.get("devices", 1)
            if (found := _devices(kind)) < needs:
                pytest.skip(f"found {found} {name} GPUs usable by torch {torch.__version__}, needs {needs}")


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither finds a tuning table of this machine's user, nor leaves one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _workers_are_forked(request: pytest.FixtureRequest) -> Iterator[None]:
    """As `tests.support.forked` says; a module that tests how workers start says ``FRESH_INTERPRETERS = True``."""
    with pytest.MonkeyPatch.context() as patch:
        if (
            DEVICE.type == "cpu"
            and profiles.current() != "nightly"
            and not hasattr(request.module, "FRESH_INTERPRETERS")
        ):
            patch.setattr(workers._Worker, "launch", forked.launch)
        yield


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FUSION_CORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _nothing_is_said_yet() -> None:
    once.forget()


@pytest.fixture(scope="module")
def one_rank() -> Iterator[str]:
    """A default process group of one rank in this process; its name. Collectives in it are real, and change nothing.

    For one module at a time: others test what happens without a process group.
    """
    torch.distributed.init_process_group(BACKEND, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()
