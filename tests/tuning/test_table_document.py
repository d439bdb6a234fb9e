"""What a file must hold to be a table: anything else is refused with its place."""

import copy
import json
import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fusion_core import ConfigError
from fusion_core.tables import UNFUSED, Table, TableError
from tests.tuning.made import BARE, FOLDER, point, table

# what is no table


def document() -> dict[str, Any]:
    return json.loads((FOLDER / "h200x4.json").read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    """The document with what stands at ``path``, like ``rows/0/us``, replaced by ``value``."""
    whole = found = document()
    *steps, last = [int(step) if step.isdecimal() else step for step in path.split("/")]
    for step in steps:
        found = found[step]
    found[last] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema is 2, needs 1; fusion-core tune writes a table in that form"),
        ("schema", True, "schema is True, needs a whole number"),
        ("schema", 1.0, "schema is 1.0, needs a whole number"),
        ("machine", [], r"machine is \[\], needs an object with gpu, arch"),
        ("machine/gpu", "", "machine.gpu is '', needs text of 1 to 1000 printable characters"),
        ("machine/gpu", 5, "machine.gpu is 5, needs text"),
        ("machine/arch", None, "machine.arch is None, needs text"),
        ("machine/links", "a\x1b[2J", r"machine.links is 'a\\x1b\[2J', needs text"),
        ("machine/driver", "9" * 1001, "machine.driver is '9+...9+', needs text"),
        ("machine/world_size", 0, "machine.world_size is 0, needs a whole number from 1 to"),
        ("machine/world_size", 2.0, "machine.world_size is 2.0, needs a whole number"),
        ("machine/versions", ["torch"], r"machine.versions is \['torch'\], needs an object"),
        ("machine/versions", {"torch": 2.11}, "machine.versions.torch is 2.11, needs text"),
        ("machine/versions", {5: "2.11"}, "machine.versions has the key 5, needs an object"),
        ("machine/versions", {"": "2.11"}, "machine.versions has the key '', needs an object"),
        ("rows/3/us/acme.\x1b[2J", 5.0, r"rows\[3\].us has the key 'acme.\\x1b\[2J', needs an object"),
        ("machine/host", "here", "machine has the key 'host', needs an object with gpu, arch"),
        ("made", "yesterday", "made is 'yesterday', needs an ISO time in UTC"),
        ("made", "2026-11-22T10:00:00", "needs an ISO time in UTC"),
        ("made", "2026-11-22T10:00:00+01:00", "needs an ISO time in UTC"),
        ("made", 5, "made is 5, needs an ISO time in UTC"),
        ("command", None, "command is None, needs text"),
        ("comment", "mine", "the table has the key 'comment', needs an object with schema, machine"),
        ("rows", {}, r"rows is \{\}, needs a list"),
        ("rows/3", 7, r"rows\[3\] is 7, needs an object with pattern, dtype"),
        ("rows/3", {"pattern": "a"}, r"rows\[3\] has no dtype, hidden, tokens, us, needs an object"),
        ("rows/3/tokns", 5, r"rows\[3\] has the key 'tokns', needs an object"),
        ("rows/3/pattern", "", r"rows\[3\].pattern is '', needs text"),
        ("rows/3/dtype", "bf16", r"rows\[3\].dtype is 'bf16', needs one of bfloat16, float16"),
        ("rows/3/dtype", ["bfloat16"], r"rows\[3\].dtype is \['bfloat16'\], needs one of"),
        ("rows/3/hidden", -8192, r"rows\[3\].hidden is -8192, needs a whole number"),
        ("rows/3/tokens", True, r"rows\[3\].tokens is True, needs a whole number"),
        ("rows/3/tokens", "64", r"rows\[3\].tokens is '64', needs a whole number"),
        ("rows/3/tokens", 2**31, r"rows\[3\].tokens is 2147483648, needs a whole number"),
        pytest.param("rows/3/tokens", 10**5000, r"rows\[3\].tokens is of type int, needs a whole number", id="huge"),
        ("rows/3/us", 5.0, r"rows\[3\].us is 5.0, needs an object"),
        ("rows/3/us", {}, r"rows\[3\].us has \[\], needs 'unfused' too"),
        ("rows/3/us", {BARE: 5.0}, r"rows\[3\].us has \['flashinfer.all_reduce'\], needs 'unfused' too"),
        (
            "rows/3/us/fused",
            5.0,
            r"rows\[3\].us has 'fused', needs 'unfused', 'unfused <operator>', or the name of a strategy",
        ),
        (
            "rows/3/us/acme.",
            5.0,
            r"rows\[3\].us has 'acme.', needs 'unfused', 'unfused <operator>', or the name of a strategy",
        ),
        ("rows/3/us/unfused", True, r"rows\[3\].us.unfused is True, needs microseconds, a number from 0.001 to 1e\+09"),
        ("rows/3/us/unfused", "5", r"rows\[3\].us.unfused is '5', needs microseconds"),
        ("rows/3/us/unfused", 0, r"rows\[3\].us.unfused is 0, needs microseconds"),
        ("rows/3/us/unfused", -5.0, r"rows\[3\].us.unfused is -5.0, needs microseconds"),
        ("rows/3/us/unfused", math.nan, r"rows\[3\].us.unfused is nan, needs microseconds"),
        ("rows/3/us/acme.a", math.inf, r"rows\[3\].us.acme.a is inf, needs microseconds"),
        ("rows/3/us/unfused", 10**400, r"rows\[3\].us.unfused is 1000+...0+, needs microseconds"),
        ("rows/3/tokens", 32, r"rows\[3\] measures .* a second time, needs each point once"),
        ("rows/3/hidden", 4096, r"have tokens \[1, 8, 32, 64, 128, 256, ...\] at only one of hidden 8192 and 4096"),
    ],
)
def test_what_is_no_table_is_refused_with_the_place_what_is_there_and_what_must_be(
    path: str, value: Any, message: str
) -> None:
    with pytest.raises(TableError, match=message):
        Table.from_dict(changed(path, value))


