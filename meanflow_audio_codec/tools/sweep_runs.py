"""The runs of a sweep, read from W/<cell>/seed<k>/ and nothing else.

A run's metrics are the newest value of each key of metrics.jsonl, and the numbers of cost.json. A cell's are those of
its finished runs, or for want of one of all; what is missing is marked `(2/3 seeds)`, of the seeds that any cell has.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meanflow_audio_codec.configuration import near_match
from meanflow_audio_codec.errors import InputError

TRAIN_SECONDS = "cost/train_seconds"
_NFE = re.compile(r"(.+)_nfe(\d+)")


class Run(NamedTuple):
    """What W/<cell>/seed<seed>/ holds."""

    seed: int
    finished: bool
    step: int  # of the newest metrics
    config: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, Any]]  # the lines of metrics.jsonl
    seconds: list[tuple[int, float]]  # of training, up to each step of timings.jsonl


class Cell(NamedTuple):
    """The runs of one folder. `seeds` is how many any cell has."""

    name: str
    keys: dict[str, str]
    runs: list[Run]
    seeds: int

    @property
    def finished(self) -> list[Run]:
        """The runs that reached their last step."""
        return [run for run in self.runs if run.finished]

    @property
    def shown(self) -> list[Run]:
        """The finished runs, or for want of one all."""
        return self.finished or self.runs

    @property
    def mark(self) -> str:
        """'' or what is missing."""
        return "" if len(self.finished) == self.seeds else f"({len(self.finished)}/{self.seeds} seeds)"

    def values(self, metric: str) -> list[float]:
        """Return the metric of each run shown that has it."""
        return [run.metrics[metric] for run in self.shown if metric in run.metrics]


def read_cells(workdir: Path) -> list[Cell]:
    """Read all runs in workdir/<cell>/seed<k>, cells in the order of their names, numbers in them by size.

    A run that left a log but no metrics is missing among its cell's runs.

    Raises:
        InputError: there is none, or a file of one is damaged.
    """
    seeds: dict[str, set[int]] = {}
    for path in workdir.glob("*/seed*"):
        if match := re.fullmatch(r"seed(\d+)(\.log)?", path.name):
            seeds.setdefault(path.parent.name, set()).add(int(match[1]))
    if not seeds:
        raise InputError(f"{workdir} holds no runs; they are in folders like {workdir}/objective=mean_flow/seed0")
    count = len(set.union(*seeds.values()))
    cells = []
    for name in sorted(seeds, key=natural):
        folders = {seed: workdir / name / f"seed{seed}" for seed in sorted(seeds[name])}
        runs = [_read_run(folder, seed) for seed, folder in folders.items() if _is_run(folder)]
        cells.append(Cell(name, _keys(name), runs, count))
    return cells


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()


def _keys(name: str) -> dict[str, str]:
    items = [item.partition("=") for item in name.split(",")]
    if all(is_key for _, is_key, _ in items):
        return {key: value for key, _, value in items}
    return {} if name == "all" else {"cell": name}


def _read_run(folder: Path, seed: int) -> Run:
    config, rows = read_json(folder / "config.json"), _read_lines(folder / "metrics.jsonl")
    metrics = {name: float(value) for row in rows for name, value in row.items() if name != "step"}
    seconds = _training_seconds(_read_lines(folder / "timings.jsonl"))
    if (folder / "cost.json").is_file():
        for name, value in read_json(folder / "cost.json").items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                metrics[name if name.startswith("cost/") else f"cost/{name}"] = float(value)
    if seconds:
        metrics.setdefault(TRAIN_SECONDS, seconds[-1][1])
    return Run(
        seed=seed,
        finished=(folder / "checkpoints" / str(config.get("total_steps"))).is_dir(),
        step=max((row["step"] for row in rows), default=0),
        config=config,
        metrics=metrics,
        history=rows,
        seconds=seconds,
    )


def _training_seconds(timings: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Add up the time of the steps alone: evaluations, saves and the time between a kill and a rerun are not in it."""
    points, last, total = [], 0, 0.0
    for row in timings:
        if row.get("steps_per_s"):
            total += (row["step"] - last) / row["steps_per_s"]
            last = row["step"]
            points.append((last, total))
    return points


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path} is not JSON; mend it, or remove the run") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines; none if there is no file. A run that is writing now may have half of one more."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise InputError(f"{path} has a line that is not JSON; mend it, or remove the run") from None


def add_ratios(cells: list[Cell], ratio: str) -> None:
    """Give each finished run its mse_ratio_nfe<k>, if its partner is finished too."""
    key, is_key, value = ratio.removeprefix("config.").partition("=")
    known = {"=".join(item) for cell in cells for item in cell.keys.items()}
    if f"{key}{is_key}{value}" not in known:
        raise InputError(f"--ratio: no cell has {ratio}{near_match(ratio, known)}")
    partners = {(frozenset(cell.keys.items()), run.seed): run for cell in cells for run in cell.finished}
    for cell in cells:
        partner_keys = frozenset((cell.keys | {key: value}).items())
        for run in cell.finished:
            partner = partners.get((partner_keys, run.seed))
            for name, error in list(run.metrics.items()) if partner else ():
                base, nfe = split_nfe(name)
                if base.endswith("/x_mse") and f"{base}_nfe1" in partner.metrics:
                    run.metrics[f"mse_ratio_nfe{nfe}"] = error / partner.metrics[f"{base}_nfe1"]


def natural(name: str) -> list[Any]:
    """Sort numbers in names by size: nfe2 before nfe16."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def split_nfe(metric: str) -> tuple[str, int | None]:
    """Return the name without `_nfe<k>`, and k; None if it has none."""
    match = _NFE.fullmatch(metric)
    return (match[1], int(match[2])) if match else (metric, None)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half-width of its 95 % confidence interval by Student's t; None for one value."""
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))


def of_several_grids(cells: Sequence[Cell]) -> bool:
    """Return whether some cells have other keys than others."""
    return len({frozenset(cell.keys) for cell in cells}) > 1


def all_keys(cells: Sequence[Cell]) -> list[str]:
    """Return the keys of any cell, in their order."""
    return list(dict.fromkeys(key for cell in cells for key in cell.keys))
