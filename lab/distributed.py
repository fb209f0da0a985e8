"""Where a process runs: its device, its rank among the processes that torchrun started, and what they agree on."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lab.config import UserError

T = TypeVar("T")

PATIENCE = timedelta(seconds=5)
"""How long a process that met a mistake waits for the main one to tell of the same."""


@dataclass(frozen=True)
class World:
    """All processes of one run, seen from one of them; `World()` is a single process on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    here: int = 1
    """How many of them share this machine."""
    store: Any = field(default=None, repr=False, compare=False)
    """Where they leave word for each other, a `torch.distributed.Store`; None: nowhere."""
    _joint: list[Callable[..., Any]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files and talks to the user."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_main(self, find: Callable[[], T]) -> T:
        """What the main process finds, on every process; an error that it meets is everybody's."""
        if self.size == 1:
            return find()
        found, error = None, None
        if self.main:
            try:
                found = find()
            except Exception as problem:
                error = problem
        found, error = self.share((found, error))
        if error:
            raise error
        return cast(T, found)

    # Work that is cut up

    def part(self, count: int, what: str) -> range:
        """Which of `count` things are this process's; every process has as many.

        Args:
            what: the setting that says how many there are.

        Raises:
            UserError: they cannot be cut into equal parts.
        """
        if count % self.size:
            raise UserError(f"{what}: {count} cannot be cut into equal parts for {self.size} processes; give a multiple of {self.size}")
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def beside(self, part: Tensor) -> Tensor:
        """Every process's tensor, all of one shape and on the CPU, side by side along the last dimension."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts, -1)

    def joined(self, part: Tensor) -> Tensor:
        """The same of tensors whose last dimensions differ, on any device; the result is on the CPU where there are several processes."""
        return part if self.size == 1 else torch.cat(self.gather(part.cpu()), -1)

    # What only the main process does, with the help of the others

    def jointly(self, own: Callable[..., T]) -> Callable[..., list[T]]:
        """A function that gives what `own` gives on every process, in the order of their ranks, of which one alone has only a share.

        Every process makes it, in the same order; only the main one calls it, inside of what it does in `led`.
        """
        if self.size == 1:
            return lambda *given: [own(*given)]
        number = len(self._joint)
        self._joint.append(own)

        def ask(*given: Any) -> list[T]:
            self.share((number, given))
            return cast(list[T], self._collected(own(*given)))

        return ask

    def led(self, work: Callable[[], None] | None) -> None:
        """Have the main process do some work, while the others, who have none, give what it asks for; its error is everybody's."""

        def lead() -> None:
            try:
                if work:
                    work()
            finally:
                self.share(None)

        if not self.main:
            while call := self.share(cast(Any, None)):
                number, given = call
                self._collected(self._joint[number](*given))
        self.from_main(lead)

    def _collected(self, value: T) -> list[T] | None:
        """Every process's value, for the main one."""
        values: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, values)
        return values

    # Ends

    def tells(self) -> bool:
        """Whether it is for this process to tell the user why the run ends: another one than the main does if that does not know of it.

        Others wait here until the main process has told and is gone: if they ended first, it would be stopped before it could speak.
        """
        if self.store is None:
            return True
        if self.main:
            self.store.set("told", "")
            return True
        try:
            self.store.wait(["told"], PATIENCE)
        except dist.DistStoreError:  # nothing came
            return True
        except RuntimeError:  # the main process kept the store, and is gone
            return False
        with contextlib.suppress(RuntimeError):
            self.any(False)
        return False

    def leave(self) -> None:
        """Wait for the others, then end the communication."""
        if self.size > 1:
            dist.barrier()
            _hang_up()


def join(device: str, threads: int, deterministic: bool) -> World:
    """Join the processes that torchrun started (or be the only one) and set this process's device and threads.

    Args:
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads of this process; 0 shares the machine's cores among its processes.
        deterministic: ask CUDA for repeatable kernels; CPU kernels are repeatable for a given number of threads.

    Raises:
        UserError: `cuda` was asked for and there is none, or fewer GPUs than processes.
    """
    size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    where = _device(device, int(os.environ.get("LOCAL_RANK", 0)), local_size)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local_size))
    # Numbers below 1e-38 take a slow path in the CPU and mean nothing to us.
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if size == 1:
        return World(device=where)
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    atexit.register(_hang_up)
    return World(rank, size, where, local_size, store)


def _hang_up() -> None:
    """End the communication; its threads, which torch never joins once there was a data-parallel model, get a moment to come to rest.

    One that lets go of its last tensor while Python ends would abort the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of handing it back to the system.

    By default every activation of some megabytes is given back and comes again as zeroed pages, step after step, which
    cost our convolutional VAE a fifth of a step on two cores, and half of it at worst. Other C libraries have no
    such switch and are left alone.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3  # from malloc.h
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)


def _device(name: str, local_rank: int, local_size: int) -> torch.device:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and found == 0):
        return torch.device("cpu")
    if found == 0:
        raise UserError("trainer.device: 'cuda' was asked for and torch finds no GPU; use 'cpu' or 'auto'")
    if local_size > found:
        raise UserError(f"torchrun started {local_size} processes on a machine with {found} GPU(s); start at most {found}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 numbers in hardware; emulated, they are slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public name for it as of torch 2.13
    return bool(known and known())


def environment() -> dict[str, Any]:
    """What the numbers of a run may depend on: versions, device, threads, processes."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "torch": cast(str, torch.__version__),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "native_bf16": native_bf16(torch.device("cuda" if gpu else "cpu")),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
