"""Whether a measurement holds for this machine."""

import dataclasses
import json
import types
from typing import Any

import pytest
import torch

from fusion_core import Device
from fusion_core.tables import Machine, links, machine, refusal
from fusion_core.tables.links import links_between

VERSIONS = {"fusion-core": "0.1.0", "torch": "2.11.0+cu130", "flashinfer-python": "0.7.2"}
H200 = Machine("NVIDIA H200", "sm_90", "nvlink 18", 4, "580.95.05", VERSIONS)


def other(**facts: Any) -> Machine:
    return dataclasses.replace(H200, **facts)


@pytest.mark.parametrize("shipped", [False, True])
def test_a_machine_takes_its_own_measurements(shipped: bool) -> None:
    assert refusal(H200, H200, shipped) is None


@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize(
    ("facts", "found", "needs"),
    [
        ({"gpu": "NVIDIA H100"}, "gpu NVIDIA H200", "gpu NVIDIA H100"),
        ({"arch": "sm_100"}, "arch sm_90", "arch sm_100"),
        ({"links": "nvlink 12"}, "links nvlink 18", "links nvlink 12"),
        ({"links": ""}, "links nvlink 18", "links none"),
        ({"world_size": 8}, "ranks 4", "ranks 8"),
        ({"gpu": "cpu", "links": ""}, "gpu NVIDIA H200, links nvlink 18", "gpu cpu, links none"),
    ],
)
def test_another_gpu_architecture_link_or_number_of_ranks_is_refused(
    facts: Any, found: str, needs: str, shipped: bool
) -> None:
    reason = refusal(H200, other(**facts), shipped)
    assert reason is not None
    assert reason.code == "machine"
    assert str(reason) == (
        f"the table was measured with {found}, needs {needs}, as here; fusion-core tune measures this machine"
    )


@pytest.mark.parametrize(
    ("facts", "found", "needs"),
    [
        ({"driver": "590.1"}, "driver 580.95.05", "driver 590.1"),
        ({"driver": ""}, "driver 580.95.05", "driver none"),
        ({"versions": {**VERSIONS, "torch": "2.12.0"}}, "torch 2.11.0+cu130", "torch 2.12.0"),
        ({"versions": {"torch": "2.11.0+cu130"}}, "flashinfer-python 0.7.2", "flashinfer-python none"),
        ({"versions": {**VERSIONS, "amd-aiter": "1"}}, "amd-aiter none", "amd-aiter 1"),
    ],
)
def test_other_versions_are_a_reason_for_a_users_own_table_and_none_for_a_shipped_one(
    facts: Any, found: str, needs: str
) -> None:
    reason = refusal(H200, other(**facts), shipped=False)
    assert reason is not None
    assert reason.found == f"the table was measured with {found}"
    assert reason.needs == f"{needs}, as here"
    assert "fusion-core tune" in reason.hint
    assert refusal(H200, other(**facts), shipped=True) is None


def test_another_release_of_fusion_core_is_no_reason() -> None:
    assert refusal(H200, other(versions={**VERSIONS, "fusion-core": "0.2.0"}), shipped=False) is None


@pytest.mark.parametrize("shipped", [False, True])
def test_links_that_are_unknown_here_are_not_compared(shipped: bool) -> None:
    assert refusal(H200, other(links="unknown"), shipped) is None
    reason = refusal(H200, other(links="unknown", gpu="NVIDIA H100"), shipped)
    assert reason is not None
    assert reason.needs == "gpu NVIDIA H100, as here"
    assert (
        refusal(other(links="unknown"), H200, shipped) is not None
    )  # unknown where it was measured: not known to hold


def test_a_machine_without_a_gpu_says_so() -> None:
    here = Machine.here(2, Device("cpu"))
    assert (here.gpu, here.arch, here.links, here.world_size, here.driver) == ("cpu", "", "", 2, "")
    assert here.versions["torch"] == str(torch.__version__)
    assert "fusion-core" in here.versions
    assert here.versions.keys() <= set(machine.DISTRIBUTIONS)


def test_torchs_version_says_what_it_was_built_for_whatever_its_metadata_say(monkeypatch: Any) -> None:
    machine._installed.cache_clear()
    monkeypatch.setattr(machine, "distribution_version", lambda name: "2.11.0")
    try:
        assert machine.installed_versions()["torch"] == str(torch.__version__)
    finally:
        machine._installed.cache_clear()


def test_a_machine_goes_to_json_and_back() -> None:
    again = Machine(**json.loads(json.dumps(H200.to_dict())))
    assert again == H200
    assert hash(again) == hash(H200)


