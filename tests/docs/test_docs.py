"""The documentation shows what the code does: hooks, requirements, included code, examples, links.

``python tests/docs/test_docs.py`` renews the code that pages include and the tables that they print; with ``models``,
that of docs/models.md as well, which takes some ten minutes. `tests/models/test_families.py` compares that one.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fusion_core
from fusion_core import Requirement
from fusion_core.plugins import hookspecs, known_faster, requirements, size_requirements, token_counts
from fusion_core.testing import CHECKS
from tests.test_requirements import CASES

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
EXAMPLE = ROOT / "examples" / "third_party_backend"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", *(ROOT / "examples").glob("*/README.md")])
HOOKS = [function for name, function in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("fusion_")]
REQUIREMENTS = [
    kind
    for module in (requirements, size_requirements, known_faster, token_counts)
    for name, kind in inspect.getmembers(module, inspect.isclass)
    if kind.__module__ == module.__name__ and hasattr(kind, "unmet") and kind is not Requirement
]

INCLUDE = re.compile(r"(<!-- include: (\S+) -->\n```(\w+)\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
MODEL_TABLE = re.compile(r"(<!-- models -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CHECK_TABLE = re.compile(r"(<!-- checks -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# ---- headings


def head(named: Any) -> str:
    """A function's or class's name and signature, as a heading shows it."""
    signature = str(inspect.signature(named)).replace("'", "")
    return f"### {named.__name__}{signature.removesuffix(' -> None') if inspect.isclass(named) else signature}"


def lacking_heads(page: str, named: Iterable[Any]) -> list[str]:
    lines = page.splitlines()
    return [head(each) for each in named if head(each) not in lines]


# ---- tests of hooks


def hooks_in_tests(source: str) -> set[str]:
    """Names of hooks that a test function gives to a plugin: ``plugin(..., fusion_x=...)`` or ``{"fusion_x": ...}``."""
    found: set[str] = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or not function.name.startswith("test_"):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                found |= {keyword.arg for keyword in node.keywords if keyword.arg}
            elif isinstance(node, ast.Dict):
                found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return found


# ---- included code


def included(reference: str, folder: Path) -> str:
    """The text of ``path``, or of the top-level definition ``name`` in ``path#name``."""
    path, _, name = reference.partition("#")
    text = read(folder / path)
    if not name:
        return text
    for node in ast.parse(text).body:
        names = {getattr(node, "name", None)} | {getattr(target, "id", None) for target in getattr(node, "targets", ())}
        if name in names:
            start = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            return "".join(text.splitlines(keepends=True)[start - 1 : node.end_lineno])
    raise LookupError(f"{path} has no top-level definition {name!r}")


def renewed(page: str, folder: Path) -> str:
    """The page with everything that is taken from elsewhere as it is there now."""
    page = INCLUDE.sub(lambda found: found[1] + included(found[2], folder) + found[5], page)
    return CHECK_TABLE.sub(lambda found: found[1] + check_table() + found[3], page)


def check_table() -> str:
    rows = [f"| `test_{check.name}` | {check.title} |" for check in CHECKS]
    return "\n".join(["", "| test | promise |", "| --- | --- |", *rows, "", ""])


def model_table() -> str:
    command = [sys.executable, str(ROOT / "examples" / "recognised_models.py")]
    return "\n" + subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout + "\n"


# ---- examples


def code_blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def page_examples(page: str, name: str) -> doctest.DocTest:
    """All blocks of a page with ``>>>`` as one session."""
    session = "\n\n".join(block for block in code_blocks(page) if ">>> " in block)
    return doctest.DocTestParser().get_doctest(session, {"__name__": "__main__"}, name, name, 0)


def public_modules() -> Iterator[ModuleType]:
    yield fusion_core
    for found in pkgutil.walk_packages(fusion_core.__path__, "fusion_core."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            yield importlib.import_module(found.name)


def failures_of(example: doctest.DocTest) -> str:
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    return "".join(said)


# ---- links


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    page = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}


