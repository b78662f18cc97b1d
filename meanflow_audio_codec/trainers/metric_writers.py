"""Where a run's numbers go: metrics.jsonl, timings.jsonl, tensorboard/, and the terminal or the log.

`metrics.jsonl` holds one JSON object a line, `step` and `group/name_unit` scalars, and nothing that depends on the
clock: it is a function of the config alone, so an interrupted run ends with the same bytes as an uninterrupted one.
Times are in `timings.jsonl`.
"""

import contextlib
import datetime
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

log = logging.getLogger(__name__)

SHOWN = ("loss", "x_mse", "v_mse", "u_mse")  # while training; all else is in the files


class MetricWriter:
    """Write the metrics of one workdir from `step` on; lines past `step` are dropped, so that no step repeats."""

    def __init__(self, workdir: epath.Path, step: int):
        self._files = {name: workdir / f"{name}.jsonl" for name in ("metrics", "timings")}
        for path in self._files.values():
            _truncate(path, step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line of scalars at `step`.

        Raises:
            FloatingPointError: a metric is not finite; it is not written.
        """
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"not finite at step {step}: {', '.join(broken)}")
        self._append("metrics", {"step": step, **metrics})
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def write_timing(self, step: int, speed: dict[str, float]) -> None:
        """Append the wall clock (seconds since 1970) and the speed at `step`."""
        self._append("timings", {"step": step, "time": time.time(), **speed})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with self._files[name].open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Flush the event files."""
        self._board.close()


def _truncate(path: epath.Path, step: int) -> None:
    """Keep the complete lines up to `step`, atomically."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        partial = path.with_name(path.name + ".tmp")
        partial.write_text("".join(kept))
        partial.replace(path)


class Progress:
    """Steps/s, examples/s and time left: a bar on a terminal, log lines elsewhere."""

    def __init__(self, first_step: int, total_steps: int, batch_size: int):
        self._batch_size, self._total = batch_size, total_steps
        self._step, self._time, self._waited = first_step, None, 0.0
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        """Count one step. The clock starts after the first, which compiles."""
        if self._time is None:
            self._step, self._time, self._waited = self._step + 1, time.monotonic(), 0.0
        if self._bar is not None:
            self._bar.update()

    @contextlib.contextmanager
    def waiting(self, running: Any) -> Iterator[None]:
        """Count the time inside as waiting for data, unless `running`, a result of the last step, is still computed."""
        start = time.monotonic()
        yield
        if running.is_ready():
            self._waited += time.monotonic() - start

    def report(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Show the errors and the speed since the last report, and return the speed."""
        now = time.monotonic()
        seconds = max(now - self._time, 1e-9)
        steps_per_s, data_wait_percent = (step - self._step) / seconds, 100 * self._waited / seconds
        self._step, self._time, self._waited = step, now, 0.0
        examples_per_s = steps_per_s * self._batch_size
        shown = {name: metrics[f"train/{name}"] for name in SHOWN if f"train/{name}" in metrics}
        errors = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(f"{errors}, {examples_per_s:.0f} examples/s")
        else:
            seconds_left = round((self._total - step) / steps_per_s) if steps_per_s else 0
            log.info(
                "step %d/%d  %s  %.2f steps/s  %.0f examples/s  %s left",
                *(step, self._total, errors, steps_per_s, examples_per_s, datetime.timedelta(seconds=seconds_left)),
            )
        return dict(steps_per_s=steps_per_s, examples_per_s=examples_per_s, data_wait_percent=data_wait_percent)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside, an evaluation or a save, out of the speed."""
        start = time.monotonic()
        yield
        self._time += time.monotonic() - start

    def close(self) -> None:
        """Finish the bar's line."""
        if self._bar is not None:
            self._bar.close()
