"""Which distributions count as a plugin's libraries: those that its metadata asks for, as pip reads it."""

import pytest

from fusion_core.plugins import sources

LINES = {
    "acme": [
        "Acme.Kernels>=2; python_version >= '3'",
        "acme-windows; sys_platform == 'no such system'",
        "acme-fast[all] (>=1,<2) ; extra == 'fast'",
        "acme-slow ; extra == 'slow' and python_version >= '3'",
        "torch>=2.11",
        "no requirement at all",
    ],
    "fusion-core": ["torch>=2.11", "pluggy>=1.7"],
}


@pytest.fixture(autouse=True)
def _metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "requires", LINES.__getitem__)
    monkeypatch.setattr(sources, "version_of", lambda name: f"1.0 of {name}")


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("acme", ["acme-kernels"]),
        ("fast", ["acme-fast", "acme-kernels"]),
        ("slow", ["acme-kernels", "acme-slow"]),
    ],
)
def test_a_requirement_counts_where_its_marker_holds(backend: str, names: list[str]) -> None:
    """Those of fusion_core itself are in every key already."""
    assert sources.libraries("acme 0.1", backend) == {name: f"1.0 of {name}" for name in names}
