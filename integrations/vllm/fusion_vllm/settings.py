"""A `FusionConfig` from the fields that a user gives to vLLM as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fusion_core import ConfigError, FusionConfig

NAME = "fusion_core"
"""The key of ``additional_config``."""


def config_of(given: object) -> FusionConfig:
    """The configuration that a mapping of field names describes.

    Raises:
        ConfigError: for anything else, a name that is no field, or a wrong value.
    """
    names = [field.name for field in fields(FusionConfig)]
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"additional_config[{NAME!r}] is {given!r}, needs an object with any of the fields {', '.join(names)}; "
            "{} for the defaults"
        )
    if unknown := [name for name in given if name not in names]:
        found = ", ".join(map(repr, unknown))
        raise ConfigError(f"additional_config[{NAME!r}] has {found}, needs names among {', '.join(names)}")
    return FusionConfig(**given)


def given_in(vllm_config: Any) -> Mapping[str, Any] | None:
    """The fields that a configuration of vLLM has for fusion_core; None if it does not switch fusion on."""
    additional = getattr(vllm_config, "additional_config", None)
    return additional.get(NAME) if isinstance(additional, Mapping) else None
