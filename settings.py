"""Settings of a run: their defaults by data set and backbone, and the flags made from them.

    settings, hyper = configure({"src": "gta5", "backbone": "r101"})

A run is described by Settings and by the numbers of its method (clan.Hyper). Each field of both is
a flag, and its comment is the flag's help. A flag wins over the defaults of the data set and the
backbone, and these over the recipe.
"""

import argparse
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

import clan
from checkpoints import name_of, newest_valid, read_metadata, saved
from data import DATASETS
from devices import count_workers, launch, uses_bfloat16
from methods import METHODS, own_fields, unused_fields
from models import BACKBONES, check_choice, has_imagenet, lineage_for, strides_for
from selftrain import READ_BY

Compile = Literal["auto", "off", "on", "blocks"]
Looks = Literal["game", "mixed", "city"]
Cudnn = Literal["auto", "fastest", "deterministic"]
Flags = dict[str, Any]  # the flags that were given, by field


@dataclass(frozen=True)
class Settings:
    """What a run is, apart from the algorithm (clan.Hyper)."""

    # Data.
    src: str = "streets"  # labelled source
    tgt: str = "auto"  # unlabelled target; auto: streets for streets, else cityscapes
    data: Path = Path("data")  # folder that holds GTA5/, SYNTHIA/RAND_CITYSCAPES/, Cityscapes/
    src_dir: Path | None = None  # the source's own folder, instead of its place in --data
    tgt_dir: Path | None = None  # the target's own folder
    src_size: tuple[int, int] | None = None  # H W of the resized source; default: the data set's
    tgt_size: tuple[int, int] | None = None  # H W of the resized target; default: the data set's
    split: Literal["val", "dev"] = "val"  # of the target to score on; dev: to choose settings by

    # The embedded streets.
    shift: tuple[float, float] = (0.5, 0.5)  # how streets' city differs from its game: look, layout
    looks: Looks = "game"  # of streets as a source; mixed: each its own; city: for a bound
    scenes: int = 0  # which streets: each number draws all of them anew

    # The network and its first weights.
    backbone: str = "auto"  # auto: tiny for streets to streets, else r101
    init: str = "auto"  # first weights of G: a run, a file, imagenet or none; auto: imagenet if any
    lineage: str | None = None  # whose first weights: caffe or torchvision; default: by --init

    # The run, and what it writes.
    recipe: Literal["paper", "released"] = "paper"  # the numbers of the PDF or of the authors' code
    seed: int = 0  # for the initial weights, the order of the samples and their augmentation
    out: Path | None = None  # run folder; default: runs/SRC-TGT-BACKBONE-METHOD-seedN
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps between scores on the target, from adv_start on; 0: at the end
    save_every: int = 1000  # steps between checkpoints
    keep: int = 3  # how many checkpoints to keep

    # Speed and memory.
    device: str = "auto"  # cpu, cuda, cuda:1; auto: the GPU if there is one
    amp: Literal["auto", "off", "bf16"] = "auto"  # bfloat16 where it is safe; auto: on CUDA
    compile: Compile = "auto"  # steps, or E's blocks, once checked; auto: long runs on CUDA
    cudnn: Cudnn = "auto"  # how it chooses algorithms; fastest: by trial, which may change bits
    merge_heads: bool = False  # one convolution a dilation for both heads; for CUDA, not measured
    recompute: bool = False  # compute E's blocks again in the backward pass: less memory, slower
    workers: int = -1  # processes that read images; -1: one a core, at most 8; none for streets

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{flag_of(name)} must be at least {least}")
        if not all(0 <= x <= 1 for x in self.shift):
            raise ValueError(f"--shift {self.shift[0]} {self.shift[1]}: both must lie in [0, 1]")
        for side in ("src", "tgt"):
            size = getattr(self, f"{side}_size")
            if size and min(size) < 32:
                raise ValueError(f"--{side}-size must be at least 32 32: D needs that many pixels")
            if getattr(self, side) == "streets" and getattr(self, f"{side}_dir"):
                raise ValueError(f"--{side} streets is drawn, not read: drop --{side}-dir")
        if self.src != "streets" and self.looks != Settings.looks:
            raise ValueError(f"--looks is only for --src streets: drop it, or --src {self.src}")
        if self.scenes and "streets" not in (self.src, self.tgt):
            raise ValueError("--scenes is only for streets: drop it")
        if self.tgt not in ("streets", "auto") and self.split == "dev":
            raise ValueError(f"--split dev is only for --tgt streets: drop it, or --tgt {self.tgt}")
        if self.tgt not in ("streets", "auto") and self.shift != (0.5, 0.5):
            raise ValueError(f"--shift is only for --tgt streets: drop it, or --tgt {self.tgt}")

    @property
    def folder(self) -> Path:
        """The run folder, after `configure` has named it."""
        if self.out is None:
            raise ValueError("these settings name no run folder: make them with configure")
        return self.out


