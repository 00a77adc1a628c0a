"""Bad input: the answer is one sentence that names it, an exit code, and nothing written."""

import io
import json
import math
import pickle
import re
import struct
import sys
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REMEDY, SMALL, Malice, make_cityscapes, make_folder, make_gta5, make_synthia
from PIL import Image
from safetensors.torch import load_file, save_file

import bench
import data
import eval as evaluation
import folders
import study
import train
from clan import Hyper
from settings import Settings, flag_of

# Bad input: the answer is one sentence that names it, an exit code, and nothing written.


def png_bytes(pixels, mode: str | None = None, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(pixels)
    output = io.BytesIO()
    (image.convert(mode) if mode else image).save(output, kind, **options)
    return output.getvalue()


def damaged_files(good: bytes) -> dict[str, bytes]:
    """What is no image any more, whatever was to be read from it."""
    size = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    huge = good[:16] + size + good[24:29]
    huge += struct.pack(">I", zlib.crc32(good[12:16] + size + good[24:29])) + good[33:]
    middle = len(good) // 2
    return {
        "empty": b"",
        "one byte": good[:1],
        "text": b"not an image\n",
        "html": b"<!DOCTYPE html><html>404 Not Found</html>",
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "zeros": bytes(len(good)),
        "noise": np.random.default_rng(0).bytes(len(good)),
        "signature alone": good[:8],
        "header alone": good[:33],
        "first half": good[:middle],
        "another checksum": good[:45] + bytes([good[45] ^ 255]) + good[46:],
        "a hole": good[: middle - 8] + bytes(16) + good[middle + 8 :],
        "zip": b"PK\x03\x04" + good,
        "pickle": pickle.dumps({"a": 1}),
        "json": b'{"names": []}',
        "a size of 2^31": huge,
        "no width": good[:16] + bytes(4) + good[20:],
    }


def strange_labels(ids: np.ndarray) -> dict[str, bytes]:
    """Images that are whole, but no label of this data set."""
    rgb = np.stack([ids] * 3, axis=2)
    frames = [Image.fromarray(ids), Image.fromarray(ids + 1)]
    animated = io.BytesIO()
    frames[0].save(animated, "PNG", save_all=True, append_images=frames[1:])
    return {
        "RGB": png_bytes(rgb),
        "RGBA": png_bytes(rgb, "RGBA"),
        "grey with alpha": png_bytes(ids, "LA"),
        "1 bit": png_bytes(ids > 7, "1"),
        "16 bit grey": png_bytes(ids.astype(np.uint16)),
        "CMYK": png_bytes(rgb, "CMYK", "JPEG"),
        "float": png_bytes(ids.astype(np.float32), None, "TIFF"),
        "animated": animated.getvalue(),
        "another size": png_bytes(ids[:20]),
        "turned": png_bytes(np.ascontiguousarray(ids.T)),
        "one pixel": png_bytes(ids[:1, :1]),
        "ids outside the map": png_bytes(ids + 100),
        "one wrong pixel": png_bytes(np.where(np.arange(ids.size).reshape(ids.shape), ids, 222)),
    }


def small_set(name: str, root: Path) -> tuple[Path, Path]:
    """A data set of two pairs; returns the image and the label that will be spoilt."""
    makers = {"gta5": make_gta5, "synthia": make_synthia, "cityscapes": make_cityscapes}
    makers["folder"] = make_folder
    folder = makers[name](root, count=2)
    return data.open_dataset(name, "target", "train", folder).items[0]


def complaint(program, argv: list, capsys) -> str:
    """What a program says of bad input, without argparse's usage; it must end with a code and show
    no traceback."""
    code = None
    try:
        code = program([str(part) for part in argv])
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    said = shown.out + shown.err + (code if isinstance(code, str) else "")
    assert code not in (None, 0), f"{argv} was taken without a word"
    assert "Traceback" not in said
    return " ".join(re.sub(r"usage: (.|\n)*?\n(?=\S+: error)", "", said).split())


@pytest.mark.parametrize("part", ("image", "label"))
@pytest.mark.parametrize("name", ("gta5", "synthia", "cityscapes", "folder"))
def test_bad_input_every_damaged_or_strange_file_is_named(tmp_path, capsys, name, part):
    """185 files in all."""
    root = tmp_path / "set"
    image, label = small_set(name, root)
    assert data.main([name, "--dir", str(root)]) == 0
    capsys.readouterr()
    path = image if part == "image" else label
    cases = damaged_files(path.read_bytes())
    if part == "label":
        cases |= strange_labels(np.asarray(Image.open(label).convert("L")))
        taken = ("RGB", "1 bit", "16 bit grey") if name == "folder" else ()
        cases = {case: content for case, content in cases.items() if case not in taken}
    for case, content in cases.items():
        path.write_bytes(content)
        said = complaint(data.main, [name, "--dir", root], capsys)
        assert path.name in said, case
        assert "1 of 2 pairs are wrong" in said or "error: " in said, case
        assert REMEDY.search(said), (case, said)
        assert path.read_bytes() == content, case
    assert len(cases) == (17 if part == "image" else 27 if name == "folder" else 30)


@pytest.mark.parametrize("part", ("image", "label"))
@pytest.mark.parametrize("name", ("gta5", "synthia", "cityscapes", "folder"))
def test_bad_input_missing_and_looping_files_are_named(tmp_path, capsys, name, part):
    root = tmp_path / "set"
    image, label = small_set(name, root)
    path = image if part == "image" else label
    for make in (
        lambda: path.symlink_to(tmp_path / "nowhere"),
        lambda: path.symlink_to(path),
        lambda: None if part == "image" and name != "folder" else path.mkdir(),
    ):
        path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()
        make()
        if not path.is_symlink() and part == "image":
            continue  # an image that is not there is no image
        assert path.name in complaint(data.main, [name, "--dir", root], capsys)


def test_bad_input_photographs_of_every_mode_are_read_or_refused(tmp_path):
    """CMYK, 1-bit, alpha and turned photographs are photographs; 16 bits a colour are not."""
    rgb = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    for mode, kind in (("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("P", "PNG")):
        (tmp_path / "x.png").write_bytes(png_bytes(rgb, mode, kind))
        assert data.read_image(tmp_path / "x.png").shape == (30, 40, 3)
    (tmp_path / "x.jpg").write_bytes(png_bytes(rgb, "CMYK", "JPEG"))
    assert data.read_image(tmp_path / "x.jpg").shape == (30, 40, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    (tmp_path / "x.jpg").write_bytes(png_bytes(rgb, None, "JPEG", exif=exif))
    assert data.read_image(tmp_path / "x.jpg").shape == (40, 30, 3)
    (tmp_path / "x.png").write_bytes(png_bytes(rgb[..., 0].astype(np.uint16)))
    with pytest.raises(ValueError, match=r"x.png has 16 bits"):
        data.read_image(tmp_path / "x.png")


def test_bad_input_names_of_any_alphabet_and_length_work(tmp_path, capsys):
    root = tmp_path / "straße 街 🚗"
    image, label = small_set("folder", root)
    for stem in ("straße 街 🚗", "a" * 240, "-rf", "a;b", "a'b\"c", "[red]a", "%s{0}"):
        image = image.rename(image.with_name(f"{stem}.png"))
        label = label.rename(label.with_name(f"{stem}.png"))
        assert data.main(["folder", "--dir", str(root)]) == 0
        content = label.read_bytes()
        label.write_bytes(b"")
        assert "".join(stem.split()) in "".join(
            complaint(data.main, ["folder", "--dir", root], capsys).split()
        )
        label.write_bytes(content)


CLASS_FILES = (
    *("", "{", "[]", "null", "3", '"names"', "{}", '{"names": []}', '{"names": null}'),
    *('{"names": "road"}', '{"names": [1]}', '{"names": [null]}', '{"names": ["a", "a"]}'),
    *('{"names": ["a"], "ignore": 3}', '{"names": ["a"], "ignore": ["b"]}', '{"name": ["a"]}'),
    *('{"names": ["a"], "ignore": [0]}', '{"names": ["a"], "ignore": [256]}'),
    *('{"names": ["a"], "ignore": [-1]}', '{"names": ["a"], "colours": []}', '{"names": {}}'),
    *('{"names": [["a"]]}', '{"names": ["a"], "ignore": [1.5]}', "\ufeff{", "NaN", "\0"),
    json.dumps({"names": [str(i) for i in range(255)]}),
)


def test_bad_input_class_files(tmp_path, capsys):
    root = tmp_path / "set"
    small_set("folder", root)
    for content in CLASS_FILES:
        folders.read_classes.cache_clear()
        (root / "classes.json").write_text(content)
        said = complaint(data.main, ["folder", "--dir", root], capsys)
        assert "classes.json is not a class list" in said and REMEDY.search(said), content
    (root / "classes.json").write_bytes(b"\xff\xfe\x00")
    folders.read_classes.cache_clear()
    assert "classes.json is not a class list" in complaint(
        data.main, ["folder", "--dir", root], capsys
    )
    folders.read_classes.cache_clear()


def wrong_weights(folder: Path, good: Path) -> list[Path]:
    """Files that are no weights of a tiny G; those with code would leave a trace in `folder`."""
    tensors = {k: v for k, v in load_file(good).items() if k.startswith("G.")}
    first, content = min(tensors), good.read_bytes()
    few_tensors = dict(list(tensors.items())[:5])
    (folder / "extra").mkdir()
    states = {
        "missing": few_tensors,
        "extra": tensors | {f"G.E.more.{i}": torch.zeros(1) for i in range(99)},
        "reshaped": {k: v.reshape(1, *v.shape) for k, v in tensors.items()},
        "nan": tensors | {first: torch.full_like(tensors[first], math.nan)},
        "inf": tensors | {first: torch.full_like(tensors[first], math.inf)},
        "other": {f"G.E.layer{i}.weight": torch.zeros(3) for i in range(99)},
        "d only": {"D.conv1.weight": torch.zeros(3)},
        "nothing": {},
    }
    files = {
        **{name: content[:n] for name, n in (("empty", 0), ("short", 4), ("cut", 5000))},
        "text": b"weights",
        "header": struct.pack("<Q", 2**62) + b"{" + bytes(99),
        "json": struct.pack("<Q", 9) + b"{broken!!" + bytes(9),
        "offsets": struct.pack("<Q", 64)
        + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999]}}'.ljust(64),
    }
    paths = []
    for name, state in states.items():
        paths.append(folder / f"{name}.safetensors")
        save_file(state, paths[-1])
    for name, raw in files.items():
        for suffix in (".safetensors", ".pth"):
            paths.append(folder / f"{name}{suffix}")
            paths[-1].write_bytes(raw)
    pickles = {
        "code": {"E.weight": Malice(folder / "trace")},
        "nested": {"state": {"E.weight": Malice(folder / "trace")}},
        "list": [torch.zeros(3)],
        "number": 3,
        "strings": {"a": "b"},
        "numbers": {1: torch.zeros(3)},
    }
    for name, value in pickles.items():
        for zipped in (True, False):
            paths.append(folder / f"{name}{'-zip' if zipped else ''}.pth")
            torch.save(value, paths[-1], _use_new_zipfile_serialization=zipped)
    return [*paths, folder / "absent.pth", folder / "absent.safetensors", folder / "extra"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bad_input_weights(few, finished, tmp_path, capsys):
    """Every wrong file to each of the three that take weights: --init, --resume and eval.py."""
    folder, out = tmp_path / "weights", tmp_path / "out"
    folder.mkdir()
    count = 0
    for path in wrong_weights(folder, finished / "step_0000008.safetensors"):
        before = path.read_bytes() if path.is_file() else None
        for program, argv in (
            (train.main, [*SMALL, "--init", path, "--out", out]),
            (train.main, ["--resume", path]),
            (evaluation.main, [path, "--src", "streets", "--tgt", "streets", "--backbone", "tiny"]),
        ):
            said = complaint(program, argv, capsys)
            assert path.name in said and REMEDY.search(said), (argv, said)
            assert not (folder / "trace").exists(), f"{path} ran its code"
            count += 1
        assert before is None or path.read_bytes() == before
    assert count == 3 * 37 and not list(out.glob("*.safetensors"))


def nonsense() -> list[tuple]:
    """Command lines that cannot be meant: each field of train.py with values of no sense."""
    cases = []
    for cls in (Settings, Hyper):
        for field in fields(cls):
            kind = type(field.default)
            if kind in (int, float):
                cases += [(train.main, [f"{flag_of(field.name)}={v}"]) for v in ("x", "nan")]
            if kind is float:
                cases += [(train.main, [f"{flag_of(field.name)}=1e999"])]
            if kind is float and field.name != "cos_offset":
                cases += [(train.main, [f"{flag_of(field.name)}=-1"])]
    lines = {
        train.main: (
            "--src nowhere|--tgt gta5|--backbone r50|--method dann|--recipe mine|--seed -1|"
            "--steps 0|--steps -5|--batch 0|--adv-start 9999|--adv-start -1|--log-every 0|"
            "--save-every 0|--keep 0|--eval-every -1|--workers -2|--device tpu|--device cuda:99|"
            "--amp fp16|--compile yes|--cudnn slow|--lineage nobody|--init imagenet|"
            "--init nowhere.pth|--lamda 3|--scales 1 2|--scale-probs 1 1|--scales 0|--scales -1|"
            "--src-size 64|--src-size 1 2 3|"
            "--tgt-size 0 0|--tgt-size 8 8|--src-dir x|--tgt-dir x|--shift 2 2|--shift -1 0|"
            "--method source --lambda-adv 1|--method tan --eps 1|--src gta5 --data nowhere|"
            "--src synthia --data nowhere|--src folder|--src folder --src-dir nowhere|"
            "--src gta5 --tgt streets --shift 0 0 --data nowhere|--resume nowhere|extra|"
            "--out /dev/null/run|--momentum 1|--mirror 2|--jitter 2|--warmup 2|--adaptive-start 2|"
            "--beta1-d 1|--d-channels 0|--method tan --detach-m|--help-me"
        ),
        evaluation.main: (
            "nowhere|--src|nowhere --split|predict|predict nowhere|. --src mars --tgt streets|"
            "predict nowhere --images x --out y|. --tgt-size 1|. --workers x|. --backbone r50"
        ),
        data.main: (
            "|mars|gta5 --data nowhere|synthia --dir nowhere|cityscapes --split dusk --dir .|"
            "streets --split test|folder|gta5 --split val --dir .|streets --role teacher"
        ),
        bench.main: "|fly|step --device tpu|step --sizes 1 2|loader --frames nowhere|eval --count x",  # noqa: E501
        study.main: "|fly|table --seeds|table --seeds x|table --methods dann|table --steps -1",
    }
    return cases + [(program, x.split()) for program, v in lines.items() for x in v.split("|")]


def test_bad_input_command_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "one_step", lambda *arguments: sys.exit(0))  # a step would be taken
    cases, silent = nonsense(), []
    for program, argv in cases:
        try:
            said = complaint(program, argv, capsys)
        except Exception as error:
            said = repr(error)
        if not REMEDY.search(said) or "Error" in said:
            silent.append((program.__module__, argv, said))
    assert not silent, "\n".join(map(str, silent))
    assert len(cases) > 180
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name[0] != "."]
    assert not left, f"nonsense left files behind: {left}"
