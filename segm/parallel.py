"""Several processes: those of `torchrun` (nccl on GPUs, gloo on CPUs), and the workers that read images."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.distributed as dist
from torch import Tensor

PRECEDENCE = 10  # seconds that other processes leave to the main one to fail first
MOST_WORKERS = 8  # per process
GRACE = 60  # seconds between a signal and the end of a worker, enough for the step and the checkpoint


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if it did; yields the device of this process.

    Args:
        device: torch.device that the user asked for.
    """
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and shows."""
    return rank() == 0


def highest(number: int) -> int:
    """The highest of all processes' numbers; on the CPU, so that no device is waited for."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather(tensor: Tensor) -> Tensor:
    """(...) of every process -> (processes, ...), the same everywhere."""
    if not dist.is_initialized():
        return tensor.unsqueeze(0)
    found = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(found, tensor)
    return torch.stack(found)


def hand_over(message: str, *, follows: bool = False) -> bool:
    """Give the message of a failure to `torchrun`, which ends the other processes and shows it at the end, once.

    Args:
        message: one line.
        follows: whether this process fails because another one has, whose message counts.

    Returns:
        Whether there is one that takes it.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return False
    if follows or os.environ.get("RANK") != "0":  # what all processes fail with, the main process says
        time.sleep(2 * PRECEDENCE if follows else PRECEDENCE)
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(file).write_text(json.dumps(content), encoding="utf-8")
    return True


def has_lost_another(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def when_orphaned(act: Callable[[], Any], every: float = 1.0) -> None:
    """Call a function, from a thread of its own, once the process that started this one is gone.

    Args:
        act: the function.
        every: seconds between two looks.
    """
    around, parent = multiprocessing.parent_process(), os.getppid()

    def wait() -> None:
        # A fork knows it by its parent's number; a process that a server forked, by the server's client.
        while os.getppid() == parent and (around is None or around.is_alive()):
            time.sleep(every)
        act()

    threading.Thread(target=wait, daemon=True).start()


def default_workers() -> int:
    """Workers that read images: the cores of this machine, shared by the processes of `torchrun`; at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def start_worker(_: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: the worker computes on one core, and lives as long as it is needed.

    PyTorch gives workers one thread by itself; OpenCV would start one per core in each of them. Signals that reach all
    processes at once (Ctrl-C, SLURM, `torchrun`) are the training's to act on, which still wants its batches. When the
    training was killed, the worker would wait for ever.
    """

    def end_later(*_: Any) -> None:
        timer = threading.Timer(GRACE, os._exit, [128 + signal.SIGTERM])
        timer.daemon = True
        timer.start()

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)
    when_orphaned(lambda: os._exit(1))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; every process gets the sum."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
