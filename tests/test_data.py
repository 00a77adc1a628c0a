"""Data sets on disk, samples as functions of (seed, step), classes that meet by name."""

import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SHARED,
    make_cityscapes,
    make_folder,
    make_gta5,
    make_synthia,
    need,
    random_ids,
    striped,
    write_png,
)
from PIL import Image

import data
from clan import RELEASED, Batch, Hyper
from classes import (
    CLASSES,
    LABEL_IDS,
    PALETTE,
    SYNTHIA_13,
    TO_TRAIN_IDS,
    UNKNOWN,
)
from measure import write_png16


def test_data_cityscapes_tables_are_the_official_ones():
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    for label in official:
        if label.id >= 0:
            expected = label.trainId if 0 <= label.trainId < 19 else 255
            assert TO_TRAIN_IDS["cityscapes"][label.id] == expected, label.name
            assert TO_TRAIN_IDS["gta5"][label.id] == expected, label.name
        if 0 <= label.trainId < 19:
            assert CLASSES[label.trainId] == label.name
            assert tuple(PALETTE[label.trainId]) == label.color
            assert LABEL_IDS[label.trainId] == label.id
    known = {label.id for label in official if label.id >= 0}
    undefined = [i for i in range(256) if TO_TRAIN_IDS["cityscapes"][i] == UNKNOWN]
    assert set(undefined) == set(range(256)) - known - {34, 255}  # both: license plate, -1


FACTS_SYNTHIA = {
    **{3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11},
    **{17: 12, 8: 13, 18: 14, 19: 15, 20: 16, 12: 17, 11: 18},
}

SYNTHIA_NAMES = {  # of the data set's own README, by class id
    **{1: "sky", 2: "building", 3: "road", 4: "sidewalk", 5: "fence", 6: "vegetation"},
    **{7: "pole", 8: "car", 9: "traffic sign", 10: "person", 11: "bicycle", 12: "motorcycle"},
    **{15: "traffic light", 16: "terrain", 17: "rider", 18: "truck", 19: "bus", 20: "train"},
    **{21: "wall"},
}


def test_data_synthia_ids_meet_the_classes_of_the_same_name():
    table = TO_TRAIN_IDS["synthia"]
    for i in range(256):
        expected = FACTS_SYNTHIA.get(i, 255 if i <= 22 else UNKNOWN)
        assert table[i] == expected, i
    assert {i: CLASSES[t] for i, t in FACTS_SYNTHIA.items()} == SYNTHIA_NAMES


def test_data_synthia_has_16_classes_of_which_13_are_reported(tmp_path):
    source = data.open_dataset("synthia", "source", "train", make_synthia(tmp_path / "s"))
    target = data.open_dataset("cityscapes", "target", "val", make_cityscapes(tmp_path / "c"))
    _, scored, left_out = data.shared_classes(source, target)
    assert len(source.classes) == 19 and len(scored) == 16 and len(SYNTHIA_13) == 13
    assert set(left_out) == {"terrain", "truck", "train"}
    assert set(scored) - set(SYNTHIA_13) == {"wall", "fence", "pole"}


@pytest.mark.parametrize("dataset", ("gta5", "cityscapes"))
def test_data_labels_are_read_by_index_and_not_by_colour(tmp_path, dataset):
    """The palette maps each index to the grey of another valid id: colours would mislead."""
    ids = random_ids(34)
    palette = np.zeros((256, 3), np.uint8)
    palette[:34] = (np.roll(np.arange(34), 5))[:, None]
    path = write_png(tmp_path / "label.png", ids, palette)
    assert Image.open(path).mode == "P"
    assert (np.asarray(Image.open(path).convert("L")) != ids).all()
    expected = [[TO_TRAIN_IDS["cityscapes"][i] for i in row] for row in ids]
    assert (data.read_label(path, dataset) == np.array(expected)).all()
    grey = write_png(tmp_path / "grey.png", ids)
    assert (data.read_label(grey, dataset) == np.array(expected)).all()


