"""The program itself, as a user runs it: trains, is killed, resumes, refuses what is wrong."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import soundfile

from meanflow_audio_codec.codec import Codec
from meanflow_audio_codec.tools.train import main

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "meanflow_mdct.py")
# The smallest run that still logs, evaluates and saves several times. Few evaluations: each is a compilation.
TINY = {
    "model.variant": "mu",
    "total_steps": 12,
    "log_steps": 2,
    "checkpoint_steps": 3,
    "optimizer.warmup_steps": 2,
    "input.batch_size": 4,
    "input.num_tokens": 8,
    "evals.validation.first_steps": 6,
    "evals.validation.every_steps": 6,
    "evals.validation.batches": 1,
    "evals.validation.seconds": 0.1,
    "evals.reconstruction.first_steps": 6,
    "evals.reconstruction.every_steps": 6,
    "evals.reconstruction.num_clips": 1,
    "evals.reconstruction.seconds": 0.8,
    "evals.reconstruction.nfe": "(1,)",
    "evals.samples.first_steps": 6,
    "evals.samples.every_steps": 6,
    "evals.samples.num_clips": 1,
    "evals.samples.seconds": 0.8,
    "evals.samples.nfe": "(1,)",
    "evals.tones.first_steps": 12,
    "evals.tones.every_steps": 12,
    "evals.tones.num_tones": 1,
    "evals.tones.nfe": "(1,)",
    "evals.cost.first_steps": 12,
    "evals.cost.every_steps": 12,
    "evals.cost.num_examples": 1,
    "evals.tones.seconds": 0.8,
    "evals.cost.seconds": 0.8,
    "evals.cost.nfe": "(1,)",
}


# In place of CONFIG, with fewer evaluators.
FEW = """
from meanflow_audio_codec.configuration import load_config

def get_config(arg=None):
    config = load_config(f"{CONFIG}:{arg}").unlock()
    config.evals = {name: config.evals[name] for name in EVALS}
    return config.lock()
