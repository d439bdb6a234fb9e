import json
from importlib.metadata import EntryPoint

import pytest

from fusion_core import registry


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
    assert answer.keys() == {"device", "order", "backends", "failures", "config"}
    assert answer["order"] == [backend["name"] for backend in answer["backends"]]
    reference = answer["backends"][-1]
    assert reference.keys() == {"name", "distribution", "strategies", "usable", "reasons"}
    assert reference["name"] == "reference"
    assert reference["usable"] is True
    assert reference["reasons"] == []
    assert reference["strategies"] > 0
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
