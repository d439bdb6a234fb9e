"""What a user chooses, in code or by environment variables; bad values are errors that say what is valid."""

import re
from typing import Any

import pytest

from fusion_core import ConfigError, FusionConfig, Registry


def test_the_environment_sets_defaults_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_CORE_ORDER", "acme, reference")
    monkeypatch.setenv("FUSION_CORE_STRICT", "yes")
    monkeypatch.setenv("FUSION_CORE_NUMERICS", "deterministic")
    monkeypatch.setenv("FUSION_CORE_LIMIT", "3")
    monkeypatch.setenv("FUSION_CORE_MAX_TOKENS", "2048")
    monkeypatch.setenv("FUSION_CORE_OPTIONS", "acme.fast, acme.overlap")
    assert FusionConfig() == FusionConfig(
        ("acme", "reference"), True, "deterministic", 3, 2048, ("acme.fast", "acme.overlap")
    )
    assert FusionConfig(strict=False, limit=None).strict is False
    assert FusionConfig(limit=None).limit is None


def test_the_environment_is_read_when_a_config_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FusionConfig().order is None
    monkeypatch.setenv("FUSION_CORE_ORDER", "none")
    assert FusionConfig().order == ()
    monkeypatch.setenv("FUSION_CORE_ORDER", "")
    assert FusionConfig().order is None


@pytest.mark.parametrize("text", ["0", "false", "no", "off", "False"])
def test_a_word_for_no_is_no(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FUSION_CORE_STRICT", text)
    assert FusionConfig().strict is False


@pytest.mark.parametrize(
    ("name", "text", "valid"),
    [
        ("STRICT", "maybe", "one of 1, true, yes, on, 0, false, no, off"),
        ("NUMERICS", "fast", "one of default, deterministic"),
        ("LIMIT", "few", "a whole number, 0 or more"),
        ("LIMIT", "-1", "a whole number, 0 or more"),
        ("MAX_TOKENS", "0", "a whole number, 1 or more"),
        ("ORDER", "acme,,reference", "names of backends separated by commas"),
        ("OPTIONS", "acme.fast,", "options of backends separated by commas, each as <backend>.<option>"),
    ],
)
def test_a_malformed_variable_is_an_error_that_lists_what_is_valid(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, valid: str
) -> None:
    monkeypatch.setenv(f"FUSION_CORE_{name}", text)
    with pytest.raises(ConfigError, match=re.escape(f"FUSION_CORE_{name} is {text!r}, needs {valid}")):
        FusionConfig()


def test_a_misspelt_variable_is_an_error_that_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_CORE_ODER", "reference")
    with pytest.raises(ConfigError, match=r"FUSION_CORE_ODER, needs names among .*FUSION_CORE_ORDER"):
        Registry.load()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"order": "acme"}, "order is 'acme', needs a tuple of backend names"),
        ({"order": (1,)}, "needs a tuple of backend names"),
        ({"order": ("a", "b", "a")}, "order names a twice"),
        ({"strict": 1}, "strict is 1, needs True or False"),
        ({"merge": None}, "merge is None, needs True or False"),
        ({"numerics": "fast"}, "numerics is 'fast', needs one of default, deterministic"),
        ({"limit": -1}, "limit is -1, needs a whole number of at least 0"),
        ({"limit": True}, "limit is True"),
        ({"max_tokens": 0}, "max_tokens is 0, needs a whole number of at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"options": "acme.fast"}, "options is 'acme.fast', needs a tuple of names, each as '<backend>.<option>'"),
        ({"options": (1,)}, "options is (1,), needs a tuple of names"),
        ({"options": None}, "options is None, needs a tuple of names"),
        ({"options": ("a.b", "c.d", "a.b")}, "options names a.b twice, needs each option once"),
    ],
)
def test_a_bad_argument_is_an_error_that_says_what_is_needed(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        FusionConfig(**given)


def test_a_list_serves_as_an_order_and_the_config_can_be_a_key() -> None:
    config = FusionConfig(order=["reference"], options=["acme.fast"])  # type: ignore[arg-type]
    assert config.order == ("reference",)
    assert {config: 1}[FusionConfig(order=("reference",), options=("acme.fast",))] == 1


def test_a_config_as_plain_json_types() -> None:
    assert FusionConfig(order=("a",), limit=2).to_dict() == {
        "order": ["a"],
        "strict": False,
        "numerics": "default",
        "limit": 2,
        "max_tokens": None,
        "options": [],
        "merge": False,
        "table": None,
        "reports": 256,
    }