LEAST = {
    "log_every": 1,
    "save_every": 1,
    "keep": 1,
    "eval_every": 0,
    "workers": -1,
    "seed": 0,
    "scenes": 0,
}

# Settings that a resumed run may change: folders, device, and when something is written. (Another
# device rounds differently. A resumed run is equal bit for bit only on the same device.)
FREE = {"data", "src_dir", "tgt_dir", "out", "device", "compile", "cudnn"}
FREE |= {"recompute", "workers", "log_every"}
FREE |= {"eval_every", "save_every", "keep"}

# What a backbone changes in the recipe. tiny and lite0 take few steps at larger rates, and begin
# with the source alone.
SMALL = {"batch": 4, "lr_g": 0.02, "head_lr": 1.0, "bn_affine": True, "batchnorm": "before"}
SMALL |= {"crop": False, "lambda_adv": 0.005, "lr_d": 1e-4, "d_channels": 32}
OF_BACKBONE: dict[str, Flags] = {
    # Chosen by `study.py sweep`; TAN and CLAN were best with the same numbers.
    "tiny": SMALL
    | {"steps": 1600, "adv_start": 1100, "seg_heads": "each"}
    | {"lambda_local": 147.0, "lambda_adv": 0.05},
    # By the same sweep on streets at 96x128; one lambda_adv is as good for TAN as for CLAN.
    "lite0": SMALL
    | {"steps": 400, "adv_start": 250, "warmup": 0.05, "jitter": 0.2, "seg_heads": "each"}
    | {"lambda_local": 119.0},
}


# What a method changes in its backbone's numbers. CDA's easy tasks are linear layers in D's place,
# and learn nothing at D's rate.
OF_METHOD: dict[str, Flags] = {"cda": {"lr_d": 0.01}}
# And on the small backbones. The D of a small network is narrow, and one that sees single pixels
# needs a larger rate than TAN's to tell the domains apart (tests/test_baselines.py). Where a loss
# of FCNs in the wild or CDA counts fully, its gradient is ten times or more that of the source's.
OF_SMALL: dict[str, Flags] = {
    "cycada": {"d_width": 64, "lr_d": 1e-3},
    "fcns_wild": {"d_width": 128, "lr_d": 1e-3, "lambda_size": 0.01},
    "cross_city": {"lr_d": 1e-3},
    "cda": {"lambda_landmark": 0.03, "lambda_layout": 0.01},
}
# The second level begins with a fifth of lambda_adv, as in its code.
OF_BOTH: dict[tuple[str, str], Flags] = {
    ("tiny", "multi"): {"lambda_adv_aux": 0.01},
    ("lite0", "multi"): {"lambda_adv_aux": 0.001},
}
# What `study.py tune` has chosen, by backbone and method.
TUNED: dict[tuple[str, str], Flags] = {
    ("tiny", "mcd"): {"lambda_dis": 10.0, "mcd_steps": 2},
    ("tiny", "advent"): {"lambda_adv": 0.002, "lr_d": 2.7e-3},
    ("tiny", "st"): {"portion": 0.35, "lambda_st": 0.3},
    ("tiny", "cbst"): {"portion": 0.7, "lambda_st": 0.3},
    ("tiny", "fcns_wild"): {"lambda_size": 0.003, "lambda_adv": 0.05},
    ("tiny", "cda"): {"lambda_landmark": 0.00027, "lambda_layout": 0.01},
}
OF_ADVERSARY = {"lambda_adv", "lambda_adv_aux", "lambda_class"}


