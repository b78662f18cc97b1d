"""The sweep runs a program that keeps the contract of a workdir, fast and the same every time; one test trains.

The program writes metrics that depend on config and step alone and a checkpoint every other step, resumes from it, and
waits amid its work where a test asks it to, so that kills fall where they should.
"""

import csv
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats

from meanflow_audio_codec.tools import sweep, sweep_figures, sweep_runs, sweep_table

ROOT = pathlib.Path(__file__).parents[2]
GRID = "objective=autoencoder,mean_flow,config.width=8,16"
KILLED = "objective=mean_flow,config.width=8,16"
CELLS = ["objective=autoencoder,width=8", "objective=autoencoder,width=16"]
CELLS += ["objective=mean_flow,width=8", "objective=mean_flow,width=16"]

CONFIG = """
from ml_collections import ConfigDict
from meanflow_audio_codec.configuration import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, objective="mean_flow", steps=6)
    return ConfigDict(dict(seed=0, total_steps=arg.steps, width=4, objective=dict(name=arg.objective))).lock()
"""

PROGRAM = """
import argparse, json, os, pathlib, random, sys, time
from meanflow_audio_codec import configuration

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--config")
parser.add_argument("--workdir", type=pathlib.Path)
given, overrides = parser.parse_known_args()
config = configuration.override_from_flags(configuration.load_config(given.config), overrides)
workdir, objective = given.workdir, config.objective.name
if objective == "broken":
    sys.exit("toy: objective.name is 'broken'")
saved = workdir / "config.json"
if saved.exists() and configuration.changed_fields(json.loads(saved.read_text()), config):
    sys.exit("toy: another config")
workdir.mkdir(exist_ok=True)
busy = workdir / "busy"
if busy.exists() and pathlib.Path("/proc", busy.read_text()).exists():
    sys.exit("toy: two at once")
busy.write_text(str(os.getpid()))
configuration.save(config, saved)

first = max([int(path.name) for path in workdir.glob("checkpoints/*")], default=0)
for name in ("metrics", "timings"):
    file = workdir / f"{name}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    file.write_text("".join(line for line in lines if line.endswith("\\n") and json.loads(line)["step"] <= first))
draw = lambda *key: random.Random(repr((objective, config.width, config.seed, *key))).uniform(1, 2)
for step in range(first + 1, config.total_steps + 1):
    rows = [{"step": step, "train/loss": draw(step)}]
    if step % 3 == 0:
        rows.append({"step": step} | {f"images/{metric}_nfe{nfe}": draw(step, metric, nfe) * 10 / step
                     for metric in ("fid", "x_mse") for nfe in ((1,) if objective == "autoencoder" else (1, 2, 16))})
    with (workdir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\\n" for row in rows)
    with (workdir / "timings.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": 0.0, "steps_per_s": config.width * (step > 1)}) + "\\n")
    pause = pathlib.Path(os.environ.get("TOY_PAUSE", "/none"))
    if pause.exists() and step == 5:
        (pause / str(os.getpid())).touch()
        while not (pause / "go").exists():
            time.sleep(0.01)
    if step % 2 == 0:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
cost = {"cost/parameters": config.width**2, "cost/train_flops_per_step": 6 * config.width**2, "device": "toy"}
(workdir / "cost.json").write_text(json.dumps(cost))
(workdir / "cores").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
busy.unlink()
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of the toy's config and program."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "config.py").write_text(CONFIG)
    (folder / "toy.py").write_text(PROGRAM)
    return folder


@pytest.fixture(autouse=True)
def importable(toy, monkeypatch):
    monkeypatch.syspath_prepend(toy)
    monkeypatch.setenv("PYTHONPATH", f"{toy}{os.pathsep}{ROOT}")


def command(toy, workdir, *flags, grid=GRID, config="config.py"):
    grids = [word for given in (grid if isinstance(grid, list) else [grid]) for word in ("--grid", given)]
    fixed = ["--config", f"{toy}/{config}", "--workdir", str(workdir), "--program", "toy", "--seeds", "3"]
    return [*fixed, *grids, *flags]


def stopped(argv):
    """Run the tool, which must fail, and return its message."""
    with pytest.raises(SystemExit) as error:
        sweep.main(argv)
    return error.value.code


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def outcome(workdir):
    return {name: (workdir / name).read_bytes() for name in ("table.csv", "runs.csv", "table.md")}


def starts(workdir):
    """How often each run has been started."""
    logs = sorted(workdir.glob("*/seed*.log"))
    return {f"{path.parent.name}/{path.stem}": path.read_text().count("$ ") for path in logs}


def sweep_once(toy, workdir, *flags, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(toy)
        patch.setenv("PYTHONPATH", f"{toy}{os.pathsep}{ROOT}")
        sweep.main(command(toy, workdir, *flags, **kwargs))
    return workdir


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The workdir of a sweep of four cells and three seeds."""
    return sweep_once(toy, tmp_path_factory.mktemp("finished") / "sweep", "--jobs", "2")


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    """What a sweep of two cells and two seeds writes."""
    return outcome(sweep_once(toy, tmp_path_factory.mktemp("uninterrupted"), "--seeds", "2", grid=KILLED))


