"""Process groups by the names that graphs and operators use."""

import gc

import pytest
import torch.distributed as dist

from fusion_core import ConfigError, groups, process_group, use_all_reduce


def test_the_group_of_a_name_is_the_group_itself(one_rank: str) -> None:
    assert process_group(one_rank) is dist.group.WORLD
    other = dist.new_group([0])
    assert process_group(other.group_name) is other
    dist.destroy_process_group(other)


def test_an_unknown_name_is_refused_with_those_that_there_are(one_rank: str) -> None:
    with pytest.raises(ConfigError, match=r"group is 'tp', needs the name of a process group of this process: '0'"):
        process_group("tp")


def test_a_group_that_is_destroyed_has_no_name_any_more(one_rank: str) -> None:
    name = dist.new_group([0]).group_name
    dist.destroy_process_group(process_group(name))
    with pytest.raises(ConfigError, match=f"group is '{name}'"):
        process_group(name)


def test_a_process_without_groups_is_told_how_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "groups", list)
    with pytest.raises(ConfigError, match=r"group is 'tp', needs .*: there is none, init_process_group makes one"):
        process_group("tp")


def test_a_group_s_own_all_reduce_is_forgotten_with_the_group(one_rank: str) -> None:
    """A later group may have its name: two engines of vLLM in one process, one after the other."""
    name = str(dist.new_group([0]).group_name)
    use_all_reduce(name, lambda x: x)
    assert groups.all_reduce_of(name) is not None
    dist.destroy_process_group(process_group(name))
    gc.collect()
    assert groups.all_reduce_of(name) is None
    assert not groups._all_reduces
    with pytest.raises(ConfigError, match=f"group is '{name}'"):
        use_all_reduce(name, lambda x: x)
