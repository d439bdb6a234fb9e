"""The rows of `tests.faults.command_line`."""

from __future__ import annotations

import re
from typing import Any

from tests.faults.fault import Fault

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
WRITABLE = "needs a file in a folder that exists and can be written"
MODEL = "import torch\ndef build():\n    return torch.nn.Linear(4, 4), (torch.ones(1, 4),)\n"


def _row(name: str, fault: str, status: int, says: str, slow: bool = False, **given: Any) -> Fault:
    """A row whose verdict is this status and one line on stderr that contains these words."""
    words = ".*".join(re.escape(part) for part in says.split(" ... "))
    return Fault("command_line", name, fault, rf"exit {status}: .*{words}.*", given, slow)


def _launched(name: str, fault: str, says: str, *args: str, **changes: str | None) -> Fault:
    """A call in torchrun's environment with these changes; None removes a variable."""
    variables = {key: value for key, value in {**LAUNCHED, **changes}.items() if value is not None}
    return _row(name, fault, 2, says, args=args or ("tune",), environment=variables)


CALLS = (
    _row("a command that there is not", "a misspelt command", 2, "No such command 'nope'", args=("nope",)),
    _row("no such option", "a misspelt option", 2, "--jsn", args=("backends", "--jsn")),
    _row("patterns: unknown", "an unknown name", 2, "'nope' is unknown, needs one of", args=("patterns", "nope")),
    _row("verify: unknown", "a backend that is not installed", 2, "nope", args=("verify", "nope")),
    _row(
        "verify: no such check",
        "a misspelt check",
        2,
        "--check is nope",
        args=("verify", "reference", "--check", "nope"),
    ),
    _row("demo: heads", "ranks that do not divide the heads", 2, "needs 2, 4 or 8", args=("demo", "--world-size", "3")),
    _row("bench: nothing", "no model", 2, "needs", args=("bench",)),
    _row("bench: one process", "no ranks", 2, "needs 2 or more; torchrun", args=("bench", "--shape", "tiny")),
    _row("tune: one process", "no ranks", 2, "needs 2 or more; torchrun", args=("tune",)),
    _row("tune: counts", "a range that goes down", 2, "--tokens is '8..4', needs", args=("tune", "--tokens", "8..4")),
    _row(
        "a setting",
        "a misspelt variable",
        2,
        "FUSION_CORE_ORDRE",
        args=("patterns",),
        environment={"FUSION_CORE_ORDRE": "x"},
    ),
    _row(
        "an order",
        "a backend that is not there",
        2,
        "'nope'",
        args=("demo",),
        environment={"FUSION_CORE_ORDER": "nope"},
    ),
)

CODE = (
    _row("explain: no function", "a name without a colon", 2, "names no function", args=("explain", "user")),
    _row("explain: no file", "a file that there is not", 2, "does not exist", args=("explain", "no.py:f")),
    _row("explain: a folder", "a folder instead of a file", 2, "cannot be imported", args=("explain", "{tmp}:f")),
    _row("explain: a null byte", "a name that no file has", 2, "needs", args=("explain", "a\0b.py:f")),
    _row("explain: no such name", "a misspelt function", 2, "has no 'f'", args=("explain", "u.py:f"), files={"u.py": "x = 1"}),
    _row("explain: no callable", "a number", 2, "needs a function", args=("explain", "u.py:x"), files={"u.py": "x = 1"}),
    _row("explain: syntax", "a file that is no Python", 2, "SyntaxError", args=("explain", "u.py:f"), files={"u.py": "(("}),
    _row(
        "explain: encoding", "a file that is not UTF-8", 2, "cannot be imported", args=("explain", "u.py:f"), files={"u.py": "é"}
    ),
    _row(
        "explain: the module raises", "an error at import", 2, "ValueError: no ... u.py:1",
        args=("explain", "u.py:f"), files={"u.py": "raise ValueError('no')"},
    ),
    _row(
        "explain: the module exits", "sys.exit(0) at import", 2, "SystemExit",
        args=("explain", "u.py:f"), files={"u.py": "raise SystemExit(0)"},
    ),
    _row(
        "explain: the function raises", "an error of the user's", 1, "own traceback: ValueError: no",
        args=("explain", "u.py:f"), files={"u.py": "def f():\n    raise ValueError('no')"},
    ),
    _row(
        "explain: the function exits", "sys.exit(0) in the function", 1, "own traceback: SystemExit: 0",
        args=("explain", "u.py:f"), files={"u.py": "def f():\n    raise SystemExit(0)"},
    ),
    _row(
        "explain: nothing is returned", "a function that forgets to return", 2, "returned NoneType, needs (model, args)",
        args=("explain", "u.py:f"), files={"u.py": "def f():\n    pass"},
    ),
)  # fmt: skip

