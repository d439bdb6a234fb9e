"""The versions and the machine that a record was made with."""

import datetime
import os
import platform
from importlib.metadata import version


def software():
    """The first entries of a record."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "fusion-core": version("fusion-core"),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
