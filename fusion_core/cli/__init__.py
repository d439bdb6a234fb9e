"""The command ``fusion-core``.

Exit status: 0 success, 1 the answer is no, 2 a usage error, 130 interrupted, 141 the reader of stdout went away.
With ``--json``, only plain JSON goes to stdout.
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
        if "--json" in sys.argv:  # the JSON is complete: what libraries print at exit must not follow it
            os.dup2(2, 1)


def _check_streams() -> None:
    """Exit if stdout is closed; print characters that the locale lacks as ``?`` instead of failing."""
    if sys.stderr is None:
        # as file descriptor 2: the next file opened would get that number, and libraries write to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stderr.write(
            "fusion-core: stdout is closed, needs a file, a pipe or a terminal; >/dev/null drops the answer\n"
        )
        sys.exit(2)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
