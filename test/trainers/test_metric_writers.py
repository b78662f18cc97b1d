"""metric_writers.py: what is on disk after writes, crashes and resumes."""

import json
import types

import pytest
from etils import epath

from meanflow_audio_codec.trainers.metric_writers import MetricWriter, Progress


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def rows(workdir, name="metrics"):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def write_steps(workdir, start, stop):
    """Write as a run does that resumes after `start`."""
    writer = MetricWriter(workdir, start)
    for step in range(start + 1, stop + 1):
        writer.write(step, {"train/loss": step / 8})
        writer.write_timing(step, {"steps_per_s": 2.0, "examples_per_s": 32.0})
    writer.close()


def test_one_object_a_line_at_once(workdir):
    """On disk without closing, in the order written; two writes of one step are two lines."""
    writer = MetricWriter(workdir, 0)
    writer.write(1, {"train/loss": 0.5, "train/lr": 1e-3})
    writer.write(1, {"val/v_mse": 2.0})
    text = (workdir / "metrics.jsonl").read_text()
    writer.close()
    assert text == '{"step": 1, "train/loss": 0.5, "train/lr": 0.001}\n{"step": 1, "val/v_mse": 2.0}\n'


def test_timings_are_apart(workdir):
    write_steps(workdir, 0, 2)
    assert {key for row in rows(workdir) for key in row} == {"step", "train/loss"}
    assert [set(row) for row in rows(workdir, "timings")] == [{"step", "time", "steps_per_s", "examples_per_s"}] * 2


def test_metrics_do_not_depend_on_the_clock_or_on_interruptions(workdir):
    write_steps(workdir / "whole", 0, 6)
    write_steps(workdir / "parts", 0, 5)
    write_steps(workdir / "parts", 3, 6)
    whole, parts = ((workdir / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert [row["step"] for row in rows(workdir / "parts", "timings")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", [0, 2, 4, 9])
@pytest.mark.parametrize("partial", ["", '{"step": 2, "tra', '{"step": 2, "train/loss": 1.0}'])
def test_resume_drops_later_lines_and_half_a_line(workdir, step, partial):
    """A line without its newline is half a line, even where it parses: the next write would join it."""
    write_steps(workdir, 0, 4)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(partial)
    MetricWriter(workdir, step).close()
    assert [row["step"] for row in rows(workdir)] == [i for i in (1, 2, 3, 4) if i <= step]
    assert [row["step"] for row in rows(workdir, "timings")] == [i for i in (1, 2, 3, 4) if i <= step]
    assert not list(workdir.glob("*.tmp"))


def test_complete_file_is_not_rewritten(workdir):
    write_steps(workdir, 0, 3)
    before = (workdir / "metrics.jsonl").stat()
    MetricWriter(workdir, 3).close()
    assert (workdir / "metrics.jsonl").stat() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_raises_and_is_not_written(workdir, value):
    writer = MetricWriter(workdir, 0)
    writer.write(1, {"train/loss": 1.0})
    with pytest.raises(FloatingPointError, match="step 2: train/u_mse"):
        writer.write(2, {"train/loss": 1.0, "train/u_mse": value})
    writer.close()
    assert [row["step"] for row in rows(workdir)] == [1]


def test_event_files_hold_the_same(workdir):
    writer = MetricWriter(workdir, 0)
    writer.write(1, {"train/loss": 0.5})
    writer.close()
    (events,) = (workdir / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_progress_measures_the_steps_alone(monkeypatch, caplog):
    """Half a second a step: neither the first, which compiles for a minute, nor a pause of a minute counts."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("meanflow_audio_codec.trainers.metric_writers.time.monotonic", lambda: clock.now)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    progress = Progress(first_step=10, total_steps=100, batch_size=16)
    speeds = []
    with caplog.at_level("INFO"):
        for step in range(11, 24):
            with progress.waiting(types.SimpleNamespace(is_ready=lambda step=step: step % 2 == 0)):
                clock.now += 30.0 if step == 11 else 0.125
            clock.now += 30.0 if step == 11 else 0.375
            progress.advance()
            if step in (15, 23):
                speeds.append(progress.report(step, {"train/loss": 0.25}))
            if step == 18:
                with progress.paused():
                    clock.now += 60.0
    progress.close()
    assert speeds == [{"steps_per_s": 2.0, "examples_per_s": 32.0, "data_wait_percent": 12.5}] * 2
    assert "step 15/100  loss 0.25" in caplog.messages[0] and "0:00:42 left" in caplog.messages[0]
