"""Plugins that are broken, each alone beside the reference backend: at loading, in a compilation, when they run."""

from __future__ import annotations

import importlib
import sys
import textwrap
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion_core
from fusion_core import FusionConfig, Registry
from tests.faults.fault import Fault
from tests.support.graphs import REFERENCE, fuse
from tests.test_matching import norm, reduce, tensors

FIXTURES = ("tmp_path", "monkeypatch", "one_rank")

PRELUDE = """
import sys
import torch
from fusion_core import Reason, Strategy, Tokens, hookimpl
from tests.test_emission import opaque
from tests.test_matching import ADD
OUTPUTS = ("normed", "residual_out")
"""
"""What the source of each plugin begins with; `opaque` is a kernel that is right."""


def observe(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_rank: str, then: str = "load") -> str:
    """Load a plugin of this source, and go on to a compilation or a call where ``then`` says so."""
    (tmp_path / "broken_plugin.py").write_text(PRELUDE + textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    sys.modules.pop("broken_plugin", None)
    point = EntryPoint("broken", "broken_plugin", "fusion_core.backends")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        registry = Registry.of([REFERENCE, point], FusionConfig())
        assert registry.backends["reference"].strategies
        failures = [str(failure.reason) for failure in registry.failures]
        if failures:
            assert len(warned) == len(failures)
            return f"refused: {'; '.join(failures)}"
        verdict = {
            "load": lambda registry: "right",
            "compile": compiled,
            "dynamic": dynamic,
            "report": reported,
            "status": status,
        }[then](registry)
    said = "; ".join(str(each.message) for each in warned if "fusion_core" in str(each.message))
    return f"{verdict.replace('right', 'right:')}; said: {said}" if said else verdict


def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    return norm(total, w), total


def dynamic(registry: Registry) -> str:
    """The same in a graph for any number of tokens."""
    return compiled(registry, True)


def compiled(registry: Registry, dynamic: bool = False) -> str:
    """What became of the plugin's strategies in a compilation, and of the numbers."""
    given = tensors()
    try:
        with torch._dynamo.config.patch(specialize_float=True):
            fused = fuse(model, *given, using=registry, dynamic=dynamic)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # what a kernel raises is handed on, with a note
        return f"error: {type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"
    for found, wanted in zip(fused.results, model(*given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    if fused.site.strategy and fused.site.strategy.startswith("broken."):
        return "right"
    own = [decision for decision in fused.site.decisions if (decision.strategy or "").startswith("broken.")]
    reasons = [str(reason) for decision in own for reason in decision.reasons]
    return f"unfused: {'; '.join(reasons) or 'nothing is said'}"


def reported(registry: Registry) -> str:
    registry.notify(fusion_core.Report(sites=()))
    return "right"


def status(registry: Registry) -> str:
    try:
        registry.status("broken", fusion_core.Device("cpu"))
    except fusion_core.BackendError as error:
        return f"error: BackendError: {error}"
    return "right"


def _row(name: str, fault: str, expected: str, source: str, then: str = "load") -> Fault:
    return Fault("plugins", name, fault, expected, {"source": source, "then": then})


def _hook(hook: str, body: str, arguments: str = "") -> str:
    return f"@hookimpl\ndef {hook}({arguments}):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"


def _strategies(body: str) -> str:
    return _hook("fusion_strategies", body)


def _declared(fields: str, before: str = "") -> str:
    """A plugin of one strategy that is right, but for some fields."""
    given = "pattern=ADD, name='broken.add', impl=opaque, outputs=OUTPUTS"
    return f"{before}\n{_strategies(f'return [Strategy(**{{**dict({given}), **dict({fields})}})]')}"


def _required(unmet: str, more: str = "", fields: str = "requires=(Rule(),)") -> str:
    """A plugin of one strategy whose requirement is of its own making."""
    rule = (
        f"class Rule:\n    def __repr__(self): return 'a rule'\n    def unmet(self, site):\n        {unmet}\n{more}\n"
    )
    return _declared(fields, rule)


def _kernel(fake: str, body: str = "return opaque(x, residual, weight, eps, group)", fields: str = "") -> str:
    """A plugin of one operator of its own."""
    operator = f"""
library = torch.library.Library("broken_plugin", "FRAGMENT")
name = f"kernel_{{len(dir(torch.ops.broken_plugin))}}"
library.define(name + "(Tensor x, Tensor residual, Tensor weight, float eps, str group) -> (Tensor, Tensor)")
calls = []

def kernel(x, residual, weight, eps, group):
    {body}

def fake(x, residual, weight, eps, group):
    calls.append(1)
    {fake}

library.impl(name, kernel, "CompositeExplicitAutograd")
torch.library.register_fake("broken_plugin::" + name, fake, lib=library)
operator = getattr(torch.ops.broken_plugin, name).default
"""
    return _declared(f"impl=operator{fields}", operator)


FAKE = "return torch.empty_like(x), torch.empty_like(x)"
NOTED = r".*fusion_core ran broken\.add at .* FUSION_CORE_ORDER=none uses none"
TEXT = "fusion_strategies gave .*, needs several Strategy objects, as a list"

IMPORT = (
    _row("import: an error", "the module raises", "refused: RuntimeError: no", "raise RuntimeError('no')"),
    _row("import: sys.exit", "the module ends the process", "refused: SystemExit: 7", "sys.exit(7)"),
    _row("import: a bare BaseException", "the module raises what no handler of errors takes", "refused: BaseException", "raise BaseException"),
    _row("import: GeneratorExit", "the module raises GeneratorExit", "refused: GeneratorExit", "raise GeneratorExit"),
    _row("import: a missing library", "the module imports what is not there", "refused: ModuleNotFoundError: .*acme_kernels.*", "import acme_kernels"),
    _row("import: syntax", "the module does not parse", "refused: SyntaxError: .*", "def ("),
    _row("import: an error without text", "the text of the error raises", "refused: Mute: its text cannot be had, as its __str__ raises", "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute"),
    _row("import: an error whose text exits", "the text of the error ends the process", "refused: Mute: its text cannot be had.*", "class Mute(Exception):\n    def __str__(self): sys.exit(3)\nraise Mute"),
    _row("import: a text of several lines", "the error has lines", "refused: ValueError: a b", "raise ValueError('a\\n   b')"),
    _row("import: recursion", "the module calls itself for ever", "refused: RecursionError: .*", "def again(): again()\nagain()"),
    _row("import: no memory", "the module asks for too much", "refused: MemoryError.*", "raise MemoryError"),
    _row("import: no hook", "the module has nothing for us", "refused: broken_plugin implements no hook, needs .*", "x = 1"),
)  # fmt: skip

HOOKS = (
    _row("hook: an error", "the hook raises", "refused: ZeroDivisionError: .*", _strategies("return 1 / 0")),
    _row("hook: sys.exit", "the hook ends the process", "refused: SystemExit: 4", _strategies("sys.exit(4)")),
    _row("hook: None", "the hook forgets its return", TEXT.join(("refused: ", "")), _strategies("[Strategy(ADD, 'broken.add', opaque)]")),
    _row("hook: a number", "the hook gives a number", f"refused: {TEXT}", _strategies("return 7")),
    _row("hook: a text", "the hook gives a text", f"refused: {TEXT}", _strategies("return 'broken.add'")),
    _row("hook: one strategy", "the hook gives a strategy and no list", f"refused: {TEXT}", _strategies("return Strategy(ADD, 'broken.add', opaque)")),
    _row("hook: other objects", "the hook gives texts", "refused: fusion_strategies gave 'a', needs Strategy objects", _strategies("return ['a']")),
    _row("hook: an object without a text", "the hook gives what has no repr", "refused: fusion_strategies gave an object of type Odd, needs Strategy objects", "class Odd:\n    def __repr__(self): raise ValueError\n" + _strategies("return [Odd()]")),
    _row("hook: half-way", "a generator raises behind its first strategy", "refused: OSError: gone", _strategies("yield Strategy(ADD, 'broken.add', opaque)\nraise OSError('gone')")),
    _row("hook: misspelt", "a hook's name lacks a letter", "refused: unknown hook 'fusion_strategy'.*did you mean 'fusion_strategies'\\?", _hook("fusion_strategy", "return []")),
    _row("hook: unknown", "a hook of no release", "refused: unknown hook 'fusion_zzz', needs one of [^?]*", _hook("fusion_zzz", "return []")),
    _row("hook: no mark", "a function has a hook's name and no mark", "refused: fusion_strategies is not marked, needs @fusion_core.hookimpl.*", "def fusion_strategies():\n    return []"),
    _row("hook: another project's mark", "the mark is of another plugin system", "refused: fusion_strategies is not marked.*", "import pluggy\n@pluggy.HookimplMarker('other')\ndef fusion_strategies():\n    return []"),
    _row("hook: an argument", "the hook takes what it is not given", "refused: .*'word'.*", _hook("fusion_strategies", "return []", "word")),
    _row("hook: another name, legal", "specname names the hook", "right", _declared("").replace("@hookimpl\ndef fusion_strategies", "@hookimpl(specname='fusion_strategies')\ndef mine"), "compile"),
    _row("hook: a wrapper, legal", "a wrapper stands around the hook", "right", _declared("") + "\n@hookimpl(wrapper=True, specname='fusion_strategies')\ndef around():\n    return (yield)\n", "compile"),
    _row("hook: optional, legal", "an optional hook of a later release", "right", _declared("") + "\n@hookimpl(optionalhook=True)\ndef fusion_later():\n    return []\n", "compile"),
    _row("hook: a wrapper that raises", "a wrapper raises before the hook", "refused: ValueError: around", _declared("") + "\n@hookimpl(wrapper=True, specname='fusion_strategies')\ndef around():\n    raise ValueError('around')\n    yield\n"),
    _row("hook: patterns", "fusion_patterns gives texts", "refused: fusion_patterns gave 'a', needs Pattern objects", _hook("fusion_patterns", "return ['a']")),
    _row("hook: dialects", "fusion_dialects ends the process", "refused: SystemExit: 5", _hook("fusion_dialects", "sys.exit(5)")),
    _row("hook: available exits", "the probe ends the process", "unfused: fusion_available of 'broken' raised SystemExit: 6", _declared("") + _hook("fusion_available", "sys.exit(6)", "device"), "compile"),
    _row("hook: available gives text", "the probe gives no reasons", "unfused: fusion_available of 'broken' raised BackendError: fusion_available gave 'no', needs Reason objects", _declared("") + _hook("fusion_available", "return ['no']", "device"), "compile"),
    _row("hook: available gives a flag", "the probe gives True", "unfused: fusion_available .* gave True, needs several Reason objects, as a list", _declared("") + _hook("fusion_available", "return True", "device"), "compile"),
    _row("hook: report raises", "fusion_report raises", "right:; said: fusion_core: fusion_report of backend 'broken' raised ValueError: late", _declared("") + _hook("fusion_report", "raise ValueError('late')", "report"), "report"),
    _row("hook: report exits", "fusion_report ends the process", "right:; said: fusion_core: fusion_report of backend 'broken' raised SystemExit: 8", _declared("") + _hook("fusion_report", "sys.exit(8)", "report"), "report"),
    _row("hook: status exits", "fusion_status ends the process", "error: BackendError: fusion_status of 'broken' raised SystemExit: 9", _declared("") + _hook("fusion_status", "sys.exit(9)", "device"), "status"),
    _row("hook: status gives text", "fusion_status gives texts", "error: BackendError: fusion_status of 'broken' raised .*needs Status objects", _declared("") + _hook("fusion_status", "return ['held']", "device"), "status"),
)  # fmt: skip

FIELDS = (
    _row("field: a name with an escape", "a name would clear the terminal", r"refused: the name of a strategy is .*, needs text of printable characters", _declared(r"name='broken.\x1b[2J'")),
    _row("field: a name with a line", "a name has two lines", r"refused: the name of a strategy is .*, needs text of printable characters", _declared(r"name='broken.a\nb'")),
    _row("field: a name that is none", "a name is a number", "refused: the name of a strategy is 7, needs .*", _declared("name=7")),
    _row("field: another's name", "a strategy has another backend's name", "refused: strategy 'reference.add' of backend 'broken' is misnamed.*", _declared("name='reference.add'")),
    _row("field: no such pattern", "the pattern does not exist", "refused: strategy 'broken.add' is for pattern 'all_red', needs one of .*", _declared("pattern='all_red'")),
    _row("field: an impl that is none", "impl is a text", "refused: strategy 'broken.add' has impl 'opaque', needs something to call", _declared("impl='opaque'")),
    _row("field: outputs in one text", "outputs is a text", "refused: strategy 'broken.add' has outputs 'normed', needs a tuple of names or None", _declared("outputs='normed'")),
    _row("field: an output too many", "the pattern has no such output", r"refused: strategy 'broken.add' has outputs \['other'\].*", _declared("outputs=('other',)")),
    _row("field: a rank in words", "rank is a text", "refused: strategy 'broken.add' has rank 'first', needs a whole number", _declared("rank='first'")),
    _row("field: an option of two words", "option is no word", "refused: strategy 'broken.add' has option 'a b', needs a word.*", _declared("option='a b'")),
    _row("field: batch_invariant in words", "batch_invariant is a text", "refused: strategy 'broken.add' has batch_invariant 'no', needs True or False", _declared("batch_invariant='no'")),
    _row("field: requires without a tuple", "requires is one requirement", "refused: strategy 'broken.add' has requires .*, needs a tuple of requirements", _declared("requires=Tokens(most=4)")),
    _row("field: a text for a requirement", "requires has a text", "refused: strategy 'broken.add' has 'bfloat16' among requires, needs requirements.*", _declared("requires=('bfloat16',)")),
    _row("field: a class for a requirement", "requires has a class", "refused: .* among requires, needs requirements.*", _declared("requires=(Tokens,)")),
    _row("field: a requirement without text", "the text of a requirement raises", "refused: strategy 'broken.add': Rule among requires raised ValueError when asked for its text", _required("return None").replace("return 'a rule'", "raise ValueError")),
    _row("field: limits that exclude all", "Tokens has no count", "refused: Tokens has no count that is .*", _declared("requires=(Tokens(most=4, least=5),)")),
)  # fmt: skip

COMPILING = (
    _row("requirement: raises", "a requirement raises", "unfused: requirement 'a rule' raised ZeroDivisionError: .*; said: fusion_core: broken.add: .*", _required("1 / 0"), "compile"),
    _row("requirement: exits", "a requirement ends the process", "unfused: requirement 'a rule' raised SystemExit: 3.*; said: .*", _required("sys.exit(3)"), "compile"),
    _row("requirement: False", "a requirement answers False", "unfused: requirement 'a rule' gave bool 'False', needs a Reason or None at any site; said: .*", _required("return False"), "compile"),
    _row("requirement: True", "a requirement answers True", "unfused: requirement 'a rule' gave bool 'True', needs a Reason or None at any site; said: .*", _required("return True"), "compile"),
    _row("requirement: a text", "a requirement answers a text", "unfused: requirement 'a rule' gave str 'too small', needs a Reason or None at any site; said: .*", _required("return 'too small'"), "compile"),
    _row("requirement: an error without text", "the text of what it raises raises", "unfused: requirement 'a rule' raised Mute.*", "class Mute(Exception):\n    def __str__(self): raise ValueError\n" + _required("raise Mute"), "compile"),
    _row("requirement: a measured range raises", "worthwhile raises", "unfused: requirement 'a rule' raised KeyError: 'x'.*; said: .*", _required("raise KeyError('x')", fields="worthwhile=(Rule(),)"), "compile"),
    _row("requirement: changes_at raises", "a requirement cannot say at which counts it changes", "unfused: changes_at of requirement 'a rule' raised ValueError: when, needs token counts or None; said: .*", _required("return Reason('t', 't') if site.tokens == 3 else None", "    def changes_at(self, site): raise ValueError('when')"), "dynamic"),
    _row("requirement: changes_at gives text", "a requirement says in words at which counts it changes", "unfused: changes_at of requirement 'a rule' gave .*, needs token counts or None; said: .*", _required("return Reason('t', 't') if site.tokens == 3 else None", "    def changes_at(self, site): return ['three']"), "dynamic"),
    _row("requirement: legal", "a requirement that refuses", "unfused: too small, needs more", _required("return Reason('small', 'too small', 'more')"), "compile"),
    _row("impl: raises", "the function raises when traced", "unfused: tracing broken.add raised ValueError: no, needs an impl that runs on fake tensors", _declared("impl=impl", "def impl(x, residual, weight, eps, *, group): raise ValueError('no')"), "compile"),
    _row("impl: exits", "the function ends the process when traced", "unfused: tracing broken.add raised SystemExit: 2, .*", _declared("impl=impl", "def impl(x, residual, weight, eps, *, group): sys.exit(2)"), "compile"),
    _row("impl: an error without text", "the text of what it raises raises", "unfused: tracing broken.add raised Mute: its text cannot be had.*", _declared("impl=impl", "class Mute(Exception):\n    def __str__(self): raise ValueError\ndef impl(x, residual, weight, eps, *, group): raise Mute"), "compile"),
    _row("impl: too few results", "the function gives one of two", "unfused: tracing broken.add raised ValueError: .*", _declared("impl=impl", "def impl(x, residual, weight, eps, *, group): return (x,)"), "compile"),
    _row("impl: no tensors", "the function gives numbers", "unfused: .*", _declared("impl=impl", "def impl(x, residual, weight, eps, *, group): return 1, 2"), "compile"),
    _row("impl: another shape", "the function gives rows too few", "unfused: .*", _declared("impl=impl", "def impl(x, residual, weight, eps, *, group): return x[:1], residual"), "compile"),
    _row("impl: data", "the function looks at data", "unfused: tracing broken.add raised .*", _declared("impl=impl", "def impl(x, residual, weight, eps, *, group):\n    return (x, residual) if x.sum().item() > 0 else (residual, x)"), "compile"),
    _row("fake: raises", "the operator's fake raises", "unfused: tracing broken.add raised .*", _kernel("raise ValueError('fake')"), "compile"),
    _row("fake: raises late", "the operator's fake raises the second time", "unfused: placing broken.add raised .*", _kernel(f"if len(calls) > 1: raise ValueError('late')\n    {FAKE}"), "compile"),
    _row("fake: exits late", "the operator's fake ends the process the second time", "unfused: placing broken.add raised SystemExit: 3.*", _kernel(f"if len(calls) > 1: sys.exit(3)\n    {FAKE}"), "compile"),
    _row("run: raises", "the kernel raises when it runs in a graph", "error: ValueError: kernel.*", _kernel(FAKE, "raise ValueError('kernel')"), "compile"),
    _row("run: raises at a count", "the kernel that the token count picks raises", f"error: ValueError: kernel {NOTED}", _kernel(FAKE, "raise ValueError('kernel')", ", requires=(Tokens(most=64),)"), "dynamic"),
    _row("run: exits at a count", "the kernel that the token count picks ends the process", "error: SystemExit: 3.*", _kernel(FAKE, "sys.exit(3)", ", requires=(Tokens(most=64),)"), "dynamic"),
)  # fmt: skip

ROWS = (*IMPORT, *HOOKS, *FIELDS, *COMPILING)