PLACES = (
    *(
        _row(f"{args[0]} {args[-1]}: below a file", "a path below a file", 2, f"Not a directory), {WRITABLE}", args=(*args, f"{{tmp}}/file/{name}"), files={"file": "", "u.py": MODEL})
        for args, name in (
            (("explain", "u.py:build", "--html"), "r.html"),
            (("tune", "--output"), "t.json"),
        )
    ),
    _row("tune: /proc", "a file system without files", 2, f"--output is '/proc/t.json' ... {WRITABLE}", args=("tune", "--output", "/proc/t.json")),
    _row("tune: /sys", "a read-only file system", 2, f"--output is '/sys/t.json' ... {WRITABLE}", args=("tune", "--output", "/sys/t.json")),
    _row("tune: a plot below a file", "a path below a file", 2, "in a folder that does not exist", args=("tune", "--plot", "{tmp}/file/t.svg"), files={"file": ""}),
    _row("tune: a plot in /proc", "a file system without files", 2, f"--plot is '/proc/t.svg' ... {WRITABLE}", args=("tune", "--plot", "/proc/t.svg")),
    _row("bench: a plot in /proc", "a file system without files", 2, f"--plot is '/proc/t.svg' ... {WRITABLE}", args=("bench", "--shape", "tiny", "--plot", "/proc/t.svg")),
    _row("tune: a folder", "a folder as the file", 2, "', a folder, needs a file in a folder that exists and can be written", args=("tune", "--output", "{tmp}")),
    _row("tune: no folder", "a folder that there is not", 2, WRITABLE, args=("tune", "--output", "{tmp}/no/t.json")),
    _row("tune: a null byte", "a name that no file has", 2, "null byte", args=("tune", "--output", "a\0b")),
    _row("explain: /proc", "a file system without files", 2, WRITABLE, args=("explain", "u.py:build", "--html", "/proc/r.html"), files={"u.py": MODEL}),
    _row("tune: the cache is a file", "XDG_CACHE_HOME below a file", 2, "set XDG_CACHE_HOME to one", args=("tune",), files={"file": ""}, environment={"XDG_CACHE_HOME": "{tmp}/file/cache"}),
    _row("tune: the cache is /proc", "XDG_CACHE_HOME that takes no file", 2, "set XDG_CACHE_HOME to one", args=("tune",), environment={"XDG_CACHE_HOME": "/proc"}),
)  # fmt: skip

ENVIRONMENTS = (
    *(
        _launched(f"{args[0]}: WORLD_SIZE={value}", "no number of ranks", f"WORLD_SIZE is {value!r}, needs a whole number from 1 on", *args, WORLD_SIZE=value)
        for args, value in (
            (("tune",), "abc"), (("tune",), "0"), (("tune",), "-2"), (("tune",), ""), (("tune",), "2.0"),
            (("bench", "--shape", "tiny"), "abc"), (("explain", "json:dumps"), "abc"), (("explain", "json:dumps"), "0"),
        )
    ),
    _launched("RANK is past the end", "RANK=2 of 2", "RANK is '2', needs a whole number from 0 to 1", RANK="2"),
    _launched("RANK is no number", "RANK=first", "RANK is 'first', needs", RANK="first"),
    _launched("no RANK", "WORLD_SIZE alone", "WORLD_SIZE alone, needs RANK and WORLD_SIZE", RANK=None),
    _launched("no WORLD_SIZE", "RANK alone", "RANK alone, needs RANK and WORLD_SIZE", WORLD_SIZE=None),
    _launched("no MASTER_ADDR", "no address", "MASTER_ADDR is not set, needs", MASTER_ADDR=None),
    _launched("no address at all", "neither of the two", "MASTER_ADDR and MASTER_PORT are not set", MASTER_ADDR=None, MASTER_PORT=None),
    _launched("MASTER_PORT is a word", "MASTER_PORT=http", "MASTER_PORT is 'http', needs", MASTER_PORT="http"),
    _launched("MASTER_PORT is too large", "MASTER_PORT=70000", "MASTER_PORT is '70000', needs", MASTER_PORT="70000"),
    _launched("LOCAL_WORLD_SIZE is a word", "LOCAL_WORLD_SIZE=x", "LOCAL_WORLD_SIZE is 'x'", LOCAL_WORLD_SIZE="x"),
    _launched("one rank", "WORLD_SIZE=1", "needs 2 or more", WORLD_SIZE="1"),
)  # fmt: skip

