"""What is private to torch is used in `fusion_core/_torch/` alone.

The linter bans the modules that it knows by name (`pyproject.toml`). What it cannot see is here: names that begin with
an underscore and are not the file's own, as attributes of any value or as text for `getattr`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fusion_core", "backends", "examples")
EXEMPT = {
    "backends/reference/fusion_reference/symm_mem.py": "torch's symmetric memory",
    "backends/aiter/fusion_aiter/creation.py": "AITER's gloo group, its communicator's inside",
    "backends/aiter/fusion_aiter/library.py": "AITER's own count of its buffers",
    "backends/flashinfer/fusion_flashinfer/workspaces.py": "the inside of FlashInfer's workspace",
    "examples/bench_step.py": "a model as users write them",
    "examples/hugging_face.py": "transformers' switch to compile generation on a CPU",
    "examples/huggingface/static_cache.py": "transformers' switch to compile generation on a CPU",
    "examples/huggingface/continuous_batching.py": "a setting of Dynamo that has no other name",
    "examples/recognised_models.py": "models as users write them",
    "examples/third_party_backend/model.py": "a model as users write them",
    "examples/shared_memory_backend/model.py": "a model as users write them",
}
OTHERS = {"os._exit", "inspect._ParameterKind"}
"""Names of Python's own."""


def _files() -> list[Path]:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return [file for file in files if not _name(file).startswith("fusion_core/_torch/") and _name(file) not in EXEMPT]


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def private_uses(text: str) -> Iterator[tuple[int, str]]:
    """Line and words of each use of a private name that the text does not define."""
    tree = ast.parse(text)
    own = set(_defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                path = f"{module}.{alias.name}".strip(".")
                if path.startswith("torch.") and any(map(_is_private, path.split("."))):
                    yield node.lineno, f"import of {path}"
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            words = ast.unparse(node)
            if words not in OTHERS and not _is_operator(node):
                yield node.lineno, words
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(str(name.value)) and name.value not in own:
                yield node.lineno, ast.unparse(node)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_operator(node: ast.Attribute) -> bool:
    """Whether an attribute names an operator or its namespace, as graphs have it: ``torch.ops._c10d_functional``."""
    words = ast.unparse(node)
    return words.startswith(("torch.ops.", "aten."))


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
                if isinstance(target, ast.Name):
                    yield target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            yield node.attr


def test_private_torch_is_used_in_one_folder() -> None:
    files = _files()
    assert len(files) > 150
    found = [f"{_name(file)}:{line}: {words}" for file in files for line, words in private_uses(file.read_text())]
    assert not found, "use it in fusion_core/_torch/, behind a function of its own:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._C._cuda_getCurrentRawStream(0)",
        "import torch.distributed as dist\ndist.distributed_c10d._world",
        "from torch._subclasses import FakeTensorMode",
        "from torch.utils import _pytree",
        "import torch._dynamo",
        "def name(node):\n    return node.target._schema.name",
        "schema = getattr(function, '_schema', None)",
    ],
)
def test_each_kind_of_use_is_found(text: str) -> None:
    assert list(private_uses(text))


def test_an_exempt_file_has_a_reason_for_it() -> None:
    for name in EXEMPT:
        assert list(private_uses((ROOT / name).read_text())), f"{name} uses nothing private any more"
