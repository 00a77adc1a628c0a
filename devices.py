"""Where a run computes: device, precision, and the processes of torchrun.

    device = find_device("auto"); join_processes(device)
    rank, world = ranks()

torchrun tells each process its number in environment variables. Only `launch` reads them.
"""

import contextlib
import ctypes
import errno
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from clan import Hyper
from methods import Method

Network = TypeVar("Network", bound=nn.Module)


class Launch(NamedTuple):
    """What torchrun has told this process; the defaults hold without torchrun."""

    rank: int = 0  # the number of this process
    world: int = 1  # how many there are
    local_rank: int | None = None  # its number on this machine
    local_world: int = 1  # how many share this machine
    restarts: int = 0  # how often torchrun has restarted it (--max-restarts)


def launch() -> Launch:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    found = zip(Launch._fields, map(os.environ.get, names), strict=True)
    return Launch(**{field: int(text) for field, text in found if text is not None})


# Device and precision.


def find_device(name: str = "auto") -> torch.device:
    """The device cpu, cuda or cuda:1; "auto" is the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = launch().local_rank
    if name == "cuda" and local_rank is not None:  # torchrun: a GPU for each process
        name = f"cuda:{local_rank}"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported: use cpu, cuda, cuda:1 or auto")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":  # events, pinned memory and nccl use the current one
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:  # the type depends on torch's build
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not available ({first}): use cpu") from error


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device, or on a CPU oneDNN, computes in bfloat16. Else it is emulated, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    mkldnn = torch.backends.mkldnn.is_available()
    return mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def uses_bfloat16(amp: str, device: torch.device) -> bool:
    """Whether a run with this --amp computes in bfloat16 on this device.

    "auto" takes it on a GPU that has it: from NVIDIA's Ampere generation on. Older ones emulate it.
    """
    if amp == "auto" and device.type == "cuda":
        return has_bfloat16(device)
    return amp == "bf16"


def choose_algorithms(cudnn: str) -> None:
    """--cudnn for all convolutions of this process; without CUDA it changes nothing.

    "fastest" times up to ten algorithms at each new size. Another process may choose others, which
    round differently. "deterministic" leaves out those that add in a random order.
    """
    torch.backends.cudnn.benchmark = cudnn == "fastest"
    torch.backends.cudnn.deterministic = cudnn == "deterministic"


@contextlib.contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """float32 convolutions of CUDA in "ieee" or "tf32" (torch's default: 10 bits of mantissa)."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch does not type it
    before = convolutions.fp32_precision
    convolutions.fp32_precision = precision
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_workers(asked: int, drawn: bool) -> int:
    """How many processes read images. -1: one for each core that this process may use, at most 8.

    drawn: only streets are read. They are drawn once and kept in memory, so -1 means none.
    """
    if asked < -1:
        raise ValueError(f"--workers {asked}: give 0, a number of processes, or -1 for the default")
    if asked >= 0 or drawn:
        return max(asked, 0)
    known = hasattr(os, "sched_getaffinity")  # a container may have only some of the cores
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(8, cores // launch().local_world)


def machine(device: torch.device, threads: int | None = None) -> str:
    """The device in words, for the line under a result. threads: a CPU's [torch's number].

    A CPU's name can stand for several kinds that round differently, so its family and model follow.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    words = {key.strip(): value.strip() for key, _, value in pairs}
    kind = [f"{key} {words[key]}" for key in ("cpu family", "model") if key in words]
    name = words.get("model name", platform.processor()) + f" ({', '.join(kind)})" * bool(kind)
    return f"{name}, {threads or torch.get_num_threads()} threads"


def place(network: Network, device: torch.device | str, plain: bool = False) -> Network:
    """The network on the device, with channels_last filters, or contiguous ones if `plain`."""
    layout = torch.contiguous_format if plain else torch.channels_last
    moved: Any = network.to(device)
    return moved.to(memory_format=layout)


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of a step for the next one. Without glibc this does nothing.

    By default glibc gives large blocks back to the system, and each step waits for new pages.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: its largest value
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# The processes of torchrun.


def in_group() -> bool:
    """Whether this process has joined a group. A group of torchrun can have one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def ranks() -> tuple[int, int]:
    """(number of this process, how many there are) in the group; (0, 1) without a group."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if in_group() else (0, 1)


def join_processes(device: torch.device) -> None:
    """Under torchrun, join the group. Each process has its own GPU, or all share the CPU."""
    if launch().local_rank is None or in_group():  # the second of two runs has joined
        return
    # nccl for the GPU, and gloo for the CPU: `any_rank` must not make the GPU wait
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(torch.distributed.rendezvous("env://"))
    # A restart needs its own names: torch 2.13 keeps the addresses of killed processes in the store
    store = torch.distributed.PrefixStore(str(launch().restarts), store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def leave_processes() -> None:
    """Wait for all processes, then leave the group; exiting without this can abort."""
    if in_group():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def any_rank(asked: bool) -> bool:
    """Whether any process was asked to stop: all must leave the loop after the same step."""
    if ranks()[1] == 1:
        return asked
    flag = torch.tensor(int(asked))  # on the CPU, so that the GPU does not wait
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def share_buffers(network: nn.Module) -> None:
    """Give every process the buffers of the first: its running statistics are the saved ones."""
    if ranks()[1] > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


# The steps of a method, averaged over processes.


class Step(nn.Module):
    """A step as a module that holds the network it trains. DDP wraps it: one forward a backward."""

    def __init__(self, step: Callable, network: nn.Module):
        super().__init__()
        self.step, self.network = step, network

    def forward(self, *arguments: Any) -> Any:
        return self.step(*arguments)


def data_parallel(method: Method, G: nn.Module, D: nn.Module | None, hyper: Hyper) -> Method:
    """The method with steps whose backward averages gradients over all processes.

    BatchNorm's running statistics are those of rank 0. Each process averages the segmentation loss
    over its own labelled pixels. So all processes count alike, however many pixels are labelled.
    Call it after `set_batchnorm`, which sets requires_grad: DDP collects the parameters here.
    """
    if not in_group():
        return method
    if method.result:
        method = on_shared_buffers(method)
    if method.later_steps(hyper):
        return averaged_by_hand(method, G, D)
    wrap = torch.nn.parallel.DistributedDataParallel
    more = getattr(D, "of_g", None)
    trained = G if more is None else nn.ModuleList([G, more])  # `more` begins at adv_start
    return replace(
        method,
        g_step=wrap(Step(method.g_step, trained), find_unused_parameters=more is not None),
        d_step=method.d_step if D is None else wrap(Step(method.d_step, D)),
    )


def on_shared_buffers(method: Method) -> Method:
    """The method, whose state is made from the same running statistics in all processes."""

    def before_step(step: int, G: nn.Module, *rest: Any) -> Any:
        share_buffers(G)
        return method.before_step(step, G, *rest) if method.before_step else {}

    def next_state(state: Any, G: nn.Module, *rest: Any) -> Any:
        share_buffers(G)
        return method.next_state(state, G, *rest) if method.next_state else {}

    return replace(method, before_step=before_step, next_state=next_state)


def averaged_by_hand(method: Method, G: nn.Module, D: nn.Module | None) -> Method:
    """The method, whose gradients are averaged one by one as they arrive.

    DDP cannot have several steps of the same parameters of which one trains a part alone.
    """

    def average(p: nn.Parameter) -> None:
        if p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            p.grad /= ranks()[1]

    for network in (G, D):
        for p in network.parameters() if network is not None else ():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(average)

    def g_step(*arguments: Any) -> Any:
        share_buffers(G)
        return method.g_step(*arguments)

    return replace(method, g_step=g_step)


def does_not_fit(error: BaseException) -> bool:
    """Whether an error means that the memory is too small. Libraries say it in different words."""
    words: tuple[str, ...] = ("out of memory", "can't allocate memory", "find an engine")
    words += (
        "ALLOC_FAILED",
        "out of shared memory",
        "killed by signal: Killed",
        "killed by signal: Bus error",
    )
    full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return full or any(word in str(error) for word in words)
