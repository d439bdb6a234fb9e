"""Backends by entry point: a broken one is named and never hides the others, in either load order."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest
import torch

from fusion_core import (
    BackendError,
    Device,
    FusionConfig,
    Reason,
    Registry,
    Report,
    Status,
    Strategy,
    hookimpl,
    pattern,
)
from fusion_core.vocabulary import add, all_reduce
from tests.broken_plugins import BROKEN, no_strategies, ran, strategy
from tests.odd_registries import Kernels
from tests.support.graphs import REFERENCE, plugin


@pattern(outputs=("sum",))
def all_reduce_twice(x: torch.Tensor, *, group: str) -> torch.Tensor:
    """A pattern of a plugin: the sum, doubled."""
    reduced = all_reduce(x, group)
    return add(reduced, reduced)


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("first", ["broken first", "broken last"])
def test_a_broken_plugin_is_named_and_the_others_load(monkeypatch: Any, what: str, first: str) -> None:
    hooks, why = BROKEN[what]
    broken = plugin(monkeypatch, "acme", **hooks)
    good = plugin(monkeypatch, "zeta" if first == "broken first" else "aaa", fusion_strategies=no_strategies)
    points = [broken, good, REFERENCE] if first == "broken first" else [REFERENCE, good, broken]
    with pytest.warns(RuntimeWarning, match="backend 'acme' not loaded"):
        registry = Registry.of(points, FusionConfig())
    assert set(registry.backends) == {good.name, "reference"}
    ((failure),) = registry.failures
    assert failure.backend == "acme"
    assert why in failure.reason.found
    for config in (FusionConfig(strict=True), FusionConfig(order=("acme", "reference"))):
        with pytest.raises(BackendError) as error:
            _quietly(points, config)
        assert why in str(error.value)


def _quietly(points: list[EntryPoint], config: FusionConfig) -> Registry:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Registry.of(points, config)


@pytest.mark.parametrize("name", ["aaa", "zzz"])
def test_a_plugin_that_does_not_import_is_named_with_its_error(name: str) -> None:
    gone = EntryPoint(name, "fusion_gone_missing", "fusion_core.backends")
    with pytest.warns(RuntimeWarning, match="No module named 'fusion_gone_missing'"):
        registry = Registry.of([gone, REFERENCE], FusionConfig())
    assert set(registry.backends) == {"reference"}
    assert registry.failures[0].reason.code == "import"
    for config in (FusionConfig(strict=True), FusionConfig(order=(name,))):
        with pytest.raises(BackendError, match="fusion_gone_missing"):
            _quietly([gone, REFERENCE], config)


def test_a_distribution_of_an_importer_of_its_own_need_not_be_hashable(monkeypatch: Any) -> None:
    point = plugin(monkeypatch, "acme", fusion_strategies=no_strategies)
    vars(point)["dist"] = Kernels("2.0")
    with pytest.raises(TypeError, match="unhashable"):
        hash(point.dist)
    assert _quietly([point], FusionConfig()).backends["acme"].distribution == "acme-kernels 2.0"


@pytest.mark.parametrize("turn", [1, -1])
def test_an_entry_point_that_takes_the_name_of_an_in_tree_backend_is_left_out_and_the_backend_stays(
    monkeypatch: Any, turn: int
) -> None:
    (installed,) = (point for point in entry_points(group="fusion_core.backends") if point.name == "reference")
    imposter = EntryPoint("reference", plugin(monkeypatch, "imposter").value, "fusion_core.backends")
    points = [installed, imposter][::turn]
    with pytest.warns(RuntimeWarning, match="plugin_imposter .* takes the name of the in-tree backend 'reference'"):
        registry = Registry.of(points, FusionConfig())
    assert registry.backends["reference"].strategies
    assert "'reference' itself loads" in str(registry.failures[0])
    assert _quietly(points, FusionConfig(order=("reference",))).backends["reference"].strategies
    with pytest.raises(BackendError, match="takes the name"):
        _quietly(points, FusionConfig(strict=True))


def test_two_plugins_of_one_name_are_both_left_out_and_named(monkeypatch: Any) -> None:
    mine = plugin(monkeypatch, "imposter", fusion_strategies=no_strategies)
    imposter = EntryPoint("reference", mine.value, "fusion_core.backends")
    for points in ([REFERENCE, imposter], [imposter, REFERENCE]):
        registry = _quietly(points, FusionConfig())
        assert not registry.backends
        assert "taken by 2 entry points" in str(registry.failures[0])


def test_two_plugins_with_a_pattern_of_one_name_keep_the_first_by_name(monkeypatch: Any) -> None:
    points = [plugin(monkeypatch, name, fusion_patterns=lambda: [all_reduce_twice]) for name in ("bbb", "aaa")]
    registry = _quietly(points, FusionConfig())
    assert set(registry.backends) == {"aaa"}
    assert "defined by 'aaa' already" in str(registry.failures[0])


def test_a_plugin_brings_a_pattern_and_a_strategy_for_it(monkeypatch: Any) -> None:
    hooks = {
        "fusion_patterns": lambda: [all_reduce_twice],
        "fusion_strategies": lambda: [strategy(pattern="all_reduce_twice")],
    }
    registry = Registry.of([plugin(monkeypatch, "acme", **hooks)], FusionConfig())
    assert [s.name for s in registry.strategies("all_reduce_twice")] == ["acme.one"]


def test_an_unknown_backend_in_order_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(
        BackendError, match=r"order names backend 'flashinfr', which is not installed.*aiter.*reference"
    ):
        Registry.load(FusionConfig(order=("flashinfr",)))


def test_order_chooses_exactly_these_backends_in_this_order() -> None:
    assert tuple(Registry.load(FusionConfig(order=("reference", "aiter"))).backends) == ("reference", "aiter")
    assert tuple(Registry.load(FusionConfig(order=())).backends) == ()


def test_without_an_order_reference_comes_last(monkeypatch: Any) -> None:
    late = plugin(monkeypatch, "zeta", fusion_strategies=no_strategies)
    assert tuple(Registry.of([REFERENCE, late], FusionConfig()).backends) == ("zeta", "reference")


def test_a_failed_backend_that_order_leaves_out_is_no_warning(monkeypatch: Any) -> None:
    broken = plugin(monkeypatch, "acme", fusion_strategies=lambda: 1 / 0)
    registry = Registry.of([broken, REFERENCE], FusionConfig(order=("reference",)))
    assert registry.failures


def test_availability_is_asked_once_a_device_and_its_reasons_are_kept(monkeypatch: Any) -> None:
    asked = []

    def available(device: Device) -> list[Reason]:
        asked.append(device)
        return [Reason("device", f"device is {device}", "an npu")]

    registry = Registry.of([plugin(monkeypatch, "acme", fusion_available=available)], FusionConfig())
    for _ in range(2):
        assert [str(reason) for reason in registry.unavailable("acme", Device("cpu"))] == [
            "device is cpu, needs an npu"
        ]
    assert asked == [Device("cpu")]


def test_a_probe_that_raises_makes_its_own_backend_unavailable(monkeypatch: Any) -> None:
    registry = Registry.of(
        [plugin(monkeypatch, "acme", fusion_available=lambda device: 1 / 0), REFERENCE], FusionConfig()
    )
    assert "ZeroDivisionError" in str(registry.unavailable("acme", Device("cpu"))[0])
    assert registry.unavailable("reference", Device("cpu")) == ()


def test_a_report_reaches_every_plugin_and_one_that_raises_is_named(monkeypatch: Any) -> None:
    heard = []
    points = [
        plugin(monkeypatch, "aaa", fusion_report=lambda report: 1 / 0),
        plugin(monkeypatch, "bbb", fusion_report=lambda report: heard.append(report)),
    ]
    report = Report(sites=())
    with pytest.warns(RuntimeWarning, match="fusion_report of backend 'aaa' raised ZeroDivisionError"):
        Registry.of(points, FusionConfig()).notify(report)
    assert heard == [report]
    with pytest.raises(BackendError, match="'aaa'"):
        Registry.of(points, FusionConfig(strict=True)).notify(report)


def test_an_option_that_no_backend_has_is_an_error_that_lists_those_there_are(monkeypatch: Any) -> None:
    optional = [Strategy("all_reduce", f"acme.{option}", ran, option=option) for option in ("two", "one")]
    acme = plugin(monkeypatch, "acme", fusion_strategies=lambda: [*optional, strategy("acme.plain")])
    for misspelt in ("acme.three", "one", "other.one"):
        why = f"options names '{misspelt}', which .* has; the options are: acme.one, acme.two"
        with pytest.raises(BackendError, match=why):
            Registry.of([acme, REFERENCE], FusionConfig(options=("acme.one", misspelt)))
    with pytest.raises(BackendError, match="the options are: none"):
        Registry.of([REFERENCE], FusionConfig(options=("acme.one",)))
    Registry.of([acme, REFERENCE], FusionConfig(options=("acme.one",), order=("reference",)))


def test_an_option_of_a_backend_that_does_not_load_is_no_second_error(monkeypatch: Any) -> None:
    broken = plugin(monkeypatch, "acme", fusion_strategies=lambda: 1 / 0)
    with pytest.warns(RuntimeWarning, match="backend 'acme' not loaded"):
        registry = Registry.of([broken, REFERENCE], FusionConfig(options=("acme.one",)))
    assert set(registry.backends) == {"reference"}


def test_a_backend_says_what_it_holds_on_a_device(monkeypatch: Any) -> None:
    def status(device: Device) -> Any:
        yield Status(f"workspace on {device}", 2**20, "in use")

    registry = Registry.of([plugin(monkeypatch, "acme", fusion_status=status), REFERENCE], FusionConfig())
    assert registry.status("acme", Device("npu")) == (Status("workspace on npu", 2**20, "in use"),)
    assert registry.status("reference", Device("npu")) == ()


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (lambda device: 1 / 0, "ZeroDivisionError"),
        (lambda device: ["64 MiB"], "gave '64 MiB', needs Status objects"),
        (lambda device: [Status("workspace", 0.5, "in use")], "memory is 0.5, needs a whole number of bytes"),  # type: ignore[arg-type]
        (lambda device: [Status("workspace", -1, "in use")], "memory is -1, needs a whole number of bytes"),
        (lambda device: [Status("workspace", 0, None)], "state is None, needs text"),  # type: ignore[arg-type]
    ],
)
def test_a_backend_that_cannot_say_what_it_holds_is_named(monkeypatch: Any, held: Any, why: str) -> None:
    registry = Registry.of([plugin(monkeypatch, "acme", fusion_status=held)], FusionConfig())
    with pytest.raises(BackendError, match=f"fusion_status of 'acme' raised .*{why}"):
        registry.status("acme", Device("cpu"))


def test_vendor_backends_say_why_they_cannot_be_used_on_a_cpu() -> None:
    registry = Registry.load()
    assert "device is cpu, needs an NVIDIA GPU" in str(registry.unavailable("flashinfer", Device("cpu"))[0])
    assert registry.unavailable("aiter", Device("cpu"))


def test_a_hook_of_another_name_a_wrapper_and_an_optional_hook_are_called(monkeypatch: Any) -> None:
    def wrapped() -> Any:
        return [*(yield), [strategy("acme.two")]]

    point = plugin(
        monkeypatch,
        "acme",
        declared=hookimpl(specname="fusion_strategies")(lambda: [strategy()]),
        around=hookimpl(wrapper=True, specname="fusion_strategies")(wrapped),
        later=hookimpl(optionalhook=True, specname="fusion_of_a_later_release")(lambda: None),
    )
    registry = Registry.of([point], FusionConfig())
    assert {each.name for each in registry.backends["acme"].strategies} == {"acme.one", "acme.two"}


def test_ctrl_c_while_a_plugin_loads_is_no_failure_of_the_plugin(monkeypatch: Any) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Registry.of([plugin(monkeypatch, "acme", fusion_strategies=interrupted)], FusionConfig())
