"""The training loop, top to bottom.

Order of a step, which exact resume rests on: draw the batch, update, log, evaluate, save state and data position
together, and only then draw the next batch. All that belongs to a saved step is on disk when its save begins.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from meanflow_audio_codec import configuration
from meanflow_audio_codec.datasets import pipeline, run_files
from meanflow_audio_codec.datasets.run_files import RunFiles
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import common as evaluators
from meanflow_audio_codec.evaluators.report import write_report
from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.models.train_state import TrainState
from meanflow_audio_codec.preprocessing import scaling
from meanflow_audio_codec.preprocessing.tokenizers import TOKENIZERS
from meanflow_audio_codec.trainers import training_steps
from meanflow_audio_codec.trainers.checkpoints import Checkpoints, newest_step, restore
from meanflow_audio_codec.trainers.metric_writers import MetricWriter, Progress
from meanflow_audio_codec.trainers.objectives import OBJECTIVES
from meanflow_audio_codec.trainers.optimizers import make_optimizer

log = logging.getLogger(__name__)
FILES = "files.jsonl"  # in the workdir


def train(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Train as `config` says, keeping everything in `workdir`; a second call with the same arguments resumes.

    Returns the final state. Nothing is written before config and data have been checked.

    Raises:
        InputError: a wrong config, data folder or workdir.
        FloatingPointError: a metric is not finite; the last checkpoint is intact.
    """
    workdir = epath.Path(workdir).expanduser()
    configuration.check_config(config)
    _check_workdir(config, workdir)
    _check_objective(config)

    ################################################ Devices: batches are split over all, parameters copied to each.
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    batched, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    batch_size = config.input.batch_size
    if batch_size % mesh.size:
        raise InputError(f"input.batch_size={batch_size} is not divisible by {mesh.size} devices; choose a multiple")

    ################################################ Input
    tokenizer = _build("tokens", TOKENIZERS, config.tokens)
    segment_samples = _segment_samples(config, tokenizer)
    files = _find_files(config, segment_samples, workdir)
    loader = _training_data(config, segment_samples, files, config.seed)
    steps_per_epoch = _steps_per_epoch(config, segment_samples, files)
    total_steps = configuration.duration_steps(config, "total", batch_size, steps_per_epoch, None)
    every = lambda spec, name: configuration.duration_steps(spec, name, batch_size, steps_per_epoch, total_steps)

    ################################################ Model and optimizer
    features = tokenizer.num_features(config.input.channels)
    model = CodecModel(features=features, **_checked_fields("model", CodecModel, config.model))
    tx, schedule = make_optimizer(config, total_steps, steps_per_epoch)

    @jax.jit
    def init(rng, scale):
        x = jnp.zeros((1, config.input.num_tokens, features))
        return TrainState.create(model.init(rng, x)["params"], tx, scale)

    state = init(jax.random.key(config.seed), jnp.ones(features))
    train_step = training_steps.make_train_step(model, tokenizer, tx, config)
    segment = (batch_size, segment_samples, config.input.channels)
    jax.eval_shape(train_step, state, {"audio": jax.ShapeDtypeStruct(segment, jnp.float32)})  # finds a wrong field
    predict_fns = training_steps.make_predict_fns(model, tokenizer, config)

    ################################################ Evaluators
    def clips(num_clips: int, seconds: float) -> tuple[np.ndarray, list[str]]:
        return _evaluation_clips(config, tokenizer, files, num_clips, seconds)

    context = evaluators.Context(predict_fns, clips, config.input.sample_rate, batch_size, workdir)
    evals = [
        (every(spec, "first"), every(spec, "every"), evaluator)
        for spec, evaluator in evaluators.from_config(config.evals, context)
    ]
    log_steps, checkpoint_steps = every(config, "log"), every(config, "checkpoint")

    ################################################ Restore: own checkpoint, another run's, its parameters, or scratch
    data = iter(loader)
    if newest_step(workdir) is not None:
        state = restore(workdir, "--workdir", state, data)
    elif config.resume:
        state = restore(config.resume, "resume", state, data)
    else:
        state = state.replace(scale=_measure_scale(config, tokenizer, segment_samples, files))
        if config.init_from:
            params = restore(config.init_from, "init_from", {"ema_params": state.params})["ema_params"]
            state = state.replace(params=params, ema_params=params)
    state = jax.device_put(state, replicated)
    first_step = int(state.step)

    ################################################ Workdir: from here on things are written
    workdir.mkdir(parents=True, exist_ok=True)
    configuration.save(config, workdir / "config.json")
    if files is not None:
        run_files.write_record(workdir / FILES, files)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logging_to(workdir))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
        writer = stack.enter_context(contextlib.closing(MetricWriter(workdir, first_step)))
        _announce(config, tokenizer, state, files, first_step, total_steps)

        ############################################ Loop
        progress = stack.enter_context(contextlib.closing(Progress(first_step, total_steps, batch_size)))
        stack.enter_context(logging_redirect_tqdm())  # log lines go above the bar
        for step in range(first_step + 1, total_steps + 1):
            with progress.waiting(state.step):
                audio = next(data)["audio"]
            batch = {"audio": jax.make_array_from_process_local_data(batched, audio)}
            state, metrics = train_step(state, batch)
            progress.advance()

            last = step == total_steps
            if step % log_steps == 0 or last:
                scalars = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
                writer.write(step, scalars | {"train/lr": float(schedule(step - 1))})
                writer.write_timing(step, progress.report(step, scalars))

            due = [evaluator for first, steps, evaluator in evals if step == first or step % steps == 0 or last]
            if due:
                with progress.paused():
                    scores = {name: value for evaluator in due for name, value in evaluator.run(state)}
                    if scores:
                        writer.write(step, scores)
                        log.info("step %d  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
                    write_report(workdir)

            if step % checkpoint_steps == 0 or last:
                _check_finite(step, metrics["param_norm"])
                with progress.paused():
                    checkpoints.save(step, state, data)
        checkpoints.wait()
        write_report(workdir)
        log.info("done: step %d, report in %s", total_steps, workdir / "report.html")
    return state


def _check_workdir(config: ConfigDict, workdir: epath.Path) -> None:
    """Refuse a workdir whose checkpoints are another run's."""
    saved = workdir / "config.json"
    if newest_step(workdir) is None:
        return
    if not saved.exists():
        raise InputError(f"--workdir: {workdir} holds checkpoints but no config.json; choose another")
    changed = configuration.changed_fields(json.loads(saved.read_text()), config)
    if changed:
        raise InputError(
            f"--workdir: {workdir} holds a run with another config ({'; '.join(changed)}); "
            "choose another workdir, or give that run's config"
        )


def _check_objective(config: ConfigDict) -> None:
    name = config.objective.name
    if name not in OBJECTIVES:
        raise InputError(f"objective.name is {name!r}; choose one of {', '.join(OBJECTIVES)}")
    for key, spec in config.evals.items():
        evaluations = spec.get("nfe", (1,))
        if min(evaluations) < 1:
            raise InputError(f"evals.{key}.nfe={evaluations}: give numbers of network evaluations from 1 on")
        if name == "autoencoder" and set(evaluations) != {1}:
            raise InputError(f"evals.{key}.nfe={evaluations}: an autoencoder decodes by one evaluation; set it to (1,)")


def _segment_samples(config: ConfigDict, tokenizer: Any) -> int:
    num_tokens = config.input.num_tokens
    if num_tokens < 1 or num_tokens % max(1, config.model.downsample):
        raise InputError(f"input.num_tokens={num_tokens} is not a positive multiple of model.downsample")
    return tokenizer.segment_samples(num_tokens)


def _find_files(config: ConfigDict, segment_samples: int, workdir: epath.Path) -> RunFiles | None:
    """Return the run's files, None for synthetic music; a run that is continued keeps those that it began with."""
    if not config.input.data_dir:
        return None
    if newest_step(workdir) is not None:
        return run_files.recall_files(config.input, workdir / FILES)
    if config.resume:
        return run_files.recall_files(config.input, epath.Path(config.resume).expanduser() / FILES)
    return run_files.find_files(config.input, segment_samples, workdir / FILES)


def _training_data(config: ConfigDict, segment_samples: int, files: RunFiles | None, seed: int) -> grain.IterDataset:
    """Return the stream of training batches."""
    spec = config.input
    return pipeline.build_audio_pipeline(
        data_dir=files and files.train,
        weights=tuple(spec.weights),
        sample_rate=spec.sample_rate,
        segment_samples=segment_samples,
        batch_size=spec.batch_size // jax.process_count(),
        seed=seed,
        channels=spec.channels,
        gain_db=tuple(spec.gain_db),
        polarity=spec.polarity,
        silence_db=spec.silence_db,
        short_files=spec.short_files,
        bad_files=spec.bad_files,
        cache_dir=spec.cache_dir,
        read_threads=spec.read_threads,
        read_processes=spec.read_processes,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )


def _steps_per_epoch(config: ConfigDict, segment_samples: int, files: RunFiles | None) -> int | None:
    """Return the steps of an epoch, None for synthetic music."""
    if files is None:
        return None
    segments = pipeline.segments_per_epoch(files.train, config.input.sample_rate, segment_samples)
    return max(1, segments // config.input.batch_size)


def _evaluation_clips(
    config: ConfigDict, tokenizer: Any, files: RunFiles | None, num_clips: int, seconds: float
) -> tuple[np.ndarray, list[str]]:
    """Return fixed clips of about `seconds`, of a length that fills whole latents."""
    step = config.model.downsample
    num_tokens = step * round(seconds * config.input.sample_rate / tokenizer.samples_per_token / step)
    return pipeline.eval_clips(
        files=files and [file for folder in files.valid for file in folder],
        sample_rate=config.input.sample_rate,
        segment_samples=tokenizer.segment_samples(max(step, num_tokens)),
        num_clips=num_clips,
        channels=config.input.channels,
        seed=0,  # the same clips for every run
    )


def _measure_scale(config: ConfigDict, tokenizer: Any, segment_samples: int, files: RunFiles | None) -> jax.Array:
    """Return each feature's RMS after companding, over at least 256 training segments drawn for this alone."""
    data = iter(_training_data(config, segment_samples, files, config.seed ^ 1))
    audio = np.concatenate([next(data)["audio"] for _ in range(-(-256 // config.input.batch_size))])
    tokens = scaling.compand(tokenizer.tokenize(jnp.asarray(audio)), config.tokens.exponent, config.tokens.eps)
    return scaling.band_scale(tokens, tokenizer.bands(config.input.channels, config.input.sample_rate))


def _build(group: str, classes: dict[str, type], spec: ConfigDict) -> Any:
    """Build the class that `spec.name` names from the fields of `spec` that it has."""
    if spec.name not in classes:
        raise InputError(f"{group}.name is {spec.name!r}; choose one of {', '.join(classes)}")
    fields = {field.name for field in dataclasses.fields(classes[spec.name])}
    return classes[spec.name](**{name: value for name, value in spec.items() if name in fields})


def _checked_fields(group: str, cls: type, spec: ConfigDict) -> dict[str, Any]:
    """Return `spec` as keyword arguments of `cls`, refusing those that it has not."""
    fields = {field.name for field in dataclasses.fields(cls)} - {"parent", "name", "features"}
    for name in spec.keys():
        if name not in fields:
            raise InputError(f"{group}.{name}: no such field{configuration.near_match(name, fields)}")
    return dict(spec.items())


@contextlib.contextmanager
def _logging_to(workdir: epath.Path) -> Iterator[None]:
    """Copy the log to workdir/train.log."""
    with (workdir / "train.log").open("a") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)


def _announce(
    config: ConfigDict, tokenizer: Any, state: TrainState, files: RunFiles | None, first_step: int, total_steps: int
) -> None:
    """Log what is about to happen, the data first."""
    if files is None:
        log.info("data: built-in synthetic music; input.data_dir trains on a folder of audio")
    else:
        counts = []
        for folders in (files.train, files.valid):
            found = [file for folder in folders for file in folder]
            counts += [len(found), sum(file.duration for file in found) / 3600]
        log.info("data: %s: %d files, %.2f h to train; %d files, %.2f h to validate", config.input.data_dir, *counts)
    token_rate = config.input.sample_rate / tokenizer.samples_per_token
    code = "no quantizer"
    if config.model.quantizer == "fsq":
        bits = config.model.latent_dim * math.log2(config.model.fsq_levels)
        code = f"{token_rate / config.model.downsample * bits / 1000:.2f} kbps"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info(
        "%s, %.2f M parameters, %.2f tokens/s, %s; steps %d to %d on %d %s",
        *(config.objective.name, parameters / 1e6, token_rate, code),
        *(first_step + 1, total_steps, jax.device_count(), jax.default_backend()),
    )


def _check_finite(step: int, param_norm: Any) -> None:
    """Keep a broken state out of the checkpoints."""
    if not math.isfinite(float(param_norm)):
        raise FloatingPointError(f"the parameters are not finite at step {step}; the last checkpoint is intact")
