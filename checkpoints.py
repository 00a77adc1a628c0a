"""Checkpoints: what the next step depends on, in one safetensors file that is whole or absent.

    save(path, pack(G, D, opt_g, opt_d), {"step": 100, ...})
    tensors, _ = read_checkpoint(newest_valid(folder, print)); unpack(tensors, G, D, opt_g, opt_d)

A file is written under a temporary name, flushed to the disk and renamed. Reading compares it with
its checksum. A run folder has one owner at a time. Only this file knows the names of checkpoints.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

Tensors = dict[str, Tensor]

# What a checkpoint holds.


def pack(
    G: nn.Module,
    D: nn.Module | None,
    opt_g: Optimizer,
    opt_d: Optimizer | None,
    state: Tensors | None = None,
) -> Tensors:
    """Everything that the next step depends on, as named tensors. `state`: that of the method."""
    tensors = {f"state.{name}": value for name, value in (state or {}).items()}
    for prefix, module in (("G", G), ("D", D)):
        values = module.state_dict() if module is not None else {}
        tensors |= {f"{prefix}.{name}": value for name, value in values.items()}
    for prefix, optimizer in (("opt_g", opt_g), ("opt_d", opt_d)):
        states = optimizer.state_dict()["state"] if optimizer else {}
        for i, values in states.items():
            tensors |= {f"{prefix}.{i}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def unpack(
    tensors: Tensors,
    G: nn.Module,
    D: nn.Module | None,
    opt_g: Optimizer,
    opt_d: Optimizer | None,
    state: Tensors | None = None,
) -> None:
    """The reverse of `pack`. Raises ValueError if a tensor has no place or a place no tensor."""

    def part(prefix: str) -> Tensors:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        for prefix, module in (("G.", G), ("D.", D)):
            if module is None and part(prefix):
                raise ValueError(f"{prefix}* has no place: this method has no such network")
            if module is not None:
                module.load_state_dict(part(prefix))
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    unpack_state(part("state."), state or {})
    for prefix, optimizer in (("opt_g.", opt_g), ("opt_d.", opt_d)):
        if not optimizer:
            continue
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states: dict[int, Tensors] = {}
        for name, value in part(prefix).items():
            i, key = name.split(".", 1)
            if int(i) >= len(parameters):
                raise ValueError(f"{prefix}{name} belongs to no parameter")
            like = parameters[int(i)]
            if value.ndim and value.shape != like.shape:
                raise ValueError(f"{prefix}{name} has the shape {tuple(value.shape)}")
            if value.ndim:  # fused optimizers need the parameter's memory format too
                value = torch.empty_like(like).copy_(value)
            states.setdefault(int(i), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})


def unpack_state(saved: Tensors, state: Tensors) -> None:
    """Replaces the tensors of a method's state by the saved ones."""
    shapes, wanted = ({k: tuple(v.shape) for k, v in x.items()} for x in (saved, state))
    if shapes != wanted:
        raise ValueError(f"the method's state is {shapes}, expected {wanted}")
    for name, value in saved.items():
        state[name] = value.to(state[name])


