"""The embedded data set: procedural street scenes with exact labels in two domains, numpy only.

    image, label = render(0, "game")                        # uint8 (64, 128, 3), uint8 (64, 128)
    image, label = render(0, "city", shift=0.5, layout=0.5)  # the other domain, same 19 classes
    image, label = render(0, "city", size=(256, 512))        # the same scene with more pixels

    python streets.py --out streets.png         # contact sheet, images/s and class frequencies

It stands in for GTA5 -> Cityscapes (Section 4.1) where no download is wanted: one generator, two
looks. "game" is flat and saturated; "city" has other colours, textures, haze, light, a camera
(`shift`) and other streets (`layout`). Labels are Cityscapes train ids.

A scene is a one-point perspective. X is the distance to the right and h the height above ground,
both in eye heights (about 1.6 m). The scale s = FOCAL / depth is the size of one eye height on the
picture (height = 1), so a point is seen at x = vx + X s / 2 and y = vy + (1 - h) s, with x and y
in [0, 1] and (vx, vy) the vanishing point. Everything is painted from far to near, colour and
class in one stroke, which is why the labels are exact.
"""

import argparse
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from math import floor
from pathlib import Path

import numpy as np

from classes import CLASSES, PALETTE

# ---- Calibration of the gap between the domains: each is the strength at shift = 1. -------------
PALETTE_SHIFT = 1.0  # way from game's to city's colours; by far the strongest knob
HAZE = 0.6  # share of fog in what is far away
GAIN, TINT = 0.40, 0.16  # half range of a scene's brightness, and of each colour channel
TONE = 0.25  # gamma: how much darker the mid-tones are
VIGNETTE = 0.30  # darkening at the corners
BLUR = 0.30  # weight of the neighbours, at most 1/2
NOISE = 0.12  # range of the sensor noise; colours are in [0, 1]
BRICKS = 0.35  # darkness of the joints in the masonry
FINE, COARSE = 0.8, 0.4  # scale of GRAIN, per pixel and in blocks

# Texture of each class (relative contrast): asphalt and foliage are rough, sky and paint are not.
GRAIN = np.array(
    [
        *(0.3, 0.25, 0.2, 0.5, 0.3, 0.1, 0.1, 0.1, 0.9, 0.6),  # road ... terrain
        *(0.05, 0.3, 0.3, 0.15, 0.2, 0.15, 0.15, 0.2, 0.2),  # sky ... bicycle
    ],
    np.float32,
)

# Geometry: (game, city at layout = 1), in eye heights.
ROAD_HALF = (2.2, 2.0)
PAVEMENT = (0.95, 1.2)
STRIP = (2.3, 0.45)  # a verge between pavement and houses; grass or paved
GRASS_SHARE = (0.95, 0.35)  # probability that it is grass
HEIGHT = (4.4, 7.0)  # mean height of a house
LOT_SHARE = (0.42, 0.24)  # probability of an open lot in place of a house

# kind: (mean count in game, in city at layout = 1, nearest s, farthest s)
POPULATION = {
    "tree": (2.4, 1.6, 0.34, 0.08),
    "lamp": (0.7, 0.9, 0.42, 0.12),
    "light": (1.0, 1.0, 0.42, 0.15),
    "disc": (0.5, 0.65, 0.42, 0.15),  # round signs
    "board": (0.5, 0.65, 0.42, 0.15),  # square signs
    "person": (1.3, 3.6, 0.42, 0.11),
    "cyclist": (0.45, 0.8, 0.40, 0.13),
    "biker": (0.50, 0.45, 0.40, 0.13),
    "bicycle": (0.25, 0.5, 0.34, 0.13),
    "car": (1.7, 2.0, 0.46, 0.07),
    "truck": (0.42, 0.38, 0.40, 0.12),
    "bus": (0.42, 0.42, 0.40, 0.12),
    "train": (0.22, 0.24, 0.36, 0.12),
}
# -------------------------------------------------------------------------------------------------

FOCAL = 1.6  # s of a thing one eye height away
THIN = 1.5 / 128  # least width of a pole, so that it is seen at 128 pixels
DOMAINS = ("game", "city", "mixed")