def test_data_synthia_label_is_the_low_byte_of_the_first_channel(tmp_path):
    """The second channel, the instance, goes up to 65535 and must not leak into the class."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 65536, (24, 40, 3)).astype(np.uint16)
    pixels[..., 0] = rng.integers(0, 23, (24, 40))
    path = write_png16(tmp_path / "label.png", pixels)
    assert (np.asarray(Image.open(path)) != pixels).any()  # what Pillow alone would give
    label = data.read_label(path, "synthia")
    expected = np.array([[FACTS_SYNTHIA.get(int(i), 255) for i in row] for row in pixels[..., 0]])
    assert label.dtype == np.uint8 and (label == expected).all()


@pytest.mark.parametrize("mode", ("L", "P", "RGB"))
def test_data_synthia_refuses_a_converted_8_bit_label(tmp_path, mode):
    path = tmp_path / "label.png"
    Image.fromarray(random_ids(19)).convert(mode).save(path)
    with pytest.raises(ValueError, match=r"label.png is not a 16-bit RGB PNG.*mapped twice"):
        data.read_label(path, "synthia")


@pytest.mark.parametrize(("dataset", "bad"), (("gta5", 35), ("cityscapes", 100), ("synthia", 23)))
def test_data_an_id_outside_the_map_is_refused_and_named(tmp_path, dataset, bad):
    ids = np.full((8, 8), 3, np.uint8)
    ids[5, 6] = bad
    if dataset == "synthia":
        path = write_png16(tmp_path / "x.png", np.stack([ids] * 3, axis=2).astype(np.uint16))
    else:
        path = write_png(tmp_path / "x.png", ids)
    with pytest.raises(ValueError, match=rf"x.png holds the id {bad} \("):
        data.read_label(path, dataset)


def test_data_a_synthia_id_above_255_is_refused(tmp_path):
    """The class has 16 bits: 258 must not be read as its low byte, 2 (building)."""
    pixels = np.full((8, 8, 3), 258, np.uint16)
    with pytest.raises(ValueError, match=r"x\.png"):
        data.read_label(write_png16(tmp_path / "x.png", pixels), "synthia")


def test_data_a_16_bit_grey_or_colour_label_of_cityscapes_is_refused(tmp_path):
    rgb = write_png(tmp_path / "colour.png", np.zeros((8, 8, 3), np.uint8))
    deep = write_png(tmp_path / "deep.png", np.full((8, 8), 7, np.uint16))
    for path in (rgb, deep):
        with pytest.raises(ValueError, match=f"{path.name} has pixels of mode"):
            data.read_label(path, "cityscapes")


@pytest.mark.parametrize("keep", (0, 20, 200, 0.5, -60))
@pytest.mark.parametrize("kind", ("image", "gta5", "synthia"))
def test_data_a_truncated_file_is_refused_and_named(tmp_path, kind, keep):
    path = tmp_path / "broken.png"
    if kind == "synthia":
        write_png16(path, np.random.default_rng(0).integers(0, 23, (64, 64, 3)).astype(np.uint16))
    elif kind == "image":
        write_png(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    else:
        write_png(path, random_ids(34, (64, 64)))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"broken.png cannot be read .*replace this file"):
        data.read_image(path) if kind == "image" else data.read_label(path, kind)


def test_data_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone.png is missing"):
        data.read_image(tmp_path / "gone.png")


def test_data_photographs_of_any_mode_become_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 10, 3)).astype(np.uint8)
    grey = rgb[..., 0]
    assert (data.read_image(write_png(tmp_path / "rgb.png", rgb)) == rgb).all()
    assert (data.read_image(write_png(tmp_path / "grey.png", grey)) == grey[..., None]).all()
    alpha = np.dstack([rgb, np.full((8, 10), 9, np.uint8)])
    assert (data.read_image(write_png(tmp_path / "alpha.png", alpha)) == rgb).all()


def test_data_a_photograph_is_turned_as_its_exif_says(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 10, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    assert (data.read_image(tmp_path / "turned.png") == np.rot90(rgb, -1)).all()


def test_data_a_photograph_of_16_bits_is_refused(tmp_path):
    deep = write_png16(tmp_path / "deep.png", np.full((8, 8, 3), 4000, np.uint16))
    grey = write_png(tmp_path / "grey.png", np.full((8, 8), 4000, np.uint16))
    for path in (deep, grey):
        with pytest.raises(ValueError, match="convert it to 8-bit RGB"):
            data.read_image(path)


# Finding files.


def test_data_an_unknown_data_set_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown data set 'kitti': choose from gta5, synthia"):
        data.open_dataset("kitti", "source", "train", Path())


@pytest.mark.parametrize("name", ("gta5", "synthia", "cityscapes", "folder"))
def test_data_a_missing_folder_is_named_with_the_remedy(tmp_path, name):
    for folder in (None, tmp_path / "nowhere"):
        sentence = rf"folder .* of the data set {name} is missing: .+dir"
        with pytest.raises(ValueError, match=sentence):
            data.open_dataset(name, "source", "train", folder)


@pytest.mark.parametrize("name", ("gta5", "synthia", "cityscapes"))
def test_data_an_empty_split_is_refused_with_the_layout(tmp_path, name):
    with pytest.raises(ValueError, match=r"no image in .*: put"):
        data.open_dataset(name, "source", "train", tmp_path)


@pytest.mark.parametrize("name", ("gta5", "synthia"))
def test_data_a_pool_of_images_has_no_val_split(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} has no split 'val'"):
        data.open_dataset(name, "source", "val", tmp_path)


def test_data_streets_has_no_test_split():
    with pytest.raises(ValueError, match="streets has no split 'test'"):
        data.open_dataset("streets", "source", "test")


@pytest.mark.parametrize("name", ("gta5", "synthia", "cityscapes"))
def test_data_every_missing_label_is_counted_at_once(tmp_path, name):
    make = {"gta5": make_gta5, "synthia": make_synthia, "cityscapes": make_cityscapes}[name]
    make(tmp_path)
    places = {"labels", "LABELS", "gtFine"}
    labels = [p for p in sorted(tmp_path.rglob("*.png")) if places & {*p.parts}]
    labels = [p for p in labels if "val" not in p.parts]
    for path in labels[1:]:
        path.unlink()
    expected = rf"{len(labels) - 1} of {len(labels)} images .* first missing label is {labels[1]}"
    with pytest.raises(ValueError, match=expected):
        data.open_dataset(name, "source", "train", tmp_path)
    assert len(data.open_dataset(name, "target", "train", tmp_path, labels="none")) == len(labels)


def test_data_cityscapes_labels_need_no_train_ids_file_and_pairs_match(tmp_path):
    make_cityscapes(tmp_path, count=4)
    dataset = data.open_dataset("cityscapes", "target", "val", tmp_path)
    assert dataset.size == (512, 1024) and len(dataset) == 4
    for i, (image, label) in enumerate(dataset.items):
        assert image.name.removesuffix("_leftImg8bit.png") + "_gtFine_labelIds.png" == label.name
        assert (data.image_at(dataset, i)[..., 0] == 13 * data.label_at(dataset, i)).all()


@pytest.mark.parametrize(
    ("name", "size"), (("gta5", (720, 1280)), ("synthia", (760, 1280)), ("cityscapes", (512, 1024)))
)
def test_data_sizes_are_those_of_the_released_code(tmp_path, name, size):
    make = {"gta5": make_gta5, "synthia": make_synthia, "cityscapes": make_cityscapes}[name]
    dataset = data.open_dataset(name, "source", "train", make(tmp_path))
    assert (dataset.size, dataset.crop) == (size, (512, 1024))


@pytest.mark.parametrize(
    ("content", "reason"),
    (
        ("{", "classes.json"),
        ("[]", "classes.json"),
        ("{}", "names"),
        ('{"names": []}', "different strings"),
        ('{"names": ["road", "road"]}', "different strings"),
        ('{"names": ["road", 3]}', "different strings"),
        ('{"names": "road"}', "different strings"),
        ('{"names": ["road"], "ignore": [0]}', "that no class has"),
        ('{"names": ["road"], "ignore": [256]}', "up to 255"),
        ('{"names": ["road"], "ignore": ["255"]}', "ids"),
        ('{"names": ["road"], "ignore": 255}', "ignore must list"),
        ('{"names": ["road"], "ids": {"0": "road"}}', "either names or ids"),
        ('{"ids": {"256": "road"}}', "up to 255"),
        ('{"ids": {"road": 0}}', "classes.json"),
        ('{"ids": {"1": "road", "01": "car"}}', "different numbers"),
        ('{"ids": {}}', "at least one"),
        ('{"ids": {"1": "road"}, "ignore": [1]}', "that no class has"),
        ('{"names": ["road"], "images": {"train": "a/*.png"}}', "needs {name} once"),
        ('{"names": ["road"], "images": {"train": "a/**/{name}.png"}}', r"no \\*\\*"),
        ('{"names": ["road"], "images": {"train": "../{name}.png"}}', "below the folder"),
        ('{"names": ["road"], "images": {"train": 3}}', "classes.json"),
        ('{"names": ["road"], "images": {"train": "a/*{name}.png"}}', "has a \\* beside"),
        ('{"names": ["road"], "images": {"train": "./{name}.png"}}', "or a ./"),
        ('{"names": ["road"], "labels": {"train": "{name}.png"}}', "that images lacks"),
    ),
)
def test_data_a_wrong_class_list_is_refused_with_the_format(tmp_path, content, reason):
    make_folder(tmp_path)
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=reason) as caught:
        data.open_dataset("folder", "target", "train", tmp_path)
    assert "classes.json is not a class list" in str(caught.value)
    assert '{"ids": {"0": "background", "255": "lesion"}}' in str(caught.value)


def test_data_a_folder_without_a_class_list_is_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"classes.json is not a class list"):
        data.open_dataset("folder", "target", "train", tmp_path)


def test_data_a_folder_is_read_with_its_own_classes(tmp_path):
    dataset = data.open_dataset("folder", "target", "train", make_folder(tmp_path))
    assert dataset.classes == ("road", "lake", "car") and len(dataset) == 2
    assert dataset.size == (512, 856)  # the images' own aspect
    label, image = data.label_at(dataset, 0), data.image_at(dataset, 0)
    assert label[0, 0] == 255 and (40 * label[1:] == image[1:, :, 0]).all()


def test_data_an_undefined_id_in_a_folder_is_refused_and_named(tmp_path):
    dataset = data.open_dataset("folder", "target", "train", make_folder(tmp_path))
    write_png(dataset.items[0][1], np.full((24, 40), 3, np.uint8))
    with pytest.raises(ValueError, match=r"holds the id 3 \(100.0 %.*give it a class in"):
        data.label_at(dataset, 0)


def test_data_an_rgb_label_in_a_folder_is_refused(tmp_path):
    dataset = data.open_dataset("folder", "target", "train", make_folder(tmp_path))
    write_png(dataset.items[0][1], np.arange(24 * 40 * 3).reshape(24, 40, 3).astype(np.uint8))
    with pytest.raises(ValueError, match=r"0.png has pixels of mode RGB.*not its colour picture"):
        data.label_at(dataset, 0)


def write_grey(path: Path, ids: np.ndarray, bits: int) -> None:
    """A grey PNG of few bits a pixel, by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    places = np.arange(bits)[::-1]
    rows = [np.packbits((row[:, None] >> places & 1).astype(np.uint8).ravel()) for row in ids]
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_data_a_photograph_with_a_preview_is_a_photograph(tmp_path):
    """Some cameras write a second, smaller image into a JPEG."""
    image, preview = (Image.fromarray(np.full((n, n, 3), 90, np.uint8)) for n in (32, 8))
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert data.read_image(tmp_path / "a.jpg").shape == (32, 32, 3)


