import os
import subprocess
import sys
import textwrap

import pytest

from fusion_core.workers import WorkerError, WorkerPool
from tests.worker_jobs import (
    is_alive,
    pids,
    rank_and_sum,
    start_a_child,
    threads_and_path,
    until,
)

FRESH_INTERPRETERS = True


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def single():
    with WorkerPool(1) as pool:
        yield pool


def test_results_come_in_the_order_of_ranks_and_workers_survive(pool):
    first = pool.run(rank_and_sum, 2, scale=3)
    assert [(rank, total) for rank, _, total in first] == [(0, [18.0] * 3), (1, [18.0] * 3)]
    second = pool.run(rank_and_sum, 1)
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in second]
    assert len({os.getpid(), *pids(pool)}) == 3


def test_workers_have_the_parents_path_and_directory_and_not_its_main(pool):
    for threads, path, directory, main in pool.run(threads_and_path):
        assert threads == 1
        assert [entry for entry in sys.path if entry] == path[: len([entry for entry in sys.path if entry])]
        assert directory == os.getcwd()
        assert main is None


def test_a_closed_pool_runs_nothing_and_leaves_nothing():
    with WorkerPool(1) as pool:
        (pid,) = pids(pool)
        (child,) = pool.run(start_a_child)
        assert is_alive(pid)
        assert is_alive(child)
    assert not is_alive(pid)
    until(lambda: not is_alive(child))
    with pytest.raises(WorkerError, match="closed, needs a new WorkerPool"):
        pool.run(rank_and_sum, 1)
    pool.close()


def test_a_forgotten_pool_leaves_nothing():
    pool = WorkerPool(1)
    (pid,) = pids(pool)
    del pool
    until(lambda: not is_alive(pid))


def test_a_world_needs_a_rank():
    with pytest.raises(WorkerError, match="world_size is 0"):
        WorkerPool(0)


def test_a_backend_that_does_not_exist_is_reported_from_the_start():
    with (
        WorkerPool(1, backend="nonsense") as pool,
        pytest.raises(WorkerError, match="failed in the start of the process group"),
    ):
        pool.run(rank_and_sum, 1)


@pytest.mark.parametrize(
    "busy",
    [pytest.param(False, marks=pytest.mark.nightly), True],  # which reacts to less
    ids=["idle", "inside C"],
)
def test_workers_end_with_a_parent_that_is_killed(tmp_path, busy):
    file = tmp_path / "pid"
    program = f"""
        import os, signal, threading
        from fusion_core.workers import WorkerPool
        from tests import worker_jobs
        pool = WorkerPool(1)
        (_, pid, _), = pool.run(worker_jobs.rank_and_sum, 0)
        print(pid, flush=True)
        if {busy}:
            pool.run(worker_jobs.hold_the_interpreter, {str(file)!r})
        signal.pause()
    """
    parent = subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    parent.stdin.write(textwrap.dedent(program))
    parent.stdin.close()
    pid = int(parent.stdout.readline())
    if busy:
        until(file.exists)
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not is_alive(pid))


SCRIPT = """
import os
from fusion_core.workers import WorkerPool
print("once")  # a worker that imported the main module would print it again
with WorkerPool(1) as pool:
    print(pool.run(os.getpid) != [os.getpid()])
"""


@pytest.mark.parametrize("how", ["stdin", pytest.param("module", marks=pytest.mark.nightly)])
def test_any_program_may_start_workers(tmp_path, how):
    (tmp_path / "program.py").write_text(SCRIPT)
    command = {"stdin": ["-"], "module": ["-m", "program"]}[how]
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry), os.getcwd()])
    done = subprocess.run(
        [sys.executable, *command],
        input=SCRIPT if how == "stdin" else "",
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("once\nTrue\n", "", 0)
