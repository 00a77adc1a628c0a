"""What several test files use: small data sets, runs, comparisons."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import baselines
import checkpoints
import clan
import models
import study
import train
from classes import LABEL_IDS
from measure import write_png16
from methods import METHODS, state_of
from models import Generator
from settings import configure
from weights import load_weights

HERE = Path(__file__).parents[1]

SHARED = HERE.parent / "shared" / "data"

# On tensors this small, threads that wait for each other cost more than they compute.
torch.set_num_threads(1)


def need(*parts: str) -> Path:
    """A path of the real data, or a skip that says what is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    return path


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit, and the same names."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ: {different[:5]}"


def closeness(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_labels(b=2, c=5, h=4, w=6, seed=9, ignored=0.3) -> torch.Tensor:
    generator = seeded(seed)
    labels = torch.randint(0, c, (b, h, w), generator=generator)
    return labels.where(torch.rand(b, h, w, generator=generator) >= ignored, 255)


EVERY_RECIPE = pytest.mark.parametrize("recipe", ("paper", "released"))

EVERY_METHOD = pytest.mark.parametrize("method", ("source", "tan", "clan"))


class AuthorsBlock(nn.Module):
    """Caffe's bottleneck: the stride in the first 1x1, the dilation in the 3x3."""

    def __init__(self, c_in, width, stride=1, dilation=1, project=False):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, kernel_size=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if project:
            conv = nn.Conv2d(c_in, 4 * width, kernel_size=1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class AuthorsHead(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(2048, classes, 3, padding=d, dilation=d) for d in (6, 12, 18, 24)
        )

    def forward(self, x):
        one, two, three, four = (conv(x) for conv in self.conv2d_list)
        return one + two + three + four


class AuthorsNet(nn.Module):
    """The released DeepLab-v2 ResNet-101 with two heads, by facts 1 and its weights' names."""

    def __init__(self, classes=19):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        c_in = 64
        plan = ((64, 3, 1, 1), (128, 4, 2, 1), (256, 23, 1, 2), (512, 3, 1, 4))
        for number, (width, depth, stride, dilation) in enumerate(plan, start=1):
            blocks = [AuthorsBlock(c_in, width, stride, dilation, project=True)]
            blocks += [AuthorsBlock(4 * width, width, 1, dilation) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            c_in = 4 * width
        self.layer5, self.layer6 = AuthorsHead(classes), AuthorsHead(classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.layer5(x), self.layer6(x)


def meta_generator(backbone: str, **options) -> models.Generator:
    """Shapes without memory or time."""
    with torch.device("meta"):
        return models.Generator(backbone, **options)


# Loading weights.


def quiet(_: str) -> None:
    pass


def refused(module, path, sentence) -> None:
    """A ValueError that names the file, and not one weight changed."""
    before = tensors_of(module)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_weights(module, path, say=quiet)
    assert str(path) in str(caught.value)
    assert_equal(tensors_of(module), before)


class Malice:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').write('run')",)


def write_png(path: Path, pixels: np.ndarray, palette=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(np.asarray(palette, np.uint8).flatten().tolist())
    image.save(path)
    return path


def random_ids(high: int, size=(24, 40), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, size).astype(np.uint8)


def striped(size, train_ids, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """An image whose colour says its train id in every pixel (13 times it), and its label."""
    label = np.random.default_rng(seed).choice(train_ids, size).astype(np.uint8)
    return np.repeat(13 * label[..., None], 3, axis=2), label


def make_gta5(folder: Path, count=5, size=(24, 40)) -> Path:
    for i in range(1, count + 1):
        image, label = striped(size, range(19), seed=i)
        write_png(folder / "images" / f"{i:05d}.png", image)
        write_png(folder / "labels" / f"{i:05d}.png", LABEL_IDS[label])
    return folder


def make_synthia(folder: Path, count=3, size=(24, 40)) -> Path:
    for i in range(count):
        write_png(folder / "RGB" / f"{i:07d}.png", striped(size, range(19), seed=i)[0])
        ids = np.zeros((*size, 3), np.uint16)
        ids[..., 0] = random_ids(23, size, seed=i)
        write_png16(folder / "GT" / "LABELS" / f"{i:07d}.png", ids)
    return folder


def make_cityscapes(folder: Path, splits=("train", "val"), count=3, size=(32, 64)) -> Path:
    for split in splits:
        for i in range(count):
            image, label = striped(size, range(19), seed=10 * len(split) + i)
            stem = f"ulm/ulm_{i:06d}_000019"
            write_png(folder / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", image)
            ids = LABEL_IDS[label]
            write_png(folder / "gtFine" / split / f"{stem}_gtFine_labelIds.png", ids)
    return folder


def make_folder(folder: Path, content=None, split="train", count=2, size=(24, 40)) -> Path:
    content = content or {"names": ["road", "lake", "car"], "ignore": [7]}
    for i in range(count):
        ids = random_ids(len(content["names"]), size, seed=i)
        ids[0, 0] = content["ignore"][0] if content.get("ignore") else 0
        image = np.repeat(40 * ids[..., None], 3, axis=2)
        write_png(folder / "images" / split / "a" / f"{i}.png", image)
        write_png(folder / "labels" / split / "a" / f"{i}.png", ids)
    (folder / "classes.json").write_text(json.dumps(content))
    return folder


def official_scores(predictions: list[Path], labels: list[Path]) -> dict[str, float]:
    """Class IoU by Cityscapes' own scorer."""
    scorer = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    args = scorer.args
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    result = scorer.evaluateImgLists([*map(str, predictions)], [*map(str, labels)], args)
    return result["classScores"] | {"mean": result["averageScoreClasses"]}


SMALL = "--src-size 32 64 --tgt-size 32 64 --steps 8 --adv-start 4 --batch 2 --d-channels 4"

SMALL = f"{SMALL} --log-every 2 --save-every 4 --keep 9 --device cpu".split()


def run(out: Path, *flags: str) -> Path:
    train.main([*SMALL, "--out", str(out), *flags])
    return out


def run_error(*flags: str) -> str:
    """The one sentence that a run ends with."""
    with pytest.raises(SystemExit) as caught:
        train.main([*flags])
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("error: ")
    return caught.value.code


def last_tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.newest_checkpoint(out))


def part(tensors: dict, prefix: str) -> dict:
    return {k: v for k, v in tensors.items() if k.startswith(prefix)}


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_logged(out: Path) -> list[dict]:
    """The lines of single steps, without those of scores."""
    return [line for line in metrics(out) if "seg" in line]


def replace_g_step(monkeypatch, g_step) -> None:
    """Every method of the table takes this step of G, until the test ends."""
    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, replace(method, g_step=g_step))


def g_step_at(G, D, batch, step: int, hyper):
    """clan.g_step in the phase of that step."""
    return clan.g_step(G, D, batch, clan.phase_at(step, hyper), hyper)


def before_step(monkeypatch, step: int, action) -> None:
    """A run calls `action` when that step (from 0) begins."""
    phase_at = clan.phase_at

    def watched(now, *arguments):
        if now == step:
            action()
        return phase_at(now, *arguments)

    monkeypatch.setattr(clan, "phase_at", watched)


def power_cut() -> None:
    raise RuntimeError("the power is gone")


def interrupt_at(monkeypatch, step: int, number=signal.SIGINT) -> None:
    """Ctrl-C during that step (from 0), as the terminal sends it."""
    before_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


def spoil(path: Path, how: str) -> None:
    """What a power cut or a bad disk leaves of a checkpoint."""
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[-100] ^= 1
    if how == "step":
        assert b'"step":"8"' in content
        content = content.replace(b'"step":"8"', b'"step":"4"')
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2]}.get(how, content))


REMEDY = re.compile(
    r"\b(use|replace|restore|convert|check|write|give|take|choose|drop|build|fetch|name|put|save|"
    r"add|expected|must|required|refused|unrecognized|choose from|invalid \w+ value)\b"
)


CELLS = "--src-size 32 64 --tgt-size 32 64 --steps 4 --adv-start 2 --batch 2 --d-channels 4"

CELLS = f"{CELLS} --log-every 1 --device cpu".split()


def studied(what: str, folder: Path, *flags: str) -> Path:
    if "images" in study.COMMANDS[what].reads and "--images" not in flags:
        flags = (*flags, "--images", "6")
    if "--results" not in flags:
        flags = (*flags, "--results", str(folder / "results"))
    study.main([what, *CELLS, "--runs", str(folder), "--to", str(folder), *flags])
    return folder


def study_error(what: str, folder: Path, *flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        studied(what, folder, *flags)
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("error: ")
    return caught.value.code


def torchrun(*flags: str, restarts: int = 0, **options) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "--max-restarts", str(restarts), str(HERE / "train.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, *flags], env=environment, **pipes | options)


def adaptation_of(name: str, **numbers: float):
    """(G, D, batch, phase, hyper, state) of a method in adaptation, with tiny on 32x64."""
    small = {} if "d_channels" in METHODS[name].unused else {"d_channels": 4}
    small |= {"colours": 0.0} if name == "selftrain" else {}  # no draws
    _, hyper = configure({"method": name} | small | numbers, tuned=False)
    torch.manual_seed(0)
    G, method = Generator("tiny", head_std=0.1), METHODS[name]
    D = train.second_network(G, hyper)
    state = state_of(method, G, hyper)
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8, generator=seeded())
    batch = clan.Batch(images, some_labels(2, 19, 32, 64), images.flip(3), (32, 64))
    if method.before_step:
        data = baselines.Images(lambda: [batch.target], lambda: [batch.labels])
        state |= method.before_step(hyper.adv_start, G, data, hyper)
    if "begun" in state:
        state["begun"] = torch.ones(())
    return G, D, batch, clan.phase_at(hyper.adv_start, hyper), hyper, state