def chosen_numbers(backbone: str, method: str) -> Flags:
    """Those of TUNED. lite0 has tiny's, and weights of an adversary in proportion to lambda_adv.

    Photographs have no labels to choose by, and on streets lite0 gains too little to choose.
    """
    if backbone != "lite0" or (backbone, method) in TUNED:
        return TUNED.get((backbone, method), {})
    ratio = OF_BACKBONE["lite0"]["lambda_adv"] / OF_BACKBONE["tiny"]["lambda_adv"]
    found = TUNED.get(("tiny", method), {})
    return {k: ratio * v if k in OF_ADVERSARY else v for k, v in found.items()}


# Of a second stage that goes on with another run. tiny's numbers are by `study.py trials`. lite0
# has fewer steps, and a teacher that keeps as little of its start as tiny's. With larger backbones
# the fields have their defaults. Neither was tried out.
OF_STAGE: Flags = {"adv_start": 0, "lr_g": 0.005, "class_mix": True, "batchnorm": "batch"}
SECOND_STAGE: dict[str, Flags] = {
    "tiny": OF_STAGE | {"steps": 500, "teacher_momentum": 0.997},
    "lite0": OF_STAGE | {"steps": 150, "teacher_momentum": 0.99, "warmup": 0.0},
}


def short_side(backbone: str) -> int:
    """Of a folder's images, unless --tgt-size or --src-size gives another size."""
    return {"tiny": 144, "lite0": 192}.get(backbone, 512)


def less_memory(settings: Settings, hyper: clan.Hyper, resumed: bool = False) -> str:
    """A sentence or two: the flags that would lower the memory of this run on this machine.

    resumed: it goes on from a checkpoint, so only flags of FREE can change.
    """
    flags = memory_flags(settings, hyper)
    now = [words for name, words in flags.items() if name in FREE or not resumed]
    later = [words for words in flags.values() if words not in now]
    sentences = [f"Give {one_of(now)}."] if now else []
    if later:
        sentences.append(f"{'Or start' if now else 'Start'} a new run with {one_of(later)}.")
    return " ".join(sentences) or "No flag lowers it: use a machine with more memory."


def one_of(words: list[str]) -> str:
    """a, b or c"""
    return ", ".join([*words[:-2], " or ".join(words[-2:])])


def memory_flags(settings: Settings, hyper: clan.Hyper) -> dict[str, str]:
    """What to give so that this run takes less memory, by the field that it sets."""
    words: dict[str, str] = {}
    if settings.backbone != "vgg16" and not settings.recompute:  # vgg16 has no residual blocks
        compiled = settings.compile in ("on", "blocks")
        words["recompute"] = "--recompute" + " with --compile off" * compiled
    device = settings.device.split(":")[0]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not uses_bfloat16(settings.amp, torch.device(device)):
        words["amp"] = "--amp bf16"
    words |= size_flags(settings, hyper.crop)
    if hyper.batch > 1:
        words["batch"] = f"a smaller --batch than {hyper.batch}"
    drawn = settings.src == settings.tgt == "streets"
    if workers := count_workers(settings.workers, drawn):
        words["workers"] = f"fewer --workers than {workers}"
        words["workers"] += " (for the computer's own memory)" * (device == "cuda")
    return words


