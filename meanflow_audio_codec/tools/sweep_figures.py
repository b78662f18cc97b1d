"""The figures of a sweep: a metric against network evaluations, against training cost, and a row a cell.

Curves and dots are means over the runs shown, bars and bands their 95 % intervals over seeds; in the rows a stroke is a
run. Drawn for print: white, legible in small, lines apart by colour (Okabe and Ito's) and by marker.
"""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meanflow_audio_codec.tools.sweep_runs import Cell, Run, all_keys, mean_and_half_width, of_several_grids, split_nfe

FIGURES = ("images/fid", "images/mse", "reconstruction/mel_distance", "reconstruction/x_mse")
EVALUATIONS = "network evaluations"
_FLOPS = "cost/train_flops_per_step"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vP*"


class Curve(NamedTuple):
    """Points (x, mean, half-width or None), what to add to the label, and the line's style."""

    suffix: str
    line: str
    points: list[tuple[float, float, float | None]]


def draw(folder: Path, cells: Sequence[Cell], metric: str) -> None:
    """Draw what `metric` (without `_nfe<k>`) and the cells allow, as folder/<kind>_<metric>.png."""
    folder.mkdir(exist_ok=True)
    name = metric.replace("/", "_")
    if any(nfe > 1 for cell in cells for nfe in evaluations(cell, metric)):
        curves = [evaluation_curves(cell, metric) for cell in cells]
        _draw_panels(folder / f"evaluations_{name}.png", cells, curves, EVALUATIONS, metric)
    label, cost = cost_axis(cells)
    curves = [cost_curves(cell, metric, cost) for cell in cells]
    if any(curves):
        _draw_panels(folder / f"cost_{name}.png", cells, curves, label, metric)
    if len(cells) > 1 and is_ablation(cells):
        _draw_ablation(folder / f"ablation_{name}.png", cells, metric)


def evaluations(cell: Cell, metric: str) -> list[int]:
    """Return the numbers of network evaluations at which the cell has the metric; none where it has no `_nfe<k>`."""
    names = {split_nfe(name) for run in cell.shown for name in run.metrics}
    return sorted(nfe for base, nfe in names if base == metric and nfe is not None)


def evaluation_curves(cell: Cell, metric: str) -> list[Curve]:
    """Return the final metric against the number of evaluations, one curve or none."""
    points = [(nfe, *mean_and_half_width(cell.values(f"{metric}_nfe{nfe}"))) for nfe in evaluations(cell, metric)]
    return [Curve("", "-", points)] if points else []


def cost_curves(cell: Cell, metric: str, cost: Callable[[Run, int], float]) -> list[Curve]:
    """Return the metric against the mean cost up to each step: at one evaluation, and dashed at the largest number
    where flow matching, or a run not evaluated at one, would be judged by half.
    """
    numbers = evaluations(cell, metric)
    names = {} if numbers else {metric: ("", "-")}
    if 1 in numbers:
        names[f"{metric}_nfe1"] = (", nfe 1", "-")
    flow_matching = any(run.config.get("objective", {}).get("name") == "flow_matching" for run in cell.shown)
    if numbers and (flow_matching or 1 not in numbers):
        names.setdefault(f"{metric}_nfe{numbers[-1]}", (f", nfe {numbers[-1]}", "--"))
    curves = []
    for name, (suffix, line) in names.items():
        found: dict[int, list[tuple[float, float]]] = {}
        for run in cell.shown:
            for row in run.history:
                if name in row:
                    found.setdefault(row["step"], []).append((cost(run, row["step"]), float(row[name])))
        points = []
        for _, pairs in sorted(found.items()):
            costs, values = zip(*pairs, strict=True)
            points.append((float(np.mean(costs)), *mean_and_half_width(values)))
        if points:
            curves.append(Curve(suffix, line, points))
    return curves


def cost_axis(cells: Sequence[Cell]) -> tuple[str, Callable[[Run, int], float]]:
    """Return the axis' label and a run's cost up to a step: FLOPs if all runs know them, or else seconds, or steps."""
    runs = [run for cell in cells for run in cell.shown]
    if all(_FLOPS in run.metrics for run in runs):
        return "training FLOPs", lambda run, step: step * run.metrics[_FLOPS]
    if all(run.seconds for run in runs):
        return "training time (s)", _seconds_until
    return "training steps", lambda run, step: float(step)


def _seconds_until(run: Run, step: int) -> float:
    steps, seconds = zip((0, 0.0), *run.seconds, strict=True)
    return float(np.interp(step, steps, seconds))


def is_ablation(cells: Sequence[Cell]) -> bool:
    """Return whether rows tell the cells apart better than panels: several grids' cells, or one key at a time."""
    items = [set(cell.keys.items()) for cell in cells]
    away = lambda a, b: len({key for key, _ in a ^ b})
    return of_several_grids(cells) or any(all(away(base, own) <= 1 for own in items) for base in items)


