"""The data set `shapes`: small landscapes drawn in memory, for tests and for the demo; needs no files.

Color is a hint, not the answer: sky and water share blues, grass and trees greens, roads and mountains greys, cars and
the rims of signs reds. What tells them apart is texture, shape and place.
"""

from collections.abc import Iterable
from itertools import pairwise, product
from typing import Any

import cv2
import numpy as np

from segm.data.dataset import Sample, SegmentationDataset
from segm.sizes import pair

LENGTHS = {"train": 2000, "val": 50}

Color = tuple[float, float, float]

# Colors that people with a color vision deficiency tell apart (Okabe and Ito; Tol), by label.
CLASSES: dict[str, tuple[int, int, int]] = {
    "sky": (86, 180, 233),
    "mountain": (136, 34, 85),
    "building": (204, 121, 167),
    "road": (153, 153, 153),
    "grass": (0, 158, 115),
    "water": (0, 114, 178),
    "tree": (17, 60, 30),
    "car": (213, 94, 0),
    "person": (240, 228, 66),
    "sign": (230, 159, 0),
    "ball": (245, 245, 245),
}
SKY, MOUNTAIN, BUILDING, ROAD, GRASS, WATER, TREE, CAR, PERSON, SIGN, BALL = range(len(CLASSES))

GREYS = ((95, 95, 100), (125, 122, 120), (110, 105, 105))
ROCKS = ((125, 105, 135), (110, 100, 140), (125, 122, 120))
WALLS = ((190, 160, 120), (170, 115, 85), (205, 180, 150), (150, 110, 80))
BLUES = ((120, 170, 225), (90, 140, 205), (150, 190, 230))
DEEPS = ((60, 100, 165), (45, 90, 150), (90, 140, 205))
GREENS = ((85, 130, 60), (105, 145, 65), (70, 110, 60), (120, 135, 70))
REDS = ((205, 40, 40), (180, 35, 60), (215, 75, 50))
TEALS = ((20, 185, 165), (0, 160, 150))
YELLOWS = ((245, 215, 50), (235, 190, 40))
PURPLES = ((165, 60, 190), (125, 60, 200), (190, 90, 170))
DARKS = ((45, 45, 50), (60, 55, 75))
WHITES = ((235, 235, 235), (215, 220, 225))


class ShapesDataset(SegmentationDataset):
    """Scenes drawn on demand, each from (seed, split, index) alone."""

    def __init__(self, split: str, *, length: int | None = None, **settings: Any) -> None:
        if split not in LENGTHS:
            raise ValueError(f"shapes has no split {split!r}; allowed: {', '.join(LENGTHS)}")
        if length is not None and length < 1:
            raise ValueError(f"length is the number of scenes, at least 1, not {length}")
        super().__init__("shapes", split, tuple(CLASSES), np.array(list(CLASSES.values())), **settings)
        self._length = length or LENGTHS[split]

    def __len__(self) -> int:
        return self._length

    def name_of(self, index: int) -> str:
        return f"{self.split}_{index:05d}"

    def load(self, index: int) -> Sample:
        # The split's number keeps the scenes of train and val apart.
        stream = list(LENGTHS).index(self.split)
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, stream, index)))
        return Sample(self.name_of(index), *draw_scene(rng, *pair(self.image_size)))