def size_flags(settings: Settings, crops: bool) -> dict[str, str]:
    """Of `memory_flags` those that make the images smaller. crops: the run trains on crops."""
    words: dict[str, str] = {}
    for side in ("src", "tgt"):
        name, field = getattr(settings, side), f"{side}_size"
        size = getattr(settings, field) or DATASETS[name].size
        if side == "src" and name == "streets" and not settings.src_size:
            continue  # drawn at the size of its target
        if size is None:
            of_folder = short_side(settings.backbone)
            words[field] = f"a {flag_of(field)} with a short side below {of_folder}"
            continue
        # Only a data set with a place in --data has crops, of 512x1024.
        crop = (min(size[0], 512), min(size[1], 1024)) if DATASETS[name].folder else size
        if crop != size and not crops:
            words["crop"] = "--crop"
        seen = crop if crops else size
        if max(seen) > 32:
            words[field] = f"a smaller {flag_of(field)} than {shown(seen)}"
    return words


def defaults(settings: Settings) -> Flags:
    """What the data set and the backbone change in the recipe."""
    size = settings.tgt_size or DATASETS[settings.tgt].size
    change: Flags = {"d_strides": strides_for(min(size) if size else short_side(settings.backbone))}
    change |= OF_BACKBONE.get(settings.backbone, {})
    if settings.src == "synthia" and settings.recipe == "released":
        change |= {"lambda_local": 10.0}
    if settings.backbone == "tiny" and settings.recipe == "paper":
        change |= {"detach_m": True}  # else M falls to near 0, and the weight to eps: RESULTS.md
    return change


def lineage_of_run(flags: Flags) -> str | None:
    """The lineage of --init, if it is a run of this backbone or one of its checkpoints."""
    path = Path(flags["init"])
    found = saved(path)[-1:] if path.is_dir() else [path] * path.is_file()
    settings = (read_metadata(found[0]) if found else {}).get("settings", {})
    return settings.get("lineage") if settings.get("backbone") == flags["backbone"] else None


def configure(flags: Flags, tuned: bool = True) -> tuple[Settings, clan.Hyper]:
    """Settings and hyper-parameters of a run: the recipe, its defaults, then the flags given.

    tuned: with what TUNED says of the method.
    """
    names = {field.name for field in fields(Settings)}
    of_settings = {k: v for k, v in flags.items() if k in names}
    src = of_settings.get("src", Settings.src)
    if of_settings.get("tgt", "auto") == "auto":
        of_settings["tgt"] = "streets" if src == "streets" else "cityscapes"
    if of_settings.get("backbone", "auto") == "auto":
        on_streets = (src, of_settings["tgt"]) == ("streets", "streets")
        of_settings["backbone"] = "tiny" if on_streets else "r101"
    if of_settings.get("init", "auto") == "auto":
        of_settings["init"] = "imagenet" if has_imagenet(of_settings["backbone"]) else "none"
    lineage = lineage_for(of_settings["backbone"], of_settings["init"])
    of_settings.setdefault("lineage", lineage_of_run(of_settings) or lineage)
    settings = Settings(**of_settings)

    numbers = asdict(clan.RECIPES[settings.recipe]) | defaults(settings)
    name = flags.get("method", clan.Hyper.method)
    both = (settings.backbone, name)
    numbers |= OF_METHOD.get(name, {}) | OF_BOTH.get(both, {})
    numbers |= OF_SMALL.get(name, {}) if settings.backbone in OF_BACKBONE else {}
    numbers |= chosen_numbers(*both) if tuned else {}
    if flags.get("method") == "selftrain" and settings.init not in ("none", "imagenet"):
        numbers |= SECOND_STAGE.get(settings.backbone, {"adv_start": 0})
        numbers["class_mix"] = numbers.get("class_mix", False) and not flags.get("source_free")
    numbers |= {k: v for k, v in flags.items() if k not in names}
    check_choice("method", numbers["method"], METHODS)
    if settings.out is None:
        task = f"{settings.src}-{settings.tgt}-{settings.backbone}"
        name = f"{task}-{numbers['method']}-seed{settings.seed}"
        of_settings["out"] = Path("runs") / name
    return Settings(**of_settings), METHODS[numbers["method"]].numbers(**numbers)


