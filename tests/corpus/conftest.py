"""The process group that rows are compiled in, and a second one."""

from collections.abc import Iterator

import pytest
import torch

from tests.corpus import all_reduces
from tests.support.device import DEVICE


@pytest.fixture(scope="module")
def groups(one_rank: str) -> Iterator[str]:
    all_reduces.make_second_group()
    if DEVICE.type != "cpu":  # what a row makes by itself is made there too
        torch.set_default_device(DEVICE)
    yield one_rank
    torch.set_default_device(None)