# Colours (rrggbb) of each ink: variants in game / in city; an instance takes one variant of each.
# The numbers of variants differ so that shirts, trousers and skins combine freely.
INKS = {
    "road": "50505c 585864 484854 / 857a6c 74706a 94887a",
    "mark": "ffffff / c8c0a0",
    "pavement": "c0a0b8 b898b0 c8a8b8 / 9aa49c a6a49a 8c9a9a",
    "curb": "e0c8d8 / b4b4ac",
    "grass": "90d030 80c828 a0d840 / 8c8050 7a7c54 968a60",
    "sky": "4098ff 3088f8 58a8ff / b0a8b4 a4a8ac c0b4b0",
    "horizon": "b8e0ff / dcd4d0",
    "cloud": "f4faff / e8e4e4",
    "house": "e07840 e8b058 d05850 d89878 b86840 / 6c8088 80909c a09c94 5c6c6c 8c8898",
    "roof": "903828 a04030 / 484c58 585458",
    "window": "284878 305890 / 404850 b4b8a8",
    "door": "682820 205838 503070 / 584840 404858",
    "skyline": "c08868 a87860 / 98a0a8 8890a0",
    "wall": "a86838 985828 b87848 / 8c9078 7c8474",
    "fence": "f0d8a0 e8c888 f8e8c0 / 6c5c50 7c7064",
    "leaf": "189828 28a838 108820 38b040 / 5c6430 746c38 48583c 66603c",
    "sprout": "40c840 50d048 38b838 68d860 / 747c40 8c8450 606c50 807850",
    "trunk": "704018 / 504840",
    "pole": "a8a8b8 9898a8 / 50585c 606058",
    "box": "181818 282828 / 38342c",
    "red": "ff2020 401010 401010 / d05040 403434 403434",  # one of the three is lit
    "amber": "403008 ffb000 403008 / 403c34 d0a050 403c34",
    "green": "0c4018 0c4018 20ff60 / 344038 344038 60b890",
    "tail": "ff2020 / d05040",
    "sign": "ffe800 ff2828 2060ff 18a048 / c8a840 a84848 506c98 406850",
    "warn": "ff2020 / b04c4c",
    "rim": "ffffff / d0ccc4",
    "back": "a0a0b0 9090a0 / 686c6c 5c6060",
    "skin": "f0b890 c88860 885030 / c09080 906858 604840",
    "hair": "402010 181010 c89030 703818 / 2c2420 1c1a1c 786850 3c2c28",
    "coat": "d82878 8028c0 e050d0 60208c / 2c3038 4c4440 24282c 6c5c54",
    "shirt": "ff30a0 e020d0 ffc0e8 a030ff f04060 / 783c60 404868 a89890 584048 403c50",
    "trousers": "401880 501060 302098 581048 / 34303c 443c48",
    "rider": "ffa000 ff8020 f8c000 / 8c6440 78583c a07c48",
    "helmet": "ffffff ffe040 / c0b8a8 605850",
    "cycle": "00c8c8 00a8b8 20e0d0 / 3c6064 506058",
    "tyre": "101014 / 28282c",
    "spokes": "408890 / 505c60",
    "moto": "b8ff00 d0ff20 98e800 / 747c40 606838",
    "car": "e82020 2030e0 f4f4f4 1818a0 c01030 / 343840 a4a8ac 602c30 2c4058 847c70",
    "truck": "f8f0d0 f09030 f0d8b0 / 8c8c80 a08c78 6c7468",
    "cab": "f06010 d84800 / 605048 506468",
    "bus": "ffd800 f8c800 / a09060 b09c60",
    "train": "00a888 009878 / 4c7c70 587468",
    "stripe": "ffffff e8f8ff / b8b8b0",
    "glass": "203850 / 50585c",
    "plate": "fff8d0 / c8c4a8",
}


def _pair(shape, left, bottom, right, top, *paint):
    """A part and its mirror image: wheels, lamps and legs come in twos."""
    return (shape, -right, bottom, -left, top, *paint), (shape, left, bottom, right, top, *paint)


