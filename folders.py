"""classes.json of a folder of photographs: what the ids of its labels mean, where its files are.

    {"names": ["sky", "road"], "ignore": [11]}                      # id i is names[i]
    {"ids": {"0": "background", "128": "lesion", "255": "lesion"}}  # any ids, several to one name
    {"ids": {...}, "images": {"train": "rgb/*/train/{name}_rgb.png"},
                   "labels": {"train": "gt/*/train/{name}_gt.png"}}

A pattern is a path below the folder. `*` stands for a part of one folder's or file's name, and
`{name}` for what an image and its label have in common. Without patterns the files are in
images/SPLIT and labels/SPLIT. A target without labels may have `images` alone. The classes of two
data sets are matched by name.
"""

import glob
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from classes import UNKNOWN, id_table

KEYS = {"names", "ids", "ignore", "images", "labels"}
EXAMPLES = '{"names": ["road", "car"]} or {"ids": {"0": "background", "255": "lesion"}}'


class ClassList(NamedTuple):
    """What a classes.json says."""

    names: tuple[str, ...]  # by train id
    to_train_ids: np.ndarray  # 256 uint8, from the ids of the label files
    images: dict[str, str]  # a pattern by split; empty: images/SPLIT
    labels: dict[str, str]


@lru_cache
def read_classes(path: Path) -> ClassList:
    """A classes.json. Raises ValueError, with its path, for one that makes no sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=different_keys)
        if not isinstance(content, dict) or set(content) - KEYS:
            raise ValueError(f"it may hold no keys but {', '.join(sorted(KEYS))}")
        unlabelled = bool(content.get("images")) and not content.keys() & {"names", "ids", "labels"}
        names, train_ids = ((), {}) if unlabelled else names_and_ids(content)
        ignore = content.get("ignore", [])
        free = isinstance(ignore, list) and all(is_id(i) and i not in train_ids for i in ignore)
        if not free:
            raise ValueError("ignore must list ids up to 255 that no class has")
        patterns = [content.get(key, {}) for key in ("images", "labels")]
        for found in patterns:
            check_patterns(found)
        if not patterns[1].keys() <= patterns[0].keys():
            raise ValueError("labels has a split that images lacks")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a class list ({error}): write {EXAMPLES}") from error
    return ClassList(names, id_table(ignore, train_ids), *patterns)


def different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. JSON itself would take the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is there twice among {', '.join(key for key, _ in pairs)}")
    return found


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def names_and_ids(content: dict) -> tuple[tuple[str, ...], dict[int, int]]:
    """(names by train id, train id by id) of `names` or `ids`."""
    if ("names" in content) == ("ids" in content):
        raise ValueError("it needs either names or ids")
    if "names" in content:
        names = content["names"]
        if not isinstance(names, list) or len(set(names)) != len(names):
            raise ValueError("names must be different strings, at least one")
        train_ids = {i: i for i in range(len(names))}
    else:
        named = {int(i): name for i, name in content["ids"].items()}
        if len(named) < len(content["ids"]) or not all(map(is_id, named)):
            raise ValueError("ids must be different numbers up to 255, each with a name")
        names = list(dict.fromkeys(named.values()))
        train_ids = {i: names.index(name) for i, name in named.items()}
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("names must be different strings, at least one")
    if len(names) > UNKNOWN:
        raise ValueError("it may hold up to 254 names")
    return tuple(names), train_ids


# Where the files of a split are.


def check_patterns(patterns: dict[str, str]) -> None:
    for split, pattern in patterns.items():
        parts = Path(pattern).parts
        if pattern.count("{name}") != 1 or "**" in pattern:
            raise ValueError(f"the pattern of {split} needs {{name}} once, and no **")
        if "*{name}" in pattern or "{name}*" in pattern or "." in parts or pattern[:2] == "./":
            raise ValueError(f"the pattern of {split} has a * beside {{name}}, or a ./")
        if Path(pattern).is_absolute() or ".." in parts:
            raise ValueError(f"the pattern of {split} must be a path below the folder")


Key = tuple[str, ...]  # what each * of a pattern stands for, then what {name} stands for


def find(folder: Path, pattern: str) -> dict[Key, Path]:
    """The files below a folder that a pattern describes."""
    wild = re.split(r"(\*|\{name\})", pattern)
    parts = {"*": "([^/]*)", "{name}": "(?P<name>[^/]+?)"}
    expression = re.compile("".join(parts.get(part, re.escape(part)) for part in wild))
    found = {}
    if not pattern:
        return {}
    literal = "".join("*" if part in parts else glob.escape(part) for part in wild)
    for path in sorted(folder.glob(literal)):
        match = expression.fullmatch(path.relative_to(folder).as_posix())
        if match and not path.is_dir() and not path.name.startswith("."):
            name = match["name"]
            place = expression.groupindex["name"] - 1
            others = [x for i, x in enumerate(match.groups()) if i != place]
            found[(*others, name)] = path
    return found


def files_of(
    folder: Path, classes: ClassList, split: str, with_labels: bool
) -> list[tuple[Path, Path | None]]:
    """(image, label) of each image of a split, by its patterns. A missing label is named as well.

    The label is None if none is asked for, or the split has no pattern for labels. An image and a
    label belong together if {name} and each `*` stand for the same; with another number of `*`, if
    {name} does. Raises ValueError for an image that belongs to two splits, a label without image,
    and a name that does not tell two images apart.
    """
    images = find(folder, classes.images[split])
    for other, pattern in classes.images.items():
        both = set(images.values()) & set(find(folder, pattern).values())
        if other != split and both:
            raise ValueError(
                f"{min(both)} belongs to {split} and to {other} by the patterns of "
                f"{folder / 'classes.json'}: write patterns that tell them apart"
            )
    for pattern in classes.labels.values():  # a label may lie beside its image
        if pattern.count("*") == classes.images[split].count("*"):
            masks = {place_of(key, pattern, folder) for key in images}
            images = {key: path for key, path in images.items() if path not in masks}
    if not with_labels or split not in classes.labels:
        return [(image, None) for image in images.values()]
    pattern = classes.labels[split]
    labels = find(folder, pattern)
    labels = {key: path for key, path in labels.items() if path not in images.values()}
    if pattern.count("*") != classes.images[split].count("*"):
        images, labels = by_name(images, folder), by_name(labels, folder)

    elsewhere = [s for s, p in classes.labels.items() if s != split and p == pattern]
    others = {key[-1] for s in elsewhere for key in find(folder, classes.images[s])}
    alone = [p for key, p in labels.items() if key not in images and key[-1] not in others]
    if alone:
        raise ValueError(
            f"{alone[0]} is a label without image ({len(alone)} in {split}): add the image, or "
            f"change the patterns of {folder / 'classes.json'}"
        )
    return [
        (image, labels.get(key) or place_of(key, pattern, folder)) for key, image in images.items()
    ]


def place_of(key: Key, pattern: str, folder: Path) -> Path:
    """Where a pattern expects the file of a key."""
    *places, name = key
    parts = iter(places)
    text = re.sub(r"\*", lambda star: next(parts, star[0]), pattern)
    return folder / text.replace("{name}", name)


def by_name(files: dict[Key, Path], folder: Path) -> dict[Key, Path]:
    """The same files by {name} alone."""
    found: dict[Key, Path] = {}
    for (*_, name), path in files.items():
        if (name,) in found:
            raise ValueError(
                f"{found[name,]} and {path} have the name {name}: use as many * in `labels` as in "
                f"`images` of {folder / 'classes.json'}"
            )
        found[name,] = path
    return found
