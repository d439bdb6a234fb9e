"""The rows of `tests.faults.plugins`: the source of each plugin and the expected verdict."""

from __future__ import annotations

import textwrap

from tests.faults.fault import Fault


def _row(
    name: str, fault: str, expected: str, source: str, then: str = "load", called: str = "broken", slow: bool = False
) -> Fault:
    return Fault("plugins", name, fault, expected, {"source": source, "then": then, "called": called}, slow)


def _hook(hook: str, body: str, arguments: str = "") -> str:
    return f"@hookimpl\ndef {hook}({arguments}):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"


def _strategies(body: str) -> str:
    return _hook("fusion_strategies", body)


def _declared(fields: str, before: str = "") -> str:
    """A plugin with one correct strategy, except for some fields."""
    given = "pattern=ADD, name='broken.add', impl=opaque, outputs=OUTPUTS"
    return f"{before}\n{_strategies(f'return [Strategy(**{{**dict({given}), **dict({fields})}})]')}"


def _required(unmet: str, more: str = "", fields: str = "requires=(Rule(),)") -> str:
    """A plugin with one strategy and a requirement of its own class."""
    rule = (
        f"class Rule:\n    def __repr__(self): return 'a rule'\n    def unmet(self, site):\n        {unmet}\n{more}\n"
    )
    return _declared(fields, rule)


def _kernel(fake: str, body: str = "return opaque(x, residual, weight, eps, group)", fields: str = "") -> str:
    """A plugin with one operator of its own."""
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


MUTE = "class Mute(Exception):\n    def __str__(self): sys.exit(3)\n"
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
    _row("fake: raises late", "the operator's fake raises the second time", "right", _kernel(f"if len(calls) > 1: raise ValueError('late')\n    {FAKE}"), "compile"),
    _row("fake: exits late", "the operator's fake ends the process the second time", "right", _kernel(f"if len(calls) > 1: sys.exit(3)\n    {FAKE}"), "compile"),
)  # fmt: skip


def _wrapped(body: str, mark: str = "wrapper=True", hook: str = "fusion_strategies", arguments: str = "") -> str:
    """A correct plugin with a wrapper around one of its hooks."""
    return f"{_declared('')}\n@hookimpl({mark}, specname='{hook}')\ndef around({arguments}):\n{textwrap.indent(body, '    ')}\n"


WRAPPERS = (
    _row("wrapper: old, legal", "a wrapper of pluggy's older form", "right", _wrapped("yield", "hookwrapper=True"), "compile"),
    _row("wrapper: drops, legal", "a wrapper leaves out one of two answers", "right", _wrapped("return (yield)[:1]") + "\n@hookimpl(specname='fusion_strategies', trylast=True)\ndef more(): return [Strategy(ADD, 'broken.more', opaque, outputs=OUTPUTS)]\n", "compile"),
    _row("wrapper: first and last, legal", "tryfirst and trylast", "right", _declared("").replace("@hookimpl", "@hookimpl(tryfirst=True)") + "\n@hookimpl(specname='fusion_strategies', trylast=True)\ndef more(): return []\n", "compile"),
    _row("wrapper: None", "a wrapper forgets to hand on", "refused: a wrapper of fusion_strategies gave None, needs a list.*", _wrapped("yield")),
    _row("wrapper: nothing left", "a wrapper drops every answer", f"refused: {TEXT}", _wrapped("yield\nreturn []")),
    _row("wrapper: exits", "a wrapper ends the process behind the hook", "refused: SystemExit: 5", _wrapped("yield\nsys.exit(5)")),
    _row("wrapper: never yields", "a wrapper does not call on", "refused: .*", _wrapped("return []\nyield")),
    _row("wrapper: twice", "a wrapper yields twice", "refused: RuntimeError: .*second yield.*", _wrapped("yield\nyield")),
    _row("wrapper: no generator", "a wrapper that is a plain function", "refused: .*generator.*", _wrapped("return []")),
    _row("wrapper: available", "a wrapper around the probe raises", "unfused: fusion_available of 'broken' raised OSError: gone", _wrapped("raise OSError('gone')\nyield", hook="fusion_available", arguments="device") + _hook("fusion_available", "return []", "device"), "compile"),
    _row("wrapper: specname misspelt", "specname lacks a letter", "refused: unknown hook 'fusion_strategie'.*did you mean 'fusion_strategies'\\?", _declared("").replace("@hookimpl", "@hookimpl(specname='fusion_strategie')")),
    _row("wrapper: no prefix", "a hook lacks its prefix", "refused: unknown hook 'strategies'.*did you mean 'fusion_strategies'\\?", _hook("strategies", "return []")),
)  # fmt: skip