def test_data_two_images_of_one_label_are_named(tmp_path):
    folder = make_folder(tmp_path)
    image = folder / "images" / "train" / "a" / "0.png"
    Image.open(image).save(image.with_suffix(".jpg"))
    with pytest.raises(ValueError, match=r"0.jpg and .*0.png have one label, .*: rename one"):
        data.open_dataset("folder", "target", "train", folder)


def test_data_a_folder_takes_the_commonest_shape(tmp_path):
    for name, size in (("a", (60, 30)), ("b", (30, 60)), ("c", (30, 60))):
        write_png(tmp_path / f"{name}.png", np.zeros((*size, 3), np.uint8))
    (tmp_path / "d.png").write_bytes(b"")
    found = data.open_dataset("folder", "target", "train", tmp_path, labels="none", short_side=64)
    assert found.size == (64, 128)


def test_data_masks_of_a_folder_may_have_1_or_16_bits_or_three_equal_channels(tmp_path):
    dataset = data.open_dataset("folder", "target", "train", make_folder(tmp_path))
    path = dataset.items[0][1]
    ids = np.arange(24 * 40).reshape(24, 40) % 2
    for pixels in (
        ids.astype(bool),
        ids.astype(np.uint16),
        np.stack([ids.astype(np.uint8)] * 3, 2),
    ):
        write_png(path, pixels)
        assert (data.label_at(dataset, 0) == ids).all()
    for bits in (2, 4):  # Pillow reads these as if they were brightness
        write_grey(path, ids, bits)
        assert (data.label_at(dataset, 0) == ids).all()
    write_png16(path, np.stack([ids + 256] * 3, axis=2).astype(np.uint16))
    with pytest.raises(ValueError, match=r"0.png has pixels of mode RGB"):
        data.label_at(dataset, 0)
    write_png(path, (ids + 255).astype(np.uint16))
    with pytest.raises(ValueError, match=r"0.png holds the id 256: write ids up to 255"):
        data.label_at(dataset, 0)


