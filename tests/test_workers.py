import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist

from fusion_core.errors import FusionError
from fusion_core.workers import WorkerError, WorkerPool

FRESH_INTERPRETERS = True

# What follows runs in the workers, which import this module.


def rank_and_sum(value, *, scale=1):
    tensor = torch.full((3,), float(value * (dist.get_rank() + 1)))
    dist.all_reduce(tensor)
    return dist.get_rank(), os.getpid(), (tensor * scale).tolist()


def threads_and_path():
    return (
        torch.get_num_threads(),
        sys.path,
        os.getcwd(),
        "__main__" in sys.modules and sys.modules["__main__"].__dict__.get("__file__"),
    )


def raise_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"bad luck on {rank}")
    dist.all_reduce(torch.ones(1))  # waits for the rank that raised


def leave(rank, code):
    if dist.get_rank() == rank:
        sys.exit(code)
    return "here"


def killed(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def crashed():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang_in_python(rank):
    if dist.get_rank() == rank:
        wait_without_end()
    return "here"


def wait_without_end():
    while True:
        signal.pause()


def skip_the_collective(rank):
    if dist.get_rank() != rank:
        dist.all_reduce(torch.ones(1))


def stop(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    return "here"


def start_a_child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return process.pid


def child_and_death():
    """A child that holds every handle of this process open, and outlives it."""
    if os.fork() == 0:
        wait_without_end()
    os.kill(os.getpid(), signal.SIGKILL)


def not_picklable():
    return lambda: None


class BreaksInTheParent:
    def __reduce__(self):
        return _only_in_workers, (os.getpid(),)


def _only_in_workers(pid):
    if os.getpid() != pid:
        raise ValueError("not here")


def breaks_in_the_parent():
    return BreaksInTheParent()


def hold_the_interpreter(path):
    """Waits inside C with the interpreter's lock held: no thread of Python can run."""
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    import ctypes

    ctypes.PyDLL(None).pause()


# What follows runs in the parent.


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def single():
    with WorkerPool(1) as pool:
        yield pool


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def pids(pool):
    return [pid for _, pid, _ in pool.run(rank_and_sum, 0)]


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_is_reported_at_once(pool, rank):
    old = pids(pool)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="bad luck") as caught:
        pool.run(raise_on, rank, timeout=100)
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert isinstance(caught.value, FusionError)
    assert caught.value.rank == rank
    assert text.startswith(f"rank {rank} of 2 failed in tests.test_workers.raise_on: it raised\nTraceback")
    assert f"ValueError: bad luck on {rank}" in text
    assert f"rank {1 - rank} was stopped at" in text, text  # it waited in all_reduce
    assert "in all_reduce" in text
    assert not any(map(is_alive, old))
    assert [rank for rank, _, _ in pool.run(rank_and_sum, 1)] == [0, 1]  # with new workers
    assert not set(old) & set(pids(pool))


def test_leaving_is_a_failure_too(pool):
    with pytest.raises(WorkerError, match="SystemExit: 3") as caught:
        pool.run(leave, 1, 3)
    assert caught.value.rank == 1


def test_a_rank_that_is_killed_comes_before_the_ranks_that_it_takes_along(pool):
    with pytest.raises(WorkerError) as caught:
        pool.run(killed, 1, timeout=100)
    assert caught.value.rank == 1
    assert str(caught.value).startswith("rank 1 of 2 failed in tests.test_workers.killed: it was killed by SIGKILL")


def test_a_rank_that_crashes_leaves_its_stack(single):
    with pytest.raises(WorkerError, match="killed by SIGSEGV") as caught:
        single.run(crashed)
    assert "in crashed" in str(caught.value)


def test_a_worker_that_dies_between_two_calls_is_reported(single):
    os.kill(pids(single)[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"rank 0 of 1 failed in .*rank_and_sum: it was killed by SIGKILL"):
        single.run(rank_and_sum, 1)


def test_a_death_is_seen_though_a_child_holds_the_connection_open(single):
    single.run(rank_and_sum, 1)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        single.run(child_and_death, timeout=100)
    assert time.monotonic() - start < 20


def test_a_rank_that_hangs_is_named_with_its_stack(pool):
    old = pids(pool)
    with pytest.raises(WorkerError) as caught:
        pool.run(hang_in_python, 1, timeout=1.0)
    text = str(caught.value)
    assert caught.value.rank == 1
    assert text.startswith("rank 1 of 2 did not finish tests.test_workers.hang_in_python within 1 s")
    assert "in wait_without_end" in text
    assert "rank 0" not in text
    assert not any(map(is_alive, old))


def test_ranks_that_wait_for_a_collective_are_named_with_their_stack(pool):
    with pytest.raises(WorkerError, match="rank 0 of 2 did not finish") as caught:
        pool.run(skip_the_collective, 1, timeout=1.0)
    assert "in skip_the_collective" in str(caught.value)


def test_a_process_that_does_not_react_is_killed(pool):
    old = pids(pool)
    with pytest.raises(WorkerError, match=r"rank 1 of 2 did not finish(.|\n)*it did not react"):
        pool.run(stop, 1, timeout=1.0)
    assert not any(map(is_alive, old))


def test_a_result_that_cannot_be_pickled_is_an_error(single):
    with pytest.raises(
        WorkerError, match=r"of 1 failed in .*not_picklable: it gave a result that cannot be pickled\nTraceback"
    ):
        single.run(not_picklable)


def test_a_result_that_cannot_be_unpickled_is_an_error(single):
    with pytest.raises(WorkerError, match=r"cannot be unpickled(.|\n)*not here"):
        single.run(breaks_in_the_parent)


def test_what_cannot_be_sent_is_an_error_and_stops_nothing(single):
    old = pids(single)
    with pytest.raises(WorkerError, match="cannot be sent"):
        single.run(lambda: None)
    function = type(pids)(pids.__code__, {}, "of_main")
    function.__module__, function.__qualname__ = "__main__", "of_main"
    with pytest.raises(WorkerError, match=r"__main__\.of_main is defined in __main__, needs a module"):
        single.run(function)
    assert pids(single) == old


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


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "inside C"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, busy):
    file = tmp_path / "pid"
    program = f"""
        import os, signal, threading
        from fusion_core.workers import WorkerPool
        from tests import test_workers
        pool = WorkerPool(1)
        (_, pid, _), = pool.run(test_workers.rank_and_sum, 0)
        print(pid, flush=True)
        if {busy}:
            pool.run(test_workers.hold_the_interpreter, {str(file)!r})
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


@pytest.mark.parametrize("how", ["stdin", "module"])
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
