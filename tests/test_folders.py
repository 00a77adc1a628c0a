"""Folders of photographs: ids, patterns, and the layouts of five published data sets."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    HERE,
    assert_equal,
    last_tensors,
    make_folder,
    run,
    run_error,
    striped,
    write_png,
)
from PIL import Image

import data
import eval as evaluation
import folders


def class_lists() -> list[dict]:
    """The classes.json files of README, in its order."""
    blocks = re.findall(r"```json\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    return [json.loads(block) for block in blocks]


def write_class_list(folder: Path, content: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(content))
    return folder


STREETS_IDS = (*range(19), 255)
# By data set: size of its images, ids of its labels, example of an image and of its label.
LAYOUTS = {
    "camvid": (
        *((360, 480), range(12)),
        "images/{split}/0001TP_{i:06d}.png",
        "labels/{split}/0001TP_{i:06d}.png",
    ),
    "acdc": (
        *((1080, 1920), STREETS_IDS),
        "rgb_anon/fog/{split}/GOPR0475/GOPR0475_frame_{i:06d}_rgb_anon.png",
        "gt/fog/{split}/GOPR0475/GOPR0475_frame_{i:06d}_gt_labelTrainIds.png",
    ),
    "bdd100k": (
        *((720, 1280), STREETS_IDS),
        "images/10k/{split}/0004a4c0-{i:08d}.jpg",
        "labels/sem_seg/masks/{split}/0004a4c0-{i:08d}.png",
    ),
    "idd": (
        *((1080, 1920), (*range(26), 255)),
        "leftImg8bit/{split}/{i}/frame0029_leftImg8bit.png",
        "gtFine/{split}/{i}/frame0029_gtFine_labellevel3Ids.png",
    ),
    "mapillary": (
        *((768, 1024), range(66)),
        "{split}/images/S2vjth7lk4EIKius2I-1A{i}.jpg",
        "{split}/labels/S2vjth7lk4EIKius2I-1A{i}.png",
    ),
    "masks": (
        *((767, 1022), (0, 255)),
        "ISIC2018_Task1-2_{split}_Input/ISIC_{i:07d}.jpg",
        "ISIC2018_Task1_{split}_GroundTruth/ISIC_{i:07d}_segmentation.png",
    ),
}
SPLITS = {
    "mapillary": {"train": "training", "val": "validation"},
    "masks": {"train": "Training", "val": "Validation"},
}


def make_layout(name: str, folder: Path) -> Path:
    """A tiny tree as the data set's archives unpack."""
    size, ids, image_at, label_at = LAYOUTS[name]
    for split in ("train", "val"):
        for i in range(2):
            place = {"split": SPLITS.get(name, {}).get(split, split), "i": i}
            image, label = striped(size, ids, seed=i)
            if name != "masks":  # striped labels are of train ids
                label = np.asarray(ids, np.uint8)[np.indices(size)[1] * len(ids) // size[1]]
            write_image(folder / image_at.format(**place), image)
            write_image(folder / label_at.format(**place), label)
    return folder


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_a_published_layout_needs_one_file_and_no_renaming(name, few, tmp_path, capsys):
    folder = make_layout(name, tmp_path / name)
    write_class_list(folder, class_lists()[list(LAYOUTS).index(name)])
    for split in ("train", "val"):
        assert data.main(["folder", "--dir", str(folder), "--split", split]) == 0
        assert "0 of 2 pairs are wrong" in capsys.readouterr().out
    dataset = data.open_dataset("folder", "target", "val", folder)
    size, *_ = LAYOUTS[name]
    assert data.image_at(dataset, 0).shape[:2] == data.label_at(dataset, 0).shape == size
    seen = set(np.unique(data.label_at(dataset, 0)).tolist()) - {255}
    assert seen == set(range(len(dataset.classes)))
    source = ["--src", "folder", "--src-dir", str(folder)] if name == "masks" else []
    flags = ["--tgt", "folder", "--tgt-dir", str(folder), "--backbone", "tiny", *source]
    out = run(tmp_path / "run", *flags, "--steps", "4", "--adv-start", "2")
    result = json.loads((out / "eval.json").read_text())
    assert "miou" in result and set(result["iou"]) == set(dataset.classes)


def test_folders_ids_of_readme_cover_each_data_set():
    """No id is forgotten: each is a class or ignored."""
    for content, (_, ids, _, _) in zip(class_lists(), LAYOUTS.values(), strict=True):
        named = content.get("ids", {str(i): n for i, n in enumerate(content.get("names", []))})
        assert {*map(int, named), *content.get("ignore", [])} >= set(ids)


@pytest.mark.parametrize("seed", range(3))
def test_folders_permuted_ids_with_a_map_change_no_bit(seed, few, tmp_path):
    """The same labels, written with other ids, several of them for one class."""
    names = ["road", "sky", "car"]
    dense = make_folder(tmp_path / "dense", {"names": names, "ignore": [7]}, size=(32, 64))
    other = make_folder(tmp_path / "other", {"names": names, "ignore": [7]}, size=(32, 64))
    rng = np.random.default_rng(seed)
    picks = [int(x) for x in rng.permutation(256)[:8]]
    ids_of = [[picks[0]], picks[1:3], picks[3:6]]  # of road, sky, car
    for path in (other / "labels").rglob("*.png"):
        label = np.asarray(Image.open(path))
        mapped = np.full_like(label, picks[6])  # the ignored id
        for train_id, ids in enumerate(ids_of):
            mapped[label == train_id] = rng.choice(ids, (label == train_id).sum())
        write_png(path, mapped)
    ids = {str(i): name for name, ids in zip(names, ids_of, strict=True) for i in ids}
    write_class_list(other, {"ids": ids, "ignore": [picks[6]]})
    flags = ["--tgt", "streets", "--backbone", "tiny", "--src", "folder", "--src-dir"]
    tensors = [
        last_tensors(run(tmp_path / f"{p.name}-run", *flags, str(p))) for p in (dense, other)
    ]
    assert_equal(*tensors)


def photographs(folder: Path, *paths: str) -> Path:
    for path in paths:
        write_png(folder / path, np.zeros((40, 64, 3) if "rgb" in path else (40, 64), np.uint8))
    return folder


def opened(folder: Path, content: dict, split: str = "train", **how) -> data.DataSet:
    folders.read_classes.cache_clear()
    return data.open_dataset("folder", "target", split, write_class_list(folder, content), **how)


def test_folders_an_image_of_two_splits_is_named(tmp_path):
    photographs(tmp_path, "rgb/a.png", "rgb/val_b.png")
    images = {"train": "rgb/{name}.png", "val": "rgb/val_{name}.png"}
    content = {"names": ["road"], "images": images, "labels": {}}
    with pytest.raises(ValueError, match=r"val_b.png belongs to train and to val"):
        opened(tmp_path, content, labels="none")


def test_folders_a_label_without_image_and_an_image_without_label_are_named(tmp_path):
    photographs(tmp_path, "rgb/a.png", "gt/a.png", "gt/b.png")
    patterns = {"images": {"train": "rgb/{name}.png"}, "labels": {"train": "gt/{name}.png"}}
    content = {"names": ["road"]} | patterns
    with pytest.raises(ValueError, match=r"gt/b.png is a label without image \(1 in train\)"):
        opened(tmp_path, content)
    (tmp_path / "gt" / "b.png").unlink()
    assert len(opened(tmp_path, content)) == 1
    photographs(tmp_path, "rgb/c.png")
    with pytest.raises(ValueError, match=r"1 of 2 images.*first missing label is .*gt/c.png"):
        opened(tmp_path, content)
    assert len(opened(tmp_path, content, labels="none")) == 2


def test_folders_pairs_are_of_the_same_folders_or_of_the_same_name(tmp_path):
    photographs(tmp_path, "rgb/1/x.png", "rgb/2/x.png", "gt/1/x.png", "gt/2/x.png")
    labels = {"train": "gt/*/{name}.png"}
    content = {"names": ["road"], "images": {"train": "rgb/*/{name}.png"}, "labels": labels}
    pairs = opened(tmp_path, content).items
    assert [(a.parent.name, b.parent.name) for a, b in pairs] == [("1", "1"), ("2", "2")]
    assert all(b.parent.parent.name == "gt" for _, b in pairs)
    photographs(tmp_path, "all/x.png")
    content["labels"] = {"train": "all/{name}.png"}
    with pytest.raises(ValueError, match=r"have the name x: use as many \*"):
        opened(tmp_path, content)
    (tmp_path / "rgb" / "2" / "x.png").unlink()
    assert opened(tmp_path, content).items[0][1] == tmp_path / "all" / "x.png"


@pytest.mark.parametrize("labels", ("required", "none"))
@pytest.mark.parametrize(
    ("image", "label"), (("{name}.png", "{name}_mask.png"), ("{name}_rgb.png", "{name}.png"))
)
def test_folders_masks_may_lie_beside_their_images(tmp_path, labels, image, label):
    files = [f"rgb/{form.format(name=name)}" for form in (image, label) for name in "ab"]
    photographs(tmp_path, *files)
    patterns = {"images": {"train": f"rgb/{image}"}, "labels": {"train": f"rgb/{label}"}}
    found = opened(tmp_path, {"names": ["road"]} | patterns, labels=labels).items
    wanted = [(tmp_path / files[i], tmp_path / files[i + 2]) for i in range(2)]
    assert list(found) == [(a, b if labels == "required" else None) for a, b in wanted]


def test_folders_splits_may_share_a_folder_of_masks_and_names_may_have_brackets(tmp_path):
    photographs(tmp_path, "rgb [1]/train/a.png", "rgb [1]/val/b.png", "gt/a.png", "gt/b.png")
    images = {split: f"rgb [1]/{split}/{{name}}.png" for split in ("train", "val")}
    labels = dict.fromkeys(images, "gt/{name}.png")
    content = {"names": ["road"], "images": images, "labels": labels}
    for split, name in (("train", "a"), ("val", "b")):
        (pair,) = opened(tmp_path, content, split).items
        assert pair == (tmp_path / "rgb [1]" / split / f"{name}.png", tmp_path / f"gt/{name}.png")
    photographs(tmp_path, "gt/c.png")
    with pytest.raises(ValueError, match=r"c.png is a label without image"):
        opened(tmp_path, content)


def test_folders_labels_are_read_by_the_list_of_the_folder_that_was_named(tmp_path):
    """Another classes.json lies nearer to the images, and has other ids."""
    photographs(tmp_path, "site/rgb/a.png", "site/gt/a.png")
    write_class_list(tmp_path / "site", {"ids": {"0": "sky", "1": "road"}})
    content = {"names": ["road", "sky"], "images": {"train": "site/rgb/{name}.png"}}
    dataset = opened(tmp_path, content | {"labels": {"train": "site/gt/{name}.png"}})
    assert dataset.classes == ("road", "sky") and (data.label_at(dataset, 0) == 0).all()


def test_folders_a_split_without_pattern_or_files_is_named(tmp_path):
    photographs(tmp_path, "rgb/a.png")
    content = {"names": ["road"], "images": {"train": "rgb/{name}.jpg"}}
    with pytest.raises(ValueError, match="has no images of val"):
        opened(tmp_path, content, "val")
    with pytest.raises(ValueError, match=r"no image below .* fits rgb/{name}.jpg"):
        opened(tmp_path, content, labels="none")
    content["images"] = {"train": "rgb/{name}.png"}
    with pytest.raises(ValueError, match="has no labels of train"):
        opened(tmp_path, content)
    assert not opened(tmp_path, content, labels="optional").has_labels
    assert not data.has_split("folder", tmp_path, "val")


@pytest.mark.parametrize("covered", (20, 2000))
def test_folders_no_message_proposes_to_ignore_an_id_of_more_than_a_hundredth(tmp_path, covered):
    folder = make_folder(tmp_path, {"names": ["road"]}, size=(50, 100))
    label = np.zeros((50, 100), np.uint8)
    label.flat[:covered] = 255
    for path in (folder / "labels").rglob("*.png"):
        write_png(path, label)
    flags = ["--src", "folder", "--src-dir", str(folder), "--tgt", "streets"]
    error = run_error(*flags, "--backbone", "tiny", "--out", str(tmp_path / "run"))
    assert f"holds the id 255 ({covered / 50:.1f} % of its pixels)" in error
    assert f"give it a class in {folder / 'classes.json'}" in error
    assert ("list it in `ignore`" in error) == (covered == 20)


def test_folders_labels_of_one_class_alone_are_no_score(few, tmp_path, capsys):
    folder = make_folder(tmp_path / "f", {"names": ["road", "car"]}, split="val")
    make_folder(tmp_path / "f", {"names": ["road", "car"]})
    for path in (folder / "labels" / "val").rglob("*.png"):
        write_png(path, np.zeros((24, 40), np.uint8))
    flags = ["--tgt", "folder", "--tgt-dir", str(folder), "--backbone", "tiny"]
    out = run(tmp_path / "run", *flags)
    shown = " ".join(capsys.readouterr().out.split())
    assert "no score: only road occurs in the labels of folder" in shown and "100.0" not in shown
    result = json.loads((out / "eval.json").read_text())
    assert result["only_class"] == "road" and "miou" not in result
    scored = capsys.readouterr()
    evaluation.main([str(out), "--device", "cpu"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "only road occurs" in shown and "100.0" not in shown and not scored.err


def test_folders_an_unlabelled_folder_can_be_checked(tmp_path, capsys):
    """Photographs alone, or with patterns for images alone."""
    photographs(tmp_path / "plain", "a.png", "trip/b.png")
    photographs(tmp_path / "listed", "rgb/a.png", "rgb/b.png")
    write_class_list(tmp_path / "listed", {"images": {"train": "rgb/{name}.png"}})
    for name in ("plain", "listed"):
        assert data.main(["folder", "--dir", str(tmp_path / name)]) == 0
        assert "0 of 2 images are wrong" in capsys.readouterr().out
    (tmp_path / "plain" / "trip" / "b.png").write_bytes(b"")
    assert data.main(["folder", "--dir", str(tmp_path / "plain")]) == 1
    assert "1 of 2 images are wrong" in capsys.readouterr().out


def test_folders_links_to_folders_are_followed_once(tmp_path):
    photographs(tmp_path / "far", "b.png")
    photographs(tmp_path / "here", "a.png")
    (tmp_path / "here" / "more").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "here")
    found = data.photographs_below(tmp_path / "here")
    assert found == [tmp_path / "here" / "a.png", tmp_path / "here" / "more" / "b.png"]


UNREAD = ("b.heic", "b.HEIF", "b.avif", "b.gif", "b.jp2", "b.cr2", "b.NEF", "b.arw", "b.dng")


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("inside", ("", "images", "images/train"))
def test_folders_images_that_are_not_read_are_named(name, inside, tmp_path, capsys):
    """In training, and by data.py. Nothing of the file is read."""
    photographs(tmp_path / inside, "a.png")
    path = tmp_path / inside / "trip" / name
    path.parent.mkdir()
    path.touch()
    sentence = (
        f"1 of 2 images in {tmp_path / inside} have an ending that is not read here, the first "
        f"is {path}: convert them to JPEG, or move them away"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        data.open_dataset("folder", "target", "train", tmp_path, labels="none")
    with pytest.raises(SystemExit) as caught:
        data.main(["folder", "--dir", str(tmp_path)])
    assert caught.value.code == f"error: {sentence}"
    flags = ["--tgt", "folder", "--tgt-dir", str(tmp_path), "--backbone", "tiny"]
    assert run_error(*flags, "--out", str(tmp_path / "run")) == f"error: {sentence}"


def test_folders_images_of_a_labelled_split_that_are_not_read_are_named(tmp_path):
    """Also if the split has no other, which would count as a split that is not there."""
    folder = make_folder(tmp_path)
    (folder / "images" / "train" / "a" / "2.heic").touch()
    (folder / "images" / "train" / "a" / "3.heic").touch()
    with pytest.raises(ValueError, match=r"^2 of 4 images in .* the first is .*a/2\.heic: convert"):
        data.open_dataset("folder", "source", "train", folder)
    (folder / "images" / "val").mkdir()
    (folder / "images" / "val" / "0.heic").touch()
    with pytest.raises(ValueError, match=r"^1 of 1 images in .*val have an ending"):
        data.has_split("folder", folder, "val")


def test_folders_an_image_that_has_been_converted_beside_itself_is_no_fault(tmp_path):
    """Most converters leave the old file, and cameras write a raw file beside each JPEG."""
    photographs(tmp_path, "a.png", "trip/b.JPG")
    (tmp_path / "a.heic").touch()
    (tmp_path / "trip" / "b.NEF").touch()
    assert len(data.photographs_below(tmp_path)) == 2
    (tmp_path / "b.NEF").touch()
    with pytest.raises(ValueError, match=rf"1 of 3 .* is {re.escape(str(tmp_path / 'b.NEF'))}:"):
        data.photographs_below(tmp_path)


def test_folders_files_that_are_no_images_are_passed_over(tmp_path):
    photographs(tmp_path, "a.png", "b.webp")
    for name in ("notes.txt", "a.json", "README.md", "Thumbs.db", "a.mov", "b.mp4", "heic"):
        (tmp_path / name).touch()
    (tmp_path / "._a.heic").touch()
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "b.heic").touch()
    (tmp_path / "c.heic").mkdir()
    assert len(data.photographs_below(tmp_path)) == 2


def test_folders_labels_that_are_not_read_leave_a_folder_unlabelled(tmp_path):
    """A label is a PNG. Other files among the labels are no photographs that are missing."""
    photographs(tmp_path, "images/val/a.png")
    (tmp_path / "labels" / "val").mkdir(parents=True)
    (tmp_path / "labels" / "val" / "a.gif").touch()
    assert not data.open_dataset("folder", "target", "val", tmp_path, labels="optional").has_labels


@pytest.mark.parametrize("size", (None, (32, 64)))
def test_folders_a_pattern_may_name_any_ending(size, tmp_path):
    """What Pillow reads is read. What it does not is named, with the remedy."""
    photographs(tmp_path, "rgb/a.gif", "rgb/b.png", "rgb/c.heic.png")
    content = {"images": {"train": "rgb/{name}.gif"}}
    assert data.image_at(opened(tmp_path, content, labels="none"), 0).shape == (40, 64, 3)
    (tmp_path / "rgb" / "c.heic.png").rename(tmp_path / "rgb" / "c.heic")
    (tmp_path / "rgb" / "c.heic").write_bytes(b"\0\0\0\x18ftypheic")
    content = {"images": {"train": "rgb/{name}.heic"}}
    with pytest.raises(ValueError, match=r"c\.heic cannot be read .*: replace it with a PNG$"):
        data.image_at(opened(tmp_path, content, labels="none", size=size), 0)


def test_folders_an_empty_val_is_no_val(tmp_path):
    photographs(tmp_path, "images/train/a.png")
    (tmp_path / "images" / "val").mkdir()
    (tmp_path / "images" / "val" / ".gitkeep").touch()
    assert not data.has_split("folder", tmp_path, "val")
    photographs(tmp_path, "images/val/a.png")
    assert data.has_split("folder", tmp_path, "val")


def test_folders_a_key_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "classes.json").write_text('{"ids": {"0": "road", "1": "car", "0": "sky"}}')
    with pytest.raises(ValueError, match="a key is there twice among 0, 1, 0"):
        folders.read_classes(tmp_path / "classes.json")