def test_data_a_label_of_another_size_is_refused_except_for_gta5s_few_pixels(tmp_path):
    folder = make_folder(tmp_path / "f", size=(60, 100))
    dataset = data.open_dataset("folder", "source", "train", folder)
    write_png(dataset.items[0][1], np.zeros((60, 99), np.uint8))
    hyper = Hyper(steps=4, crop=False)
    with pytest.raises(ValueError, match=r"0.png is 99x60 but its image is 100x60"):
        for step in range(2):
            data.batch_at(step, dataset, None, hyper)
    with pytest.raises(ValueError, match="99x60"):
        next(data.checked([data.Pairs(dataset)[0]]))
    gta5 = data.open_dataset("gta5", "source", "train", make_gta5(tmp_path / "g", size=(100, 200)))
    write_png(gta5.items[0][1], np.full((99, 200), 7, np.uint8))
    assert data.Pairs(gta5)[0][2].shape == (99, 200)
    write_png(gta5.items[0][1], np.full((90, 200), 7, np.uint8))
    with pytest.raises(ValueError, match="200x90"):
        next(data.checked([data.Pairs(gta5)[0]]))


# Samples.


@pytest.fixture
def small_sets(tmp_path):
    """GTA5 of five and Cityscapes of three tiny images, seen at their own size."""
    source = data.open_dataset(
        "gta5", "source", "train", make_gta5(tmp_path / "gta5"), size=(24, 40)
    )
    target = data.open_dataset(
        "cityscapes", "target", "train", make_cityscapes(tmp_path / "cs"), size=(32, 64)
    )
    return source, target