############################################ Before anything runs


def test_a_grid_is_a_product_and_grids_are_a_union():
    assert sweep.parse_grid([]) == [{}]
    cells = sweep.parse_grid(["objective=a,b,config.x.y=1,2", "config.x.y=1,objective=a,c"])
    names = [sweep.cell_name(cell) for cell in cells]
    assert names == [
        *("objective=a,x.y=1", "objective=a,x.y=2", "objective=b,x.y=1", "objective=b,x.y=2"),
        "x.y=1,objective=c",  # the order of its own grid; x.y=1,objective=a is there already
    ]
    assert cells[1] == {"objective": "a", "config.x.y": "2"}
    assert sweep.parse_grid(["a=b=c"]) == [{"a": "b=c"}] and sweep.cell_name({}) == "all"


MISTAKES = {
    "value without a key": (dict(grid="mean_flow"), ("'mean_flow' has no key",)),
    "no value": (dict(grid="objective=,a"), ("'objective='", "KEY=VALUE")),
    "empty item": (dict(grid="objective=a,"), ("''", "KEY=VALUE")),
    "key twice": (dict(grid="objective=a,objective=b"), ("objective comes twice",)),
    "key twice, once as a field": (dict(grid="width=a,config.width=b"), ("config.width comes twice",)),
    "cells of one name": (dict(grid=["width=8", "config.width=8"]), ("two cells are called width=8",)),
    "path": (dict(grid="objective=a/b"), ("'objective=a/b' cannot be in a folder's name",)),
    "control character": (dict(grid="objective=a\nb"), ("cannot be in a folder's name",)),
    "long name": (dict(grid=f"objective={'a' * 300}"), ("longer than the 255 bytes",)),
    "unknown argument": (dict(grid="objektive=a,b"), ("cell objektive=a:", "did you mean objective?")),
    "unknown field": (dict(grid="objective=a,config.wide=8"), ("cell objective=a,wide=8:", "did you mean width?")),
    "wrong type": (dict(grid="objective=a,config.width=8,many"), ("cell objective=a,width=many:", "config.width")),
    "argument twice": (dict(config="config.py:objective=a"), ("objective=a of --config is in the grid too",)),
    "field twice": (dict(flags=["--config.width=2"]), ("--config.width is set twice",)),
    "seed": (dict(flags=["--config.seed=2"]), ("--config.seed is set by --seeds",)),
    "seed in the grid": (dict(grid="config.seed=1,2"), ("--config.seed is set by --seeds",)),
    "arguments of JSON": (dict(config="config.json"), ("takes no arguments", "config.")),
    "no such config": (dict(config="none.py"), ("none.py",)),
    "no known end": (dict(flags=["--config.total_epochs=2"]), ("must know a run's end", "total_steps")),
    "unknown flag": (dict(flags=["--seed=2"]), ("unknown argument --seed=2",)),
    "no seeds": (dict(flags=["--seeds=0"]), ("--seeds=0",)),
    "no jobs": (dict(flags=["--jobs=0"]), ("--jobs=0",)),
    "no such program": (dict(flags=["--program=no_toy"]), ("--program: no module no_toy",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_before_anything_runs(mistake, toy, tmp_path):
    given, words = MISTAKES[mistake]
    message = stopped(command(toy, tmp_path / "sweep", *given.pop("flags", []), **given))
    assert message.startswith("sweep: ") and "\n" not in message and all(word in message for word in words), message
    assert not (tmp_path / "sweep").exists()


def test_config_or_table_must_be_given(tmp_path):
    assert "--config is missing" in stopped(["--workdir", str(tmp_path)])
    assert "holds no runs" in stopped(["--workdir", str(tmp_path), "--table"])


############################################ Running


def test_every_cell_runs_with_every_seed_in_its_own_folder(finished):
    assert starts(finished) == {f"{cell}/seed{seed}": 1 for cell in sorted(CELLS) for seed in range(3)}
    for cell, seed in itertools.product(CELLS, range(3)):
        config = json.loads((finished / cell / f"seed{seed}" / "config.json").read_text())
        assert f"objective={config['objective']['name']},width={config['width']}" == cell and config["seed"] == seed


def test_parallel_runs_share_the_cores(finished):
    shares = {tuple(json.loads(path.read_text())) for path in finished.glob("*/*/cores")}
    cores = sorted(os.sched_getaffinity(0))
    assert sorted(itertools.chain(*shares)) == cores if len(cores) > 1 else shares == {tuple(cores)}


def test_a_finished_sweep_runs_no_further_and_more_seeds_only_what_is_new(toy, tmp_path, caplog):
    arguments = dict(grid="objective=mean_flow")
    caplog.set_level("INFO")
    sweep.main(command(toy, tmp_path, "--seeds", "1", **arguments))
    assert "1/1 finished objective=mean_flow/seed0 after" in caplog.text
    sweep.main(command(toy, tmp_path, "--seeds", "3", **arguments))
    assert re.search(r"1/2 finished objective=mean_flow/seed1 after 0:\d\d:\d\d, 0:\d\d:\d\d left\n", caplog.text)
    assert "3 runs: 1 finished before, 2 to do" in caplog.text
    assert starts(tmp_path) == {f"objective=mean_flow/seed{seed}": 1 for seed in range(3)}
    sweep.main(command(toy, tmp_path, "--seeds", "1", "--config.total_steps=8", **arguments))
    assert starts(tmp_path) == {f"objective=mean_flow/seed{seed}": 2 if seed == 0 else 1 for seed in range(3)}
    assert [row["step"] for row in read_csv(tmp_path / "runs.csv")] == ["8", "6", "6"]


def test_a_failed_run_is_reported_and_tried_again_while_others_finish(toy, tmp_path):
    argv = command(toy, tmp_path, "--seeds", "2", "--jobs", "2", grid="objective=broken,mean_flow")
    lines = stopped(argv).splitlines()
    assert lines == [
        "sweep: 2 runs failed; the same command tries them again",
        "objective=broken/seed0: exit status 1: toy: objective.name is 'broken'",
        "objective=broken/seed1: exit status 1: toy: objective.name is 'broken'",
    ]
    assert "| broken | (0/2 seeds) at step 0 |" in (tmp_path / "table.md").read_text()
    assert "| mean_flow | 2 |" in (tmp_path / "table.md").read_text()
    stopped(argv)
    assert set(starts(tmp_path).values()) == {1, 2}
    assert starts(tmp_path)["objective=broken/seed1"] == 2


def test_a_workdir_of_another_config_is_a_failed_run(toy, tmp_path):
    arguments = dict(grid="objective=mean_flow")
    sweep.main(command(toy, tmp_path, "--seeds", "1", **arguments))
    message = stopped(command(toy, tmp_path, "--seeds", "1", "--config.width=5", **arguments))
    assert "objective=mean_flow/seed0: exit status 1: toy: another config" in message


def test_a_program_that_ends_early_has_failed(toy, tmp_path):
    failures = sweep.run_sweep(f"{toy}/config.py", tmp_path, program="toy", overrides=["--config.total_steps=5"])
    assert list(failures) == ["all/seed0"] and "without the checkpoint of step 5" in failures["all/seed0"]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in a minute"
        time.sleep(0.01)


@pytest.fixture
def paused(toy, tmp_path, request):
    """A sweep of which two runs are in their midst, held there until pause/go exists, and their process ids."""
    pause = tmp_path / "pause"
    pause.mkdir()
    environment = os.environ | {"TOY_PAUSE": str(pause)}
    argv = [sys.executable, "-m", "meanflow_audio_codec.tools.sweep"]
    argv += command(toy, tmp_path / "sweep", "--jobs", "2", "--seeds", "2", grid=KILLED)
    process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(lambda: len(list(pause.iterdir())) == 2)
    yield process, pause, [int(path.name) for path in pause.iterdir()]
    (pause / "go").touch()
    process.kill()
    process.wait()
    process.stderr.close()


def is_alive(pid):
    state = pathlib.Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_and_the_next_sweep_goes_on(number, paused, uninterrupted, toy, tmp_path):
    process, pause, pids = paused
    assert all(map(is_alive, pids))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.splitlines()[-1] == "sweep: interrupted; the same command goes on"
    assert "Traceback" not in errors and not any(map(is_alive, pids))
    sweep.main(command(toy, tmp_path / "sweep", "--seeds", "2", grid=KILLED))
    assert outcome(tmp_path / "sweep") == uninterrupted
    assert sorted(starts(tmp_path / "sweep").values()) == [1, 1, 2, 2]


def test_after_a_kill_the_next_sweep_waits_for_the_runs_left(paused, uninterrupted, toy, tmp_path):
    process, pause, pids = paused
    process.kill()
    process.wait()
    assert all(map(is_alive, pids))
    argv = [sys.executable, "-m", "meanflow_audio_codec.tools.sweep"]
    argv += command(toy, tmp_path / "sweep", "--seeds", "2", grid=KILLED)
    following = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    line = following.stderr.readline()
    (pause / "go").touch()
    _, rest = following.communicate(timeout=60)
    assert line.startswith(f"waiting for {tmp_path / 'sweep'}")
    assert set(map(int, line.rpartition(":")[2].split())) == set(pids)
    assert following.returncode == 0 and "4 runs: 2 finished before, 2 to do" in rest
    assert outcome(tmp_path / "sweep") == uninterrupted
    assert set(starts(tmp_path / "sweep").values()) == {1}


############################################ Tables


def final(workdir, cell, seed, metric):
    rows = [json.loads(line) for line in (workdir / cell / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()]
    return [row[metric] for row in rows if metric in row][-1]


def test_table_holds_mean_and_t_interval_of_every_metric(finished):
    rows = {f"objective={row['objective']},width={row['width']}": row for row in read_csv(finished / "table.csv")}
    assert list(rows) == CELLS  # 8 before 16
    for cell, row in rows.items():
        assert (row["finished_seeds"], row["seeds"], row["steps"]) == ("3", "3", "6")
        for metric in ("train/loss", "images/fid_nfe1", "images/x_mse_nfe16"):
            if metric == "images/x_mse_nfe16" and "autoencoder" in cell:
                assert row[metric] == row[f"{metric}_ci95"] == ""
                continue
            values = [final(finished, cell, seed, metric) for seed in range(3)]
            interval = scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
            mean, half_width = float(row[metric]), float(row[f"{metric}_ci95"])
            np.testing.assert_allclose((mean - half_width, mean + half_width), interval, rtol=1e-12)
        width = int(row["width"])
        assert float(row["cost/parameters"]) == width**2 and float(row["cost/parameters_ci95"]) == 0
        # Six steps at `width` a second; the first row's clock had not begun.
        assert float(row["cost/train_seconds"]) == pytest.approx(6 / width)
        assert "cost/device" not in row


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (0.08203, None, "0.08203"),
        (9_999.4, None, "9999"),
        (234_912.0, 0.0, "234.9 k"),
        (1.0807e9, None, "1081 M"),
        (2.5e10, 0.0, "25 G"),
        (234_912.0, 120.0, "234.91 ± 0.12 k"),
        (-0.0123, 0.00456, "-0.0123 ± 0.0046"),
    ],
)
def test_numbers_are_as_precise_as_their_intervals(mean, half_width, text):
    assert sweep_table._text(mean, half_width) == text


def test_markdown_has_the_columns_asked_for(finished, tmp_path, capsys):
    values = [final(finished, CELLS[2], seed, "images/fid_nfe2") for seed in range(3)]
    half_width = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(values)
    assert 0.1 <= half_width < 10  # two digits are one or two decimals
    digits = 2 if half_width < 1 else 1
    sweep.main(["--workdir", str(finished), "--table", "--columns", "images/fid_nfe2,cost/parameters"])
    markdown = capsys.readouterr().out
    assert markdown == (finished / "table.md").read_text()
    lines = markdown.splitlines()
    assert lines[0] == "| objective | width | seeds | images/fid_nfe2 | cost/parameters |"
    assert lines[2] == "| autoencoder | 8 | 3 |  | 64 |"
    assert lines[4] == f"| mean_flow | 8 | 3 | {np.mean(values):.{digits}f} ± {half_width:.{digits}f} | 64 |"
    sweep.main(["--workdir", str(finished), "--table"])
    heads = capsys.readouterr().out.splitlines()[0]
    assert "images/fid_nfe1 | cost/train_flops_per_step | cost/train_seconds |" in heads


def test_ratio_pairs_runs_by_seed_and_all_other_keys(finished):
    sweep.main(["--workdir", str(finished), "--table", "--ratio", "objective=autoencoder"])
    rows = read_csv(finished / "runs.csv")
    assert len(rows) == 12
    for row in rows:
        cell = f"objective=autoencoder,width={row['width']}"
        denominator = final(finished, cell, int(row["seed"]), "images/x_mse_nfe1")
        for nfe in (1, 2, 16):
            error = row[f"images/x_mse_nfe{nfe}"]
            assert row[f"mse_ratio_nfe{nfe}"] == (str(float(error) / denominator) if error else "")
    ratios = [float(row["mse_ratio_nfe2"]) for row in rows if (row["objective"], row["width"]) == ("mean_flow", "8")]
    table = next(row for row in read_csv(finished / "table.csv") if row["mse_ratio_nfe2"])
    assert float(table["mse_ratio_nfe2"]) == pytest.approx(np.mean(ratios))  # the mean of ratios, not their ratio
    assert "mse_ratio_nfe1" in (finished / "table.md").read_text()
    sweep.main(["--workdir", str(finished), "--table"])


def write_run(folder, steps, total, value, lines=""):
    (folder / "checkpoints" / str(steps)).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"total_steps": total}))
    rows = [{"step": step, "val/v_mse": value + total - step} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + lines)