# The command line: one flag for each field, with the field's comment as its help.


def choices() -> dict[str, tuple[str, ...]]:
    """The values of the fields whose choices are the rows of a table."""
    return {
        "src": tuple(DATASETS),
        "tgt": (*DATASETS, "auto"),
        "backbone": (*BACKBONES, "auto"),
        "method": tuple(METHODS),
    }


@lru_cache
def comments(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass."""
    found = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE)
    return dict(found)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


@lru_cache
def groups(cls: type) -> dict[str, str]:
    """The group of each field: the comment line above the first of them."""
    found, title = {}, cls.__name__
    for line in inspect.getsource(cls).splitlines():
        heading = re.fullmatch(r"    # (.*)\.", line)
        field = re.match(r"    (\w+): .*?  # ", line)
        title = heading[1] if heading else title
        if field:
            found[field[1]] = title
    return found


def shown(value: Any) -> str:
    """A value as one would write it after its flag."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    values: dict[str, Any],
    title: str | None = None,
    without: Collection[str] = (),
) -> None:
    """A flag for each field, in the groups of the dataclass; `values` are shown as defaults.

    The parsed arguments hold only the flags that were given.
    """
    help_of, group_of = comments(cls), groups(cls)
    in_group: dict[str, Any] = {}
    hints, of_tables = typing.get_type_hints(cls), choices()
    for field in fields(cls):
        if field.name in without:
            continue
        name = title or group_of[field.name]
        if name not in in_group:
            in_group[name] = parser.add_argument_group(name)
        kind = hints[field.name]
        options: dict[str, Any]
        if isinstance(kind, types.UnionType):  # X | None
            kind = typing.get_args(kind)[0]
        if field.name in of_tables:
            options = {"choices": of_tables[field.name]}
            if len(", ".join(options["choices"])) > 60:  # too long for a line of the help
                options["metavar"] = "NAME"
        elif typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            many = inner[1] is ...
            pair = ("H", "W") if inner[0] is int else ("LOOK", "LAYOUT")
            options = {"type": inner[0], "nargs": "+" if many else len(inner)}
            options["metavar"] = "N" if many else pair
        else:
            metavars: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}
            options = {"type": kind, "metavar": metavars.get(kind, "NAME")}
        many = "choices" in options and "metavar" in options
        listed = f": {', '.join(options['choices'])}" if many else ""
        text = f"{help_of[field.name]}{listed} [{shown(values[field.name])}]".replace("%", "%%")
        flag, suppressed = flag_of(field.name), argparse.SUPPRESS
        in_group[name].add_argument(flag, help=text, default=suppressed, **options)


def add_run_flags(
    parser: argparse.ArgumentParser,
    without: Collection[str] = (),
    flags: Flags | None = None,
) -> None:
    """All flags that describe a run. Those that not all methods have stand under the names of
    theirs, in the words of the chosen method if it has them.

    flags: those that are given. The help shows the defaults that follow from them; with
    selftrain_start those of the first part, but the steps of both and the stage's own numbers.
    """
    first, last = both_parts(flags or {})
    settings, hyper = configure(first or last)
    values = vars(settings) | vars(hyper) | shown_sizes(settings)
    if first:
        _, of_stage = configure(last)
        values |= {name: getattr(of_stage, name) for name in own_fields("selftrain")}
        values["steps"] += of_stage.steps
    for cls in (Settings, clan.Hyper):
        add_flags(parser, cls, values, without=without)
    known = {field.name for field in fields(clan.Hyper)} | {*without}
    for name in dict.fromkeys((hyper.method, *METHODS)):
        numbers = METHODS[name].numbers
        titles = {field: title_of(field) for field in own_fields(name) - known}
        for title in dict.fromkeys(titles.values()):
            others = {f.name for f in fields(numbers) if titles.get(f.name) != title}
            defaults_of = {f.name: f.default for f in fields(numbers)} | values
            add_flags(parser, numbers, defaults_of, title, without=others)
        known |= titles.keys()