AUGMENTED = replace(RELEASED, steps=12, batch=2, jitter=0.2)


def assert_same_batch(a: Batch, b: Batch) -> None:
    assert (a.target_size and tuple(a.target_size)) == b.target_size  # a list, from a DataLoader
    for x, y in zip(a[:3], b[:3], strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def test_data_a_batch_is_a_pure_function_of_seed_and_step(small_sets):
    forward = [data.batch_at(step, *small_sets, AUGMENTED, seed=3) for step in range(12)]
    np.random.seed(1)
    torch.manual_seed(1)  # global states, which must not matter
    for step in (7, 0, 11, 7, 3):
        assert_same_batch(data.batch_at(step, *small_sets, AUGMENTED, seed=3), forward[step])
    other = [data.batch_at(step, *small_sets, AUGMENTED, seed=4) for step in range(12)]
    same = [
        a.source.shape == b.source.shape and torch.equal(a.source, b.source)
        for a, b in zip(forward, other, strict=True)
    ]
    assert not all(same)


@pytest.mark.parametrize("workers", (0, 2))
def test_data_workers_and_a_late_start_change_nothing(small_sets, workers):
    steps = data.Steps(*small_sets, AUGMENTED, seed=3)
    loader = torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(5, 12), num_workers=workers
    )
    for step, batch in zip(range(5, 12), loader, strict=True):
        assert_same_batch(batch, data.batch_at(step, *small_sets, AUGMENTED, seed=3))


@pytest.mark.parametrize("mirror", (0.0, 0.5, 1.0))
def test_data_image_and_label_are_mirrored_together(small_sets, mirror):
    hyper = Hyper(steps=30, batch=2, crop=False, mirror=mirror)
    mirrored = 0
    for step in range(15):
        batch = data.batch_at(step, small_sets[0], None, hyper)
        assert torch.equal(batch.source[:, 0], 13 * batch.labels)
        for slot in range(2):
            i = data.sample_index(2 * step + slot, 5, 0, 0)
            mirrored += not np.array_equal(batch.labels[slot], data.label_at(small_sets[0], i))
    assert mirrored == 30 * mirror if mirror != 0.5 else 5 < mirrored < 25


def test_data_image_and_label_are_cropped_together(small_sets):
    """At the data set's own size a crop resamples nothing: exact, at many places."""
    source = replace(small_sets[0], crop=(16, 24))
    hyper = Hyper(steps=30, crop=True, mirror=0.5)
    seen = set()
    for step in range(30):
        batch = data.batch_at(step, source, None, hyper)
        assert batch.source.shape == (1, 3, 16, 24)
        assert torch.equal(batch.source[:, 0], 13 * batch.labels)
        seen.add(batch.labels.numpy().tobytes())
    assert len(seen) > 20