# Parts of things, back to front: (shape, left, bottom, right, top, ink, class), in eye heights
# from the foot.
# fmt: off
BICYCLE = (
    *_pair("disc", .12, 0, .66, .54, "tyre", 18), *_pair("disc", .21, .09, .57, .45, "spokes", 18),
    ("box", -.40, .24, .40, .36, "cycle", 18), ("box", -.18, .24, -.08, .66, "cycle", 18),
    ("box", .28, .28, .38, .74, "cycle", 18),
)
MOTORCYCLE = (
    *_pair("disc", .16, 0, .72, .56, "tyre", 17), ("box", -.50, .22, .42, .44, "moto", 17),
    ("taper", -.62, .42, .46, .66, "moto", 17), ("box", .34, .40, .46, .86, "moto", 17),
    ("box", -.20, .16, .20, .30, "tyre", 17),
)
THINGS = {
    "person": (
        *_pair("box", .03, 0, .17, .50, "trousers", 11), ("box", -.27, .52, .27, .88, "shirt", 11),
        ("box", -.19, .45, .19, .94, "shirt", 11), ("disc", -.12, .90, .12, 1.16, "skin", 11)),
    "walker": (  # seen from behind, a leg in front, with a bag
        ("box", -.20, 0, -.06, .50, "trousers", 11), ("box", .04, .06, .18, .50, "trousers", 11),
        ("taper", -.24, .44, .24, .95, "shirt", 11), ("box", .16, .40, .32, .66, "hair", 11),
        ("disc", -.12, .92, .12, 1.17, "hair", 11)),
    "coat": (
        *_pair("box", .04, 0, .15, .26, "trousers", 11), ("taper", -.28, .22, .28, .96, "coat", 11),
        ("disc", -.12, .90, .12, 1.16, "skin", 11), ("box", -.11, 1.04, .11, 1.18, "hair", 11)),
    "bicycle": BICYCLE,
    "cyclist": (
        *BICYCLE, ("box", -.12, .22, .10, .72, "trousers", 12),
        ("taper", -.24, .66, .22, 1.14, "rider", 12), ("box", .08, .82, .36, .94, "rider", 12),
        ("disc", -.10, 1.10, .16, 1.38, "helmet", 12)),
    "biker": (
        *MOTORCYCLE, ("box", -.14, .26, .10, .66, "trousers", 12),
        ("taper", -.32, .58, .20, 1.12, "rider", 12), ("box", .06, .80, .40, .92, "rider", 12),
        ("disc", -.14, 1.06, .16, 1.38, "helmet", 12)),
    "car": (
        *_pair("box", .34, 0, .54, .22, "tyre", 13), ("box", -.60, .12, .60, .56, "car", 13),
        ("taper", -.58, .52, .58, .98, "car", 13), ("taper", -.47, .58, .47, .90, "glass", 13),
        *_pair("box", .36, .36, .58, .48, "lamp", 13), ("box", -.18, .22, .18, .34, "plate", 13)),
    "truck": (
        *_pair("box", .44, 0, .70, .34, "tyre", 14), ("box", -.78, .28, .78, .52, "cab", 14),
        ("box", -.80, .50, .80, 2.15, "truck", 14), ("box", -.03, .56, .03, 2.08, "cab", 14),
        *_pair("box", .52, .32, .76, .44, "lamp", 14)),
    "bus": (
        *_pair("box", .46, 0, .72, .26, "tyre", 15), ("box", -.82, .16, .82, 2.0, "bus", 15),
        ("box", -.70, .95, .70, 1.62, "glass", 15), ("box", -.45, 1.72, .45, 1.90, "plate", 15),
        *_pair("box", .50, .34, .76, .48, "lamp", 15)),
    "train": (
        ("box", -.70, 0, .70, .20, "tyre", 16), ("box", -.85, .14, .85, 1.90, "train", 16),
        ("taper", -.85, 1.85, .85, 2.30, "train", 16), ("box", -.85, .62, .85, .80, "stripe", 16),
        *_pair("box", .05, 1.05, .64, 1.80, "glass", 16),
        *_pair("disc", .42, .30, .66, .54, "lamp", 16)),
    "lamp": (
        ("pole", -.05, 0, .05, 3.80, "pole", 5), ("box", -.05, 3.70, .90, 3.84, "pole", 5),
        ("box", .55, 3.56, .95, 3.76, "rim", 5)),
    "lantern": (
        ("pole", -.06, 0, .06, 2.90, "box", 5), ("taper", -.24, 2.82, .24, 3.40, "rim", 5),
        ("box", -.28, 3.36, .28, 3.50, "box", 5)),
    "post": (  # thick at its foot, with an arm that hangs a light over the road
        ("pole", -.11, 0, .11, .90, "pole", 5), ("pole", -.06, .90, .06, 4.30, "pole", 5),
        ("box", -.70, 4.18, .70, 4.32, "pole", 5)),
    "light": (
        ("pole", -.06, 0, .06, 2.60, "pole", 5), ("box", -.22, 1.70, .22, 2.72, "box", 6),
        ("disc", -.17, 2.38, .17, 2.68, "red", 6), ("disc", -.17, 2.06, .17, 2.36, "amber", 6),
        ("disc", -.17, 1.74, .17, 2.04, "green", 6)),
    "disc": (
        ("pole", -.05, 0, .05, 1.90, "pole", 5), ("disc", -.34, 1.56, .34, 2.24, "rim", 7),
        ("disc", -.28, 1.62, .28, 2.18, "sign", 7), ("box", -.20, 1.85, .20, 1.95, "rim", 7)),
    "warning": (
        ("pole", -.05, 0, .05, 1.60, "pole", 5), ("wedge", -.44, 1.50, .44, 2.30, "warn", 7),
        ("wedge", -.28, 1.58, .28, 2.12, "rim", 7), ("box", -.05, 1.64, .05, 1.92, "box", 7)),
    "board": (
        ("pole", -.05, 0, .05, 1.90, "pole", 5), ("box", -.34, 1.50, .34, 2.20, "rim", 7),
        ("box", -.28, 1.56, .28, 2.14, "sign", 7)),
    "arrow": (  # a way sign with a line of text
        *_pair("pole", .28, 0, .36, 1.60, "pole", 5), ("box", -.52, 1.55, .52, 2.05, "sign", 7),
        ("box", -.40, 1.76, .28, 1.84, "rim", 7), ("box", .26, 1.68, .38, 1.92, "rim", 7)),
    "back": (  # for the other direction
        ("pole", -.05, 0, .05, 2.10, "pole", 5), ("box", -.33, 1.52, .33, 2.18, "back", 7)),
    "tree": (
        ("pole", -.12, 0, .12, 1.90, "trunk", 8), ("crown", -1.0, 1.30, .35, 2.75, "leaf", 8),
        ("crown", -.30, 1.40, 1.0, 2.70, "leaf", 8), ("crown", -.70, 1.90, .75, 3.40, "leaf", 8),
        ("crown", -.55, 2.35, .30, 3.25, "sprout", 8)),
    "conifer": (
        ("pole", -.10, 0, .10, .70, "trunk", 8), ("wedge", -.85, .50, .85, 2.30, "leaf", 8),
        ("wedge", -.72, 1.30, .72, 3.00, "leaf", 8), ("wedge", -.55, 2.10, .55, 3.70, "sprout", 8)),
    "bare": (  # the sky shows between the twigs, and is labelled with them
        ("pole", -.11, 0, .11, 2.10, "trunk", 8), ("twigs", -1.0, 1.20, .40, 2.90, "trunk", 8),
        ("twigs", -.40, 1.30, 1.0, 2.80, "trunk", 8), ("twigs", -.75, 1.90, .75, 3.50, "trunk", 8)),
}
# What an object may look like, one of these each; kinds that are not listed have one look.
LOOKS = {
    "tree": ("tree", "tree", "bare", "conifer", "tree"),
    "lamp": ("lamp", "lantern", "post"),
    "disc": ("disc", "warning", "disc"),
    "board": ("board", "arrow", "back"),
    "person": ("person", "walker", "coat"),
}
# Sides of vehicles: half width, class, then (from, bottom, to, top, ink, panes), from and to in
# eye heights behind the face that is turned to us; panes > 0 leaves gaps at that period.
SIDES = {
    "car": (.60, 13, (
        (0, .12, 2.7, .56, "car", 0), (.2, .5, 2.0, .96, "car", 0),
        (.35, .58, 1.85, .88, "glass", .8),
        (.3, 0, .75, .3, "tyre", 0), (1.95, 0, 2.4, .3, "tyre", 0))),
    "truck": (.80, 14, (
        (0, .28, 4.6, .52, "cab", 0), (0, .5, 3.5, 2.15, "truck", 0),
        (3.6, .28, 4.6, 1.75, "cab", 0), (3.8, 1.0, 4.4, 1.55, "glass", 0),
        (.5, 0, 1.2, .4, "tyre", 0), (3.7, 0, 4.3, .4, "tyre", 0))),
    "bus": (.82, 15, (
        (0, .16, 6.5, 2.0, "bus", 0), (.2, .95, 6.3, 1.62, "glass", .9),
        (.8, 0, 1.5, .34, "tyre", 0), (4.8, 0, 5.5, .34, "tyre", 0))),
    "train": (.85, 16, (
        (0, .1, 14, 2.1, "train", 0), (0, .62, 14, .8, "stripe", 0),
        (.2, 1.05, 13.8, 1.7, "glass", 1.2))),
}
# fmt: on


