"""The process group that rows are compiled in, and a second one."""

import pytest

from tests.corpus import all_reduces


@pytest.fixture(scope="module")
def groups(one_rank: str) -> str:
    all_reduces.make_second_group()
    return one_rank