def ramp_set(tmp_path, size=(200, 320)) -> data.DataSet:
    """One smooth image: red grows with x, green with y; the label is x in 19 stripes."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([255 * (x + 0.5) / size[1], 255 * (y + 0.5) / size[0], 0 * x], axis=2)
    write_png(tmp_path / "images" / "00001.png", image.round().astype(np.uint8))
    write_png(tmp_path / "labels" / "00001.png", LABEL_IDS[19 * x // size[1]])
    dataset = data.open_dataset("gta5", "source", "train", tmp_path, size=(100, 160))
    return replace(dataset, crop=(64, 96))


def test_data_a_resized_crop_keeps_image_and_label_aligned(tmp_path):
    dataset, hyper = ramp_set(tmp_path), Hyper(steps=30, crop=True, mirror=0.5)
    places = set()
    for step in range(20):
        batch = data.batch_at(step, dataset, None, hyper)
        red, green = batch.source[0, 0].double(), batch.source[0, 1].double()
        stripe = red / 255 * 19
        inside = (stripe - stripe.round()).abs() > 0.2  # away from the border of two stripes
        assert torch.equal(stripe.floor()[inside], batch.labels[0].double()[inside])
        span = (red[:, -1] - red[:, 0]).abs().mean() / 255, (green[-1] - green[0]).mean() / 255
        assert span == pytest.approx((95 / 160, 63 / 100), abs=0.02)
        places.add((red.min().item(), green.min().item()))
    assert len(places) > 15


def test_data_a_scaled_image_keeps_the_labels_base_size(tmp_path):
    """Released code: the image is resized to 0.8, 1.0 or 1.1 of the base size, the label not."""
    dataset = ramp_set(tmp_path)
    sizes = []
    for step in range(200):
        batch = data.batch_at(step, dataset, dataset, replace(RELEASED, steps=200))
        assert batch.labels.shape == (1, 100, 160) and batch.target_size == (100, 160)
        sizes.append(tuple(batch.source.shape[2:]))
    shares = {s: sizes.count(s) / 200 for s in sizes}
    expected = {(80, 128): 0.3, (100, 160): 0.4, (110, 176): 0.3}
    assert shares == pytest.approx(expected, abs=0.12)


def test_data_the_target_is_scaled_and_mirrored_too(small_sets):
    shapes, batches = set(), []
    for step in range(30):
        batch = data.batch_at(step, *small_sets, replace(RELEASED, steps=30))
        shapes.add(tuple(batch.target.shape[2:]))
        batches.append(batch)
    assert shapes == {(26, 51), (32, 64), (35, 70)}
    whole = [b.target[0] for b in batches if b.target.shape[2:] == (32, 64)]
    known = {small.tobytes() for i in range(3) for small in (data.image_at(small_sets[1], i),)}
    as_is = [x.permute(1, 2, 0).contiguous().numpy().tobytes() in known for x in whole]
    turned = [x.flip(2).permute(1, 2, 0).contiguous().numpy().tobytes() in known for x in whole]
    assert all(a != t for a, t in zip(as_is, turned, strict=True))
    assert any(as_is) and any(turned)


def test_data_images_are_bicubic_and_labels_nearest(small_sets):
    """Nearest invents no id; bicubic invents colours."""
    image, label = data.image_at(small_sets[0], 0), data.label_at(small_sets[0], 0)
    few = np.where(label % 2, 3, 255).astype(np.uint8)
    assert set(np.unique(data.resize(few, (37, 61)))) == {3, 255}
    expected = Image.fromarray(image).resize((61, 37), Image.Resampling.BICUBIC)
    assert (data.resize(image, (37, 61)) == np.asarray(expected)).all()


def test_data_jitter_changes_the_source_alone_and_not_its_label(small_sets):
    plain = Hyper(steps=8, crop=False)
    jittered = replace(plain, jitter=0.3)
    for step in range(4):
        a, b = (data.batch_at(step, *small_sets, h) for h in (plain, jittered))
        assert torch.equal(a.labels, b.labels) and torch.equal(a.target, b.target)
        assert not torch.equal(a.source, b.source)


@pytest.mark.parametrize("length", (1, 2, 7, 50))
def test_data_every_image_comes_once_an_epoch(length):
    orders = [
        [data.sample_index(epoch * length + n, length, seed, domain) for n in range(length)]
        for seed, domain, epoch in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    ]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length == 50:
        assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("world", (2, 3))
def test_data_the_processes_share_out_the_global_batch(small_sets, world):
    """Rank by rank, batch 2 in each: the batch that one process with batch 2 * world would see."""
    hyper = Hyper(steps=12, batch=2, crop=False)
    for step in range(5):
        parts = [data.batch_at(step, *small_sets, hyper, rank=r, world=world) for r in range(world)]
        whole = data.batch_at(step, *small_sets, replace(hyper, batch=2 * world))
        for name in ("source", "labels", "target"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))


def test_data_the_processes_see_different_images_in_an_epoch():
    seen = [
        data.sample_index((step * 2 + rank) * 3 + slot, 12, 0, 0)
        for step in range(2)
        for rank in range(2)
        for slot in range(3)
    ]
    assert sorted(seen) == list(range(12))


def test_data_training_never_reads_a_label_of_the_target(small_sets, tmp_path, monkeypatch):
    """A target without labels gives the batches of one with them."""
    source, target = small_sets
    shutil.rmtree(tmp_path / "cs" / "gtFine")
    bare = data.open_dataset(
        "cityscapes", "target", "train", tmp_path / "cs", size=(32, 64), labels="none"
    )
    assert all(label is None for _, label in bare.items)
    opened = []
    reader = data.decode
    monkeypatch.setattr(data, "decode", lambda path: opened.append(path) or reader(path))
    for step in range(6):
        a = data.batch_at(step, source, target, AUGMENTED)
        assert_same_batch(a, data.batch_at(step, source, bare, AUGMENTED))
    assert opened and not any("gtFine" in str(path) for path in opened)


def test_data_the_target_is_left_alone_before_adv_start(small_sets):
    hyper = Hyper(steps=10, adv_start=4, crop=False)
    steps = data.Steps(*small_sets, hyper, seed=0)
    assert [steps[i].target is None for i in (0, 3, 4, 9)] == [True, True, False, False]
    source_only = data.Steps(*small_sets, replace(hyper, method="source"), seed=0)
    assert source_only[9].target is None


def test_data_streets_splits_and_domains_share_no_scene():
    sets = [
        data.open_dataset("streets", role, split)
        for role in ("source", "target")
        for split in ("train", "val")
    ]
    items = [set(d.items) for d in sets]
    assert sum(map(len, items)) == len(set.union(*items))
    assert {item[1] for item in sets[0].items + sets[1].items} == {"game"}
    assert {item[1] for item in sets[2].items + sets[3].items} == {"city"}
    image, label = data.image_at(sets[0], 0), data.label_at(sets[0], 0)
    assert image.shape == (64, 128, 3) and image.dtype == np.uint8
    assert label.shape == (64, 128) and set(np.unique(label)) <= {*range(19), 255}


# Class spaces.


def test_data_classes_meet_by_name(tmp_path):
    content = {"names": ["car", "lake", "road"], "ignore": [255]}
    target = data.open_dataset("folder", "target", "train", make_folder(tmp_path / "f", content))
    source = data.open_dataset("streets", "source", "train")
    table, scored, left_out = data.shared_classes(source, target)
    assert scored == ("road", "car")
    assert (table[:3] == (13, 255, 0)).all() and (table[3:] == 255).all()
    assert set(left_out) == set(CLASSES) - {"road", "car"} | {"lake"}


def test_data_camvid_has_eleven_classes_of_cityscapes():
    folder = need("camvid")
    target = data.open_dataset("folder", "target", "val", folder)
    source = data.open_dataset("streets", "source", "train")
    table, scored, left_out = data.shared_classes(source, target)
    assert len(target) == 101 and len(scored) == 11 and len(left_out) == 8
    names = json.loads((folder / "classes.json").read_text())["names"]
    assert [CLASSES[table[i]] for i in range(11)] == names
    assert table[255] == 255
    _, _, label = data.Pairs(target)[0]
    assert set(label.unique().tolist()) <= {*range(11), 255}


def test_data_sets_without_a_common_name_are_refused(tmp_path):
    target = data.open_dataset(
        "folder", "target", "train", make_folder(tmp_path, {"names": ["lake"], "ignore": [9]})
    )
    source = data.open_dataset("streets", "source", "train")
    with pytest.raises(ValueError, match=r"share no class name: name the classes .*road, sidewalk"):
        data.shared_classes(source, target)


# The check command.


def test_data_check_finds_every_bad_file_at_once(tmp_path, capsys):
    make_gta5(tmp_path, count=6)
    (tmp_path / "images" / "00002.png").write_bytes(b"no image")
    write_png(tmp_path / "labels" / "00003.png", np.full((24, 40), 77, np.uint8))
    write_png(tmp_path / "labels" / "00005.png", np.full((12, 40), 7, np.uint8))
    write_png(tmp_path / "images" / "00006.png", np.full((24, 40, 3), 9, np.uint8))
    assert data.main(["gta5", "--dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    for words in ("00002.png cannot be read", "00003.png holds the id 77", "00005.png is 40x12"):
        assert words in out
    assert "00006.png is blank" in out and "3 of 6 pairs are wrong, 1 notes" in out
    assert "00001.png" not in out and "00004.png" not in out


def test_data_check_of_a_good_set_counts_the_classes(tmp_path, capsys):
    make_folder(tmp_path / "set", {"names": ["road", "car"]})
    write_png(tmp_path / "set/labels/train/a/0.png", np.zeros((24, 40), np.uint8))
    ids = np.zeros((24, 40), np.uint8)
    ids[:12] = 1
    write_png(tmp_path / "set/labels/train/a/1.png", ids)
    assert data.main(["folder", "--dir", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    shares = {name.strip(): (float(a), float(b)) for name, a, b in rows}
    assert shares == {"road": (75, 100), "car": (25, 50), "unlabelled": (0, 0)}
    assert "0 of 2 pairs are wrong" in out


def test_data_check_of_a_missing_folder_ends_with_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"error: the folder .* of the data set gta5 is missing"):
        data.main(["gta5", "--data", str(tmp_path)])


def test_data_the_real_cityscapes_frames_are_right(capsys):
    need("cityscapes")
    folder = SHARED / "cityscapes"
    assert data.main(["cityscapes", "--dir", str(folder), "--split", "train"]) == 0
    assert "0 of 4 pairs are wrong" in capsys.readouterr().out


@pytest.mark.parametrize("workers", (0, 2))
def test_data_a_bad_file_found_by_a_worker_is_one_sentence(tmp_path, workers):
    dataset = data.open_dataset("folder", "source", "train", make_folder(tmp_path))
    for image, _ in dataset.items:
        image.write_bytes(image.read_bytes()[:60])
    steps = data.Steps(dataset, None, Hyper(method="source", steps=4, crop=False), seed=0)
    for samples, options in ((steps, {"batch_size": None}), (data.Pairs(dataset), {})):
        loader = torch.utils.data.DataLoader(
            samples, num_workers=workers, collate_fn=list if not options else None, **options
        )
        with pytest.raises(ValueError, match="cannot be read") as caught:
            list(data.checked(loader))
        assert "\n" not in str(caught.value)


# Looks and splits of streets.


def test_data_mixed_streets_have_a_look_each_between_game_and_city():
    """The scenes of one run differ in look. A scene is the same at every call."""
    mixed = data.open_dataset("streets", "source", "train", mixed=True)
    images = [data.image_at(mixed, i).astype(float) for i in range(12)]
    assert all((data.image_at(mixed, i) == image).all() for i, image in enumerate(images))
    skies = np.array(
        [image[:6].mean(axis=(0, 1)) for image in images]
    )  # blue in game, grey in city
    blueness = skies[:, 2] - skies[:, 0]
    assert blueness.max() - blueness.min() > 60
    plain = data.open_dataset("streets", "source", "train")
    game = np.array([data.image_at(plain, i)[:6].mean(axis=(0, 1)) for i in range(12)])
    assert (game[:, 2] - game[:, 0]).min() > blueness.min()
    target = data.open_dataset("streets", "target", "train", mixed=True)
    assert target.items == data.open_dataset("streets", "target", "train").items


@pytest.mark.parametrize("role", ("source", "target"))
def test_data_the_splits_of_streets_share_no_scene(role):
    scenes = [
        set(data.open_dataset("streets", role, split).items) for split in ("train", "dev", "val")
    ]
    assert all(len(split) >= 250 for split in scenes)
    assert len(set.union(*scenes)) == sum(map(len, scenes))


def test_data_scenes_of_another_number_are_drawn_anew():
    first, again, other = (
        data.open_dataset("streets", "target", "val", scenes=number) for number in (0, 0, 1)
    )
    assert first.items == again.items and not set(first.items) & set(other.items)
    assert (data.image_at(first, 0) != data.image_at(other, 0)).any()


def test_data_a_photograph_of_a_turned_camera_is_upright(tmp_path):
    """Phones store the picture as the sensor sees it, and say in EXIF how it was held."""
    pixels = striped((40, 24), range(3))[0]
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.jpg", exif=exif)
    dataset = data.open_dataset("folder", "target", "train", tmp_path, labels="none", short_side=48)
    assert data.image_at(dataset, 0).shape[:2] == (24, 40) and dataset.size == (48, 80)
    assert data.upright_size(tmp_path / "images" / "a.jpg") == (24, 40)


@pytest.mark.parametrize("name", ("A.PNG", "a_mask.png", "a.jpg"))
def test_data_labels_of_other_names_are_not_taken_for_no_labels(tmp_path, name):
    write_png(tmp_path / "images" / "val" / "a.png", striped((40, 24), range(3))[0])
    label = tmp_path / "labels" / "val" / name
    label.parent.mkdir(parents=True)
    label.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"first missing label is .*labels/val/a.png"):
        data.open_dataset("folder", "target", "val", tmp_path, labels="optional")
    label.unlink()
    assert not data.open_dataset("folder", "target", "val", tmp_path, labels="optional").has_labels


def test_data_hidden_files_are_no_photographs(tmp_path):
    write_png(tmp_path / "a.png", striped((40, 24), range(3))[0])
    (tmp_path / "._a.png").write_bytes(b"x")
    assert len(data.open_dataset("folder", "target", "train", tmp_path, labels="none")) == 1
