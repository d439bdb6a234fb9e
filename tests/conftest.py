"""Shared by all tests: hypothesis profiles, skips for missing devices, a clean environment."""

import functools
import os
from collections.abc import Iterator

import pytest
import torch

from fusion_core.plugins import once
from fusion_core.workers import worker
from tests.support import durations, forked, profiles
from tests.support.device import BACKEND, DEVICE

profiles.load()
os.environ.setdefault(
    "KINETO_LOG_LEVEL", "5"
)  # else the profiler prints on stderr when it starts; read when torch is imported
# In each new cache folder Inductor compiles a probe of the CPU's vector instructions, which takes 5 s; this skips it.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@functools.cache
def _devices(kind: str) -> int:
    """The number of GPUs of this kind that torch can use. Called only for marked tests, as it wakes the driver."""
    built_for = torch.version.hip if kind == "rocm" else torch.version.cuda
    return torch.cuda.device_count() if built_for else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="run the whole fault campaign and print its verdicts")
    parser.addoption("--record-durations", action="store_true", help="rewrite tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(durations.Recorder())
    if hasattr(config, "workerinput"):
        forked.connect()
    elif config.getoption("numprocesses", None) and DEVICE.type == "cpu" and profiles.current() != "nightly":
        forked.start_seedbeds()


def pytest_unconfigure() -> None:
    forked.stop_seedbeds()


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
    """Tests neither read the user's tuning tables nor write any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _workers_are_forked(request: pytest.FixtureRequest) -> Iterator[None]:
    """See `tests.support.forked`; a module that tests how workers start sets ``FRESH_INTERPRETERS = True``."""
    with pytest.MonkeyPatch.context() as patch:
        if (
            DEVICE.type == "cpu"
            and profiles.current() != "nightly"
            and not hasattr(request.module, "FRESH_INTERPRETERS")
        ):
            patch.setattr(worker.Worker, "launch", forked.launch)
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
    """The name of a default process group of one rank in this process. Collectives really run, but change nothing.

    For one module at a time: other modules test the behaviour without a process group.
    """
    torch.distributed.init_process_group(BACKEND, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()
