"""A forked worker behaves like a fresh one: environment, path, folder, group, output, end, and its own hash seed."""

import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist

from fusion_core.workers import WorkerError, WorkerPool, worker
from tests.support import forked


def state():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    return environment, sys.path, os.getcwd(), torch.get_num_threads(), dist.get_world_size()


def seen():
    return os.getsid(0) == os.getpid(), hash("a seed of its own"), os.getppid(), os.environ.get("FORKED_AT")


def preloaded():
    return "tests.support.preloaded" in sys.modules


def say():
    sys.stdout.write(f"rank {dist.get_rank()} speaks\n")
    sys.stdout.flush()


def kill(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


def test_a_forked_worker_is_in_the_state_of_a_fresh_one(pool, monkeypatch):
    found = pool.run(state)
    monkeypatch.setattr(worker.Worker, "launch", forked.as_asked)
    with WorkerPool(2) as fresh:
        assert found == fresh.run(state)


def test_its_session_is_its_own_and_ranks_have_different_hash_seeds(pool):
    (own, seed, server, _), (own_too, other, another, _) = pool.run(seen)
    assert own
    assert own_too
    assert seed != other
    assert os.getpid() not in (server, another)  # or nothing was forked here


def test_its_server_has_made_the_imports(pool):
    """The server itself ignores an import that fails: each worker would then import and compile for itself."""
    assert pool.run(preloaded) == [True, True]


def test_variables_are_those_of_its_start(monkeypatch):
    monkeypatch.setenv("FORKED_AT", "its start")
    with WorkerPool(1) as pool:
        assert pool.run(seen)[0][3] == "its start"


def test_a_variable_that_is_read_at_import_gets_a_fresh_interpreter(monkeypatch):
    monkeypatch.setenv("TORCH_SOMETHING", "1")
    with WorkerPool(1) as pool:
        assert pool.run(seen)[0][2] == os.getpid()


def test_its_output_goes_where_this_process_writes_now(pool, capfd):
    with WorkerPool(1) as single:
        single.run(say)
    assert capfd.readouterr().out == "rank 0 speaks\n"


def test_its_end_is_known_and_the_next_call_has_new_ones(pool):
    with pytest.raises(WorkerError, match=r"rank 1 of 2 failed in .*kill: it was killed by SIGKILL"):
        pool.run(kill, 1)
    assert [own for own, *_ in pool.run(seen)] == [True, True]


def test_a_pool_that_names_modules_is_forked_where_tests_change_nothing(monkeypatch):
    monkeypatch.setattr(worker.Worker, "launch", forked.as_asked)
    with WorkerPool(1, preload=forked.PRELOAD) as pool:
        assert pool.run(preloaded) == [True]
        assert pool.run(seen)[0][2] != os.getpid()


def test_where_a_module_cannot_be_imported_workers_are_fresh_interpreters(monkeypatch, capfd):
    monkeypatch.setattr(worker.Worker, "launch", forked.as_asked)
    with WorkerPool(1, preload=("fusion_core.no_such_module",)) as pool:
        assert pool.run(seen)[0][2] == os.getpid()
    assert "No module named 'fusion_core.no_such_module'" in capfd.readouterr().err
