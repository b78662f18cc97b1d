"""The findings of the ladder, from the runs' own files: python -m meanflow_audio_codec.proj.ladder.report --workdir W

Writes the tables and figures of every part into W, tests the predictions, and puts what `documentation/ladder.md` shows
between its marks `<!-- NAME -->` and `<!-- /NAME -->`; into `documentation/ladder/` go the figures that the page shows,
decoded images, and `<part>_runs.csv` with every metric of every run. Parts without runs in W keep what they have there.
Runs of one seed are paired across cells: they share data order, initial noise and evaluation noise.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.proj.ladder.study import PARTS
from meanflow_audio_codec.tools.sweep_runs import Run, mean_and_half_width, read_cells
from meanflow_audio_codec.tools.sweep_table import write_table

AE, FM, MF, IMF = "autoencoder", "flow_matching", "mean_flow", "improved_mean_flow"


class Data(NamedTuple):
    """How findings are read off a data set: its part, that of its ablations, the error of the tokens, the quality."""

    part: str
    ablations: str
    x_mse: str
    quality: str  # lower is better
    many: int  # evaluations at which flow matching is judged


MNIST = Data("mnist", "mnist_ablations", "images/x_mse", "images/fid", 50)
AUDIO = Data("audio", "audio_ablations", "reconstruction/x_mse", "reconstruction/mel_distance", 16)


class Row(NamedTuple):
    """One cell's value: mean over seeds, half-width of its 95 % interval (None for one seed)."""

    label: str
    mean: float
    half_width: float | None


class Prediction(NamedTuple):
    """A claim of the method: what is measured in each cell, where it should lie, and the words for it."""

    name: str
    claim: str
    measured: str  # in words, for the axis
    objectives: tuple[str, ...]  # whose runs are looked at, each against the others of its cell and seed
    value: Callable[[dict[str, Run], str, Data], float]
    expected: float  # the line in the figure
    bounds: tuple[float, float]


def _metric(run: Run, name: str, nfe: int) -> float:
    """NaN where the run was not scored so."""
    return run.metrics.get(f"{name}_nfe{nfe}", np.nan)


def _ratio(runs: dict[str, Run], objective: str, data: Data) -> float:
    return _metric(runs[objective], data.x_mse, 1) / _metric(runs[AE], data.x_mse, 1)


def _gap_closed(runs: dict[str, Run], objective: str, data: Data) -> float:
    one, many = (_metric(runs[FM], data.quality, nfe) for nfe in (1, data.many))
    return (one - _metric(runs[objective], data.quality, 1)) / (one - many)


def _improvement(runs: dict[str, Run], objective: str, data: Data) -> float:
    plain, improved = (_metric(runs[name], data.quality, 1) for name in (MF, IMF))
    return 100 * (plain - improved) / plain


PREDICTIONS = (
    Prediction(
        "flow_matching_is_the_autoencoder",
        "flow matching at one evaluation equals the autoencoder (within 2 %)",
        "token error of flow matching at one evaluation / of the autoencoder",
        (FM,),
        _ratio,
        1.0,
        (0.98, 1.02),
    ),
    Prediction(
        "error_ratio_two",
        "a good one-step sampler has twice the autoencoder's token error (within 5 %)",
        "token error at one evaluation / of the autoencoder",
        (MF, IMF),
        _ratio,
        2.0,
        (1.9, 2.1),
    ),
    Prediction(
        "gap_closed",
        "mean flow at one evaluation closes most of the gap between flow matching at one and at many",
        "share of the gap closed",
        (MF, IMF),
        _gap_closed,
        1.0,
        (0.5, np.inf),
    ),
    Prediction(
        "improved_against_plain",
        "improved mean flow beats plain mean flow at one evaluation",
        "improvement over plain mean flow in %, same seeds",
        (IMF,),
        _improvement,
        0.0,
        (0.0, np.inf),
    ),
)