class Canvas:
    """image: uint8 RGB (H, W, 3); label: uint8 (H, W). Coordinates are pixels."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.unit = min(height, width)  # every size is a share of it, so that scenes look alike at any size
        self.image = np.empty((height, width, 3), np.uint8)
        self.label = np.full((height, width), GRASS, np.uint8)

    def polygon(self, points: Iterable[tuple[float, float]], color: Color, label: int) -> None:
        """points: (x, y) pairs"""
        corners = [np.rint(np.array([*points], np.float32)).astype(np.int32)]
        cv2.fillPoly(self.image, corners, color)
        cv2.fillPoly(self.label, corners, label)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color, label: int) -> None:
        corners = (round(x0), round(y0)), (round(x1), round(y1))
        cv2.rectangle(self.image, *corners, color, cv2.FILLED)
        cv2.rectangle(self.label, *corners, label, cv2.FILLED)

    def disc(self, x: float, y: float, radius: float, color: Color, label: int) -> None:
        center, radius = (round(x), round(y)), max(round(radius), 1)
        cv2.circle(self.image, center, radius, color, cv2.FILLED)
        cv2.circle(self.label, center, radius, label, cv2.FILLED)

    def pick(self, colors: tuple[Color, ...], spread: float = 14) -> Color:
        """One of `colors`, shifted a little."""
        base = colors[self.rng.integers(len(colors))]
        shift = self.rng.uniform(-spread, spread, 3).tolist()
        return tuple(min(max(c + s, 0.0), 255.0) for c, s in zip(base, shift, strict=True))

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))


def shade(color: Color, factor: float) -> Color:
    red, green, blue = (min(c * factor, 255.0) for c in color)
    return red, green, blue


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image uint8 RGB (H, W, 3), label uint8 (H, W) with every pixel labelled."""
    canvas = Canvas(rng, height, width)
    horizon = canvas.uniform(0.3, 0.55) * height
    draw_sky(canvas, horizon)
    if rng.random() < 0.6:
        draw_mountains(canvas, horizon)
    draw_ground(canvas, horizon)
    draw_objects(canvas, horizon)
    image = add_texture(canvas)
    return light(rng, image), canvas.label


def draw_sky(canvas: Canvas, horizon: float) -> None:
    """A vertical gradient with a sun and clouds, all of them sky."""
    top = np.array(canvas.pick(BLUES), np.float32)
    low = top + (235 - top) * canvas.uniform(0.1, 0.7)
    ramp = np.linspace(0, 1, canvas.height, dtype=np.float32)[:, None] * (canvas.height / max(horizon, 1))
    rows = top + (low - top) * np.minimum(ramp, 1)
    canvas.image[:] = cv2.repeat(rows.astype(np.uint8)[:, None], 1, canvas.width)
    canvas.label[: round(horizon)] = SKY
    if canvas.rng.random() < 0.4:
        x, y = canvas.uniform(0, canvas.width), canvas.uniform(0, horizon * 0.6)
        canvas.disc(x, y, canvas.unit * canvas.uniform(0.03, 0.06), (255, 245, 205), SKY)
    for _ in range(canvas.rng.integers(0, 4)):
        draw_cloud(canvas, horizon)


def draw_cloud(canvas: Canvas, horizon: float) -> None:
    x, y = canvas.uniform(0, canvas.width), canvas.uniform(0, horizon * 0.7)
    grey = canvas.uniform(215, 250)
    for _ in range(3):
        center = (round(x + canvas.unit * canvas.uniform(-0.1, 0.1)), round(y))
        axes = tuple(max(round(canvas.unit * canvas.uniform(*r)), 1) for r in ((0.06, 0.14), (0.015, 0.035)))
        cv2.ellipse(canvas.image, center, axes, 0, 0, 360, (grey, grey, grey), cv2.FILLED)


def draw_mountains(canvas: Canvas, horizon: float) -> None:
    color = canvas.pick(ROCKS)
    count = int(canvas.rng.integers(4, 9))
    xs = np.linspace(-0.1, 1.1, count) * canvas.width
    ys = horizon - canvas.rng.uniform(0.03, 0.28, count) * canvas.height
    ridge = list(zip(xs, ys, strict=True))
    canvas.polygon([(-1, horizon + 1), *ridge, (canvas.width, horizon + 1)], color, MOUNTAIN)
    # The side away from the light is darker: facets inside one class.
    for (x0, y0), (x1, _) in pairwise(ridge):
        facet = [(x0, y0), (x1, horizon), (x0 + 0.2 * (x1 - x0), horizon)]
        cv2.fillPoly(canvas.image, [np.rint(facet).astype(np.int32)], shade(color, 0.82))
    canvas.label[round(horizon) :] = GRASS