TUNE = ("tune", "--hidden", "64", "--tokens", "1", "--patterns", "all_reduce", "--output", "{tmp}/t.json")
PROCESSES = (
    _row("a closed pipe", "| true, which ends before it reads", 141, "stdout was closed before all was written, needs a reader", shell="set -o pipefail; $FUSION_CORE patterns | true"),
    _row("a full disk", "> /dev/full", 2, "No space left on device, needs", shell="$FUSION_CORE patterns > /dev/full"),
    _row("a full disk for JSON", "--json > /dev/full", 2, "No space left on device, needs", True, shell="$FUSION_CORE backends --json > /dev/full"),
    _row("both on a full disk", "> /dev/full 2>&1", 2, "", True, shell="$FUSION_CORE patterns > /dev/full 2>&1"),
    _row("stdout is closed", ">&-", 2, "stdout is closed, needs", True, shell="$FUSION_CORE patterns >&-"),
    _row("stderr is closed", "2>&-", 0, "", True, shell="$FUSION_CORE patterns 2>&- > /dev/null"),
    _row("the help into a closed pipe", "--help | true", 141, "stdout was closed", True, shell="set -o pipefail; $FUSION_CORE --help | true"),
    _row("ASCII alone", "PYTHONIOENCODING=ascii, and a user's module that prints more", 0, "", True, shell="PYTHONIOENCODING=ascii $FUSION_CORE explain u.py:build > /dev/null", files={"u.py": f"print('\\xd7')\n{MODEL}"}),
    _row("Latin 1", "a locale that lacks characters", 0, "", True, shell="PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C $FUSION_CORE backends > /dev/null"),
    _row("a narrow terminal", "COLUMNS=1", 0, "", True, shell="COLUMNS=1 LINES=1 TERM=dumb FORCE_COLOR=1 $FUSION_CORE backends > /dev/null"),
    _row("Ctrl-C in the demo", "SIGINT while the ranks start", 130, "2 workers ended", True, args=("demo", "--layers", "1"), interrupted=True),
    _row("Ctrl-C in verify", "SIGINT while the ranks start", 130, "2 workers ended", True, args=("verify", "reference", "--examples", "1", "--check", "equals_the_oracle_where_it_accepts"), interrupted=True),
    _row("ranks with another order", "FUSION_CORE_ORDER on one rank alone", 2, "rank 1 has order (), needs ('reference',) as rank 0 has it", args=TUNE, ranks=({"FUSION_CORE_ORDER": "reference"}, {"FUSION_CORE_ORDER": "none"})),
    _row("explain: ranks with another order", "FUSION_CORE_ORDER on one rank alone", 2, "rank 1 has order", True, args=("explain", "u.py:build"), files={"u.py": MODEL}, ranks=({}, {"FUSION_CORE_ORDER": "none"})),
    _row("a label that a table refuses", "a command of a thousand letters", 2, "the table that rank 0 is to write would be refused: command is", True, args=(*TUNE, "--budget", "0" * 1000 + "9"), ranks=({}, {})),
    _row("a port in use", "two calls at one port", 2, "no process group by the environment: ... start it with torchrun", True, shell="P=$(python -c 'import socket,subprocess,sys,os; s=socket.socket(); s.bind((\"127.0.0.1\",0)); s.listen(); p=str(s.getsockname()[1]); sys.exit(subprocess.call(os.environ[\"FUSION_CORE\"].split()+[\"tune\"],env={**os.environ,\"RANK\":\"0\",\"WORLD_SIZE\":\"2\",\"MASTER_ADDR\":\"127.0.0.1\",\"MASTER_PORT\":p}))')"),
)  # fmt: skip
