"""The map's numbers stand where they belong, in colour and without; the picture is the same every time."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from smolpost.errors import UserError
from smolpost.report.heat_map import heat_map_table, save_heat_map

SCORES = {
    "1024": {"value": 0.5},
    "8192/depth_0.00": {"value": 1.0},
    "8192/depth_0.50": {"value": 0.25},
    "1024/depth_0.00": {"value": 0.0},
    "1024/niah_single_1": {"value": 0.9},
    "1024/depth_1.00": {"value": 0.876},
}


def shown(scores, **options):
    console = Console(file=io.StringIO(), width=60, **options)
    console.print(heat_map_table(scores, "needles"))
    return console.file.getvalue()


def test_lengths_are_columns_and_depths_are_rows():
    plain = shown(SCORES)
    assert "\x1b" not in plain
    assert [
        [line[:5].strip(), line[7:11].strip(), line[13:].strip()] for line in plain.splitlines()[1:] if line[0] != "─"
    ] == [
        ["depth", "1024", "8192"],
        ["0.00", "0.00", "1.00"],
        ["0.50", "", "0.25"],
        ["1.00", "0.88", ""],
    ]


def colours(scores):
    """Number -> (ink, its place's colour) as the terminal gets them."""
    escapes = re.findall(
        r"\x1b\[(\d+);48;2;(\d+);(\d+);(\d+)m *([\d.]+)", shown(scores, color_system="truecolor", force_terminal=True)
    )
    return {number: (ink, (int(red), int(green), int(blue))) for ink, red, green, blue, number in escapes}


def test_ink_is_readable_on_every_colour():
    """By WCAG 2.1's contrast ratio, which asks for 3 of large text and 4.5 of small."""

    def luminance(color):
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    cells = colours({f"1/depth_{i / 100}": {"value": i / 100} for i in range(101)})
    assert len(cells) == 101
    for ink, color in cells.values():
        light = {"37": 1.0, "30": 0.0}[ink]
        lighter, darker = sorted((light, luminance(color)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 4.2


def test_the_terminal_has_the_colours_of_the_picture():
    matplotlib = pytest.importorskip("matplotlib")
    cells = colours({f"1/depth_{i / 100}": {"value": i / 100} for i in range(101)})
    for number, (_, color) in cells.items():
        drawn = matplotlib.colormaps["cividis"](float(number), bytes=True)[:3]
        assert max(abs(int(a) - b) for a, b in zip(drawn, color, strict=True)) <= 20  # straight between nine stops


def test_pictures_are_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    for suffix in ("png", "svg"):
        for name in "ab":
            save_heat_map(SCORES, tmp_path / f"{name}.{suffix}", "needles")
        first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
        assert first == second and len(first) > 2000
    drawn = re.findall(r">([^<>]+)</text>", (tmp_path / "a.svg").read_text())
    assert [text for text in drawn if re.fullmatch(r"\d\.\d\d", text)].count("0.88") == 1
    assert {"1024", "8192", "0.25", "needles", "context length (tokens)"} <= set(drawn)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match="needles: has no scores by depth"):
        heat_map_table({"1024": {"value": 0.5}, "1024/vt": {"value": 0.5}}, "needles")
    with pytest.raises(UserError, match=r"map.jpg: a heat map is drawn as .png or .svg"):
        save_heat_map(SCORES, Path("map.jpg"), "needles")