def test_what_is_missing_is_marked(tmp_path):
    for seed in range(3):
        write_run(tmp_path / "objective=a" / f"seed{seed}", 4, 4, seed)
        write_run(tmp_path / "objective=b" / f"seed{seed}", 4 - (seed == 1), 4, seed, lines='{"step": 4, "val/v_m')
        write_run(tmp_path / "objective=c" / f"seed{seed}", 1 + seed % 2, 4, seed)
    write_run(tmp_path / "objective=d" / "seed1", 4, 4, 0.5)
    sweep.main(["--workdir", str(tmp_path), "--table"])
    assert (tmp_path / "table.md").read_text().splitlines()[:6] == [
        "| objective | seeds | val/v_mse |",
        "| --- | --- | --- |",
        "| a | 3 | 1.0 ± 2.5 |",  # 4.303 / sqrt(3)
        "| b | (2/3 seeds) | 1 ± 13 |",  # of 0 and 2 alone: 12.706
        "| c | (0/3 seeds) at step 1-2 | 3.7 ± 2.9 |",  # 3, 3, 5
        "| d | (1/3 seeds) | 0.5 |",
    ]
    assert [row["finished"] for row in read_csv(tmp_path / "runs.csv")] == [*"111", *"101", *"000", "1"]
    assert read_csv(tmp_path / "table.csv")[3]["val/v_mse_ci95"] == ""


