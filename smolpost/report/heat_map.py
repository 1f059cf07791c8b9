"""Needle plots: scores by context length and by depth in it, for the terminal and as a picture.

The colours are cividis (Nuñez et al. 2018), which looks the same with every kind of colour vision. The scale is always
0 to 1, so maps of different models can be compared. Every cell has its number, so nothing depends on colour alone.
"""

import math
import re
from pathlib import Path

from rich.style import Style
from rich.text import Text

from smolpost.errors import UserError
from smolpost.screen import Blocks

DEPTH = "/depth_"  # in the name of a score by depth in the context
SUFFIXES = (".png", ".svg")

# cividis at 0, 1/8, ... 1: red, green, blue in [0, 255].
# fmt: off
_STOPS = (
    (0, 34, 77), (26, 56, 111), (67, 78, 107), (97, 100, 111), (124, 123, 120),
    (155, 147, 118), (187, 173, 108), (222, 201, 87), (253, 231, 55),
)
# fmt: on

# Above this score black text is easier to read on its colour than white.
_LIGHT = 0.5

# Inches: a cell, and what the axes, the title and the scale take.
_CELL = (0.62, 0.34)
_MARGIN = (2.3, 1.5)


def heat_map_table(scores: dict[str, dict[str, float]], title: str) -> Blocks:
    """The map as a table of numbers on colours.

    Args:
        scores: Metric -> {"value": in [0, 1], ...}; those named `LENGTH/depth_D` are shown, D being 0 at the start.
        title: Heading.
    Raises:
        UserError: There is none.
    """
    lengths, depths, values = _grid(scores, title)
    rows = [[f"{depth:.2f}", *map(_cell, row)] for depth, row in zip(depths, values, strict=True)]
    return Blocks(["depth", *map(str, lengths)], rows, title=title)


def save_heat_map(scores: dict[str, dict[str, float]], file: Path, title: str) -> None:
    """The map as a picture, the same bytes for the same scores and libraries.

    Args:
        scores, title: As `heat_map_table`.
        file: Ends in .png or .svg.
    Raises:
        UserError: There is no score by depth, or the file has another ending.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: a heat map is drawn as {' or '.join(SUFFIXES)}; use such a name")
    lengths, depths, values = _grid(scores, title)

    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt: the ids in an SVG are random otherwise. Its text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "heat map", "svg.fonttype": "none"}):
        figure = Figure(
            figsize=(_MARGIN[0] + _CELL[0] * len(lengths), _MARGIN[1] + _CELL[1] * len(depths)),
            layout="constrained",
        )
        axes = figure.add_subplot()
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "black" if math.isnan(value) or value > _LIGHT else "white"
                axes.text(x, y, _number(value), ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        axes.set(title=title, xlabel="context length (tokens)", ylabel="depth in the context")
        figure.colorbar(image, label="share found")
        # The date in an SVG and the version in a PNG are left out.
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None})


def _grid(scores: dict[str, dict[str, float]], title: str) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths and depths, ascending, and a row of values for each depth; NaN where a length lacks it."""
    values: dict[tuple[int, float], float] = {}
    for name, score in scores.items():
        if match := re.fullmatch(rf"(\d+){DEPTH}(\d+(?:\.\d+)?)", name):
            values[int(match[1]), float(match[2])] = score["value"]
    if not values:
        raise UserError(f"{title}: has no scores by depth, as recall and RULER's needle tasks have; nothing to map")
    lengths, depths = (sorted({place[axis] for place in values}) for axis in (0, 1))
    return lengths, depths, [[values.get((length, depth), math.nan) for length in lengths] for depth in depths]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _cell(value: float) -> Text:
    if math.isnan(value):
        return Text()
    place = min(max(value, 0.0), 1.0) * (len(_STOPS) - 1)
    below = min(int(place), len(_STOPS) - 2)
    ends = zip(_STOPS[below], _STOPS[below + 1], strict=True)
    color = [round(low + (high - low) * (place - below)) for low, high in ends]
    ink = "black" if value > _LIGHT else "white"
    return Text(_number(value), Style(color=ink, bgcolor="#{:02x}{:02x}{:02x}".format(*color)))