def _draw_panels(path: Path, cells: Sequence[Cell], curves: list[list[Curve]], x_label: str, y_label: str) -> None:
    """Draw a panel for each combination of the keys but the first, in it a line for each value of the first; for the
    cells of several grids one panel with a line each.
    """
    from matplotlib.figure import Figure  # a second to import: only when drawn; no pyplot state

    first, *others = all_keys(cells) or [""]
    if is_ablation(cells):
        titles, lines = [""] * len(cells), own_names(cells)
    else:
        titles = [", ".join(f"{key}={cell.keys[key]}" for key in others) for cell in cells]
        lines = [cell.keys[first] for cell in cells]
    panels, looks = dict.fromkeys(titles), {line: _look(i) for i, line in enumerate(dict.fromkeys(lines))}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for title, panel in zip(panels, grid.flat, strict=False):
        panels[title] = panel
        missing = [f"{line} {c.mark}" for t, line, c in zip(titles, lines, cells, strict=True) if t == title and c.mark]
        wrapped = textwrap.wrap(title, 40, break_long_words=False)
        panel.set_title("\n".join([*wrapped, *missing]), fontsize=8, parse_math=False)
        panel.set_xlabel(x_label)
    for panel in list(grid.flat)[len(panels) :]:
        panel.set_visible(False)
    handles = {}
    for title, line, found in zip(titles, lines, curves, strict=True):
        for curve in found:
            x, mean, half_width = zip(*curve.points, strict=True)
            bars = [half or 0 for half in half_width]
            handle = panels[title].errorbar(x, mean, bars, linestyle=curve.line, capsize=2, **looks[line])
            handles.setdefault(line + curve.suffix, handle)
    every = [point for found in curves for curve in found for point in curve.points]
    means = [mean for _, mean, _ in every]
    if _is_wide(means):
        grid[0, 0].set_yscale("log", nonpositive="clip")
    if x_label == EVALUATIONS:
        grid[0, 0].set_xscale("log", base=2)
    for panel in panels.values():
        if x_label == EVALUATIONS:
            panel.set_xticks(sorted({nfe for nfe, _, _ in every}))
            panel.xaxis.set_major_formatter("{x:g}")
        panel.tick_params(labelbottom=True)
        _finish(panel)
    grid[0, 0].set_ylabel(y_label, fontsize=9)
    legend_columns = min(columns, 2)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=legend_columns, fontsize=8, frameon=False
    )
    height = 2.3 * rows + 0.6 + 0.18 * len(handles) / legend_columns
    figure.set_size_inches(max(4.5, 2.8 * columns + 0.7), height)
    _save(figure, path)


def own_names(cells: Sequence[Cell]) -> list[str]:
    """Return what tells each cell from the others."""
    common = set.intersection(*(set(cell.keys.items()) for cell in cells))
    own = [[f"{key}={value}" for key, value in cell.keys.items() if (key, value) not in common] for cell in cells]
    return [", ".join(names) or cell.name for names, cell in zip(own, cells, strict=True)]


def _look(index: int) -> dict[str, Any]:
    count = len(_COLORS)
    marker = _MARKERS[(index + index // count) % count]  # the same colour again has another marker
    return dict(color=_COLORS[index % count], marker=marker, markersize=4, linewidth=1.2)


def _draw_ablation(path: Path, cells: Sequence[Cell], metric: str) -> None:
    from matplotlib.figure import Figure

    numbers = [nfe for cell in cells for nfe in evaluations(cell, metric)]
    name = f"{metric}_nfe{min(numbers)}" if numbers else metric
    figure = Figure(figsize=(6, 0.3 * len(cells) + 1), layout="constrained")
    panel = figure.subplots()
    found = {row: values for row, cell in enumerate(cells) if (values := cell.values(name))}
    for row, values in found.items():
        mean, half_width = mean_and_half_width(values)
        panel.errorbar(mean, row, xerr=half_width or 0, fmt="o", color=_COLORS[0], markersize=4, capsize=2)
        panel.plot(values, [row] * len(values), "|", color=_COLORS[1], markersize=7)
    if _is_wide([value for values in found.values() for value in values]):
        panel.set_xscale("log", nonpositive="clip")
    labels = [f"{own} {cell.mark}".strip() for own, cell in zip(own_names(cells), cells, strict=True)]
    panel.set_yticks(range(len(cells)), labels, parse_math=False)
    panel.set_ylim(len(cells) - 0.5, -0.5)
    panel.set_xlabel(name)
    _finish(panel)
    _save(figure, path)


def _is_wide(values: Sequence[float]) -> bool:
    """Return whether an even axis would hide all but the largest."""
    return min(values) > 0 and max(values) > 30 * min(values)


def _finish(panel: Any) -> None:
    """Light grid, small print."""
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.xaxis.label.set_size(9)
    panel.xaxis.get_offset_text().set_size(8)


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(path.name + ".tmp")
    figure.savefig(partial, format="png", dpi=200)
    partial.replace(path)