def title_of(name: str) -> str:
    """In the help, of a number that not all methods have."""
    return f"--method {', '.join(m for m in METHODS if name in own_fields(m))}"


def shown_sizes(settings: Settings) -> Flags:
    """The sizes that a run will take, for its help: H W, or what a folder's follow from."""
    of_folder = f"short side {short_side(settings.backbone)}"
    target = settings.tgt_size or DATASETS[settings.tgt].size or of_folder
    source = settings.src_size or DATASETS[settings.src].size or of_folder
    if settings.src == "streets" and not settings.src_size:  # drawn at the target's size
        source = target
    return {"src_size": source, "tgt_size": target}


def run_parser(description: str, flags: Flags | None = None) -> argparse.ArgumentParser:
    """The flags of train.py. description: a line, and more after a blank line for the end."""
    first, _, rest = description.partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="python train.py [flags]",
        description=first,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=Path(),
        type=Path,
        help="go on from a run folder or a checkpoint; without a value: from the newest of --out",
    )
    parser.add_argument(
        "--selftrain-start",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="steps of --method, after which a second stage begins; --steps counts both. With it "
        "the rates shown below are those of --method",
    )
    add_run_flags(parser, flags=flags)
    return parser


def flags_in(arguments: argparse.Namespace) -> tuple[Flags, Path | None]:
    flags = vars(arguments)
    resume = flags.pop("resume", None)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}, resume


