"""JSON that another process or a person wrote."""

import json
from typing import Any

import pytest
import torch

from fusion_core import Reason
from fusion_core._json.shapes import each, listed, names_with, text, text_or_none
from fusion_core._json.values import decode_scalar, encode_scalar, parse
from fusion_core.agree.agreement import reason_of


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice in an object"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
    ],
)
def test_what_is_no_json_by_the_standard_is_refused_where_a_person_wrote_it(document: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(document, strict=True)
    parse(document)  # Python's own writer gives it


@pytest.mark.parametrize("document", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_cannot_be_read_is_one_kind_of_error(document: bytes) -> None:
    for strict in (False, True):
        with pytest.raises(ValueError):  # noqa: PT011  # the words are Python's
            parse(document, strict=strict)


@pytest.mark.parametrize("value", [None, True, 3, 1e-6, "swizzled", torch.float8_e4m3fn])
def test_a_scalar_comes_back_as_it_was(value: Any) -> None:
    again = decode_scalar(json.loads(json.dumps(encode_scalar(value))))
    assert again == value
    assert type(again) is type(value)


def test_a_tensor_is_no_scalar() -> None:
    with pytest.raises(TypeError, match="needs a number, text, a dtype or None"):
        encode_scalar(torch.zeros(1))


@pytest.mark.parametrize(
    "given",
    [
        None,
        "text",
        {"code": "c"},
        {"code": 3, "found": "f"},
        {"code": "c", "found": "f", "arg": 3},
        {"code": "c", "found": "f", "other": "o"},
    ],
)
def test_a_reason_of_another_shape_is_a_reason_that_says_so(given: Any) -> None:
    assert reason_of(json.dumps(given).encode()).found == "a rank gave a reason that cannot be read"
    reason = Reason("c", "found", "needs", hint="hint")
    assert reason_of(json.dumps(reason.to_dict()).encode()) == reason


def test_a_shape_says_what_is_wrong_and_where() -> None:
    shape = names_with(names=listed(text_or_none), more=each(text))
    assert shape({"names": ["a", None], "more": {"b": "c"}, "other": 1}) == ""
    assert shape([]) == "is list, needs names with values"
    assert shape({"names": []}) == "more is missing"
    assert shape({"names": [1], "more": {}}) == "names is int, needs text"
    assert shape({"names": [], "more": {"b": 2}}) == "more b: is int, needs text"
    assert listed(text, text)(["a"]) == "has 1 values, needs 2"
