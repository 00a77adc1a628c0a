"""Checkpoints: what the next step depends on, in one safetensors file that is whole or not there.

    save(path, pack(G, D, opt_g, opt_d), {"step": 100, ...})
    tensors, _ = read_checkpoint(newest_valid(folder, print)); unpack(tensors, G, D, opt_g, opt_d)

Written beside its name, flushed to the disk and renamed; read against its checksum. A run folder
has one owner at a time.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# What is in one.


def pack(G, D, opt_g, opt_d) -> dict[str, torch.Tensor]:
    """Everything that the next step depends on, as flat tensors."""
    tensors = {}
    for prefix, module in (("G", G), ("D", D)):
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    for prefix, optimizer in (("opt_g", opt_g), ("opt_d", opt_d)):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {
                f"{prefix}.{i}.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)
            }
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def unpack(tensors: dict[str, torch.Tensor], G, D, opt_g, opt_d) -> None:
    """The reverse of `pack`. Raises ValueError where a tensor has no place or no value."""

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        G.load_state_dict(part("G."))
        D.load_state_dict(part("D."))
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    for prefix, optimizer in (("opt_g.", opt_g), ("opt_d.", opt_d)):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {}
        for name, value in part(prefix).items():
            i, key = name.split(".", 1)
            if int(i) >= len(parameters):
                raise ValueError(f"{prefix}{name} belongs to no parameter")
            like = parameters[int(i)]
            if value.ndim and value.shape != like.shape:
                raise ValueError(f"{prefix}{name} has the shape {tuple(value.shape)}")
            if value.ndim:  # the fused optimizers need its memory format too
                value = torch.empty_like(like).copy_(value)
            state.setdefault(int(i), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of the metadata and of the tensors' names, types, shapes and bytes."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


# Writing.


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Writes beside `path`, then renames: a reader sees the whole file or the one before it."""
    wrong = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if wrong:
        raise FloatingPointError(f"{wrong[0]} is not finite: {path} was not written")
    beside = path.with_suffix(".tmp")
    text = {k: json.dumps(v, default=str) for k, v in metadata.items()}
    text |= {"format": "pt"}
    text |= {"checksum": checksum(tensors, text)}
    try:
        save_file(tensors, beside, metadata=text)
        to_disk(beside)
        beside.chmod(0o644)
        beside.replace(path)
        to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}): make room or choose another --out; the "
            "checkpoints before it are intact"
        ) from error


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # only there can a folder be opened
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@lru_cache  # of the code that runs, not of what was checked out since
def commit() -> str:
    """The commit of this code, "-dirty" if it was changed since, or "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return result.stdout.strip() or "unknown"


# Reading.


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata, compared with the checksum if it has one.

    Raises ValueError for a file that is damaged in any way that can be seen.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: truncated or damaged ({error}); take an older checkpoint or fetch it again"
        ) from error
    theirs = metadata.pop("checksum", None)
    ours = metadata.keys() >= KEYS  # a file of train.py has one
    if (theirs or ours) and theirs != checksum(tensors, metadata):
        raise ValueError(
            f"{path}: damaged, it does not have the checksum it was written with; take "
            "an older checkpoint or fetch it again"
        )
    return tensors, metadata


BEFORE = "before_adaptation.safetensors"  # the checkpoint at adv_start

KEYS = {"settings", "classes", "tgt_size", "step", "world", "commit"}  # beside the tensors


def read_metadata(path: Path) -> dict:
    """What train.py wrote into a checkpoint, by KEYS; {} for weights of other origin."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if not found.keys() >= KEYS:
                return {}
            return {key: json.loads(found[key]) for key in KEYS}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no readable checkpoint ({error}): use an older one of the run"
        ) from error


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; that of adv_start before those of steps."""
    return [*folder.glob(BEFORE), *sorted(folder.glob("step_*.safetensors"))]


def newest_checkpoint(path: Path) -> Path:
    """The file itself, or the last checkpoint of a run folder."""
    if path.is_file():
        return path
    found = saved(path)
    if not found:
        raise ValueError(f"{path} holds no checkpoint: name a run folder of train.py or a file")
    return found[-1]


def newest_valid(folder: Path, say) -> Path:
    """The last checkpoint of a run folder that is whole; says which it passes over, and why.

    Those get another ending, so that they are in nobody's way and not lost.
    """
    newest = newest_checkpoint(folder)
    if newest == folder:  # a file, named as such
        return folder
    for path in reversed(saved(folder)):
        try:
            read_checkpoint(path)
            return path
        except ValueError as error:
            if int(os.environ.get("RANK", 0)) == 0:  # of several processes one moves it
                path.rename(f"{path}.damaged")
            say(f"passed over, now {path.name}.damaged: {error}", soft_wrap=True)
    raise ValueError(
        f"no checkpoint of {folder} is whole: begin anew with another --out, or restore one"
    )


# One owner a folder.


LOCK_WAIT = 10  # seconds: a killed run's loaders notice within five, and hold its lock until then


@contextlib.contextmanager
def owned(folder: Path):
    """Work in this folder alone. The lock ends with its process, however that ends."""
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error}): choose another --out") from error
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
        if fresh and [path.name for path in folder.iterdir()] == [".lock"]:  # a refused run
            shutil.rmtree(folder)
