"""Results of a sweep or a greedy soup: a plot of long context against the rest, and tables for the terminal.

Every kind of point has its own shape, and the Pareto front has rings, so nothing depends on colour alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from smolpost.screen import Blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"  # Okabe and Ito's palette
INK, GREY = "#333333", "#999999"
SIZE = (7.2, 4.8)  # inches
DPI = 160  # 1152 pixels wide: a README shows about 900
ENDS = {"weight 0": "s", "weight 1": "D"}
SHAPES = {**ENDS, "a weight between": "o", "ingredient alone": "^", "picked": "*"}
LABEL = 44  # characters of a line beside an axis
NEAR = 10  # times max_cost: points that cost more get no share of the second panel


def save_pareto(reports: Mapping[str, Any] | Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot sweeps, `long` up and `rest` to the right, into a .png or .svg file; the same bytes for the same reports.

    One report shows the points by weight with their 95% intervals, the Pareto front, the ingredients and the region
    that costs more than `max_cost`. Several, of one recipe's seeds, show each as a thin line with its picked point,
    and the mean over them at the weights that all have. Where weights far off squeeze those near weight 0, a second
    panel shows these alone.

    Args:
        reports: What `selection.sweep.sweep` returned, or several of them.
    """
    reports = [reports] if isinstance(reports, Mapping) else list(reports)
    near, far = _split(reports)
    first, zoomed = reports[0], bool(far) and len(near) > 1
    with _panels(file, 2 if zoomed else 1) as panels:
        for axes in panels:
            draw = _draw_one if len(reports) == 1 else _draw_several
            draw(axes, reports, named=axes is panels[-1])
        panels[-1].set_xlabel(f"rest: {_mean_of(first['rest'])}")
        panels[0].set_ylabel(f"long: {_mean_of(first['long'])}")
        if zoomed:
            panels[0].set_xlabel("rest")
            _zoom(panels, near)
        for axes in panels if len(reports) == 1 else ():
            _forbid(axes, first["points"][0]["rest"]["value"] - first["max_cost"])
        _head(panels[0].figure, reports)
        _legend(panels)


def sweep_table(report: Mapping[str, Any]) -> Blocks:
    """The points of a sweep by weight and its ingredients, with 95% intervals, and what became of each.

    "front" marks the Pareto front, "over" what costs more than the rule allows.
    """
    rows, styles = [], []
    for point in report["points"]:
        marks = {"picked": point["picked"], "front": point["pareto"], "over": not point["allowed"]}
        cells = (_estimate(point[key]) for key in ("long", "rest", "cost"))
        words = " ".join(mark for mark, holds in marks.items() if holds)
        rows.append([f"{point['weight']:g}", *cells, words])
        styles.append("bold" if point["picked"] else None)
    for ingredient in report["ingredients"]:
        rows.append([ingredient["name"], _estimate(ingredient["long"]), _estimate(ingredient["rest"]), "", ""])
        styles.append(None)
    heads = [f"{head}\n95% interval" for head in ("long", "rest", "cost in rest")]
    return Blocks(["weight", *heads, ""], rows, styles=styles)


def greedy_table(report: Mapping[str, Any]) -> Blocks:
    """The candidates of a greedy soup in the order of trial: alone, and as the soup with them."""
    first, *others = report["alone"]
    rows = [[first["name"], _estimate(first), _estimate(first), "", "kept"]]
    for alone, trial in zip(others, report["trials"], strict=True):
        cells = (_estimate(alone), _estimate(trial), _estimate(trial["change"]))
        rows.append([alone["name"], *cells, "kept" if trial["kept"] else "left out"])
    heads = [f"{head}\n95% interval" for head in ("alone", "soup with it", "change")]
    return Blocks(["candidate", *heads, ""], rows)


