"""The research ladder on a small MNIST and on synthetic music: of its 48 cells some train, score and finish.

Each would be compilations alone. Those that train cover every pair of kinds; of the others a step is traced.
"""

import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.configuration import load_config, override_from_flags
from meanflow_audio_codec.proj.ladder import study, train
from meanflow_audio_codec.tools.sweep import parse_grid
from meanflow_audio_codec.trainers import objectives
from meanflow_audio_codec.trainers import train as trainer

ROOT = pathlib.Path(__file__).parents[2]
# Two steps of the smallest model: what differs from cell to cell stays.
SHORT = {
    "config.model.variant": "mu",
    "config.total_steps": 2,
    "config.log_steps": 2,
    "config.checkpoint_steps": 2,
    "config.optimizer.warmup_steps": 1,
}
SHORT_AUDIO = {
    "config.input.num_tokens": 8,
    "config.input.batch_size": 4,
    "config.evals.validation.batches": 1,
    "config.evals.reconstruction.num_clips": 1,
    "config.evals.samples.num_clips": 1,
    "config.evals.tones.num_tones": 1,
    "config.evals.cost.num_examples": 1,
    **{f"config.evals.{name}.seconds": 0.8 for name in ("reconstruction", "samples", "tones", "cost")},
}
# The cells that train: every objective, backbone and tokenization on either dataset, and on one of them every pair.
TRAINED = {
    "mnist": (
        "autoencoder,mlp,mdct",
        "autoencoder,conv,reshape",
        "flow_matching,mixer,mdct",
        "mean_flow,mlp,reshape",
        "mean_flow,conv,mdct",
        "improved_mean_flow,conv,mdct",
    ),
    "audio": (
        "autoencoder,mixer,reshape",
        "flow_matching,mlp,mdct",
        "flow_matching,conv,reshape",
        "mean_flow,mixer,mdct",
        "improved_mean_flow,mlp,reshape",
        "improved_mean_flow,mixer,mdct",
        "improved_mean_flow,conv,mdct",
    ),
}
KINDS = ("objective", "backbone", "tokens")
RUNGS = ("autoencoder", "flow_matching", "mean_flow", "improved_mean_flow")
WHOLE = list(itertools.product(RUNGS, ("mlp", "mixer", "conv"), ("mdct", "reshape")))


def cells(part):
    return parse_grid(study.PARTS[part].grids)


def named(part):
    """The cells by what differs between them, those of the audio at one rate."""
    return {
        ",".join(cell[kind] for kind in KINDS): cell
        for cell in cells(part)
        if cell.get("config.model.latent_dim", "32") == "32"
    }


def with_everything(cell):
    """All evaluators and Muon are in one cell alone: each is a compilation, and the same in all."""
    return tuple(cell.get(kind) for kind in KINDS) == ("improved_mean_flow", "conv", "mdct")


def configure(config, cell, overrides):
    arguments = [f"{key}={value}" for key, value in cell.items() if not key.startswith("config.")]
    fields = {key: value for key, value in cell.items() if key.startswith("config.")} | overrides
    if not with_everything(cell):
        fields["config.optimizer.name"] = "adamw"
    flags = [f"--{key}={value}" for key, value in fields.items()]
    return override_from_flags(load_config(f"{ROOT / config}:{','.join(['runlocal', *arguments])}"), flags)


def mnist_config(cell, digits):
    return configure("configs/mnist.py", cell, SHORT | {"config.input.data_dir": digits})


def audio_config(cell):
    names = ("reconstruction", "samples", "tones", "cost")
    few = {f"config.evals.{name}.nfe": evaluations(cell, (1, 2)) for name in names}
    return configure("configs/meanflow_mdct.py", cell, SHORT | SHORT_AUDIO | few)


def evaluations(cell, nfe):
    return (1,) if cell["objective"] == "autoencoder" else nfe