def paired_runs(workdir: Path, data: Data) -> dict[str, dict[int, dict[str, Run]]]:
    """Return {cell: {seed: {objective: run}}} of the finished runs, cells named by all but the objective."""
    found: dict[str, dict[int, dict[str, Run]]] = {}
    for cell in read_cells(workdir / data.part):
        keys = dict(cell.keys)
        objective = keys.pop("objective")
        for run in cell.finished:
            found.setdefault(", ".join(keys.values()), {}).setdefault(run.seed, {})[objective] = run
    return found


def measure(prediction: Prediction, runs: dict[str, dict[int, dict[str, Run]]], data: Data) -> list[Row]:
    """Return a row for each cell and objective for which some seed has all of its runs, with the metrics needed."""
    rows = []
    for name, seeds in runs.items():
        for objective in prediction.objectives:
            complete = [found for found in seeds.values() if len(found) == 4]
            values = [prediction.value(found, objective, data) for found in complete]
            values = [value for value in values if not np.isnan(value)]
            if values:
                label = f"{name}, {objective}" if len(prediction.objectives) > 1 else name
                rows.append(Row(label, *mean_and_half_width(values)))
    return rows


def judge(row: Row, bounds: tuple[float, float]) -> str:
    """Say whether all of the interval lies within the bounds or outside of them; one value has none."""
    if row.half_width is None:
        return "open"
    low, high = row.mean - row.half_width, row.mean + row.half_width
    if bounds[0] <= low and high <= bounds[1]:
        return "holds"
    return "fails" if high < bounds[0] or low > bounds[1] else "open"


def verdict(prediction: Prediction, rows: Sequence[Row]) -> str:
    """Say in a line what all cells together say of the claim, those of each tokenisation, and single cells."""
    if not rows:
        return f"- **{prediction.claim}**: no cell is complete."
    means = [row.mean for row in rows]
    over_cells = Row("", *mean_and_half_width(means))
    words = [judge(row, prediction.bounds) for row in rows]
    counts = ", ".join(f"{word} in {words.count(word)}" for word in ("holds", "fails", "open") if word in words)
    by_tokens = []
    for tokens in ("mdct", "reshape"):
        if found := [row.mean for row in rows if tokens in row.label.split(", ")]:
            over_tokens = Row("", *mean_and_half_width(found))
            by_tokens.append(f"{tokens} {judge(over_tokens, prediction.bounds)} with {_spread(over_tokens)}")
    return (
        f"- **{prediction.claim}**: {judge(over_cells, prediction.bounds)}. {prediction.measured.capitalize()}: "
        f"{_spread(over_cells)} over cells, from {min(means):.3g} to {max(means):.3g}"
        f"{'; ' if by_tokens else ''}{', '.join(by_tokens)}. Single cells: {counts}."
    )


def _spread(row: Row) -> str:
    return f"{row.mean:.3g}" + ("" if row.half_width is None else f" ± {row.half_width:.2g}")


def ablation_table(workdir: Path, data: Data) -> str:
    """Return the quality of each ablation over that of the default with the same seed, in Markdown, best first.

    The default is the first cell of the part's first grid.
    """
    default = PARTS[data.ablations].grids[0].partition(",")[0]
    cells = {cell.name: cell for cell in read_cells(workdir / data.ablations)}
    base = {run.seed: run for run in cells[default].finished} if default in cells else {}
    rows = []
    for name, cell in cells.items():
        pairs = [(run, base[run.seed]) for run in cell.finished if run.seed in base]
        if pairs and name != default:
            columns = [
                [_metric(a, data.quality, n) / _metric(b, data.quality, n) for a, b in pairs] for n in (1, data.many)
            ]
            rows.append((np.mean(columns[0]), f"| {name.replace(',', ', ')} | {' | '.join(map(_times, columns))} |"))
    heads = " | ".join(f"{data.quality}_nfe{nfe}" for nfe in (1, data.many))
    lines = [f"| against {default} | {heads} |", "| --- | --- | --- |", *(line for _, line in sorted(rows))]
    return "\n".join(lines)