def draw_ground(canvas: Canvas, horizon: float) -> None:
    """Grass from the horizon down, with water, a road, or both on it."""
    canvas.box(0, horizon, canvas.width, canvas.height, canvas.pick(GREENS), GRASS)
    if canvas.rng.random() < 0.5:
        draw_water(canvas, horizon)
    if canvas.rng.random() < 0.75:
        draw_road(canvas, horizon)


def draw_water(canvas: Canvas, horizon: float) -> None:
    """A lake at the horizon, or a shore on one side."""
    color, depth = canvas.pick(DEEPS), canvas.height - horizon
    if canvas.rng.random() < 0.5:
        low = horizon + depth * canvas.uniform(0.2, 0.5)
        left, right = low + depth * canvas.rng.uniform(-0.1, 0.1, 2)
        canvas.polygon([(0, horizon), (canvas.width, horizon), (canvas.width, right), (0, left)], color, WATER)
        return
    shore = canvas.width * canvas.rng.uniform(0.15, 0.5, 2)
    points = np.array([(0, horizon), (shore[0], horizon), (shore[1], canvas.height), (0, canvas.height)])
    if canvas.rng.random() < 0.5:
        points[:, 0] = canvas.width - points[:, 0]
    canvas.polygon(points, color, WATER)


def draw_road(canvas: Canvas, horizon: float) -> None:
    """A road to a vanishing point, or across the picture; its markings are road."""
    color, depth = canvas.pick(GREYS), canvas.height - horizon
    if canvas.rng.random() < 0.35:
        top = horizon + depth * canvas.uniform(0.3, 0.55)
        low = top + depth * canvas.uniform(0.2, 0.35)
        canvas.box(0, top, canvas.width, low, color, ROAD)
        y = (top + low) / 2
        lines = [[(x * canvas.width, y), ((x + 0.07) * canvas.width, y)] for x in np.arange(0, 1, 0.16)]
    else:
        far, near = canvas.width * canvas.rng.uniform(0.25, 0.75, 2)
        narrow, wide = canvas.width * canvas.uniform(0.01, 0.04), canvas.width * canvas.uniform(0.25, 0.45)
        edges = [(far - narrow, horizon), (far + narrow, horizon)]
        edges += [(near + wide, canvas.height), (near - wide, canvas.height)]
        canvas.polygon(edges, color, ROAD)
        steps = [(t * t, t * t + 0.06) for t in np.linspace(0.2, 1, 6)]
        lines = [[(far + (near - far) * t, horizon + depth * t) for t in step] for step in steps]
    thickness = max(round(canvas.unit * 0.012), 1)
    for line in lines:
        cv2.line(canvas.image, *((round(x), round(y)) for x, y in line), (225, 225, 215), thickness)


def draw_objects(canvas: Canvas, horizon: float) -> None:
    """Objects stand on the ground, the far ones first and smaller."""
    rng = canvas.rng
    below = {draw_building: 3, draw_tree: 3, draw_car: 3, draw_person: 3, draw_sign: 3, draw_ball: 2}
    counts = {draw: rng.integers(0, high) for draw, high in below.items()}
    # Buildings keep to the back, else they hide everything.
    reach = {draw_building: 0.2, draw_tree: 0.6}
    depth = canvas.height - horizon
    places = [(rng.uniform(0.0, reach.get(draw, 0.95)), k, draw) for draw, n in counts.items() for k in range(n)]
    for near, _, draw in sorted(places, key=lambda place: place[0]):
        x, foot = canvas.uniform(0.03, 0.97) * canvas.width, horizon + depth * near
        draw(canvas, x, foot, canvas.unit * (0.55 + 0.75 * near))


