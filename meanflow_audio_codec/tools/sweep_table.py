"""The tables of a sweep: table.csv (a row a cell), runs.csv (a row a run), table.md (a choice of columns).

Each number is the mean over a cell's finished runs, with the half-width of its 95 % confidence interval over seeds
(`_ci95`; Student's t, none for one seed).
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from meanflow_audio_codec.configuration import near_match
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools.sweep_figures import FIGURES, draw
from meanflow_audio_codec.tools.sweep_runs import (
    TRAIN_SECONDS,
    Cell,
    add_ratios,
    all_keys,
    mean_and_half_width,
    natural,
    of_several_grids,
    read_cells,
    split_nfe,
)

COLUMNS = (
    *("images/fid_nfe1", "images/fid_nfe50", "images/kid_nfe1", "images/accuracy_percent_nfe1", "images/mse_nfe1"),
    *("reconstruction/mel_distance_nfe1", "reconstruction/mel_distance_nfe16", "reconstruction/x_mse_nfe1"),
    *("reconstruction/si_sdr_db_nfe1", "tones/modulation_depth_nfe1", "mse_ratio_nfe1"),
    *("cost/decoder_parameters", "cost/train_flops_per_step", TRAIN_SECONDS),
)

_UNITS = ((1e9, " G"), (1e6, " M"), (1e3, " k"))


def write_table(
    workdir: str | os.PathLike, columns: Sequence[str] = (), ratio: str = "", figures: Sequence[str] = ()
) -> str:
    """Write table.csv (a row a cell), runs.csv (a row a run), table.md and figures/*.png; return the Markdown.

    Args:
        workdir: Folder of the cells' folders.
        columns: Metrics of table.md; none: those of `COLUMNS` that exist.
        ratio: KEY=VALUE of the runs whose x_mse divides; '' for no ratios.
        figures: Metrics to draw, without `_nfe<k>`; none: those of `FIGURES` that exist.

    Raises:
        InputError: no run, a damaged file, a metric or key that no run has.
    """
    workdir = Path(workdir).expanduser()
    cells = read_cells(workdir)
    if ratio:
        add_ratios(cells, ratio)
    metrics = sorted({name for cell in cells for run in cell.shown for name in run.metrics}, key=natural)
    bases = sorted({split_nfe(name)[0] for name in metrics}, key=natural)
    names = _chosen("--columns", columns, COLUMNS, metrics) or metrics[:8]
    drawn = _chosen("--figures", figures, FIGURES, bases)
    markdown = _markdown(cells, names)
    _replace(workdir / "table.csv", _table_csv(cells, metrics))
    _replace(workdir / "runs.csv", _runs_csv(cells))
    _replace(workdir / "table.md", markdown)
    for metric in drawn:
        draw(workdir / "figures", cells, metric)
    return markdown


def _chosen(flag: str, given: Sequence[str], default: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in given:
        if name not in known:
            raise InputError(f"{flag}: no run has {name}{near_match(name, known)}")
    return list(given) or [name for name in default if name in known]


def _table_csv(cells: list[Cell], metrics: list[str]) -> str:
    keys = all_keys(cells)
    rows = [[*keys, "finished_seeds", "seeds", "steps", *(f"{m}{end}" for m in metrics for end in ("", "_ci95"))]]
    for cell in cells:
        row = [*(cell.keys.get(key, "") for key in keys), len(cell.finished), cell.seeds, _steps(cell)]
        for metric in metrics:
            values = cell.values(metric)
            row += mean_and_half_width(values) if values else ("", "")
        rows.append(row)
    return _csv(rows)


def _runs_csv(cells: list[Cell]) -> str:
    keys = all_keys(cells)
    metrics = sorted({name for cell in cells for run in cell.runs for name in run.metrics}, key=natural)
    rows = [[*keys, "seed", "finished", "step", *metrics]]
    for cell in cells:
        for run in cell.runs:
            values = [run.metrics.get(metric, "") for metric in metrics]
            rows.append([*(cell.keys.get(key, "") for key in keys), run.seed, int(run.finished), run.step, *values])
    return _csv(rows)


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _steps(cell: Cell) -> str:
    """The step of the runs shown, or the least and the greatest."""
    steps = [run.step for run in cell.shown]
    return "-".join(str(step) for step in sorted({min(steps), max(steps)})) if steps else "0"


def _markdown(cells: list[Cell], metrics: list[str]) -> str:
    """Write a column for each key; cells of several grids, which have few of the keys each, are named in one."""
    keys = all_keys(cells)
    several_grids = of_several_grids(cells)
    heads = ["cell"] if several_grids else keys
    rows = [[*heads, "seeds", *metrics], ["---"] * (len(heads) + 1 + len(metrics))]
    for cell in cells:
        name = [cell.name.replace(",", ", ")] if several_grids else [cell.keys[key] for key in keys]
        seeds = str(cell.seeds) if not cell.mark else cell.mark
        if cell.mark and not cell.finished:
            seeds += f" at step {_steps(cell)}"
        values = [cell.values(metric) for metric in metrics]
        texts = [_text(*mean_and_half_width(found)) if found else "" for found in values]
        rows.append([*name, seeds, *texts])
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return "\n".join(lines) + "\n\nMean over the finished seeds ± half-width of its 95 % interval (Student's t).\n"


def _text(mean: float, half_width: float | None) -> str:
    """Write the half-width with two digits and the mean as far as it; four digits where there is none, or it is 0."""
    unit, letter = next(((unit, letter) for unit, letter in _UNITS if abs(mean) >= 10 * unit), (1, ""))
    if half_width is None or half_width <= 1e-12 * abs(mean):  # equal but for rounding
        return f"{mean / unit:.4g}{letter}"
    mean, half_width = mean / unit, half_width / unit
    digits = max(0, 1 - math.floor(math.log10(half_width)))
    if digits > 6:
        return f"{mean:.4g} ± {half_width:.2g}{letter}"
    return f"{mean:.{digits}f} ± {half_width:.{digits}f}{letter}"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)