def test_a_gpu_that_torch_cannot_use_here_is_none_that_was_measured(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = Machine.here(4, Device("cuda", "sm_90"))
    assert (here.gpu, here.arch) == ("cuda", "sm_90")
    assert refusal(H200, here, shipped=True) is not None


@pytest.mark.cuda
def test_this_gpu_has_a_name_and_a_driver() -> None:
    here = Machine.here(1)
    assert here.gpu == torch.cuda.get_device_name()
    assert here.arch.startswith("sm_")
    assert here.driver[0].isdecimal()
    assert here.links == ""


@pytest.mark.cuda(devices=2)
def test_the_links_of_two_gpus_can_be_told() -> None:
    assert links_between(2).startswith(("nvlink ", "no nvlink"))


# links


def nvlinks(monkeypatch: Any, matrix: Any, driver: str = "580.95.05") -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(links, "nvlinks", lambda: matrix)
    monkeypatch.setattr(links, "driver_version", lambda: driver)


def square(size: int, count: int) -> list[list[int]]:
    return [[0 if row == column else count for column in range(size)] for row in range(size)]


@pytest.mark.parametrize(
    ("world_size", "matrix", "said"),
    [
        (1, square(4, 18), ""),
        (2, square(2, 18), "nvlink 18"),
        (2, square(8, 18), "nvlink 18"),
        (4, square(4, 0), "no nvlink"),
        (2, [[0, 1, 2], [1, 0, 2], [2, 2, 0]], "nvlink 1 to 2"),
        (2, [[0, 4, 0], [4, 0, 4], [0, 4, 0]], "nvlink 0 to 4"),
        (2, square(1, 0), "unknown"),
        (2, [], "unknown"),
        (2, None, "unknown"),
        (8, square(4, 18), "several hosts"),
    ],
)
def test_the_links_are_said_in_words(monkeypatch: Any, world_size: int, matrix: Any, said: str) -> None:
    nvlinks(monkeypatch, matrix)
    assert links_between(world_size) == said


def test_no_links_are_only_said_where_the_driver_could_be_asked(monkeypatch: Any) -> None:
    nvlinks(monkeypatch, square(2, 0), driver="")
    assert links_between(2) == "unknown"


def test_more_ranks_than_the_launcher_started_here_are_on_several_hosts(monkeypatch: Any) -> None:
    nvlinks(monkeypatch, None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert links_between(4) == "unknown"
    assert links_between(8) == "several hosts"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert links_between(8) == "unknown"


def test_links_that_torch_cannot_tell_are_unknown_and_stop_nothing(monkeypatch: Any) -> None:
    from torch._C import _distributed_c10d

    def detect(kind: Any, name: str) -> Any:
        assert name == "nvlink"
        return types.SimpleNamespace(matrix=square(2, 6))

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(_distributed_c10d, "_detect_dma_connectivity", detect)
    assert links_between(2) == "nvlink 6"
    for error in (RuntimeError("no detector"), TypeError("other arguments")):

        def fail(kind: Any, name: str, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(_distributed_c10d, "_detect_dma_connectivity", fail)
        assert links_between(2) == "unknown"
    monkeypatch.delattr(_distributed_c10d, "_detect_dma_connectivity")
    assert links_between(2) == "unknown"


@pytest.fixture
def _asked_anew() -> Any:
    links.driver_version.cache_clear()
    yield
    links.driver_version.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(("content", "said"), [("6.12.12\n", "6.12.12"), (None, "")])
def test_amds_driver_is_the_kernels_module(monkeypatch: Any, tmp_path: Any, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "version").write_text(content)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(links, "AMD_DRIVER", tmp_path / "version")
    assert links.driver_version() == said


class Nvml:
    """NVIDIA's library as far as it is asked."""

    def __init__(self, starts: int = 0, answers: int = 0) -> None:
        self.starts, self.answers, self.users = starts, answers, 0

    def nvmlInit_v2(self) -> int:
        self.users += self.starts == 0
        return self.starts

    def nvmlSystemGetDriverVersion(self, text: Any, length: Any) -> int:
        text.value = b"580.95.05"
        assert length.value == 80
        return self.answers

    def nvmlShutdown(self) -> int:
        self.users -= 1
        return 0


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(("nvml", "said"), [(Nvml(), "580.95.05"), (Nvml(starts=9), ""), (Nvml(answers=9), "")])
def test_nvidias_driver_is_asked_and_left_as_it_was(monkeypatch: Any, nvml: Nvml, said: str) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(links.ctypes, "CDLL", lambda name: nvml)
    assert links.driver_version() == said
    assert nvml.users == 0


@pytest.mark.usefixtures("_asked_anew")
def test_without_a_driver_its_version_is_empty(monkeypatch: Any) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(links.ctypes, "CDLL", missing)
    assert links.driver_version() == ""