def draw_building(canvas: Canvas, x: float, foot: float, scale: float) -> None:
    """scale: pixels; every object's sizes are shares of it."""
    width, height = scale * canvas.uniform(0.25, 0.55), scale * canvas.uniform(0.3, 0.75)
    color = canvas.pick(WALLS)
    x0, x1, top = x - width / 2, x + width / 2, foot - height
    canvas.box(x0, top, x1, foot, color, BUILDING)
    if canvas.rng.random() < 0.5:
        roof = [(x0, top), (x1, top), (x, top - 0.3 * width)]
        canvas.polygon(roof, shade(color, 0.7), BUILDING)
    # The windows.
    pitch = scale * canvas.uniform(0.09, 0.13)
    pane = canvas.pick(((60, 70, 90), (235, 220, 150), (130, 160, 185)))
    columns, rows = max(int((x1 - x0) / pitch), 1), max(int((foot - top) / pitch), 1)
    xs = x0 + (np.arange(columns) + 0.25) * (x1 - x0) / columns
    ys = top + (np.arange(rows) + 0.25) * (foot - top) / rows
    w, h = 0.5 * (x1 - x0) / columns, 0.55 * (foot - top) / rows
    for y, left in product(ys, xs):
        corners = (round(left), round(y)), (round(left + w), round(y + h))
        cv2.rectangle(canvas.image, *corners, pane, cv2.FILLED)


def draw_tree(canvas: Canvas, x: float, foot: float, scale: float) -> None:
    height, color = scale * canvas.uniform(0.3, 0.6), shade(canvas.pick(GREENS), 0.55)
    trunk = max(0.05 * height, 1)
    canvas.box(x - trunk, foot - 0.4 * height, x + trunk, foot, canvas.pick(((95, 70, 45), (80, 65, 55))), TREE)
    if canvas.rng.random() < 0.4:
        for low, half in ((0.25, 0.3), (0.5, 0.22)):
            base = foot - low * height
            points = [(x - half * height, base), (x + half * height, base), (x, base - 0.5 * height)]
            canvas.polygon(points, color, TREE)
        return
    for _ in range(5):
        dx, dy = canvas.rng.uniform(-0.16, 0.16, 2) * height
        radius = height * canvas.uniform(0.14, 0.22)
        canvas.disc(x + dx, foot - 0.65 * height + dy, radius, shade(color, canvas.uniform(0.85, 1.1)), TREE)


def draw_car(canvas: Canvas, x: float, foot: float, scale: float) -> None:
    length, color = scale * canvas.uniform(0.4, 0.6), canvas.pick((*REDS, *REDS, *WHITES))
    height, wheel = 0.3 * length, 0.12 * length
    sill = foot - wheel * 0.8
    belt = sill - height
    canvas.box(x - length / 2, belt, x + length / 2, sill, color, CAR)
    cabin = [(-0.3, 0), (-0.18, -0.85), (0.18, -0.85), (0.32, 0)]
    canvas.polygon([(x + a * length, belt + b * height) for a, b in cabin], color, CAR)
    glass = [(-0.22, -0.1), (-0.14, -0.7), (0.14, -0.7), (0.24, -0.1)]
    canvas.polygon([(x + a * length, belt + b * height) for a, b in glass], (70, 85, 100), CAR)
    for side in (-0.28, 0.28):
        canvas.disc(x + side * length, foot - wheel, wheel, (30, 30, 32), CAR)


def draw_person(canvas: Canvas, x: float, foot: float, scale: float) -> None:
    """A head, a coat that ends at the knees, and legs."""
    height = scale * canvas.uniform(0.4, 0.55)
    half, coat = 0.2 * height, canvas.pick(TEALS)
    skin = canvas.pick(((225, 180, 150), (160, 115, 85), (95, 65, 50)))
    knee, neck = foot - 0.25 * height, foot - 0.78 * height
    canvas.box(x - 0.7 * half, knee, x + 0.7 * half, foot, shade(coat, 0.6), PERSON)
    canvas.box(x - half, neck, x + half, knee, coat, PERSON)
    canvas.disc(x, neck - 0.1 * height, 0.12 * height, skin, PERSON)