def test_cells_of_several_grids_are_named_in_one_column(tmp_path):
    for name in ("objective=a", "lr=1,width=8"):
        write_run(tmp_path / name / "seed0", 4, 4, 0.5)
    sweep.main(["--workdir", str(tmp_path), "--table"])
    assert (tmp_path / "table.md").read_text().splitlines()[:4] == [
        "| cell | seeds | val/v_mse |",
        "| --- | --- | --- |",
        "| lr=1, width=8 | 1 | 0.5 |",
        "| objective=a | 1 | 0.5 |",
    ]
    assert read_csv(tmp_path / "table.csv")[0]["width"] == "8"


def test_mistakes_about_the_table_get_one_line(finished, tmp_path):
    table = ["--workdir", str(finished), "--table"]
    for flags, words in {
        ("--columns", "images/fid_nfe3"): ("no run has images/fid_nfe3", "did you mean images/fid_nfe"),
        ("--figures", "images/fidd"): ("no run has images/fidd", "did you mean images/fid?"),
        ("--ratio", "objective=autoencoders"): ("no cell has", "did you mean objective=autoencoder?"),
        ("--ratio", "autoencoder"): ("no cell has autoencoder",),
    }.items():
        message = stopped([*table, *flags])
        assert "\n" not in message and all(word in message for word in (flags[0], *words)), message
    write_run(tmp_path / "all" / "seed0", 1, 1, 0.0, lines="{\n")
    assert "metrics.jsonl has a line that is not JSON" in stopped(["--workdir", str(tmp_path), "--table"])


