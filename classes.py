"""The 19 classes that Cityscapes scores, their colours, and their ids in each data set's labels.

    label = TO_TRAIN_IDS["cityscapes"][label_ids]           # labelIds to train ids, both uint8
    colours = palette_of(CLASSES)[label]                    # H W 3 uint8

A train id is the index of a class in CLASSES. IGNORE marks unlabelled pixels (Section 4.1). A new
label id is added here and in tests/test_data.py, which compares these tables with the official
ones.
"""

from collections.abc import Iterable, Sequence

import numpy as np

# In the order of their train ids.
CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)
PALETTE = np.array(
    [
        *([128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156], [190, 153, 153]),
        *([153, 153, 153], [250, 170, 30], [220, 220, 0], [107, 142, 35], [152, 251, 152]),
        *([70, 130, 180], [220, 20, 60], [255, 0, 0], [0, 0, 142], [0, 0, 70], [0, 60, 100]),
        *([0, 80, 100], [0, 0, 230], [119, 11, 32]),
    ],
    dtype=np.uint8,
)
IGNORE = 255
UNKNOWN = 254  # marks ids that a data set's labels must not contain

# Classes that the paper's text calls infrequent and prone to negative transfer (Sections 4.3 and
# 4.4; its tables show them in blue).
INFREQUENT = ("fence", "pole", "traffic light", "traffic sign")


def id_table(known_ids: Iterable[int], train_ids: dict[int, int]) -> np.ndarray:
    """256 entries, id on disk to train id. Known ids without one get IGNORE, all others UNKNOWN."""
    to_train_ids = np.full(256, UNKNOWN, np.uint8)
    to_train_ids[list(known_ids)] = IGNORE
    for label_id, train_id in train_ids.items():
        to_train_ids[label_id] = train_id
    return to_train_ids


CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
FROM_CITYSCAPES = {label_id: train_id for train_id, label_id in enumerate(CITYSCAPES_IDS)}
FROM_SYNTHIA = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11}
FROM_SYNTHIA |= {17: 12, 8: 13, 18: 14, 19: 15, 20: 16, 12: 17, 11: 18}
TO_TRAIN_IDS = {
    "gta5": id_table((*range(35), 255), FROM_CITYSCAPES),  # 34, 255: the license plate (id -1)
    "cityscapes": id_table((*range(35), 255), FROM_CITYSCAPES),
    "synthia": id_table(range(23), FROM_SYNTHIA),
}
LABEL_IDS = np.array(CITYSCAPES_IDS, np.uint8)  # by train id, for the official scorer

SYNTHIA_ABSENT = ("terrain", "truck", "train")  # classes that SYNTHIA's labels never show
SYNTHIA_13 = tuple(c for c in CLASSES if c not in ("wall", "fence", "pole", *SYNTHIA_ABSENT))


def palette_of(classes: Sequence[str]) -> np.ndarray:
    """Colours by train id, 256 x 3 uint8: Cityscapes' colour of that name, else a random one."""
    known = dict(zip(CLASSES, PALETTE, strict=True))
    palette = np.zeros((256, 3), np.uint8)
    for i, name in enumerate(classes):
        rng = np.random.default_rng(i)
        palette[i] = known.get(name, rng.integers(40, 256, 3))
    return palette