def _times(ratios: Sequence[float]) -> str:
    """Write a mean ratio and, in brackets, its range over seeds."""
    return f"{np.mean(ratios):.2f}" + (f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(ratios) > 1 else "")


def draw(path: Path, prediction: Prediction, rows: Sequence[Row]) -> None:
    """Draw a dot with its interval for each row, and a line where the claim puts it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.22 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    widths = [row.half_width or 0.0 for row in rows]
    axes.errorbar([row.mean for row in rows], places, xerr=widths, fmt="o", color="#0072b2", markersize=4, capsize=2)
    axes.axvline(prediction.expected, color="#d55e00", linewidth=1)
    axes.set_yticks(places, [row.label for row in rows], fontsize=7)
    axes.set_xlabel(prediction.measured, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def fill(text: str, blocks: dict[str, str]) -> str:
    """Replace what stands between the marks of each block.

    Raises:
        InputError: a mark is missing.
    """
    for name, block in blocks.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marked.search(text):
            raise InputError(f"the page has no marks <!-- {name} --> and <!-- /{name} -->; add them")
        text = marked.sub(lambda match, block=block: f"{match[1]}{block.rstrip()}\n{match[2]}", text)
    return text


def write_findings(workdir: Path, page: Path) -> None:
    """Write tables and figures of the parts that have runs, and fill the page."""
    text, figures = page.read_text(), page.with_suffix("")
    figures.mkdir(exist_ok=True)
    blocks = {}
    for part in _parts_with_runs(workdir):
        ratio = "objective=autoencoder" if part in ("mnist", "audio") else ""
        blocks[part] = write_table(workdir / part, ratio=ratio)
        shutil.copy(workdir / part / "runs.csv", figures / f"{part}_runs.csv")
        for figure in (workdir / part / "figures").glob("*.png"):
            if f"({figures.name}/{part}_{figure.name})" in text:
                shutil.copy(figure, figures / f"{part}_{figure.name}")
    _keep_images(workdir, figures)
    for data in (MNIST, AUDIO):
        if data.part in blocks:
            runs = paired_runs(workdir, data)
            measured = {prediction: measure(prediction, runs, data) for prediction in PREDICTIONS}
            for prediction, rows in measured.items():
                if rows:
                    draw(figures / f"{data.part}_{prediction.name}.png", prediction, rows)
            lines = [verdict(prediction, rows) for prediction, rows in measured.items()]
            blocks[f"{data.part} predictions"] = "\n".join(lines)
        if data.ablations in blocks:
            blocks[f"{data.ablations} ratios"] = ablation_table(workdir, data)
    page.write_text(fill(text, blocks))


def _keep_images(workdir: Path, figures: Path) -> None:
    """Copy what each rung decoded of MNIST, in 16 grays, a quarter of the file."""
    from PIL import Image

    for objective in (AE, FM, MF, IMF):
        samples = workdir / MNIST.part / f"objective={objective},backbone=conv,tokens=mdct" / "seed0" / "samples"
        for grid in samples.glob("*/grid.png"):
            Image.open(grid).convert("L").quantize(16).save(figures / f"mnist_by_{objective}.png", optimize=True)


def _parts_with_runs(workdir: Path) -> Iterable[str]:
    return [part for part in PARTS if part != "classifier" and list((workdir / part).glob("*/seed*/metrics.jsonl"))]


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the findings."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, type=Path, help="the folder given to the study")
    parser.add_argument("--page", type=Path, default=Path("documentation/ladder.md"), help="default: %(default)s")
    given = parser.parse_args(argv)
    try:
        write_findings(given.workdir.expanduser(), given.page)
    except InputError as error:
        sys.exit(f"report: {error}")
    except OSError as error:
        sys.exit(f"report: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
