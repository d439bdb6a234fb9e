"""What an import brings along: neither Inductor nor any vendor's library."""

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import fusion_core",
        "import fusion_core; fusion_core.Registry.load()",
        "import fusion_core; r = fusion_core.Registry.load(); [r.unavailable(b, fusion_core.Device.here()) for b in r.backends]",
    ],
    ids=["import", "list backends", "ask what can be used"],
)
def test_no_kernel_library_and_no_compiler_comes_along(statement: str) -> None:
    brought = modules_after(statement)
    assert "fusion_core" in brought
    assert brought.isdisjoint({"flashinfer", "aiter", "torch._inductor.compile_fx", "torch._dynamo", "triton"})


def test_the_check_above_can_fail() -> None:
    assert "torch._inductor.compile_fx" in modules_after("import torch._inductor.compile_fx")


def test_every_public_name_is_there() -> None:
    import fusion_core

    assert fusion_core.__all__ == sorted(fusion_core.__all__)
    for name in fusion_core.__all__:
        assert getattr(fusion_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        fusion_core.fuse  # noqa: B018
