"""The command ``fusion-core``.

Exit status: 0 done, 1 the answer is no, 2 the call was wrong, 130 it was interrupted, 141 the reader of stdout left.
With ``--json``, plain JSON alone goes to stdout.
"""

from __future__ import annotations

import importlib.util
import os
import sys

_EXTRA = ("typer", "rich")


def main() -> None:
    """Run the command line of this process. Does not return."""
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        sys.stderr.write(
            f"{' and '.join(missing)} {verb} not installed, needs the cli extra; pip install 'fusion-core[cli]'\n"
        )
        sys.exit(2)
    _check_streams()
    try:
        from fusion_core.cli.app import app

        app(prog_name="fusion-core")
    except KeyboardInterrupt:  # while torch is imported, or while the interrupted command cleans up
        sys.exit(130)
    finally:
        if "--json" in sys.argv:  # the answer is out: what libraries say when the interpreter ends is no part of it
            os.dup2(2, 1)


def _check_streams() -> None:
    """An answer that goes nowhere is a wrong call, and a character that the locale lacks is no reason to give none."""
    if sys.stderr is None:
        # under its own number: what is opened next would take it, and libraries write to that
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stderr.write(
            "fusion-core: stdout is closed, needs a file, a pipe or a terminal; >/dev/null drops the answer\n"
        )
        sys.exit(2)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