PATTERN = """
from fusion_core.patterns.definition import pattern
from fusion_core.vocabulary import all_reduce
def acme(x: torch.Tensor, *, group: str) -> torch.Tensor:
    return all_reduce(x, group)
"""
NAMES = (
    _row("name: the plugin", "the entry point's name would clear the terminal", "refused: the entry point's name is .*x1b.*, needs text of printable characters", _declared(""), called="broken\x1b[2J"),
    _row("name: a pattern", "a pattern's name has a bell", "refused: the name of a pattern is 'acme.x07', needs text of printable characters", PATTERN + "acme.__name__ = 'acme\\x07'\n" + _hook("fusion_patterns", "return [pattern(outputs=('reduced',))(acme)]")),
    _row("name: an output", "the name of a pattern's output has a line", "refused: an output of pattern 'acme' is .*, needs text of printable characters", PATTERN + _hook("fusion_patterns", "return [pattern(outputs=('re\\nduced',))(acme)]")),
    _row("name: a dialect", "a dialect's name turns the text round", "refused: the name of a dialect is .*u202e.*, needs text of printable characters", "from fusion_core import Dialect\n" + _hook("fusion_dialects", "return [Dialect('acme\\u202e', {})]")),
    _row("name: an option", "an option's name has a null byte", "refused: strategy 'broken.add' has option .*x00.*, needs a word.*", _declared("option='fast\\x00'")),
    _row("name: untested", "the words on hardware have an escape", "refused: strategy 'broken.add' has untested .*, needs a sentence of printable characters or None", _declared("untested='no \\x1b[2J'")),
    _row("name: a requirement", "the words of a requirement have a line", "refused: strategy 'broken.add' has .* among requires, needs printable characters", _required("return None").replace("return 'a rule'", "return 'a\\nrule'")),
    _row("name: an error's text", "the text of an error would clear the terminal", r"refused: ValueError: no .x1b\[2J", "raise ValueError('no \\x1b[2J')"),
    _row("name: a reason's text", "a reason of a requirement is no text", "unfused: requirement 'a rule' raised BackendError: found of a Reason is torch.float32, needs text.*", _required("return Reason('dtype', torch.float32)"), "compile"),
)  # fmt: skip


def _dialect(operand: str, more: str = "", needs: str = "") -> str:
    """A correct plugin with a dialect that reads one operator of the graph."""
    return f"""{_declared("")}
from fusion_core import Check, Derived, Dialect, Reading
def fails(given): raise ValueError('no')
def exits(given): sys.exit(3)
def true(given): return True
READING = Reading('add', {{'x': {operand}, 'residual': 'self'}}, {{'dtype': None}}, ('sum',){needs})
""" + _hook("fusion_dialects", f"return [Dialect('acme', {{'aten::rsqrt': READING}}{more})]")