############################################ Figures


def test_figures_are_drawn_for_what_exists(finished, tmp_path):
    names = {path.name for path in (finished / "figures").iterdir()}
    assert names == {"evaluations_images_fid.png", "cost_images_fid.png"}
    for path in (finished / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    for seed, value in itertools.product(range(2), (1, 2, 3)):
        write_run(tmp_path / f"lr={value}" / f"seed{seed}", 4, 4, value + seed)
    sweep.main(["--workdir", str(tmp_path), "--table", "--figures", "val/v_mse"])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"cost_val_v_mse.png", "ablation_val_v_mse.png"}


def test_curves_hold_the_tables_numbers(finished):
    cells = {cell.name: cell for cell in sweep_runs.read_cells(finished)}
    cell = cells[CELLS[3]]
    (curve,) = sweep_figures.evaluation_curves(cell, "images/fid")
    row = read_csv(finished / "table.csv")[3]
    for nfe, mean, half_width in curve.points:
        assert (str(mean), str(half_width)) == (row[f"images/fid_nfe{nfe}"], row[f"images/fid_nfe{nfe}_ci95"])
    assert [nfe for nfe, _, _ in curve.points] == [1, 2, 16]
    label, cost = sweep_figures.cost_axis(list(cells.values()))
    (curve,) = sweep_figures.cost_curves(cell, "images/fid", cost)
    assert label == "training FLOPs" and curve.line == "-"
    assert [x for x, _, _ in curve.points] == [3 * 6 * 16**2, 6 * 6 * 16**2]  # evaluated at steps 3 and 6
    assert str(curve.points[-1][1]) == row["images/fid_nfe1"]