def render(
    index: int,
    domain: str,
    *,
    seed: int = 0,
    size: tuple[int, int] = (64, 128),
    shift: float = 0.5,
    layout: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a domain: image uint8 (H, W, 3) RGB and label uint8 (H, W) of train ids.

    domain: "game", "city" or "mixed". size: (H, W) in pixels. shift and layout in [0, 1]: how much
    the city differs from the game in appearance, and in geometry and class frequency. The others
    ignore them: mixed has the game's geometry, and each of its scenes an appearance of its own
    between game and city. A pure function of its arguments. Raises ValueError for arguments outside
    these ranges.
    """
    _check(index, domain, size, shift, layout)
    key = [seed, DOMAINS.index(domain), index]
    if domain != "city":
        mixed = domain == "mixed"
        look = int(np.random.default_rng([*key, 2]).integers(33)) / 32  # of this scene
        shift, layout = look if mixed else 0.0, 0.0
    rng = np.random.default_rng(key)  # the scene: the same draws at every size
    canvas = _canvas(rng, size, shift)
    street = _street(rng, layout)
    _paint_sky(canvas, rng)
    _paint_ground(canvas, rng, street)
    for side in (-1, 1):
        _paint_houses(canvas, rng, street, side, layout)
    for s, x, kind, pick in sorted(_population(rng, street, layout)):
        _paint_thing(canvas, s, x, kind, pick)
    image = canvas.image
    if shift > 0:
        light = 1 + shift * (GAIN * rng.uniform(-1, 1) + TINT * rng.uniform(-1, 1, 3))
        _photograph(canvas, np.random.default_rng([*key, 1]), light.astype(np.float32), shift)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), canvas.label


def _check(index, domain, size, shift, layout):
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}, but must be 'game', 'city' or 'mixed'")
    if index < 0:
        raise ValueError(f"index is {index}, but scenes are numbered from 0")
    if min(size) < 16:
        raise ValueError(f"size is {tuple(size)}, but a scene needs at least 16 x 16 pixels")
    for name, value in (("shift", shift), ("layout", layout)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, but must be within [0, 1]")


# ---- Canvas: where colour and class are painted together ----------------------------------------


@dataclass
class Canvas:
    """A picture in the making: colours in [0, 1], classes, and the view it is seen from."""

    image: np.ndarray  # float32 (H, W, 3)
    label: np.ndarray  # uint8 (H, W)
    xs: np.ndarray  # float32 (W,), centres of the columns in [0, 1]
    ys: np.ndarray  # float32 (H, 1), centres of the rows in [0, 1]
    vx: float
    vy: float
    shift: float
    inks: dict[str, np.ndarray]  # name -> float32 (variants, 3)
    fog: np.ndarray  # float32 (3,)

    def ink(self, name: str, pick: int = 0, s: float = 1.0) -> np.ndarray:
        """Colour (3,) of the ink for the instance numbered `pick`, seen at scale s."""
        variants = self.inks[name]
        colour = variants[pick % len(variants)] * (0.92 + 0.16 * (pick % 97) / 96)
        return colour + _haze(s, self.shift) * (self.fog - colour)

    def tints(self, name: str, picks: np.ndarray) -> np.ndarray:
        """Colours (n, 3) of the ink for many instances, without haze."""
        variants = self.inks[name]
        shade = (0.92 + 0.16 * (picks % 97) / 96).astype(np.float32)
        return variants[picks % len(variants)] * shade[:, None]


def _haze(s, shift):
    """Share of fog in what is seen at scale s, 0 at the eye."""
    return HAZE * shift * 0.08 / (0.08 + s)


@lru_cache(maxsize=64)
def _inks(shift: float) -> dict[str, np.ndarray]:
    """The colours of INKS at a strength of the shift; city's variants are the game's, moved."""
    table = {}
    for name, text in INKS.items():
        game, city = (
            np.array([list(bytes.fromhex(c)) for c in half.split()], np.float32) / 255
            for half in text.split("/")
        )
        n = max(len(game), len(city))
        game, city = (np.resize(half, (n, 3)) for half in (game, city))
        table[name] = game + np.float32(shift * PALETTE_SHIFT) * (city - game)
    return table


def _canvas(rng, size, shift) -> Canvas:
    h, w = size
    inks = _inks(shift)
    vx, vy = rng.uniform([0.36, 0.43], [0.64, 0.56])
    return Canvas(
        image=np.empty((h, w, 3), np.float32),
        label=np.full((h, w), 10, np.uint8),
        xs=((np.arange(w) + 0.5) / w).astype(np.float32),
        ys=((np.arange(h)[:, None] + 0.5) / h).astype(np.float32),
        vx=float(vx),
        vy=float(vy),
        shift=shift,
        inks=inks,
        fog=inks["horizon"][0],
    )


def _span(a: float, b: float, n: int) -> slice:
    """The pixels of n whose centres lie in [a, b) of [0, 1]; at least one, if inside at all."""
    i = floor(a * n + 0.5)
    j = max(floor(b * n + 0.5), i + 1)
    return slice(max(i, 0), max(j, 0))


# Lumps of foliage: a fixed pattern, from which every tree takes its own part.
LUMPS = np.random.default_rng(0).random((64, 64), np.float32)


def _lumps(across, down, cells, pick):
    """The pattern at (rows, 1) and (columns,), `cells` lumps to a unit."""
    rows = (np.floor(down * cells).astype(np.int32) + pick) & 63
    columns = (np.floor(across * cells).astype(np.int32) + pick // 64) & 63
    return LUMPS[rows, columns]


def _shape(canvas, shape, x0, y0, x1, y1, colour, cls, pick=0):
    """Paint a shape into the rectangle.

    box; disc (ellipse); taper (narrower towards its top); wedge (a triangle); crown (foliage with
    a ragged outline, lit from above); twigs (a crown that is painted in part, labelled as a whole).
    """
    h, w = canvas.label.shape
    area = _span(y0, y1, h), _span(x0, x1, w)
    if shape == "box":
        canvas.image[area] = colour
        if cls is not None:
            canvas.label[area] = cls
        return
    across = (canvas.xs[area[1]] - (x0 + x1) / 2) * (2 / (x1 - x0))
    down = (canvas.ys[area[0]] - (y0 + y1) / 2) * (2 / (y1 - y0))
    painted = inside = None
    if shape == "taper":
        inside = np.abs(across) < 0.85 + 0.15 * down
    elif shape == "wedge":
        inside = np.abs(across) < 0.5 + 0.5 * down
    else:
        inside = across**2 + down**2 < 1
    if shape in ("crown", "twigs"):
        coarse, fine = _lumps(across, down, 3.0, pick), _lumps(across, down, 6.5, pick)
        inside = across**2 + down**2 < 0.55 + 0.9 * coarse
        if shape == "twigs":
            painted = inside & (fine < 0.55)
        shade = (0.62 + 0.5 * fine + 0.3 * coarse) * (1 - 0.18 * down)
        colour = (colour * shade[..., None]).astype(np.float32)
    if painted is None:
        painted = inside
    canvas.image[area][painted] = colour[painted] if colour.ndim == 3 else colour
    if cls is not None:
        canvas.label[area][inside] = cls


def _slab(canvas, x, near, far, bottom, top, colour, cls, period=0.0):
    """Paint a vertical face that recedes along the street at X = x from s = near to s = far."""
    h, w = canvas.label.shape
    ends = canvas.vx + x * near / 2, canvas.vx + x * far / 2
    cols = _span(min(ends), max(ends), w)
    s = ((canvas.xs[cols] - canvas.vx) * (2 / x)).clip(far, near)
    rows = _span(canvas.vy + (1 - top) * (near if top > 1 else far), canvas.vy + near, h)
    y = canvas.ys[rows] - canvas.vy
    inside = (y >= s * (1 - top)) & (y < s * (1 - bottom))
    if period:
        inside &= (FOCAL / s / period) % 1 < 0.8
    canvas.image[rows, cols][inside] = colour
    canvas.label[rows, cols][inside] = cls


# ---- The street: sky, ground, houses ------------------------------------------------------------


@dataclass
class Street:
    """Where the zones of the ground end, left (0) and right (1), in eye heights from our lane."""

    road: tuple[float, float]
    pavement: tuple[float, float]
    facade: tuple[float, float]
    grass: tuple[bool, bool]


def _between(pair, layout):
    return pair[0] + (pair[1] - pair[0]) * layout


def _street(rng, layout) -> Street:
    half = _between(ROAD_HALF, layout) * rng.uniform(0.85, 1.15)
    lane = rng.uniform(-0.6, 0.2)  # we drive on the right: the middle of the road is to our left
    road = (lane - half, lane + half)
    wide = _between(PAVEMENT, layout) * rng.uniform(0.75, 1.25, 2)
    strip = _between(STRIP, layout) * rng.uniform(0.3, 1.7, 2)
    pavement = (road[0] - wide[0], road[1] + wide[1])
    facade = (pavement[0] - strip[0], pavement[1] + strip[1])
    grass = rng.random(2) < _between(GRASS_SHARE, layout)
    return Street(road, pavement, facade, (bool(grass[0]), bool(grass[1])))


def _paint_sky(canvas, rng):
    """A gradient, clouds (which the game hardly shows) and what closes the street far away."""
    pick = int(rng.integers(1 << 16))
    sky, low = canvas.ink("sky", pick), canvas.ink("horizon")
    height = (canvas.ys / canvas.vy).clip(0, 1)[:, None]
    canvas.image[:] = sky + height * (low - sky)
    cloud = sky + (0.2 + 0.5 * canvas.shift) * (canvas.ink("cloud") - sky)
    for x, y, rx, ry in rng.uniform([0, 0, 0.05, 0.02], [1, 0.3, 0.2, 0.06], (4, 4)):
        _shape(canvas, "disc", x - rx, y - ry, x + rx, y + ry, cloud, None)
    blocks = rng.uniform(0.02, 0.10, 24)
    for k, (top, green) in enumerate(zip(blocks, rng.random(24) < 0.4, strict=True)):
        ink, cls, top = ("leaf", 8, top / 2) if green else ("skyline", 2, top)
        box = k / 24, canvas.vy - top, (k + 1) / 24, canvas.vy + 0.03
        _shape(canvas, "box", *box, canvas.ink(ink, k, 0.03), cls)


def _paint_ground(canvas, rng, street):
    """Road with its markings, pavements, strips and, beyond the facades, the ground of the lots."""
    first = _span(canvas.vy + 0.02, 1, len(canvas.ys)).start
    s = canvas.ys[first:] - canvas.vy
    x = (canvas.xs - canvas.vx) * (2 / s)  # (rows, W): eye heights to the right of us
    edges = [street.facade[0], street.pavement[0], street.road[0]]
    edges += [street.road[1], street.pavement[1], street.facade[1]]
    zone = np.searchsorted(np.array(edges, np.float32), x)
    strips = [("grass", 9) if green else ("pavement", 1) for green in street.grass]
    zones = [("grass", 9), strips[0], ("pavement", 1), ("road", 0)]
    zones += [("pavement", 1), strips[1], ("grass", 9)]
    pick = int(rng.integers(1 << 16))
    colours = np.stack([canvas.ink(name, pick) for name, _ in zones])
    label = np.array([cls for _, cls in zones], np.uint8)[zone]
    image = colours[zone]
    _paint_marks(canvas, rng, street, image, s, x)
    image += _haze(s, canvas.shift)[:, None] * (canvas.fog - image)
    canvas.image[first:], canvas.label[first:] = image, label


def _paint_marks(canvas, rng, street, image, s, x):
    """Curbs, the dashed middle line, solid edge lines and, now and then, a zebra crossing."""
    left, right = street.road
    middle = (left + right) / 2
    dash = (FOCAL / s / 2.5) % 1 < 0.55
    off = np.abs(x - middle)
    image[(off < 0.07) & dash] = canvas.ink("mark")
    half = (right - left) / 2
    image[np.abs(off - half + 0.25) < 0.05] = canvas.ink("mark")
    image[np.abs(off - half - 0.08) < 0.08] = canvas.ink("curb")
    start, some = rng.uniform(0.12, 0.3), rng.random() < 0.35
    if some:
        stripes = (s > start) & (s < 1.35 * start) & (off < half - 0.4) & (x * 1.4 % 1 < 0.5)
        image[stripes] = canvas.ink("mark")


def _plots(rng, layout, n=14):
    """Far ends of the plots as depths, which are open lots, heights of the houses, picks: (n,)."""
    ends = 2.5 + np.cumsum(rng.uniform(3.0, 7.5, n))
    lot = rng.random(n) < _between(LOT_SHARE, layout)
    lot[1:] &= ~lot[:-1]  # a house follows every lot: its gable closes the view
    lot[-1] = False
    tall = _between(HEIGHT, layout) * rng.uniform(0.6, 1.4, n)
    return ends, lot, tall.astype(np.float32), rng.integers(1 << 16, size=n)


def _paint_houses(canvas, rng, street, side, layout):
    """All plots of one side at once: houses that recede, and open lots behind walls and fences.

    A column of the picture sees the facade plane at one depth. Where the plot there is a lot, the
    eye goes on to the gable of the next house, at the depth where that one begins.
    """
    middle = _span(canvas.vx, 1, len(canvas.xs)).start
    cols = slice(0, middle) if side < 0 else slice(middle, None)
    facade = street.facade[(side + 1) // 2]
    dx = canvas.xs[cols] - canvas.vx
    front = (dx * (2 / facade)).clip(1e-3)  # s of the facade plane in each column
    rows = _span(0, canvas.vy + front.max(), len(canvas.ys))  # down to the nearest house
    ends, lot, tall, picks = _plots(rng, layout)
    depth = FOCAL / front
    plot = np.searchsorted(ends, depth).clip(0, len(ends) - 1)
    open_ = lot[plot]
    s = np.where(open_, FOCAL / ends[plot], front).astype(np.float32)
    owner = plot + open_
    v = (canvas.vy - canvas.ys[rows]) / s + 1  # (rows, columns): height above the ground
    u = np.where(open_, dx * 2 / s, depth).astype(np.float32)  # along the wall
    image, label = canvas.image[rows, cols], canvas.label[rows, cols]
    inside = (v >= 0) & (v < tall[owner]) & (depth < ends[-1])
    image[inside] = _masonry(canvas, u, v, s, owner, tall, picks, open_)[inside]
    label[inside] = 2
    _paint_plots(canvas, rng, image, label, front, plot, lot, picks)


def _masonry(canvas, u, v, s, owner, tall, picks, gable):
    """Colours (rows, columns, 3) of the houses: walls, windows, doors, eaves, bricks."""
    walls, panes, roofs = (canvas.tints(ink, picks) for ink in ("house", "window", "roof"))
    colour = np.empty((*v.shape, 3), np.float32)
    colour[:] = walls[owner] * np.where(gable, 0.82, 1.0).astype(np.float32)[:, None]
    storey, bay = 1.25 + 0.3 * (picks % 2), 1.1 + 0.5 * (picks % 3)
    level = v / storey[owner].astype(np.float32)
    across = (u / bay[owner].astype(np.float32)) % 1
    if canvas.shift > 0:  # joints of the masonry, fading where they are finer than a pixel
        joints = (v * 4 % 1 < 0.3) | ((u * 2 + 0.5 * (v * 4 // 1 % 2)) % 1 < 0.2)
        colour *= 1 - (BRICKS * canvas.shift) * (joints * (s / (s + 0.1)))[..., None]
    window = (np.abs(across - 0.5) < 0.26) & (np.abs(level % 1 - 0.58) < 0.24)
    window &= ~gable | (across < 0.5)  # gables have few windows
    colour[window] = np.broadcast_to(panes[owner], colour.shape)[window]
    door = (np.abs(across - 0.5) < 0.2) & (level < 0.75) & ((u // 2) % 2 < 1) & ~gable
    colour[door] = canvas.ink("door", int(picks[0]))
    eaves = v > tall[owner] - 0.22
    colour[eaves] = np.broadcast_to(roofs[owner], colour.shape)[eaves]
    colour += _haze(s, canvas.shift)[:, None] * (canvas.fog - colour)
    return colour


def _paint_plots(canvas, rng, image, label, front, plot, lot, picks):
    """Bushes on the lots, then a wall or a fence along lots and some front gardens."""
    n = len(lot)
    bush = np.where(lot, rng.uniform(0.2, 1.7, n), 0)
    kind = rng.random(n)  # below 0.4 a wall, below 0.8 a fence, else open
    barrier = np.where((kind < 0.8) & (lot | (rng.random(n) < 0.3)), rng.uniform(0.7, 1.2, n), 0)
    v = (canvas.vy - canvas.ys[: len(image)]) / front + 1
    u = FOCAL / front
    bumps = 1.2 - 1.6 * ((u * 0.7) % 1 - 0.5) ** 2
    wall = kind < 0.4
    for ink, cls, height, which in (
        ("leaf", 8, bush[plot] * bumps, lot),
        ("wall", 3, barrier[plot], wall),
        ("fence", 4, barrier[plot], ~wall),
    ):
        colours = canvas.tints(ink, picks)[plot]
        if cls == 4:  # pickets
            colours = colours * np.where(u * 2.5 % 1 < 0.3, 0.6, 1.0)[:, None]
        colours = colours + _haze(front, canvas.shift)[:, None] * (canvas.fog - colours)
        inside = (v >= 0) & (v < height) & which[plot]
        painted, shade = inside, 1.0
        if cls == 4:  # every other fence is a railing: what is behind shows between its bars
            rails = (u * 2.5 % 1 < 0.35) | (np.abs(v - 0.92 * height) < 0.08)
            painted = inside & (rails | (picks[plot] % 2 == 0))
        if cls == 8:
            shade = (0.7 + 0.6 * _lumps(u, v, 3.0, int(picks[0])))[..., None]
        colours = np.broadcast_to(colours, image.shape) * shade
        image[painted] = colours[painted].astype(np.float32)
        label[inside] = cls


# ---- What stands and moves on the street --------------------------------------------------------


def _population(rng, street, layout):
    """Yield (s, X, kind, pick) of every object; vehicles share out the lanes without overlap."""
    left, right = street.road
    half = (right - left) / 2
    lanes = [left + 0.3 * half, left + 0.75 * half, right - 0.75 * half, right - 0.3 * half]
    slots = cycle(rng.permutation(12).tolist())  # 4 lanes x 3 distances
    for kind, (game, city, near, far) in POPULATION.items():
        count = floor(_between((game, city), layout) + rng.random())
        for a, b, c in rng.random((count, 3)):
            pick = int(c * (1 << 16))
            side = pick // 7 % 2
            s = far + (near - far) * a * a
            if kind in SIDES:
                slot = next(slots)
                s = far + (near - far) * ((slot // 4 + a) / 3) ** 2
                x = lanes[slot % 4]
            elif kind == "tree":
                x = street.facade[side] + (0.5 - side) * (0.3 + 0.8 * b)
            elif kind in ("cyclist", "biker"):
                x = left + 0.5 + (2 * half - 1) * b
            elif kind in ("person", "bicycle"):
                x = street.road[side] + (street.facade[side] - street.road[side]) * b
            else:
                x = street.road[side] + (side - 0.5) * 0.5
            yield s, x, kind, pick


def _paint_thing(canvas, s, x, kind, pick):
    """Paint an object whose foot is at (s, x): shadow, the side we see, then its parts."""
    fx, fy = canvas.vx + x * s / 2, canvas.vy + s
    if kind in SIDES:
        shade = 0.35 * canvas.ink("road", 0, s)
        w = SIDES[kind][0] * s / 2
        _shape(canvas, "box", fx - w, fy - 0.05 * s, fx + w, fy + 0.06 * s, shade, None)
        _paint_side(canvas, s, x, kind, pick)
    turn = -1 if pick // 5 % 2 else 1  # some cycles ride the other way
    looks = LOOKS.get(kind, (kind,))
    build = 0.9 + 0.2 * (pick % 13) / 12 if kind in LOOKS else 1.0  # no two are of one height
    for shape, x0, h0, x1, h1, ink, cls in THINGS[looks[pick // 3 % len(looks)]]:
        if ink == "lamp":
            ink = "tail" if x > 0 else "plate"  # tail lights in our lanes, head lights opposite
        half, cx = (x1 - x0) * s / 4, fx + turn * (x0 + x1) * s / 4
        if shape == "pole":
            shape, half = "box", max(half, THIN / 2)
        colour = canvas.ink(ink, pick, s)
        box = cx - half, fy - h1 * build * s, cx + half, fy - h0 * build * s
        _shape(canvas, shape, *box, colour, cls, pick)


def _paint_side(canvas, s, x, kind, pick):
    """The long side of a vehicle that is left or right of us; straight ahead none is seen."""
    half, cls, parts = SIDES[kind]
    if abs(x) <= half + 0.05:
        return
    plane = x - half if x > 0 else x + half
    depth = FOCAL / s
    for z0, h0, z1, h1, ink, panes in parts:
        near, far = FOCAL / (depth + z0), FOCAL / (depth + z1)
        colour = 0.8 * canvas.ink(ink, pick, s)
        _slab(canvas, plane, near, far, h0, h1, colour, cls, panes)


# ---- The camera of the city ---------------------------------------------------------------------


def _photograph(canvas, rng, light, shift):
    """Texture by class, blur, light, tone, vignette and noise, all in place on canvas.image."""
    image, (h, w) = canvas.image, canvas.label.shape
    noise = rng.random((h, w, 4), np.float32) - 0.5
    block = max(1, round(h / 32))
    coarse = noise[: -(-h // block), : -(-w // block), 3].repeat(block, 0).repeat(block, 1)
    grain = shift * GRAIN[canvas.label] * (FINE * noise[..., 3] + COARSE * coarse[:h, :w])
    image *= 1 + grain[..., None]
    blur = BLUR * shift
    image[:, 1:-1] += blur * ((image[:, :-2] + image[:, 2:]) / 2 - image[:, 1:-1])
    image[1:-1] += blur * ((image[:-2] + image[2:]) / 2 - image[1:-1])
    image -= (TONE * shift) * image * (1 - image)  # a gamma without powers: the same everywhere
    corner = (2 * canvas.xs - 1) ** 2 + (2 * canvas.ys - 1) ** 2  # 2 in the corners
    image *= light * (1 - (VIGNETTE * shift / 2) * corner)[..., None]
    image += (NOISE * shift) * noise[..., :3]


# ---- Demo ---------------------------------------------------------------------------------------


def _sheet(count: int, size: tuple[int, int]) -> np.ndarray:
    """Contact sheet uint8: a row per scene, with image and labels of each domain."""
    rows = []
    for index in range(count):
        row = []
        for domain in DOMAINS:
            image, label = render(index, domain, size=size)
            row += [image, PALETTE[label]]
        rows.append(np.concatenate(row, 1))
    return np.concatenate(rows)


def _statistics(domain: str, count: int = 200) -> tuple[float, np.ndarray, np.ndarray]:
    """Images/s, % of the pixels and % of the images (19,) of each class at 64x128."""
    render(0, domain)
    start = time.perf_counter()
    labels = [render(index, domain)[1] for index in range(count)]
    speed = count / (time.perf_counter() - start)
    counts = np.stack([np.bincount(label.ravel(), minlength=19) for label in labels])
    return speed, 100 * counts.sum(0) / counts.sum(), 100 * (counts > 0).mean(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("streets.png"), help="contact sheet")
    parser.add_argument("--count", type=int, default=4, help="scenes of each domain on it")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512), metavar=("H", "W"))
    args = parser.parse_args()

    from PIL import Image

    Image.fromarray(_sheet(args.count, tuple(args.size))).save(args.out)
    (fast, pixels, images), (fast2, pixels2, images2) = map(_statistics, DOMAINS[:2])
    print(f"{args.out}: game {fast:.0f} images/s, city {fast2:.0f} images/s at 64x128")
    print(f"{'':14} {'game':>6} {'city':>6} % of pixels {'game':>6} {'city':>6} % of images")
    for name, *row in zip(CLASSES, pixels, pixels2, images, images2, strict=True):
        print(f"{name:14} {row[0]:6.1f} {row[1]:6.1f} {'':11} {row[2]:6.0f} {row[3]:6.0f}")


if __name__ == "__main__":
    main()