SAID = "unfused: .*; said: fusion_core: dialect 'acme': reading of aten"
KEY = "right:; said: fusion_core: state of dialect 'acme' raised {}; graphs are compiled anew instead of taken from the cache"
DIALECTS = (
    _row("dialect: an operand raises", "a function of a reading raises", f"{SAID}.* raised ValueError: no", _dialect("Derived(fails, 'self')"), "compile"),
    _row("dialect: an operand exits", "a function of a reading ends the process", f"{SAID}.* raised SystemExit: 3", _dialect("Derived(exits, 'self')"), "compile"),
    _row("dialect: a condition raises", "a condition of a reading raises", f"{SAID}.* raised ValueError: no", _dialect("'self'", needs=", needs=(Check(fails, 'self'),)"), "compile"),
    _row("dialect: a condition gives True", "a condition gives no reason", f"{SAID}.* gave True, needs a Reason or None", _dialect("'self'", needs=", needs=(Check(true, 'self'),)"), "compile"),
    _row("dialect: an operator without", "a reading names what its operator lacks", f"{SAID}.* uses its argument 'nope'.*", _dialect("'nope'"), "compile"),
    _row("dialect: its state raises", "what the readings hang on cannot be told", KEY.format("ZeroDivisionError: division by zero"), _dialect("'self'", ", state=lambda: 1 / 0").replace("aten::rsqrt", "aten::sinh"), "key"),
    _row("dialect: its state exits", "what the readings hang on ends the process", KEY.format("SystemExit: 3"), _dialect("'self'", ", state=lambda: sys.exit(3)").replace("aten::rsqrt", "aten::sinh"), "key"),
)  # fmt: skip

RUNNING = (
    _row("run: raises", "the kernel raises when it runs in a graph", "error: ValueError: kernel.*", _kernel(FAKE, "raise ValueError('kernel')"), "compile"),
    _row("run: raises at a count", "the kernel that the token count picks raises", f"error: ValueError: kernel {NOTED}", _kernel(FAKE, "raise ValueError('kernel')", ", requires=(Tokens(most=64),)"), "dynamic"),
    _row("run: exits at a count", "the kernel that the token count picks ends the process", f"error: SystemExit: 3 {NOTED}", _kernel(FAKE, "sys.exit(3)", ", requires=(Tokens(most=64),)"), "dynamic"),
    _row("run: raises in an eager function", "the kernel raises in fusion_core.ops", r"error: ValueError: kernel fusion_core ran broken\.add at fusion_core.ops.all_reduce_add_rms_norm of .* FUSION_CORE_ORDER=none uses none", _kernel(FAKE, "raise ValueError('kernel')"), "eager"),
    _row("run: exits in an eager function", "the kernel ends the process in fusion_core.ops", f"error: SystemExit: 3 {NOTED}", _kernel(FAKE, "sys.exit(3)"), "eager"),
    _row("run: raises in whole Inductor", "the kernel raises in a compiled graph", "error: ValueError: kernel.*", _kernel(FAKE, "raise ValueError('kernel')"), "whole"),
    _row("run: raises on both ranks", "the kernel raises in a compiled graph on each rank", f"error: ValueError: kernel {NOTED}", _kernel(FAKE, "raise ValueError('kernel')"), "ranks", slow=True),
    _row("run: legal", "a kernel that is right", "right", _kernel(FAKE), "whole"),
    _row("again: a requirement", "a requirement raises in each of three compilations", "right:; said: [^;]*a rule[^;]*", _required("1 / 0"), "again"),
    _row("again: fusion_report", "fusion_report raises in each of three compilations", "right:; said: [^;]*fusion_report[^;]*", _declared("") + _hook("fusion_report", "raise ValueError('late')", "report"), "again"),
    _row("text: a requirement's raises late", "the words of a requirement raise once it is loaded", "right: .*an object of type Rule.*", _required("return None").replace("return 'a rule'", "calls.append(1); return 'a rule' if len(calls) < 3 else sys.exit(3)").replace("class Rule", "calls = []\nclass Rule", 1), "support"),
    _row("text: a requirement's raises in the key", "the same in the key of the compile cache", "right", _required("return None").replace("return 'a rule'", "calls.append(1); return 'a rule' if len(calls) < 3 else sys.exit(3)").replace("class Rule", "calls = []\nclass Rule", 1), "key"),
    _row("text: an error's and a requirement's", "both texts end the process", "unfused: requirement 'an object of type Rule' raised Mute: its text cannot be had.*", MUTE + _required("raise Mute").replace("return 'a rule'", "calls.append(1); return 'a rule' if len(calls) < 3 else sys.exit(3)").replace("class Rule", "calls = []\nclass Rule", 1), "compile"),
    _row("requirement: unhashable", "a requirement has no hash, and is equal to nothing", "right", _required("return None", "    __hash__ = None\n    def __eq__(self, other): raise ValueError"), "whole"),
)  # fmt: skip