def test_cost_axis_falls_back_to_seconds_and_flow_matching_is_dashed_at_many_evaluations(finished):
    cell = sweep_runs.read_cells(finished)[3]
    runs = [
        run._replace(
            metrics={name: value for name, value in run.metrics.items() if "flops" not in name},
            config=run.config | {"objective": {"name": "flow_matching"}},
        )
        for run in cell.runs
    ]
    label, cost = sweep_figures.cost_axis([cell._replace(runs=runs)])
    curves = sweep_figures.cost_curves(cell._replace(runs=runs), "images/fid", cost)
    assert label == "training time (s)" and cost(runs[0], 3) == pytest.approx(3 / 16)
    assert [(curve.suffix, curve.line) for curve in curves] == [(", nfe 1", "-"), (", nfe 16", "--")]


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        (["objective=a,b,c"], True),
        (["objective=a,b,width=8"], True),
        (["lr=1,2", "width=8,hop=4", "objective=a"], True),
        (["objective=a,b,width=8", "objective=a,width=8,16"], True),
        (["objective=a,b,width=8,16"], False),
    ],
)
def test_ablations_are_told_from_products(grids, expected):
    cells = [sweep_runs.Cell(sweep.cell_name(keys), keys, [], 1) for keys in sweep.parse_grid(grids)]
    assert sweep_figures.is_ablation(cells) == expected


