import json
from importlib.metadata import EntryPoint

import pytest

from fusion_core import BackendError, Reason, Status
from fusion_core.plugins import registry
from tests.support.graphs import plugin


@pytest.fixture
def broken_backend(monkeypatch):
    points = [*registry.entry_points(group=registry.GROUP), EntryPoint("sad", "no_such_module", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


def test_text(run):
    text = run("backends").stdout
    assert "backends on cpu, in the order in which they are tried" in text
    assert [line.split()[0] for line in text.splitlines() if "fusion-core 0" in line][-1] == "reference"
    assert "needs an NVIDIA GPU" in text


def test_json(run):
    answer = json.loads(run("backends", "--json").stdout)
    assert answer.keys() == {"device", "order", "backends", "failures", "status", "config"}
    assert answer["order"] == [backend["name"] for backend in answer["backends"]]
    reference = answer["backends"][-1]
    assert reference.keys() == {"name", "distribution", "strategies", "variants", "usable", "reasons"}
    assert reference["name"] == "reference"
    assert reference["usable"] is True
    assert reference["reasons"] == []
    assert 0 < reference["strategies"] < reference["variants"]
    flashinfer = next(backend for backend in answer["backends"] if backend["name"] == "flashinfer")
    assert flashinfer["usable"] is False
    assert {reason["code"] for reason in flashinfer["reasons"]} >= {"device"}


def test_order(run):
    assert json.loads(run("backends", "--order", "reference, aiter", "--json").stdout)["order"] == [
        "reference",
        "aiter",
    ]
    assert "no backend is in use" in run("backends", "--order", "none").stdout


@pytest.mark.parametrize(
    ("order", "says"),
    [("nope", "'nope', which is not installed"), ("a,,b", "--order is 'a,,b'"), ("aiter,aiter", "twice")],
)
def test_an_order_that_cannot_be_used(run, order, says):
    assert says in run("backends", "--order", order, status=2).stderr


@pytest.mark.usefixtures("broken_backend")
def test_a_backend_that_fails_to_load_hides_no_other(run):
    text = run("backends").stdout
    assert "backend 'sad' not loaded: ModuleNotFoundError" in text
    assert "reference" in text
    answer = json.loads(run("backends", "--json").stdout)
    assert [failure["backend"] for failure in answer["failures"]] == ["sad"]
    assert answer["failures"][0]["reason"]["code"] == "import"


@pytest.mark.usefixtures("broken_backend")
def test_strict(run):
    assert "'sad' not loaded" in run("backends", "--strict", status=2).stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [("reference.fast", "'reference.fast', which no strategy"), ("a.b,,c.d", "--options is 'a.b,,c.d', needs options")],
)
def test_options_that_cannot_be_used(run, options, says):
    assert says in run("backends", "--options", options, status=2).stderr


def test_options_reach_the_configuration(run, monkeypatch):
    seen = []

    def refuse(config):
        seen.append(config.options)
        raise BackendError("seen")

    monkeypatch.setattr(registry.Registry, "load", refuse)
    run("backends", "--options", "acme.fast, acme.overlap", status=2)
    assert seen == [("acme.fast", "acme.overlap")]


@pytest.fixture
def backends_that_hold(monkeypatch):
    """One that holds memory, one that cannot say, one that cannot be used here and must not be asked."""
    held = [Status("workspace of group 0", 3 * 2**19, "in use"), Status("workspace of group 1", 0, "no memory is left")]
    points = [
        plugin(monkeypatch, "acme", fusion_status=lambda device: held),
        plugin(monkeypatch, "bad", fusion_status=lambda device: 1 / 0),
        plugin(
            monkeypatch,
            "absent",
            fusion_available=lambda device: [Reason("driver", "found no driver", "one")],
            fusion_status=lambda device: [Status("workspace of nobody", 0, "in use")],
        ),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


@pytest.mark.usefixtures("backends_that_hold")
def test_what_backends_hold(run):
    text = run("backends").stdout
    rows = [" ".join(line.split()) for line in text.split("device memory")[1].splitlines() if line]
    assert rows == [
        "backend subject MiB state",
        "acme workspace of group 0 1.5 in use",
        "acme workspace of group 1 0.0 no memory is left",
        "bad ? fusion_status of 'bad' raised ZeroDivisionError: division by zero",
    ]
    answer = json.loads(run("backends", "--json").stdout)["status"]
    assert answer[0] == {
        "backend": "acme",
        "subject": "workspace of group 0",
        "memory": 3 * 2**19,
        "state": "in use",
    }
    assert [(row["backend"], row["memory"]) for row in answer] == [("acme", 3 * 2**19), ("acme", 0), ("bad", None)]


def test_backends_that_hold_nothing_have_no_section(run):
    assert "device memory" not in run("backends").stdout