def checksum(tensors: Tensors, metadata: dict[str, str]) -> str:
    """SHA-256 of the metadata and of the tensors' names, types, shapes and bytes."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


# Writing.


def save(path: Path, tensors: Tensors, metadata: dict) -> None:
    """Writes a temporary file, then renames it: a reader sees the whole new file or the old one."""
    wrong = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if wrong:
        raise FloatingPointError(f"{wrong[0]} is not finite: {path} was not written")
    temporary = path.with_suffix(".tmp")
    text = {k: json.dumps(v, default=str) for k, v in metadata.items()}
    text |= {"format": "pt"}
    text |= {"checksum": checksum(tensors, text)}
    try:
        save_file(tensors, temporary, metadata=text)
        to_disk(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}): make room or choose another --out; "
            "earlier checkpoints are intact"
        ) from error


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open a folder
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@lru_cache  # asked once: a later checkout does not change the code that runs
def commit() -> str:
    """The commit of this code, "-dirty" if it was changed since, or "unknown" outside git.

    Studies add lines to results/, which is no code.
    """

    def git(*words: str) -> subprocess.CompletedProcess:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)

    try:
        name = git("describe", "--always", "--abbrev=12", "--exclude=*").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)results").returncode == 1
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return name + "-dirty" * changed if name else "unknown"


# Reading.


def read_checkpoint(path: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a safetensors file and its metadata, compared with its checksum if it has one.

    Raises ValueError for a file that is truncated, unreadable or does not fit its checksum.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: truncated or damaged ({error}); take an older checkpoint or fetch it again"
        ) from error
    written = metadata.pop("checksum", None)
    from_train = metadata.keys() >= KEYS  # every file of train.py has a checksum
    if (written or from_train) and written != checksum(tensors, metadata):
        raise ValueError(
            f"{path}: damaged, it does not have the checksum it was written with; take "
            "an older checkpoint or fetch it again"
        )
    return tensors, metadata


BEFORE = "before_adaptation.safetensors"  # the checkpoint at adv_start
OF_STEPS = "step_*.safetensors"  # the others, see `name_of`

KEYS = {"settings", "classes", "tgt_size", "step", "world", "commit"}  # train.py's metadata
OPTIONAL_KEYS = {"compiled"}  # a file without these can be read too


def read_metadata(path: Path) -> dict:
    """The metadata that train.py wrote; {} for weights of another origin."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if not found.keys() >= KEYS:
                return {}
            return {key: json.loads(found[key]) for key in KEYS | (OPTIONAL_KEYS & found.keys())}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no readable checkpoint ({error}): use an older one of the run"
        ) from error


def name_of(step: int) -> str:
    """The file name of the checkpoint after `step` steps."""
    return f"step_{step:07d}.safetensors"


def of_steps(folder: Path) -> list[Path]:
    """The checkpoints of a run folder except that of adv_start, oldest first."""
    return sorted(folder.glob(OF_STEPS))


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run folder: first that of adv_start, then the others, oldest first."""
    return [*folder.glob(BEFORE), *of_steps(folder)]


def drop_oldest(folder: Path, keep: int) -> None:
    """Delete all checkpoints of `of_steps` except the newest `keep`."""
    for path in of_steps(folder)[:-keep]:
        path.unlink()


def drop_unfinished(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for pattern in (OF_STEPS, BEFORE):
        for path in folder.glob(Path(pattern).with_suffix(".tmp").name):
            path.unlink()


def newest_checkpoint(path: Path) -> Path:
    """`path` if it is a file, else the last checkpoint of the run folder `path`."""
    if path.is_file():
        return path
    found = saved(path)
    if not found:
        raise ValueError(f"{path} holds no checkpoint: name a run folder of train.py or a file")
    return found[-1]


def newest_valid(folder: Path, say: Callable[..., None], rename: bool = True) -> Path:
    """The last whole checkpoint of a run folder. Says which files it skips, and why.

    Damaged files are renamed to *.damaged, not deleted. Only one of several processes does so: the
    one with `rename`.
    """
    newest = newest_checkpoint(folder)
    if newest == folder:  # `folder` is a file
        return folder
    for path in reversed(saved(folder)):
        try:
            read_checkpoint(path)
            return path
        except ValueError as error:
            if rename:
                path.rename(f"{path}.damaged")
            say(f"skipped and renamed to {path.name}.damaged: {error}", soft_wrap=True)
    raise ValueError(
        f"no checkpoint of {folder} is whole: start a new run with another --out, or restore one"
    )


# A run folder has one owner.


LOCK_WAIT = 10  # seconds; the loaders of a killed run hold its lock for up to five


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, so that no other process writes there. It ends with the process."""
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be created ({error}): choose another --out") from error
    lock, owner = filelock.FileLock(folder / ".lock"), folder / ".owner"
    try:
        lock.acquire(timeout=LOCK_WAIT)
    except filelock.Timeout:
        who = owner.read_text() if owner.exists() else "another process"
        raise ValueError(
            f"{folder} is in use by {who}: wait for it to end, or choose another --out"
        ) from None
    try:
        owner.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
        if fresh and [path.name for path in folder.iterdir()] == [".lock"]:  # the run was refused
            shutil.rmtree(folder)