############################################ The real trainer


SMALL = """
from meanflow_audio_codec.configuration import load_config

def get_config(arg=None):
    config = load_config(f"{ROOT}/configs/meanflow_mdct.py:{arg}").unlock()
    config.total_steps, config.log_steps, config.model.variant, config.optimizer.name = 2, 1, "mu", "adamw"
    config.input.update(batch_size=4, num_tokens=8)
    config.evals = {"reconstruction": config.evals.reconstruction}  # each evaluation is a compilation
    config.evals.reconstruction.update(num_clips=1, seconds=0.3, nfe=(1,))
    return config.lock()
"""


def test_sweeps_the_trainer(tmp_path, monkeypatch):
    """Two rungs of the codec and an objective that is none, some ten seconds each on an idle core."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of programs that run twice
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true")
    (tmp_path / "small.py").write_text(f"ROOT = {str(ROOT)!r}\n{SMALL}")
    argv = ["--config", f"{tmp_path}/small.py:runlocal", "--workdir", str(tmp_path / "sweep")]
    argv += ["--grid", "objective=autoencoder,flow_matching,gan", "--ratio", "objective=autoencoder"]
    message = stopped(argv)
    assert message.startswith("sweep: 1 runs failed") and "objective.name is 'gan'" in message, message
    autoencoder, flow, gan = read_csv(tmp_path / "sweep" / "table.csv")
    assert [row["finished_seeds"] for row in (autoencoder, flow, gan)] == ["1", "1", "0"]
    ratio = float(flow["reconstruction/x_mse_nfe1"]) / float(autoencoder["reconstruction/x_mse_nfe1"])
    assert float(flow["mse_ratio_nfe1"]) == pytest.approx(ratio)
    assert {"reconstruction/mel_distance_nfe1", "train/v_mse", "cost/train_seconds"} <= set(flow)
    assert stopped(argv) == message
    assert list(starts(tmp_path / "sweep").values()) == [1, 1, 2]