def run(config, cell, workdir):
    if not with_everything(cell):
        with config.unlocked():
            kept = ("images_at_end", "reconstruction")
            config.evals = {name: config.evals[name] for name in kept if name in config.evals}
    trainer.train(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    metrics = {name: value for line in lines for name, value in line.items()}
    assert metrics["step"] == config.total_steps
    assert all(math.isfinite(value) for value in metrics.values())
    assert (workdir / "cost.json").exists() == with_everything(cell)
    assert (workdir / "report.html").exists()
    return metrics


@pytest.mark.parametrize("name", TRAINED["mnist"])
def test_mnist_cell_trains(name, digits, tmp_path, compile_fast):
    cell = named("mnist")[name]
    metrics = run(mnist_config(cell, digits), cell, tmp_path)
    assert {name for name in metrics if name.startswith("images/mse")} == {
        f"images/mse_nfe{nfe}" for nfe in evaluations(cell, (1, 2, 4))
    }
    assert 0 < metrics["images/mse_nfe1"] < 4
    assert (tmp_path / "samples" / "2" / "grid.png").exists()


@pytest.mark.parametrize("name", TRAINED["audio"])
def test_audio_cell_trains(name, tmp_path, compile_fast):
    cell = named("audio")[name]
    metrics = run(audio_config(cell), cell, tmp_path)
    tones = ("tones/modulation_depth",) if with_everything(cell) else ()
    for metric in ("reconstruction/mel_distance", "reconstruction/x_mse", *tones):
        expected = {f"{metric}_nfe{nfe}" for nfe in evaluations(cell, (1, 2))}
        assert {name for name in metrics if name.startswith(metric)} == expected


@pytest.mark.parametrize("cell", [{"quantizer": "none"}, {"quantizer": "rvq"}, {"backbone": "transformer"}], ids=str)
def test_what_the_ladder_leaves_out_trains(cell, tmp_path, compile_fast):
    fields = SHORT | SHORT_AUDIO | {"config.model.num_quantizers": 4}
    metrics = run(configure("configs/meanflow_mdct.py", cell, fields), cell, tmp_path)
    assert "reconstruction/lsd_db_nfe1" in metrics
    assert ("train/code_loss" in metrics) == (cell.get("quantizer") == "rvq")


class ReadyError(Exception):
    """A step has been traced and the evaluators are built."""


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part in TRAINED for name in named(part) if name not in TRAINED[part]]
)
def test_every_other_cell_is_ready_to_train(part, name, digits, tmp_path, monkeypatch, compile_fast):
    build = trainer.evaluators.from_config

    def stop(evals, context):
        assert len(list(build(evals, context))) == len(evals)
        raise ReadyError

    monkeypatch.setattr(trainer.evaluators, "from_config", stop)
    cell = named(part)[name]
    with pytest.raises(ReadyError):
        trainer.train(mnist_config(cell, digits) if part == "mnist" else audio_config(cell), tmp_path / "run")


def test_the_matrix_is_whole():
    for part in TRAINED:
        assert set(named(part)) == {",".join(kinds) for kinds in WHOLE}
    assert len(cells("mnist")) == len(named("audio")) == len(WHOLE) == 24
    rates = {cell["config.model.latent_dim"] for cell in cells("audio") if cell["backbone"] == "conv"}
    assert rates == {"16", "32", "64"}


def test_what_trains_covers_the_matrix():
    trained = {part: [name.split(",") for name in names] for part, names in TRAINED.items()}
    for i, j in itertools.combinations(range(len(KINDS)), 2):
        pairs = {(kinds[i], kinds[j]) for part in trained.values() for kinds in part}
        assert pairs == {(kinds[i], kinds[j]) for kinds in WHOLE}
    for part, i in itertools.product(trained.values(), range(len(KINDS))):
        assert {kinds[i] for kinds in part} == {kinds[i] for kinds in WHOLE}


@pytest.mark.parametrize("part", [part for part in study.PARTS if part != "classifier"])
def test_every_cell_changes_what_it_says(part):
    """The configs of a part are all different, and none but an ablation's first is the default."""
    spec = study.PARTS[part]
    configs = []
    for cell in parse_grid(spec.grids):
        arguments = ",".join(f"{key}={value}" for key, value in cell.items() if not key.startswith("config."))
        flags = [f"--{key}={value}" for key, value in cell.items() if key.startswith("config.")]
        joint = "," if ":" in spec.config else ":"
        config = load_config(f"{ROOT / spec.config}{joint}{arguments}")
        configs.append(override_from_flags(config, [*spec.overrides, *flags]).to_json(sort_keys=True))
    assert len(set(configs)) == len(configs)


def test_swapped_tangent_differentiates_along_r():
    """With u = 2 t + 5 r the derivative is 5 in place of 2; the value and the loss elsewhere are unharmed."""
    u_fn = lambda z, t, r, cond: 0 * z + (2 * t + 5 * r)[:, None]
    cfg = study_objective(fm_fraction=0.0)
    x, rng = jnp.zeros((64, 3)), jax.random.key(0)
    loss = {f.__name__: f(u_fn, x, None, rng, cfg)[1] for f in (objectives.improved_mean_flow, train.swapped_tangent)}
    along_t, along_r = (float(loss[name]["hdudt_over_u"]) for name in ("improved_mean_flow", "swapped_tangent"))
    np.testing.assert_allclose(along_r / along_t, 5 / 2, rtol=1e-5)


def study_objective(**fields):
    config = load_config(f"{ROOT / 'configs' / 'mnist.py'}:data_dir=unused")
    flags = [f"--config.objective.{name}={value}" for name, value in fields.items()]
    return override_from_flags(config, flags).objective


def test_study_runs_a_part_and_a_mistake_ends_in_one_line(tmp_path, digits, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true")
    flags = ["--workdir", str(tmp_path), "--mnist-dir", str(digits), "--audio-dir", "unused", "--runlocal"]
    study.main([*flags, "--parts", "classifier"])
    assert (tmp_path / "classifier" / "all" / "seed0" / "checkpoints" / "20").is_dir()
    with pytest.raises(SystemExit, match="study: failed runs:\n  classifier/all/seed0: .*holds a run with another"):
        study.main([*flags, "--parts", "classifier", "--mnist-dir", str(tmp_path)])
