"""What the workers of the tests of worker pools run, and how a test sees which processes there are."""

import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist


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


def killed_alone(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2.0)  # longer than others get where none is to fail
    return "here"


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
