"""The command ``fusion-core``.

Exit status: 0 done, 1 the answer is no, 2 the call was wrong. With ``--json``, plain JSON alone goes to stdout.
"""

from __future__ import annotations

import importlib.util
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
    from fusion_core.cli.app import app

    app(prog_name="fusion-core")