def broken_links(page: str, path: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", prose, re.MULTILINE):
        target, _, wanted = "".join(link).partition("#")
        if "://" in target:
            continue
        file = path.parent / target if target else path
        if not file.exists() or (wanted and wanted not in anchors(page if file == path else read(file))):
            broken.append("".join(link))
    return broken


# ---- the checks


def test_every_hook_has_a_heading_with_its_exact_signature() -> None:
    assert len(HOOKS) >= 5
    assert lacking_heads(read(DOCS / "hooks.md"), HOOKS) == []


def test_every_hook_has_a_test_that_implements_it() -> None:
    tested = set().union(*(hooks_in_tests(read(path)) for path in (ROOT / "tests").rglob("test_*.py")))
    assert {hook.__name__ for hook in HOOKS} - tested == set()


def test_every_requirement_is_public_documented_and_tested() -> None:
    assert len(REQUIREMENTS) >= 11
    assert [kind for kind in REQUIREMENTS if getattr(fusion_core, kind.__name__, None) is not kind] == []
    page = read(DOCS / "requirements.md")
    assert lacking_heads(page, REQUIREMENTS) == []
    asked = {kind for kind in REQUIREMENTS if f">>> requirement = {kind.__name__}(" in page}
    assert set(REQUIREMENTS) - asked == set()  # the page prints a message of each, and the doctest below runs it
    assert set(REQUIREMENTS) - {type(case[0]) for case in CASES} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_takes_from_elsewhere_is_as_it_is_there(path: Path) -> None:
    assert read(path) == renewed(read(path), path.parent), f"stale: run python {Path(__file__).relative_to(ROOT)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(path: Path) -> None:
    assert broken_links(read(path), path) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_of_a_page_run(path: Path) -> None:
    assert failures_of(page_examples(read(path), path.name)) == ""


def test_every_example_in_a_public_docstring_runs() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [each for module in public_modules() for each in finder.find(module, module.__name__) if each.examples]
    assert len(examples) >= 8
    assert "".join(map(failures_of, examples)) == ""


def test_the_example_is_small_and_uses_installed_packages_alone() -> None:
    plugin = read(EXAMPLE / "fusion_acme" / "__init__.py")
    assert len(plugin.splitlines()) <= 40
    assert read(EXAMPLE / "tests" / "test_conformance.py").splitlines() == [
        "from fusion_core.testing.conformance import *  # noqa: F403",
        "",
        'BACKEND = "acme"',
    ]
    for path in EXAMPLE.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (tests|backends)\b", read(path), re.MULTILINE), path


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in re.findall(r"\]\((docs/[^)]+)\)", read(ROOT / "README.md"))}
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} - linked == set()


# ---- each check can fail


def fusion_new(device: fusion_core.Device, depth: int) -> Iterable[str]:
    return []


class NewRequirement:
    def __init__(self, arg: str, *sizes: int) -> None: ...


def test_a_lacking_or_changed_heading_is_found() -> None:
    wanted = "### fusion_new(device: fusion_core.site.Device, depth: int) -> collections.abc.Iterable[str]"
    assert lacking_heads(wanted, [fusion_new]) == []
    assert lacking_heads(wanted.replace(", depth: int", ""), [fusion_new]) == [wanted]
    assert lacking_heads("### NewRequirement(arg: str)", [NewRequirement]) == [
        "### NewRequirement(arg: str, *sizes: int)"
    ]


def test_a_hook_without_a_test_is_found() -> None:
    assert hooks_in_tests("def test_one(): plugin('acme', fusion_new=list)") >= {"fusion_new"}
    assert hooks_in_tests("def test_one():\n    hooks = {'fusion_new': list}") >= {"fusion_new"}
    assert "fusion_new" not in hooks_in_tests("def helper(): plugin('acme', fusion_new=list)")
    assert "fusion_new" not in hooks_in_tests("def test_fusion_new():\n    'fusion_new'")


def test_stale_code_is_found(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("ONE = 1\n\n\n@marked\ndef two():\n    return 2\n", encoding="utf-8")
    page = "<!-- include: code.py#two -->\n```python\n@marked\ndef two():\n    return 2\n```\n"
    assert renewed(page, tmp_path) == page
    assert renewed(page.replace("return 2", "return 3"), tmp_path) == page
    assert included("code.py#ONE", tmp_path) == "ONE = 1\n"
    with pytest.raises(LookupError, match="no top-level definition 'three'"):
        renewed(page.replace("#two", "#three"), tmp_path)
    table = "<!-- checks -->\nold\n<!-- end -->"
    assert renewed(table, tmp_path) != table


def test_an_example_that_does_not_run_is_found() -> None:
    good = "```python\n>>> one = 1\n```\n\ntext\n\n```python\n>>> one + 1\n2\n```\n"
    assert failures_of(page_examples(good, "good")) == ""
    assert "Expected:\n    3" in failures_of(page_examples(good.replace("\n2\n", "\n3\n"), "bad"))


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n### run(x: int) -> None\n", encoding="utf-8")
    links = "[a](page.md) [b](page.md#a-page) [c](page.md#runx-int---none) [d](https://example.org)\n\n[e]: page.md\n"
    assert broken_links(links, tmp_path / "other.md") == []
    broken = "[a](gone.md) [b](page.md#gone)\n\n[e]: gone.md\n"
    assert broken_links(broken, tmp_path / "other.md") == ["gone.md", "page.md#gone", "gone.md"]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(read(page), page.parent), encoding="utf-8")
    if "models" in sys.argv:
        table = model_table()
        page = DOCS / "models.md"
        page.write_text(MODEL_TABLE.sub(lambda found: found[1] + table + found[3], read(page)), encoding="utf-8")
    sys.exit(0)
