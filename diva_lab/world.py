"""The tiny world: procedural images in which every attribute is known.

Each scene shows one body (12 classes in 4 families) and carries nine details, one for each visual pattern of
MMVP-VLM. Everything else (place, size, tilt, background, light, clutter, grain, where the sign and the dots stand)
is nuisance that no caption names. A world is fixed by its seed: another seed bends the silhouettes, turns the
palette and shuffles the alphabet, under the same names. All arithmetic is float64, so that the bytes of an image do
not depend on the machine's vector units.
"""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diva_lab import messages

FAMILIES = {
    "round": ("disc", "oval", "drop"),
    "angular": ("square", "triangle", "diamond"),
    "pointed": ("star", "cross", "gear"),
    "curly": ("heart", "flower", "leaf"),
}
CLASSES = tuple(name for members in FAMILIES.values() for name in members)
# detail -> its values; the order of the keys is the order of MMVP's nine patterns
DETAILS = {
    "orientation": ("west", "east", "north", "south"),
    "presence": ("with", "without"),
    "state": ("lit", "unlit"),
    "quantity": ("one", "two", "three", "four"),
    "position": ("left", "right", "over", "under"),
    "colour": ("red", "yellow", "green", "cyan", "blue", "purple"),
    "structure": ("plain", "striped", "checked"),
    "text": ("a", "e", "k", "s", "t", "x"),
    "viewpoint": ("high", "low"),
}
ATTRIBUTES = {"class": CLASSES, **DETAILS}  # all that a scene can be asked for
# MMVP's own names of the nine patterns, in the order of DETAILS
PATTERNS = dict(
    zip(
        DETAILS,
        (
            "Orientation and Direction",
            "Presence of Specific Features",
            "State and Condition",
            "Quantity and Count",
            "Positional and Relational Context",
            "Color and Appearance",
            "Structural Characteristics",
            "Texts",
            "Viewpoint and Perspective",
        ),
        strict=True,
    )
)
ADJECTIVES = ("colour", "structure", "state")  # said before the noun; the others after it
# what a pixel can show, in the order in which it is painted: REGIONS cover whole patches, SMALL_PARTS do not
PARTS = ("sky", "ground", "tail", "body", "arrowhead", "ball", "sign", "dots")
REGIONS = ("sky", "ground", "body", "sign")
SMALL_PARTS = ("ball", "dots", "tail", "arrowhead")
NUISANCES = 32  # uniform numbers a scene carries beside its attributes
SCENE = np.dtype([("class", "i1"), *((name, "i1") for name in DETAILS), ("nuisance", "f8", (NUISANCES,))])