def parse(argv: list[str] | None, description: str = "") -> tuple[Flags, Path | None]:
    """The flags that were given, by field name, and what to resume from.

    With --help it prints what follows from the other flags, and ends.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = run_parser(description)
    asked = [word for word in argv if word in ("-h", "--help")]
    if asked:
        rest = [word for word in argv if word not in asked]
        try:
            flags, resume = flags_in(parser.parse_args(rest))
            if resume is not None:
                flags.pop("selftrain_start", None)
                flags, _ = resumed(flags, resume, lambda *_, **__: None)
            parser = run_parser(description, flags)
        except ValueError as error:
            parser.error(str(error))
        parser.print_help()
        sys.exit(0)
    return flags_in(parser.parse_args(argv))


def refuse_unused_flags(flags: Flags) -> None:
    """Reject flags that the chosen method does not use."""
    method = flags.get("method", clan.Hyper.method)
    unused = [flag_of(name) for name in flags if name in unused_fields(method)]
    if unused:
        raise ValueError(f"--method {method} does not use {', '.join(unused)}: drop one of the two")


# A run with a second stage.


def refuse_stage_without_start(flags: Flags) -> None:
    """Raises ValueError for a second stage that goes on with nothing, and has no numbers then.

    --tau has no value that fits all networks: M differs by orders of magnitude.
    """
    if flags.get("method") != "selftrain":
        return
    if flags.get("init", "auto") in ("auto", "none", "imagenet") and "adv_start" not in flags:
        raise ValueError(
            "--method selftrain goes on with a network that has learnt: give --init RUN. For both "
            "parts in one run give another --method and --selftrain-start N"
        )
    if flags.get("trust") in READ_BY["tau"] and "tau" not in flags:
        raise ValueError(
            f"--trust {flags['trust']} needs --tau, about as small as most values of M are (tiny: "
            "1.6e-5). --trust least_m reads M as well, and needs none"
        )


def both_parts(flags: Flags, resume: Path | None = None) -> tuple[Flags | None, Flags]:
    """The flags of the first part and of the second stage: two runs, the one in the other's folder.

    Without --selftrain-start there is one run, and the first part is None. A flag that both parts
    use holds for both.
    """
    flags = dict(flags)
    start = flags.pop("selftrain_start", None)
    if start is None:
        return None, flags
    if flags.get("method") == "selftrain" or start < 1:
        raise ValueError("--selftrain-start N follows N > 0 steps of another --method: name that")
    if flags.get("steps", start + 1) <= start:
        raise ValueError(f"--steps counts both parts: give more than --selftrain-start {start}")
    of_second, unused = own_fields("selftrain"), unused_fields("selftrain") | {"adv_start", "init"}
    first = {k: v for k, v in flags.items() if k not in of_second} | {"steps": start}
    second = {k: v for k, v in flags.items() if k not in unused} | {"method": "selftrain"}
    second["lineage"] = configure(first)[0].lineage
    if "steps" in flags:
        second["steps"] = flags["steps"] - start
    out = configure(second | {"init": "first"})[0].folder
    if resume and resume != Path() and resume.is_dir():
        out = resume
    first["out"] = out / "first"
    return first, second | {"out": out, "init": str(out / "first" / name_of(start))}


# Going on with a run.


def run_folder(flags: Flags, resume: Path | None) -> Path:
    """The folder that a run with these flags will write to."""
    if resume is None or resume == Path() or "out" in flags:
        return configure(flags)[0].folder
    if not resume.exists():
        raise ValueError(f"{resume} does not exist: give a run folder or a checkpoint to --resume")
    return resume.parent if resume.is_file() else resume


def restarted(flags: Flags, resume: Path | None) -> Path | None:
    """What to go on from. A process that torchrun --max-restarts has started again takes what it
    has saved since then; otherwise the flag holds."""
    if launch().restarts == 0:
        return resume
    folder = run_folder(flags, resume)
    return folder if saved(folder) else resume


def resumed(flags: Flags, resume: Path, say: Callable[..., None]) -> tuple[Flags, Path]:
    """The flags of the run to resume, and its checkpoint. A given flag may not contradict them."""
    folder = run_folder(flags, None) if resume == Path() else resume
    path = newest_valid(folder, say, rename=launch().rank == 0)
    metadata = read_metadata(path)
    if not metadata:
        raise ValueError(f"{path} is no checkpoint of train.py: use it with --init")
    refuse_other_version(path, metadata)
    saved_flags: Flags = metadata["settings"]
    before = {k: tuple(v) if isinstance(v, list) else v for k, v in saved_flags.items()}
    changed = [
        f"{flag_of(k)} {v} (was {before.get(k)})"
        for k, v in flags.items()
        if k not in FREE and v != before.get(k)
    ]
    if changed:
        raise ValueError(
            f"{path} was made with other settings: drop {', '.join(changed)}, or start a new run "
            "with --out"
        )
    world, now = metadata["world"], launch().world
    if world != now:
        raise ValueError(
            f"{path} was made by {world} processes, not by {now}, which changes the batch: "
            f"use torchrun --nproc-per-node {world}, or start a new run with --out"
        )
    say(f"going on from {path}", soft_wrap=True)
    keys = ("data", "src_dir", "tgt_dir", "out")
    paths = {k: saved_flags[k] and Path(saved_flags[k]) for k in keys}
    return before | paths | {"out": path.parent} | flags, path


def refuse_other_version(path: Path, metadata: dict) -> None:
    """Raises ValueError for a checkpoint whose settings are not those of this code."""
    method = METHODS.get(metadata["settings"].get("method"))
    numbers = method.numbers if method else clan.Hyper
    known = {field.name for cls in (Settings, numbers) for field in fields(cls)}
    names = ", ".join(sorted(metadata["settings"].keys() ^ known))
    if names:
        raise ValueError(
            f"{path} was made by another version of this code ({names}): use commit "
            f"{metadata['commit']}, or its weights with --init"
        )
