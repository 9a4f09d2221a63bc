"""Several processes: those of `torchrun` (nccl on GPUs, gloo on CPUs), and the workers that read images; and the
signals that ask a training to end."""

import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import cv2
import torch
import torch.distributed as dist
from torch import Tensor, nn

MAIN_RANK_HEAD_START = 10  # seconds that other processes leave to the main one to fail first
logger = logging.getLogger(__name__)
SHARED_MEMORY = "/dev/shm"
MOST_WORKERS = 8  # per process
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 2  # seconds within which signals are one: terminal and launcher may both pass it on
GRACE = 60  # seconds between a signal and the end of a worker, enough for the step and the checkpoint


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if it did; from the device asked for to that of this process."""
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if not is_main():
        logging.getLogger("patch").setLevel(logging.ERROR)  # one process says what a merge is like
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
    """Return whether this process is the one that writes and shows."""
    return rank() == 0


class Requests:
    """The requests of all processes, such as a signal's, which all of them see after the same update.

    They travel while the next update is computed: no process waits for another one's.
    """

    def __init__(self) -> None:
        self._under_way: tuple[Any, Tensor] | None = None
        self._asked = False  # whether the one under way is a request of this process

    def exchange(self, number: int) -> int:
        """Send a request, 0 for none; returns the highest of all processes, with several of them that of the call
        before."""
        if not dist.is_initialized():
            return number
        self._asked = bool(number) and not self._asked  # a request is not repeated before it has arrived
        before, tensor = self._under_way, torch.tensor(number if self._asked else 0)  # on the CPU: no device waits
        self._under_way = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True), tensor
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])


def from_main(value: Any) -> Any:
    """The main process's value, in all of them: what is decided by looking at files is decided once."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def all_gather(tensor: Tensor) -> Tensor:
    """(...) of every process -> (processes, ...), the same everywhere."""
    if not dist.is_initialized():
        return tensor.unsqueeze(0)
    found = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(found, tensor)
    return torch.stack(found)


def report_failure(message: str, *, follows: bool = False) -> bool:
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
        time.sleep(2 * MAIN_RANK_HEAD_START if follows else MAIN_RANK_HEAD_START)
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(file).write_text(json.dumps(content), encoding="utf-8")
    return True


def is_peer_failure(error: BaseException) -> bool:
    """Return whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def on_parent_exit(act: Callable[[], Any]) -> None:
    """Call a function, from a thread of its own, once the process that started this one is gone."""
    around, parent = multiprocessing.parent_process(), os.getppid()

    def wait() -> None:
        # A fork knows it by its parent's number; a process that a server forked, by the server's client.
        while os.getppid() == parent and (around is None or around.is_alive()):
            time.sleep(1)
        act()

    threading.Thread(target=wait, daemon=True).start()


def default_workers() -> int:
    """Workers that read images: the cores of this machine, shared by the processes of `torchrun`; at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def fitting_workers(workers: int, n_bytes: int) -> int:
    """So many of the workers as the shared memory takes, through which they hand over their batches.

    Args:
        workers: number of them that is asked for.
        n_bytes: size of a batch; each worker prepares two, while a third is read.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # no Linux
        return workers
    fitting = min(workers, free // (3 * n_bytes))
    if fitting < workers:
        logger.warning(
            "%s has %.0f MiB left: %d processes read images, not %d; in a container, --shm-size enlarges it",
            *(SHARED_MEMORY, free / 2**20, fitting, workers),
        )
    return fitting


def start_worker(_: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: the worker computes on one core, and lives as long as it is needed.

    OpenCV would start one thread per core. Signals that reach all processes at once (Ctrl-C, SLURM, `torchrun`) are the
    training's to act on, which still wants its batches. When the training was killed, the worker would wait for ever.
    """

    def end_later(*_: Any) -> None:
        timer = threading.Timer(GRACE, os._exit, [128 + signal.SIGTERM])
        timer.daemon = True
        timer.start()

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)
    on_parent_exit(lambda: os._exit(1))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; every process gets the sum."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def begin_sum(tensor: Tensor) -> Callable[[], Tensor]:
    """As `all_reduce_sum`, while something else is computed; the function that is returned waits for the sum."""
    work = dist.all_reduce(tensor, async_op=True) if dist.is_initialized() else None

    def end() -> Tensor:
        if work is not None:
            work.wait()
        return tensor

    return end


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, which are of the same size; PyTorch's own is for GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # unlike that of torch.distributed, it has a gradient

        mean = all_reduce(x.mean((0, 2, 3))) / world_size()
        centered = x - mean[:, None, None]
        variance = all_reduce(centered.square().mean((0, 2, 3))) / world_size()
        with torch.no_grad():
            n_values = x.numel() / x.shape[1] * world_size()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n_values / max(n_values - 1, 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centered * scale[:, None, None] + self.bias[:, None, None]


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let the BatchNorm of a model see the batches of all processes, in place; parameters and keys stay."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            module.__class__ = _CpuSyncBatchNorm
    return model


class SignalError(Exception):
    """A signal ended a training. Its message says where things stand; `status` is the exit status, 128 + signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Interruption:
    """Takes note of SIGTERM and Ctrl-C instead of dying of them.

    Attributes:
        status: what to leave with, 128 + the signal's number, as shells say it; 0: go on.
    """

    def __init__(self) -> None:
        self.status = 0

    def request(self, number: int = signal.SIGTERM) -> None:
        """Note a signal."""
        self.status = 128 + number

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, signals are noted. A second Ctrl-C ends the program at once, as it does without us."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only a program's first thread may handle signals
            return
        before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        first = math.inf

        def note(number: int, _: FrameType | None) -> None:
            nonlocal first
            now = time.monotonic()
            if number == signal.SIGINT and now > first + SAME:
                raise KeyboardInterrupt
            first = min(first, now)
            self.request(number)

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number in SIGNALS:
                signal.signal(number, before[number])
