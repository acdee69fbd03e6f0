"""Pictures as papers print them, with Pillow alone: panels with axes, heat maps, colour bars, line charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Drawing, in pixels; 300 a printed inch.
PANEL, GAP, MARGIN, TOP, BAR = 720, 70, 150, 80, 250
TITLE, LABEL, TICK = 34, 30, 26
INK, FRAME, PATH, SIDE_PATH = (25, 25, 25), (120, 120, 120), (214, 96, 20), (244, 190, 150)
LINES = [(33, 113, 181), (214, 96, 20), (35, 139, 69), (118, 42, 131), (150, 150, 40), (200, 40, 90)]
SHADES = np.array([[247, 251, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]])  # 0 to 1

Box = tuple[int, int, int, int]  # left, top, right, bottom
Ticks = list[tuple[float, str]]  # where from 0 to 1, and what it says


def panel(index: int) -> Box:
    """The place of the panels of maps, left to right."""
    left = MARGIN + index * (PANEL + GAP)
    return left, TOP, left + PANEL, TOP + PANEL


def figure(panels: int, bar: bool) -> Image.Image:
    """White paper for ``panels`` of `panel`, with room for a `colour_bar`."""
    _, _, right, bottom = panel(panels - 1)
    return Image.new("RGB", (right + (BAR if bar else GAP), bottom + MARGIN), "white")


def shade(values: np.ndarray, unused: np.ndarray | None = None) -> np.ndarray:
    """Colours of values from 0 (light) to 1 (dark): (H, W) -> (H, W, 3) uint8; ``unused`` cells are white."""
    at = np.clip(values, 0, 1) * (len(SHADES) - 1)
    colours = np.stack([np.interp(at, range(len(SHADES)), channel) for channel in SHADES.T], axis=-1)
    if unused is not None:
        colours[unused] = 255
    return colours.round().astype(np.uint8)


def paste(picture: Image.Image, box: Box, colours: np.ndarray) -> None:
    """Fill ``box`` with colours (H, W, 3), each a rectangle."""
    size = (box[2] - box[0], box[3] - box[1])
    picture.paste(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST), box[:2])


def axes(
    picture: Image.Image, box: Box, title: str, x_label: str, x_ticks: Ticks, y_label: str, y_ticks: Ticks
) -> None:
    """Frame, title above, ticks and labels below and to the left; no left ones without a ``y_label``."""
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    draw.rectangle((left - 1, top - 1, right, bottom), outline=INK, width=2)
    write(picture, ((left + right) / 2, top - 36), title, TITLE)
    for share, name in x_ticks:
        x = left + share * (right - left)
        draw.line((x, bottom, x, bottom + 8), fill=INK, width=2)
        write(picture, (x, bottom + 28), name, TICK)
    write(picture, ((left + right) / 2, bottom + 76), x_label, LABEL)
    if not y_label:
        return
    for share, name in y_ticks:
        y = top + share * (bottom - top)
        draw.line((left - 8, y, left, y), fill=INK, width=2)
        write(picture, (left - 16, y), name, TICK, anchor="rm")
    widest = max(ImageFont.load_default(TICK).getlength(name) for _, name in y_ticks)
    write(picture, (left - widest - 46, (top + bottom) / 2), y_label, LABEL, upwards=True)


def dot(draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: int, colour: tuple[int, int, int]) -> None:
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white", width=2)


def colour_bar(picture: Image.Image, beside: Box, label: str, lowest: float = 0.0) -> None:
    """The scale of `shade` to the right of a panel, from ``lowest`` to 1."""
    _, top, right, bottom = beside
    box = (right + 40, top, right + 76, bottom)
    paste(picture, box, shade(np.linspace(1, 0, 256)[:, None]))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((box[0] - 1, top - 1, box[2], bottom), outline=INK, width=2)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - share * (bottom - top)
        draw.line((box[2], y, box[2] + 8, y), fill=INK, width=2)
        write(picture, (box[2] + 16, y), f"{lowest + share * (1 - lowest):.3g}", TICK, anchor="lm")
    write(picture, (box[2] + 110, (top + bottom) / 2), label, LABEL, upwards=True)


def write(
    picture: Image.Image, at: Sequence[float], text: str, size: int, anchor: str = "mm", upwards: bool = False
) -> None:
    font = ImageFont.load_default(size)
    if not upwards:
        ImageDraw.Draw(picture).text(at, text, fill=INK, font=font, anchor=anchor)
        return
    width = round(font.getlength(text)) + 4
    line = Image.new("RGB", (width, 2 * size), "white")
    ImageDraw.Draw(line).text((width / 2, size), text, fill=INK, font=font, anchor="mm")
    picture.paste(line.rotate(90, expand=True), (round(at[0] - size), round(at[1] - width / 2)))


def line_chart(
    series: Mapping[str, Mapping[float, tuple[float, float, float]]], title: str, x_label: str, y_label: str
) -> Image.Image:
    """Lines over x with a bar at each point: name -> x -> (value, lowest, highest). The y axis starts at 0."""
    box = (MARGIN, TOP, MARGIN + 2 * PANEL, TOP + PANEL)
    picture = Image.new("RGB", (box[2] + GAP, box[3] + MARGIN), "white")
    points = [(x, *values) for line in series.values() for x, values in line.items()]
    x_ticks, y_ticks = round_ticks(max(p[0] for p in points)), round_ticks(max(p[3] for p in points))
    axes(picture, box, title, x_label, x_ticks[1], y_label, [(1 - share, name) for share, name in y_ticks[1]])
    draw = ImageDraw.Draw(picture)

    def at(x: float, y: float) -> tuple[float, float]:
        return box[0] + x / x_ticks[0] * (box[2] - box[0]), box[3] - y / y_ticks[0] * (box[3] - box[1])

    for i, (name, line) in enumerate(series.items()):
        colour = LINES[i % len(LINES)]
        centres = [at(x, value) for x, (value, _, _) in sorted(line.items())]
        draw.line(centres, fill=colour, width=5, joint="curve")
        for (x, (_, lowest, highest)), centre in zip(sorted(line.items()), centres, strict=True):
            draw.line([at(x, lowest), at(x, highest)], fill=colour, width=3)
            dot(draw, centre, 9, colour)
        y = box[1] + 40 + 46 * i
        draw.line((box[2] - 330, y, box[2] - 270, y), fill=colour, width=5)
        write(picture, (box[2] - 250, y), name, LABEL, anchor="lm")
    return picture


def round_ticks(highest: float) -> tuple[float, Ticks]:
    """The end of an axis from 0 to ``highest`` or a little more, and its ticks at round numbers."""
    step = 10 ** math.floor(math.log10(highest))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if highest / s <= 6)
    count = math.ceil(highest / step - 1e-9)
    return step * count, [(i / count, f"{step * i:.6g}") for i in range(count + 1)]