"""


def command(workdir, arg="runlocal", **overrides):
    flags = [f"--config.{name}={value}" for name, value in (TINY | overrides).items()]
    return ["--config", f"{CONFIG}:{arg}", "--workdir", str(workdir), *flags]


def short_command(workdir, *args, evals=("validation",), **overrides):
    """The same with AdamW and these evaluators alone."""
    config = workdir.parent / "few.py"
    config.write_text(f"CONFIG, EVALS = {CONFIG!r}, {evals!r}\n{FEW}")
    _, spec, *flags = command(workdir, *args, **{"optimizer.name": "adamw"} | overrides)
    others = {name.split(".")[1] for name in TINY if name.startswith("evals.")} - set(evals)
    kept = [flag for flag in flags if not flag.startswith(tuple(f"--config.evals.{name}." for name in others))]
    return ["--config", spec.replace(CONFIG, str(config), 1), *kept]


def read(workdir, name="metrics"):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def final_state(workdir, step=12):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(step) / "state")


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def write_noise(path, seconds=2.0, sample_rate=24_000, channels=1):
    rng = np.random.default_rng(len(path.name))
    audio = rng.normal(0, 0.1, (int(seconds * sample_rate), channels))
    soundfile.write(path, audio, sample_rate)
    return path


@pytest.fixture(autouse=True)
def compiled_with_care():
    """Other tests compile in a hurry, which rounds otherwise; here runs in several processes must agree to the bit."""
    jax.clear_caches()


@pytest.fixture
def compile_fast(hurried):
    """For runs that are compared with none of another test."""
    with hurried():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory, compile_once):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    jax.clear_caches()  # a session's fixture comes before a test's
    main(command(workdir))
    return workdir


def test_workdir_holds_the_whole_run(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "timings.jsonl", "train.log", "report.html", "cost.json"),
        *("checkpoints", "samples", "tensorboard"),
    }
    rows = read(finished)
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "val/v_mse" in row] == [6, 12]
    assert {"reconstruction/si_sdr_db_nfe1", "reconstruction/mel_distance_nfe1"} <= set(rows[-1])
    audio, sample_rate = soundfile.read(finished / "samples" / "12" / "00_nfe01.wav")
    reference, _ = soundfile.read(finished / "samples" / "12" / "00_reference.wav")
    assert sample_rate == 24_000 and audio.shape == reference.shape
    assert "synthetic music" in (finished / "train.log").read_text().splitlines()[0]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["12", "9"]


def test_a_finished_run_runs_no_further(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    main(command(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def saving(workdir):
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def evaluating(workdir):
    """Clips of a step are on disk, its scores not yet."""
    steps = [int(path.name) for path in workdir.glob("samples/*")]
    scored = (
        [row["step"] for row in read(workdir) if "val/v_mse" in row] if (workdir / "metrics.jsonl").exists() else []
    )
    return bool(set(steps) - set(scored))


def stepping(workdir):
    """Past the newest checkpoint."""
    rows = read(workdir) if (workdir / "metrics.jsonl").exists() else []
    done = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    return bool(rows) and rows[-1]["step"] > max(done, default=0)


def test_killed_run_ends_as_the_uninterrupted_one_bit_for_bit(finished, tmp_path):
    workdir = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    moments = [stepping, saving, evaluating] * 2
    kills = 0
    for moment in moments:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *command(workdir)], env=environment, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # the workdir changes as we look
                if moment(workdir):
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
            time.sleep(0.001)
        process.wait()
    assert kills >= 5
    main(command(workdir))
    assert_equal_trees(final_state(workdir), final_state(finished))
    assert (workdir / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert (workdir / "samples/12/00_nfe01.wav").read_bytes() == (finished / "samples/12/00_nfe01.wav").read_bytes()


def test_one_model_of_several_bitrates(tmp_path, compile_fast):
    """Quantizer dropout in training; each bitrate is judged apart; the rate is announced.

    Levels are fitted before the first step and stay; what was trained is a codec.
    """
    workdir = tmp_path / "run"
    fields = {"model.quantizer_dropout": 0.5, "evals.reconstruction.kept": "(8,20)", "total_steps": 6}
    fields |= {"model.quantizer": "gain_shape", "model.level_stages": 1, "model.max_bits": 64}
    main(short_command(workdir, evals=("validation", "reconstruction"), **fields))
    assert "gain_shape code of 93.75 tokens/s, 3.00 kbps" in (workdir / "train.log").read_text()
    before, last = read(workdir)[-2:]
    scores = {last[f"reconstruction{group}/x_mse_nfe1"] for group in ("", "_8", "_20")}
    assert len(scores) == 3
    assert {"train/code_kbps", "train/code_usage", "val/code_bits"} <= set(before | last)
    state = final_state(workdir, 6)
    entries, averages = (state[kind]["level_quantizer"]["codebook"] for kind in ("params", "ema_params"))
    assert entries.std() > 0.1 and np.all(np.diff(entries.mean(-1)) >= 0)
    np.testing.assert_allclose(averages, entries, rtol=1e-5)
    codec = Codec.load(workdir)
    audio = np.random.default_rng(0).normal(0, 0.01, 24_000).astype(np.float32)
    codes, louder = codec.encode(audio, codec.sample_rate), codec.encode(9 * audio, codec.sample_rate)
    assert np.mean(louder[1]) > np.mean(codes[1])  # entries are in order of loudness


def test_trains_on_a_folder_of_mixed_audio(tmp_path, compile_fast):
    folder = tmp_path / "music" / "deeper"
    folder.mkdir(parents=True)
    for i, (kind, rate, channels) in enumerate([("wav", 44_100, 2), ("flac", 16_000, 1), ("ogg", 48_000, 1)]):
        write_noise(folder / f"{i}.{kind}", sample_rate=rate, channels=channels)
    main(short_command(tmp_path / "run", f"runlocal,data_dir={tmp_path / 'music'}", total_steps=4))
    assert "3 files" not in (tmp_path / "run" / "train.log").read_text()  # one was held out
    assert read(tmp_path / "run")[-1]["step"] == 4


def test_a_run_keeps_to_its_files_and_names_those_that_vanish(tmp_path, compile_fast):
    folder, workdir = tmp_path / "music", tmp_path / "run"
    folder.mkdir()
    for i in range(6):
        write_noise(folder / f"{i}.wav")
    arg = f"runlocal,data_dir={folder},cache_dir={tmp_path / 'cache'}"
    main(short_command(workdir, arg, total_steps=3))
    shutil.copytree(workdir, tmp_path / "undisturbed")
    main(short_command(tmp_path / "undisturbed", arg, total_steps=6))
    write_noise(folder / "0_new.wav")
    shutil.rmtree(tmp_path / "cache")
    shutil.copytree(workdir, tmp_path / "again")
    main(short_command(tmp_path / "again", arg, total_steps=6))
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (tmp_path / "undisturbed/metrics.jsonl").read_bytes()
    listed = [row["name"] for row in read(workdir, "files") if row["part"] == "train"]
    (folder / listed[0]).unlink()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        main(short_command(workdir, arg, total_steps=6))
    assert f"1 of the run's 6 files: {listed[0]} is gone; put them back" in stopped.value.code
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_worker_processes_change_nothing_and_resume(finished, tmp_path):
    workdir, processes = tmp_path / "run", {"input.read_processes": 2}
    main(command(workdir, **processes))
    shutil.rmtree(workdir / "checkpoints" / "12")
    main(command(workdir, **processes))
    assert (workdir / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert_equal_trees(final_state(workdir), final_state(finished))


def test_other_devices_other_threads_same_losses(finished, tmp_path):
    """Eight devices sum in another order, so equality is up to float32 rounding, amplified over 12 steps."""
    quick = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
    xla_flags = f"--xla_force_host_platform_device_count=4 {quick}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    fields = {"input.read_threads": 0, "optimizer.name": "muon"}
    run = [sys.executable, ROOT / "train.py", *short_command(tmp_path / "run", **fields)]
    subprocess.run(run, env=environment, check=True, capture_output=True)
    for one, many in zip(read(finished), read(tmp_path / "run"), strict=True):
        for name in ("train/loss", "train/u_mse", "val/v_mse"):
            if name in one:
                np.testing.assert_allclose(many[name], one[name], rtol=1e-3)


def test_continues_and_initialises_from_another_run(finished, tmp_path, compile_fast):
    muon = {"optimizer.name": "muon"}
    main(short_command(tmp_path / "more", resume=finished, total_steps=14, **muon))
    assert read(tmp_path / "more")[0]["step"] == 14
    main(short_command(tmp_path / "init", init_from=finished, total_steps=2, **muon | {"optimizer.lr": 0.0}))
    assert_equal_trees(final_state(tmp_path / "init", 2)["params"], final_state(finished)["ema_params"])


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    """A folder of wrong configs and wrong audio."""
    folder = tmp_path_factory.mktemp("mistakes")
    base = {"base": f"{CONFIG}:runlocal"}
    configs = {
        "unset": base | {"input": {"data_dir": None}},
        "typo": base | {"optimiser": {"lr": 1e-4}},
        "type": base | {"optimizer": {"lr": "fast"}},
        "units": base | {"total_steps": 3, "total_epochs": 1},
    }
    for name, values in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    for name in ("empty", "corrupt", "truncated", "short"):
        (folder / name).mkdir()
    (folder / "corrupt" / "bad.wav").write_bytes(b"no audio at all")
    whole = write_noise(folder / "whole.flac").read_bytes()
    (folder / "truncated" / "cut.flac").write_bytes(whole[: len(whole) // 2])
    write_noise(folder / "short" / "short.wav", seconds=0.01)
    return folder


MISTAKES = {
    "unset value": ("{here}/unset.json", {}, ("input.data_dir is not set", "--config.input.data_dir=")),
    "misspelt key in a file": ("{here}/typo.json", {}, ("typo.json", "optimiser", "did you mean optimizer?")),
    "wrong type in a file": ("{here}/type.json", {}, ("type.json", "optimizer.lr", "float")),
    "two units in a file": ("{here}/units.json", {}, ("total_steps", "total_epochs", "keep one")),
    "misspelt flag": ("{config}", {"optimizer.lrr": 1}, ("optimizer.lrr", "did you mean optimizer.lr?")),
    "wrong type": ("{config}", {"total_steps": "many"}, ("config.total_steps", "many")),
    "two units": ("{config}", {"total_steps": 5, "total_epochs": 1}, ("total_steps", "total_epochs", "keep one")),
    "epochs of endless data": ("{config}:variant=mu", {"log_epochs": 1}, ("log_epochs", "log_steps")),
    "misspelt argument": ("{config}:objektive=mean_flow", {}, ("objektive", "did you mean objective?")),
    "unknown objective": ("{config}:objective=gan", {}, ("objective.name", "improved_mean_flow")),
    "unknown variant": ("{config}:variant=XXL", {}, ("model.variant", "Ti")),
    "no such config": ("{here}/none.py", {}, ("none.py",)),
    "no such folder": ("{config}:data_dir={here}/nowhere", {}, ("nowhere", "input.data_dir")),
    "empty folder": ("{config}:data_dir={here}/empty", {}, ("empty", "input.data_dir")),
    "corrupt audio": ("{config}:data_dir={here}/corrupt", {}, ("bad.wav", "input.bad_files=skip")),
    "truncated audio": ("{config}:data_dir={here}/truncated", {}, ("cut.flac", "input.bad_files=skip")),
    "short file": ("{config}:data_dir={here}/short", {}, ("short.wav", "input.short_files=pad")),
    "too many codebooks": (
        "{config}",
        {"evals.reconstruction.kept": "(8,65)"},
        ("kept=65", "1 to 64"),
    ),
    "too much dropout": ("{config}", {"model.quantizer_dropout": 1.5}, ("model.quantizer_dropout is 1.5",)),
    "too many steps": ("{config}:objective=autoencoder", {"evals.samples.nfe": "(2,)"}, ("nfe", "(1,)")),
    "resume from nothing": ("{config}:variant=mu", {"resume": "/nowhere"}, ("resume", "/nowhere")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(mistake, mistakes, tmp_path):
    spec, overrides, words = MISTAKES[mistake]
    workdir = tmp_path / "run"
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    spec = spec.format(config=CONFIG, here=mistakes)
    with pytest.raises(SystemExit) as stopped:
        main(["--config", spec, "--workdir", str(workdir), *flags])
    message = stopped.value.code
    assert "\n" not in message and all(word in message for word in words), message
    assert not workdir.exists()


def stops(argv, **environment):
    """Run the program and return its last line on stderr; it must fail."""
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", *argv], env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    return run.stderr.splitlines()[-1]


def test_workdir_of_another_config_is_refused_and_left_alone(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        main(command(finished, **{"input.polarity": False, "model.latent_dim": 32}))
    assert "input.polarity: True -> False; model.latent_dim: 64 -> 32" in stopped.value.code
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_unwritable_workdir():
    with pytest.raises(SystemExit) as stopped:
        main(command("/proc/run"))
    assert "/proc/run" in stopped.value.code


def test_batch_must_divide_among_devices(tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    line = stops(command(tmp_path / "run", **{"input.batch_size": 3}), XLA_FLAGS=flags)
    assert "input.batch_size=3" in line and "2 devices" in line
    assert not (tmp_path / "run").exists()


def test_full_disk_while_saving_keeps_the_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        line = stops(command(disk / "run"))
        assert "no space to save step" in line
        kept = (disk / "run" / "metrics.jsonl").read_text()
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir() if path.name.isdigit()]
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        main(command(disk / "run"))
        assert (disk / "run" / "metrics.jsonl").read_text().startswith(kept)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, compile_fast):
    with pytest.raises(SystemExit) as stopped:
        main(short_command(tmp_path / "run", log_steps=1, **{"optimizer.lr": 1e30, "optimizer.grad_clip_norm": 1e30}))
    assert "not finite at step" in stopped.value.code
    assert [row["step"] for row in read(tmp_path / "run")] == [1]  # a warm-up's first step changes nothing


def test_importing_is_light_and_training_needs_no_tensorflow(tmp_path):
    code = "import sys, meanflow_audio_codec; print('jax' in sys.modules, 'tensorflow' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert imported.stdout.split() == ["False", "False"]
    code = "import sys, meanflow_audio_codec.trainers.train; print('tensorflow' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert imported.stdout.split() == ["False"]