def draw_scenes(n: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """`n` independent scenes, all attributes uniform. Returns a structured array [n] of dtype `SCENE`."""
    rng = np.random.default_rng(seed)
    scenes = np.zeros(n, SCENE)
    scenes["class"] = rng.integers(len(CLASSES), size=n)
    for name, values in DETAILS.items():
        scenes[name] = rng.integers(len(values), size=n)
    scenes["nuisance"] = rng.random((n, NUISANCES))
    return scenes


def draw_pairs(detail: str, n: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """`n` minimal pairs [n, 2]: twice the same scene, nuisance included, but for the one named detail."""
    if detail not in DETAILS:
        raise ValueError(f"unknown detail {detail!r}; {messages.expected(detail, DETAILS)}")
    first = draw_scenes(n, seed)
    second = first.copy()
    count = len(DETAILS[detail])
    shift = 1 + np.random.default_rng((*np.atleast_1d(seed), 1)).integers(count - 1, size=n)
    second[detail] = (first[detail] + shift) % count
    return np.stack([first, second], axis=1)


def _phrase(detail: str, value: str) -> str:
    return {
        "orientation": f"facing {value}",
        "presence": f"{value} a tail",
        "quantity": f"{value} dots" if value != "one" else "one dot",
        "position": f"ball {value}",
        "text": f"labelled {value}",
        "viewpoint": f"seen from {value}",
    }.get(detail, value)


def caption(scene: np.void, details: tuple[str, ...] = (), rng: np.random.Generator | None = None) -> str:
    """The scene's class and the named `details` in words; `rng` shuffles what follows the noun.

    >>> caption(draw_scenes(1, 0)[0], ("colour", "quantity"))
    'a photo of a red flower two dots'
    """
    words = {name: _phrase(name, DETAILS[name][scene[name]]) for name in details}
    before = [words[name] for name in ADJECTIVES if name in words]
    after = [words[name] for name in DETAILS if name in words and name not in ADJECTIVES]
    if rng is not None:
        rng.shuffle(after)
    return " ".join(["a photo of a", *before, CLASSES[scene["class"]], *after])


def captions(scenes: np.ndarray, p: float | np.ndarray, rng: np.random.Generator) -> list[str]:
    """One caption a scene: the class always, each detail with probability `p` (1 gives full captions).

    `p` is one number, or one a scene, [n, 1].
    """
    names = np.array(list(DETAILS))
    said = rng.random((len(scenes), len(names))) < p
    return [caption(scene, tuple(names[row]), rng) for scene, row in zip(scenes, said, strict=True)]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = [_phrase(name, value) for name, values in DETAILS.items() for value in values]
    return sorted({word for text in ["a photo of a", *CLASSES, *phrases] for word in text.split()})


_GLYPHS = {
    "a": "01110 10001 10001 11111 10001 10001 10001",
    "e": "11111 10000 10000 11110 10000 10000 11111",
    "k": "10001 10010 10100 11000 10100 10010 10001",
    "s": "01111 10000 10000 01110 00001 00001 11110",
    "t": "11111 00100 00100 00100 00100 00100 00100",
    "x": "10001 10001 01010 00100 01010 10001 10001",
}
_ANGLES = 720  # resolution of a silhouette's table
_CHUNK = 16  # images rendered at a time, so that the working set stays in the cache
_DIRECTIONS = {"west": (-1, 0), "east": (1, 0), "north": (0, -1), "south": (0, 1)}
_DIRECTIONS |= {"left": (-1, 0), "right": (1, 0), "over": (0, -1), "under": (0, 1)}


def _silhouettes() -> np.ndarray:
    """Radius by angle (y down) of each class, [12, _ANGLES], in units of the body's radius."""
    a = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    c, s = np.cos(a), np.sin(a)

    def polygon(corners: int, turn: float) -> np.ndarray:
        half = np.pi / corners
        return np.cos(half) / np.cos((a - turn + half) % (2 * half) - half)

    low, high = np.zeros_like(a), np.full_like(a, 2.0)  # heart: (r^2 - 1)^3 = r^5 cos^2 sin^3, y up, by bisection
    for _ in range(50):
        r = (low + high) / 2
        outside = (r * r - 1) ** 3 > r**5 * c**2 * (-s) ** 3
        low, high = np.where(outside, low, r), np.where(outside, r, high)
    star = 1.12 / (1 + 1.35 * np.abs((a + np.pi / 2) / (2 * np.pi / 5) % 1 - 0.5).clip(0, 0.5) * -2 + 1.35)
    cross = np.minimum(1.1 / np.maximum(np.abs(c), np.abs(s)), 0.36 / np.minimum(np.abs(c), np.abs(s)).clip(1e-9))
    table = {
        "disc": np.full_like(a, 0.92),
        "oval": 1 / np.sqrt((c / 0.62) ** 2 + (s / 1.1) ** 2),
        "drop": 0.8 + 0.35 * (-s).clip(0) ** 6 - 0.12 * (-s).clip(0) * (1 - (-s).clip(0)) * 4,
        "square": 0.84 / np.maximum(np.abs(c), np.abs(s)),
        "triangle": 1.15 * polygon(3, -np.pi / 2),
        "diamond": 1.12 / (np.abs(c) * 1.25 + np.abs(s)),
        "star": star,
        "cross": cross,
        "gear": np.where(np.sin(8 * a) > 0, 1.06, 0.74),
        "heart": 0.9 * high,
        "flower": 0.86 + 0.24 * np.cos(5 * (a + np.pi / 2)),
        "leaf": 1 / np.sqrt((c / 1.14) ** 2 + (s / 0.56) ** 2) * (1 + 0.2 * np.abs(c) ** 8),
    }
    return np.stack([table[name] for name in CLASSES])


@dataclass(frozen=True)
class World:
    """A world of images, fixed by its seed. Seed 0 is the shipped one.

    Args:
        seed: bends silhouettes, palette and alphabet where it is not 0.
        px: side of an image in pixels; the scene is laid out on a 32 x 32 canvas whatever `px`.
    """

    seed: int = 0
    px: int = 32

    @functools.cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((2407, 20171, self.seed))
        silhouettes = _silhouettes()
        glyphs = np.stack([np.array([list(row) for row in g.split()], dtype=float) for g in _GLYPHS.values()])
        hues = np.arange(6) / 6
        if self.seed:
            waves, bend, phase = rng.integers(2, 6, (12, 1)), rng.uniform(-0.12, 0.12, (12, 1)), rng.random((12, 1))
            angle = np.arange(_ANGLES) / _ANGLES
            silhouettes = silhouettes * (1 + bend * np.cos(2 * np.pi * (waves * angle + phase)))
            hues = (rng.permutation(hues) + rng.random()) % 1
            glyphs = rng.permutation(glyphs)
        rgb = (np.abs((hues[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1).clip(0, 1)
        return {
            "silhouettes": silhouettes,
            "palette": 0.12 + 0.83 * rgb,  # [6, 3]
            "glyphs": np.pad(glyphs, ((0, 0), (1, 1), (1, 1))),  # [6, 9, 7], a margin of one all round
            "grain": rng.uniform(-0.035, 0.035, (32, self.px, self.px, 3)),
        }

    def render(self, scenes: np.ndarray) -> np.ndarray:
        """Pictures of `scenes` [n] as uint8 [n, px, px, 3], the same bytes on every machine."""
        parts = [self._render(scenes[i : i + _CHUNK]) for i in range(0, len(scenes), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros((0, self.px, self.px, 3), np.uint8)

    def parts(self, scenes: np.ndarray) -> UInt8[np.ndarray, "n px px"]:
        """What each pixel of `render(scenes)` shows: an index into `PARTS`.

        It is the last painted part that covers at least half of the pixel. The light around a lit body, specks, the
        body's stripes and the letter on the sign are no parts of their own.
        """
        maps = [_Canvas(self, scenes[i : i + _CHUNK]).parts() for i in range(0, len(scenes), _CHUNK)]
        return np.concatenate(maps) if maps else np.zeros((0, self.px, self.px), np.uint8)

    def _render(self, scenes: np.ndarray) -> np.ndarray:
        canvas = _Canvas(self, scenes)
        image = canvas.background()
        image = canvas.glow(image)
        image = canvas.tail(image)
        image = canvas.body(image)
        image = canvas.arrow(image)
        image = canvas.ball(image)
        image = canvas.sign(image)
        image = canvas.dots(image)
        return canvas.light_and_grain(image)


def _paint(image: np.ndarray, alpha: np.ndarray, colour: np.ndarray | float) -> np.ndarray:
    return image + alpha[..., None] * (colour - image)


def _column(values: np.ndarray, dtype: type = float) -> np.ndarray:
    """One number a scene, [n, 1, 1], to broadcast over pixels."""
    return np.asarray(values, dtype)[:, None, None]


class _Canvas:
    """What is painted for a few scenes, layer by layer; coordinates are those of the 32 x 32 canvas, y down."""

    def __init__(self, world: World, scenes: np.ndarray):
        self.tables, self.scenes = world._tables, scenes
        self.u = u = scenes["nuisance"].T[:, :, None, None]  # [NUISANCES, n, 1, 1]
        grid = (np.arange(world.px) + 0.5) * (32 / world.px)
        self.x, self.y = grid[None, None, :], grid[None, :, None]
        self.soft = world.px / 32  # edges are one pixel wide at any resolution
        self.tone = 0.3 + 0.4 * u[1]
        self.step = (0.13 + 0.1 * u[2]) * np.where(u[3] > 0.5, 1, -1)
        # the body, in polar form around its centre
        self.dx, self.dy = self.x - (16 + 2.4 * (u[19] - 0.5)), self.y - (16 + 2.4 * (u[20] - 0.5))
        self.radius, tilt = 6.9 + 1.6 * u[21], 0.3 * (u[22] - 0.5)
        index = ((np.arctan2(self.dy, self.dx) + tilt) * (_ANGLES / (2 * np.pi))).astype(int) % _ANGLES
        outline = self.tables["silhouettes"][_column(scenes["class"], int), index]
        self.inside = self.radius * outline - np.hypot(self.dx, self.dy)  # distance from the outline, inside above 0
        self.colour = self.tables["palette"][scenes["colour"]][:, None, None, :]
        self.side = np.where(u[23] > 0.5, 1.0, -1.0)  # of the bottom corner with the tail; the dots take the other

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Opacity from the signed distance inside an outline, in canvas units."""
        return (distance * self.soft + 0.5).clip(0, 1)

    def is_value(self, detail: str, value: str) -> np.ndarray:
        return _column(self.scenes[detail]) == DETAILS[detail].index(value)

    def way(self, detail: str) -> tuple[np.ndarray, np.ndarray]:
        """The direction that a detail's value names, as x and y of one scene each."""
        way = np.array([_DIRECTIONS[value] for value in DETAILS[detail]], float)[self.scenes[detail]]
        return _column(way[:, 0]), _column(way[:, 1])

    def parts(self) -> np.ndarray:
        """The index of the last part that covers at least half of a pixel, [n, px, px]."""
        covers = {
            "ground": self.ground_cover(), "tail": self.tail_cover(), "body": self.cover(self.inside),
            "arrowhead": self.cover(self.arrow_inside() + 0.9), "ball": self.cover(self.ball_inside()),
            "sign": self.sign_cover()[0], "dots": np.max(self.dot_covers(), axis=0),
        }  # fmt: skip
        shown = np.zeros((len(self.scenes), self.x.size, self.y.size), np.uint8)
        for name, cover in covers.items():
            shown[np.broadcast_to(cover >= 0.5, shown.shape)] = PARTS.index(name)
        return shown

    def ground_cover(self) -> np.ndarray:
        horizon = 6.5 + 17 * _column(self.scenes["viewpoint"]) + 3 * (self.u[0] - 0.5)
        return self.cover(self.y - horizon)

    def background(self) -> np.ndarray:
        """Sky and ground, which meet at the horizon: high in the image when seen from high; and clutter."""
        u = self.u
        tint = 0.16 * (u[4:7] - 0.5).transpose(1, 2, 3, 0)  # [n, 1, 1, 3]
        ground = self.ground_cover()
        image = (self.tone - self.step + 2 * self.step * ground * np.ones_like(self.x))[..., None] + tint
        for i in range(4):
            a, b, c = u[7 + 3 * i], u[8 + 3 * i], u[9 + 3 * i]
            speck = self.cover(0.7 + 0.7 * c - np.hypot(self.x - 32 * a, self.y - 32 * b))
            image = image + (speck * np.where(c > 0.5, 0.2, -0.2))[..., None]
        return image

    def glow(self, image: np.ndarray) -> np.ndarray:
        """The light around a lit body."""
        alpha = np.where(self.is_value("state", "lit"), 0.75, 0.0) * np.exp(-(-self.inside).clip(0) / 2.5)
        return _paint(image, alpha, np.array([1.0, 0.95, 0.75]))

    def tail_cover(self) -> np.ndarray:
        along = ((self.dx * self.side + self.dy) * 0.7071).clip(0, self.radius + 4.5)
        off = np.hypot(self.dx - along * self.side * 0.7071, self.dy - along * 0.7071)
        return self.cover(1.1 - off) * self.is_value("presence", "with")

    def tail(self, image: np.ndarray) -> np.ndarray:
        return _paint(image, self.tail_cover(), 0.45 * self.colour)

    def body(self, image: np.ndarray) -> np.ndarray:
        """The silhouette in its colour: plain, striped or checked."""
        wave = np.sin((self.dx * 0.8 + self.dy * 0.6) * 1.1 + 6.28 * self.u[24])
        cross_wave = np.sin((self.dx * -0.6 + self.dy * 0.8) * 1.1 + 6.28 * self.u[25])
        kind = _column(self.scenes["structure"], int)
        dark = np.select([kind == 1, kind == 2], [wave > 0, wave * cross_wave > 0], False)
        return _paint(image, self.cover(self.inside), self.colour * np.where(dark, 0.45, 1.0)[..., None])

    def arrow_inside(self) -> np.ndarray:
        """Distance from the arrowhead's outline, inside above 0; a margin of .9 surrounds it."""
        x, y = self.way("orientation")
        ahead, across = self.dx * x + self.dy * y, self.dx * y - self.dy * x
        return np.minimum(ahead + 1.9, (3.1 - ahead) * 0.5 - np.abs(across) * 0.87)

    def arrow(self, image: np.ndarray) -> np.ndarray:
        """The arrowhead on the body: which way it faces."""
        arrow = self.arrow_inside()
        image = _paint(image, self.cover(arrow + 0.9), 0.97)
        return _paint(image, self.cover(arrow), 0.03)

    def ball_inside(self) -> np.ndarray:
        x, y = self.way("position")
        return 2.3 - np.hypot(self.dx - x * (self.radius + 3.7), self.dy - y * (self.radius + 3.7))

    def ball(self, image: np.ndarray) -> np.ndarray:
        """The ball beside the body, of any colour."""
        ball = self.ball_inside()
        image = _paint(image, self.cover(ball), 0.1)
        colour = self.tables["palette"][(self.u[26, :, 0, 0] * 6).astype(int)][:, None, None, :]
        return _paint(image, self.cover(ball - 0.8), colour)

    def sign_cover(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the sign is, and the column and row of it that a pixel shows."""
        u = self.u
        left, top = np.where(u[27] > 0.5, 24.0, 1.0) + 0.9 * (u[28] - 0.5), 1 + 0.9 * (u[29] - 0.5)
        column, row = np.floor(self.x - left).astype(int), np.floor(self.y - top).astype(int)
        return (column >= 0) & (column < 7) & (row >= 0) & (row < 9), column, row

    def sign(self, image: np.ndarray) -> np.ndarray:
        """The sign with its letter, in a top corner."""
        on, column, row = self.sign_cover()
        ink = self.tables["glyphs"][_column(self.scenes["text"], int), row.clip(0, 8), column.clip(0, 6)]
        return np.where(on[..., None], (0.95 - 0.9 * ink)[..., None], image)

    def dot_covers(self) -> list[np.ndarray]:
        first, count = np.where(self.side > 0, 1.9, 20.6), _column(self.scenes["quantity"])
        return [self.cover(1.25 - np.hypot(self.x - first - 3.1 * i, self.y - 29.6)) * (count >= i) for i in range(4)]

    def dots(self, image: np.ndarray) -> np.ndarray:
        """One to four dots in the bottom corner away from the tail."""
        bright = np.where(self.tone + self.step > 0.5, 0.02, 0.98)
        for cover in self.dot_covers():
            image = _paint(image, cover, bright[..., None])
        return image

    def light_and_grain(self, image: np.ndarray) -> np.ndarray:
        """Light that comes from one side, grain, and rounding to uint8."""
        turn = 6.28 * self.u[30]
        slope = (self.x - 16) * np.cos(turn) + (self.y - 16) * np.sin(turn)
        light = 1 + (0.2 * self.u[31] / 16) * slope
        grain = self.tables["grain"][(self.scenes["nuisance"][:, 31] * 32).astype(int)]
        return ((image * light[..., None] + grain).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def named_world(source: str) -> World | None:
    """The world that `world` or `world:SEED` names; None for another source.

    Raises:
        ValueError: where the seed is no whole number.
    """
    kind, colon, seed = source.partition(":")
    if kind != "world":
        return None
    if colon and not seed.isdecimal():
        raise ValueError(f"images={source!r}: expected 'world' or 'world:SEED' with a whole number, as 'world:3'")
    return World(int(seed or 0))


def write_pairs(folder: str | Path, world: World, per_pattern: int, seed: int) -> Path:
    """Write minimal pairs in MMVP-VLM's layout: `Questions.csv` beside `MLLM_VLM Images/<type>/<id>.jpg`.

    Ids run from 1; rows 2k-1 and 2k are one pair, the odd one being image 1. Returns `folder`.
    """
    folder = Path(folder)
    rows = []
    for number, (detail, pattern) in enumerate(PATTERNS.items()):
        images = folder / "MLLM_VLM Images" / pattern
        images.mkdir(parents=True, exist_ok=True)
        scenes = draw_pairs(detail, per_pattern, (seed, number)).reshape(-1)
        for scene, pixels in zip(scenes, world.render(scenes), strict=True):
            statement = caption(scene, (detail,)).removeprefix("a photo of ")
            rows.append((len(rows) + 1, pattern, statement))
            Image.fromarray(pixels).save(images / f"{len(rows)}.jpg", quality=95, subsampling=0)
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])
    return folder
