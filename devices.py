"""Where a run computes: device, precision, and the processes of torchrun.

    device = find_device("auto"); join_processes(device)
    rank, world = ranks()

torchrun tells a process its place through environment variables; `launch` alone reads them.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from methods import Method

Network = TypeVar("Network", bound=nn.Module)


class Launch(NamedTuple):
    """What torchrun has told this process; the defaults hold without torchrun."""

    rank: int = 0  # the number of this process
    world: int = 1  # how many there are
    local_rank: int | None = None  # its number on this machine
    local_world: int = 1  # how many share this machine
    restarts: int = 0  # how often --max-restarts has started it again


def launch() -> Launch:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    found = zip(Launch._fields, map(os.environ.get, names), strict=True)
    return Launch(**{field: int(text) for field, text in found if text is not None})


# Device and precision.


def find_device(name: str = "auto") -> torch.device:
    """cpu, cuda, cuda:1, or for "auto" the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = launch().local_rank
    if name == "cuda" and local_rank is not None:  # under torchrun each process has its own
        name = f"cuda:{local_rank}"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported: use cpu, cuda, cuda:1 or auto")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises differs by its build
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not available ({first}): use cpu") from error


def uses_bfloat16(amp: str, device: torch.device) -> bool:
    """Whether a run with this --amp computes in bfloat16 on this device."""
    return amp == "bf16" or (amp == "auto" and device.type == "cuda")


def machine(device: torch.device) -> str:
    """The device in words, for the line under a result."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def place(network: Network, device: torch.device | str, plain: bool = False) -> Network:
    """The network on the device, its filters channels_last, or contiguous if `plain`."""
    layout = torch.contiguous_format if plain else torch.channels_last
    moved: Any = network.to(device)
    return moved.to(memory_format=layout)


def keep_freed_memory() -> None:
    """Have glibc, where it is the C library, keep the memory of a step for the next one.

    By default it gives large blocks back to the system, and each step pays for new pages.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: its largest value
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# The processes of torchrun.


def ranks() -> tuple[int, int]:
    """This process's number among those that have met and how many they are; (0, 1) for one."""
    group = torch.distributed
    met = group.is_available() and group.is_initialized()
    return (group.get_rank(), group.get_world_size()) if met else (0, 1)


def join_processes(device: torch.device) -> None:
    """Under torchrun, meet the other processes: each has its own GPU, or all share the CPU."""
    if launch().world == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo beside nccl: what is agreed between processes must not make the device wait
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(torch.distributed.rendezvous("env://"))
    # torch 2.13 leaves the addresses of killed processes in the store when torchrun starts anew
    store = torch.distributed.PrefixStore(str(launch().restarts), store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def leave_processes() -> None:
    """Wait for all processes, then leave the group; exiting without this can abort."""
    if ranks()[1] > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def any_rank(asked: bool) -> bool:
    """Whether any process was asked to stop: all must leave the loop after the same step."""
    if ranks()[1] == 1:
        return asked
    flag = torch.tensor(int(asked))  # on the CPU: the device need not wait
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def share_buffers(network: nn.Module) -> None:
    """Give every process the buffers of the first: the running statistics that are saved."""
    if ranks()[1] > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


# The steps of a method, compiled and averaged over processes.


def compiled(method: Method, choice: str, device: torch.device) -> Method:
    """The method, with --compile on with its two steps compiled. Raises ValueError on a CPU."""
    if choice == "off":
        return method
    if device.type == "cpu":  # torch 2.13: right losses, and G's gradient off by 4 %, or without
        # the segmentation loss's for the focal form
        raise ValueError("--compile on loses gradients on a CPU with torch 2.13: drop it")
    g_step, d_step = torch.compile(method.g_step), torch.compile(method.d_step)
    return replace(method, g_step=g_step, d_step=d_step)


class Step(nn.Module):
    """A step as a module that holds the network it trains: one forward for each backward."""

    def __init__(self, step: Callable, network: nn.Module):
        super().__init__()
        self.step, self.network = step, network

    def forward(self, *arguments: Any) -> Any:
        return self.step(*arguments)


def data_parallel(method: Method, G: nn.Module, D: nn.Module | None) -> Method:
    """The method with steps whose backward averages gradients over all processes.

    BatchNorm's running statistics are those of rank 0. A loss over unlabelled pixels is averaged
    process by process, so that each counts alike however many of its pixels are labelled.
    Call it after `set_batchnorm`, which sets requires_grad: DDP collects the parameters here.
    """
    if ranks()[1] == 1:
        return method
    wrap = torch.nn.parallel.DistributedDataParallel
    return replace(
        method,
        g_step=wrap(Step(method.g_step, G)),
        later_steps=tuple(  # one of these may train a part of G alone
            wrap(Step(step, G), find_unused_parameters=True) for step in method.later_steps
        ),
        d_step=method.d_step if D is None else wrap(Step(method.d_step, D)),
    )
