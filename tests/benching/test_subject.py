import sys

import pytest
import torch
import torch.distributed as dist

from fusion_core import ConfigError
from fusion_core.bench.shapes import SHAPES, named
from fusion_core.bench.subject import BATCHES, Function, NamedShape, parse_batches, subject

SOURCE = """
def plain(): return abs, (-1,)
def batched(batch): return abs, (-batch,)
def defaulted(*, batch=4, **rest): return abs, (-batch,), {}
def more(batch, size): ...
def hidden(batch, /): ...
def swallowed(**kwargs): return abs, (kwargs,)
def wrong(batch): return abs
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    (tmp_path / "user_app.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield lambda name, batches=None: Function(f"{tmp_path}/user_app.py:{name}", batches)
    for name in [name for name in sys.modules if name.startswith(("user_app", "_user_app"))]:
        del sys.modules[name]


def test_a_function_is_called_for_every_batch_size_if_it_takes_one(app):
    assert app("plain").batches == (None,)
    assert app("swallowed").batches == (None,)
    assert app("batched").batches == BATCHES
    assert app("defaulted", [2, 3]).batches == (2, 3)
    assert app("plain").call(None).args == (-1,)
    assert app("batched").call(3).args == (-3,)
    assert app("defaulted").call(5).args == (-5,)


@pytest.mark.parametrize(
    ("name", "batches", "says"),
    [
        ("more", None, "takes size, needs no argument, or batch alone"),
        ("hidden", None, "takes batch, needs no argument"),
        ("plain", [1], "takes no batch, needs a parameter of this name"),
        ("gone", None, "has no 'gone'"),
    ],
)
def test_functions_that_cannot_be_used(app, name, batches, says):
    with pytest.raises(ConfigError, match=says):
        app(name, batches)


def test_what_a_function_returns_is_checked(app):
    with pytest.raises(ConfigError, match=r"wrong returned builtin_function_or_method, needs \(model, args\)"):
        app("wrong").call(1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((None, None, None, None), "found neither MODULE:FUNCTION nor --shape, needs one"),
        (("a.py:f", "tiny", None, None), "found both MODULE:FUNCTION and --shape"),
        (("a.py:f", None, 2, None), "--layers is given with MODULE:FUNCTION, needs --shape"),
        (("a.py:f", None, None, 64), "--context is given with MODULE:FUNCTION"),
        ((None, "llama-3-71b", None, None), "'llama-3-71b', needs one of llama-3-8b, llama-3-70b, "),
    ],
)
def test_wrong_arguments(given, says):
    with pytest.raises(ConfigError, match=says):
        subject(*given, None)


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "a", "1,1", "1,01", "1.5", "1 2"])
def test_batches_that_are_none(text):
    with pytest.raises(ConfigError, match="needs different whole numbers"):
        parse_batches(text)


def test_batches():
    assert parse_batches(None) is None
    assert parse_batches(" 1, 32,8") == (1, 32, 8)


def test_a_shape_must_split_evenly():
    assert named("qwen3-32b", 8) is SHAPES["qwen3-32b"]
    with pytest.raises(ConfigError, match="llama-3-8b has 32 heads, 8 key-value heads, 14336 MLP columns for 3 ranks"):
        named("llama-3-8b", 3)
    with pytest.raises(ConfigError, match="llama-3-70b has 8 key-value heads for 16 ranks, needs a number of ranks"):
        named("llama-3-70b", 16)


def test_every_shape_splits_over_common_numbers_of_ranks_and_says_whose_it_is():
    for shape in SHAPES.values():
        assert not any(shape.indivisible(ranks) for ranks in (2, 4))
        assert shape.source


@pytest.mark.usefixtures("one_rank")
def test_a_shape_has_one_stack_for_all_batch_sizes():
    made = subject(None, "tiny", 1, 16, [2, 3])
    assert isinstance(made, NamedShape)
    calls = [made.call(batch) for batch in made.batches]
    assert calls[0].model is calls[1].model
    assert [call.args[0].shape for call in calls] == [torch.Size([2, 256]), torch.Size([3, 256])]
    assert str(made) == "tiny, 1 layer, context 16"
    assert dist.get_world_size() == 1