@contextmanager
def _panels(file: Path, number: int) -> Iterator[list["Axes"]]:
    """An empty plot that is saved when the block ends; its last panel is the wide one."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK}
    # The hash salt names the SVG's elements, which would be random, and the date would differ: None leaves it out.
    with matplotlib.rc_context(style | {"ytick.color": INK, "svg.hashsalt": "pareto"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(1, number, squeeze=False, width_ratios=[1, 2.4][-number:])[0])
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#E6E6E6", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.margins(0.08)
        yield panels
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=DPI, metadata={"Date": None} if file.suffix == ".svg" else None)


def _split(reports: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping], list[Mapping]]:
    """What is drawn and lies near weight 0 or was picked, and what costs far more."""
    near, far = [], []
    for report in reports:
        least = report["points"][0]["rest"]["value"] - NEAR * report["max_cost"]
        shown = report["points"] if len(reports) > 1 else [*report["points"], *report["ingredients"]]
        for point in shown:
            close = point["rest"]["value"] >= least or point.get("picked")
            (near if close else far).append(point)
    return near, far


def _zoom(panels: Sequence["Axes"], near: Sequence[Mapping[str, Any]]) -> None:
    """Show the near points alone in the last panel, and where they lie in the first."""
    limits = []
    for values in _places(near):
        margin = 0.14 * ((max(values) - min(values)) or abs(values[0]) or 1.0)
        limits.append((min(values) - margin, max(values) + margin))
    (left, right), (low, high) = limits
    panels[-1].set_xlim(left, right)
    panels[-1].set_ylim(low, high)
    x, y = [left, right, right, left, left], [low, low, high, high, low]
    panels[0].plot(x, y, color=INK, linewidth=0.8, linestyle=":", zorder=8)
    for axes, title in zip(panels, ("all weights", "the dotted frame"), strict=True):
        axes.set_title(title, loc="left", fontsize=9)


def _draw_one(axes: "Axes", reports: Sequence[Mapping[str, Any]], *, named: bool) -> None:
    [report] = reports
    points = report["points"]
    axes.plot(*_places(points), color=BLUE, linewidth=1.2, zorder=2)
    axes.plot(
        *_places([point for point in points if point["pareto"]]), linestyle="none", marker="o", markersize=13,
        markerfacecolor="none", markeredgecolor=GREEN, markeredgewidth=1.1, zorder=3, label="Pareto front",
    )  # fmt: skip
    for point in points:
        _point(axes, point, _kind(point), BLUE)
        if point["picked"]:
            _star(axes, point, RED, label="picked")
        if named or _kind(point) in ENDS:
            _name(axes, point, f"{point['weight']:g}")
    for ingredient in report["ingredients"]:
        _point(axes, ingredient, "ingredient alone", ORANGE)
        if named:
            _name(axes, ingredient, ingredient["name"], left=True)


def _draw_several(axes: "Axes", reports: Sequence[Mapping[str, Any]], *, named: bool) -> None:
    for report in reports:
        points = report["points"]
        axes.plot(*_places(points), color=GREY, linewidth=0.8, marker=".", markersize=4, zorder=2, label="each seed")
        _star(axes, next(point for point in points if point["picked"]), GREY, label="picked by each seed")
    weights = set.intersection(*({point["weight"] for point in report["points"]} for report in reports))
    means = [_mean(weight, reports) for weight in sorted(weights)]
    axes.plot(*_places(means), color=BLUE, linewidth=1.8, zorder=4, label=f"mean of {len(reports)} seeds")
    for mean in means:
        _point(axes, mean, _kind(mean), BLUE)
        if named or _kind(mean) in ENDS:
            _name(axes, mean, f"{mean['weight']:g}")


def _mean(weight: float, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = [point for report in reports for point in report["points"] if point["weight"] == weight]
    return {"weight": weight} | {key: {"value": fmean(p[key]["value"] for p in found)} for key in ("long", "rest")}


def _kind(point: Mapping[str, Any]) -> str:
    return {0: "weight 0", 1: "weight 1"}.get(point["weight"], "a weight between")


def _places(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["rest"]["value"] for point in points], [point["long"]["value"] for point in points]


def _point(axes: "Axes", point: Mapping[str, Any], kind: str, colour: str) -> None:
    [x], [y] = _places([point])
    if "low" in point["long"]:
        for ends, other, draw in ((point["rest"], y, axes.hlines), (point["long"], x, axes.vlines)):
            draw(other, ends["low"], ends["high"], colors=colour, linewidth=0.8, alpha=0.5, zorder=1)
    axes.plot(
        x, y, marker=SHAPES[kind], linestyle="none", markersize=6.5, color=colour, markeredgecolor="white", zorder=5,
        label=kind,
    )  # fmt: skip


def _star(axes: "Axes", point: Mapping[str, Any], colour: str, *, label: str) -> None:
    axes.plot(
        *_places([point]), marker=SHAPES["picked"], linestyle="none", markersize=17, markerfacecolor=colour,
        markeredgecolor="white", zorder=6, label=label,
    )  # fmt: skip


def _name(axes: "Axes", point: Mapping[str, Any], text: str, *, left: bool = False) -> None:
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
    axes.annotate(
        text, (point["rest"]["value"], point["long"]["value"]), xytext=(-8 if left else 9, -10 if left else 6),
        textcoords="offset points", ha="right" if left else "left", zorder=9, annotation_clip=True,
        bbox=box,
    )  # fmt: skip


def _forbid(axes: "Axes", least: float) -> None:
    """Shade what costs more than is allowed."""
    left, right = axes.get_xlim()
    if least > left:
        axes.axvspan(left, least, color="#000000", alpha=0.05, linewidth=0, zorder=0, label="costs too much")
        axes.axvline(least, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_xlim(left, right)


def _head(figure: "Figure", reports: Sequence[Mapping[str, Any]]) -> None:
    """The picked weights and the rule, above all panels."""
    weights, first = ", ".join(f"{report['picked']:g}" for report in reports), reports[0]
    confidence = " with 95% confidence" if first["confident"] else ""
    figure.suptitle(
        f"Picked weight: {weights}\nthe smallest within one standard error of the best long-context score, at a cost "
        f"of at most {first['max_cost']:g}{confidence}",
        x=0.01, ha="left", fontsize=9,
    )  # fmt: skip


def _legend(panels: Sequence["Axes"]) -> None:
    """Every label once, below the plot, where no point can lie."""
    found = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in found}
    panels[0].figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8, markerscale=0.8,
        columnspacing=1.6, handletextpad=0.5,
    )  # fmt: skip


def _mean_of(metrics: Sequence[str]) -> str:
    """The objective in words, in lines that an axis can hold."""
    return fill(metrics[0] if len(metrics) == 1 else f"mean of {', '.join(metrics)}", LABEL)


def _estimate(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} {found['low']:.2f}..{found['high']:.2f}"