def draw_sign(canvas: Canvas, x: float, foot: float, scale: float) -> None:
    """A post with a rimmed plate: triangle, diamond or octagon."""
    height = scale * canvas.uniform(0.45, 0.6)
    post, radius = max(0.06 * height, 0.8), 0.33 * height
    center = foot - height + radius
    canvas.box(x - post, center, x + post, foot, (140, 140, 145), SIGN)
    corners = int(canvas.rng.choice((3, 4, 8)))
    angles = 2 * np.pi * (np.arange(corners) + (0.5 if corners == 8 else 0)) / corners - np.pi / 2
    plate, rim = canvas.pick(YELLOWS), canvas.pick((*DARKS, *REDS))
    for size, color in ((radius, rim), (0.7 * radius, plate)):
        points = np.stack([x + size * np.cos(angles), center + size * np.sin(angles)], axis=1)
        canvas.polygon(points, color, SIGN)


def draw_ball(canvas: Canvas, x: float, foot: float, scale: float) -> None:
    """A ball with a stripe and a highlight."""
    radius, color = scale * canvas.uniform(0.11, 0.18), canvas.pick(PURPLES)
    y = foot - radius
    canvas.disc(x, y, radius, color, BALL)
    axes = (max(round(radius), 1), max(round(0.35 * radius), 1))
    tilt = canvas.uniform(0, 180)
    cv2.ellipse(canvas.image, (round(x), round(y)), axes, tilt, 0, 360, canvas.pick((*WHITES, *PURPLES)), cv2.FILLED)
    glint = (round(x - 0.35 * radius), round(y - 0.4 * radius))
    cv2.circle(canvas.image, glint, max(round(0.18 * radius), 1), (255, 255, 255), cv2.FILLED)


def add_texture(canvas: Canvas) -> np.ndarray:
    """The image with the texture of each class: blades, leaves, waves, grain; sky, walls, cars stay flat."""
    shape = canvas.label.shape
    noise = byte_noise(canvas.rng, shape).astype(np.int16)
    scale = max(round(canvas.unit / 160), 1)
    # Blurring over k pixels divides noise by sqrt(k): the gains make up for it.
    blades = cv2.blur(noise, (scale, 5 * scale))
    leaves = cv2.blur(noise, (3 * scale, 3 * scale))
    stripes = cv2.blur(noise, (15 * scale, scale))
    ripples = np.sin(np.arange(shape[0], dtype=np.float32) * (2 * np.pi / (5 * scale)) + canvas.uniform(0, 6))
    waves = cv2.add(stripes, np.repeat(np.rint(12 * ripples).astype(np.int16)[:, None], shape[1], axis=1))
    texture = np.zeros(shape, np.int16)
    layers = {GRASS: (blades, 0.8), TREE: (leaves, 1.4), WATER: (waves, 0.8), MOUNTAIN: (leaves, 0.3)}
    for label, (pattern, gain) in {**layers, ROAD: (noise, 0.08), BUILDING: (noise, 0.03)}.items():
        scaled = cv2.multiply(pattern, (gain * np.sqrt(scale), 0, 0, 0))
        cv2.copyTo(scaled, cv2.compare(canvas.label, label, cv2.CMP_EQ), texture)
    return cv2.add(canvas.image, cv2.merge([texture] * 3), dtype=cv2.CV_8U)


def byte_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """int8, uniform in [-128, 127]; raw bytes are several times faster than normal numbers."""
    return np.frombuffer(rng.bytes(int(np.prod(shape))), np.int8).reshape(shape)


def light(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Brightness that falls off to one side, a warm or cold tint, and the camera's noise per channel."""
    across = np.linspace(*rng.uniform(0.85, 1.15, 2), image.shape[1], dtype=np.float32)
    warmth = rng.uniform(-0.08, 0.08) * np.array([1, 0, -1])
    tint = (rng.uniform(0.75, 1.15) * (1 + warmth)).astype(np.float32)
    lit = image * (across[:, None] * tint)
    lit += byte_noise(rng, image.shape) * np.float32(rng.uniform(0.01, 0.06))
    return np.clip(lit, 0, 255, out=lit).astype(np.uint8)