@pytest.mark.parametrize("name", ["schema", "machine", "made", "command", "rows"])
def test_a_part_that_is_missing_is_named(name: str) -> None:
    measured = document()
    del measured[name]
    with pytest.raises(TableError, match=f"the table has no {name}, needs an object with schema"):
        Table.from_dict(measured)


@pytest.mark.parametrize("value", [None, [], "table", 5, True])
def test_what_is_no_object_is_no_table(value: Any) -> None:
    with pytest.raises(TableError, match=r"the table is .*, needs an object"):
        Table.from_dict(value)


def test_a_table_that_is_made_in_python_is_checked_too() -> None:
    with pytest.raises(TableError, match=r"rows\[1\].us.acme.a is nan"):
        table(point(64, 1, 10), point(64, 2, 10, a=math.nan))
    with pytest.raises(ConfigError, match=r"rows\[1\] measures 'all_reduce, .*' a second time"):
        table(point(64, 1, 10), point(64, 1, 11))


def test_the_table_keeps_nothing_of_the_document() -> None:
    measured = document()
    made = Table.from_dict(measured)
    whole = copy.deepcopy(made.to_dict())
    measured["rows"][0]["us"][UNFUSED] = 1.0
    measured["machine"]["versions"]["torch"] = "9"
    assert made.to_dict() == whole


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([1, 8, 8192, UNFUSED]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_any_change_of_a_document_is_either_taken_as_it_is_or_refused(data: Any) -> None:
    whole: Any = document()
    for _ in range(data.draw(st.integers(1, 2))):
        parent, key, found = None, None, whole
        while isinstance(found, dict | list) and found and (parent is None or data.draw(st.booleans())):
            parent, key = (
                found,
                data.draw(st.sampled_from(sorted(found) if isinstance(found, dict) else range(len(found)))),
            )
            found = found[key]
        if parent is None:
            break
        change = data.draw(st.sampled_from(["replace", "delete", "copy", "add"]))
        if change == "delete":
            del parent[key]
        elif change == "copy" and isinstance(parent, list):
            parent.append(copy.deepcopy(found))
        elif change == "add" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8))] = data.draw(JSON)
        else:
            parent[key] = data.draw(JSON)
    try:
        loaded = Table.from_dict(whole)
    except TableError as error:
        str(error).encode()  # raises where the message cannot be printed
        return
    assert loaded.to_dict() == whole
    assert loaded.fingerprint
