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

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from meanflow_audio_codec import configuration
from meanflow_audio_codec.datasets import audio as audio_files
from meanflow_audio_codec.datasets import pipeline
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
    files = _find_files(config, workdir)
    loader, steps_per_epoch = _training_data(config, tokenizer, files["train"], config.seed)
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
    segment = (batch_size, tokenizer.segment_samples(config.input.num_tokens), config.input.channels)
    jax.eval_shape(train_step, state, {"audio": jax.ShapeDtypeStruct(segment, jnp.float32)})  # finds a wrong field
    predict_fns = training_steps.make_predict_fns(model, tokenizer, config)

    ################################################ Evaluators
    def clips(num_clips: int, seconds: float) -> tuple[np.ndarray, list[str]]:
        return _evaluation_clips(config, tokenizer, files["valid"], num_clips, seconds)

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
        state = state.replace(scale=_measure_scale(config, tokenizer, files["train"]))
        if config.init_from:
            params = restore(config.init_from, "init_from", {"ema_params": state.params})["ema_params"]
            state = state.replace(params=params, ema_params=params)
    state = jax.device_put(state, replicated)
    first_step = int(state.step)

    ################################################ Workdir: from here on things are written
    workdir.mkdir(parents=True, exist_ok=True)
    configuration.save(config, workdir / "config.json")
    for part, found in files.items():
        if found is not None:
            audio_files.write_manifest(workdir / f"{part}_files.jsonl", found)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logging_to(workdir))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
        writer = stack.enter_context(contextlib.closing(MetricWriter(workdir, first_step)))
        _announce(config, tokenizer, state, files["train"], first_step, total_steps)

        ############################################ Loop
        progress = stack.enter_context(contextlib.closing(Progress(first_step, total_steps, batch_size)))
        stack.enter_context(logging_redirect_tqdm())  # log lines go above the bar
        for step in range(first_step + 1, total_steps + 1):
            batch = {"audio": jax.make_array_from_process_local_data(batched, next(data)["audio"])}
            state, metrics = train_step(state, batch)
            progress.advance()

            last = step == total_steps
            if step % log_steps == 0 or last:
                scalars = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
                writer.write(step, scalars | {"train/lr": float(schedule(step - 1))})
                writer.write_timing(step, *progress.report(step, scalars))

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


def _find_files(config: ConfigDict, workdir: epath.Path) -> dict[str, list | None]:
    """Return the files for "train" and "valid", None for synthetic music. A resumed run opens only changed files."""
    spec = config.input
    if not spec.data_dir:
        return {"train": None, "valid": None}
    folders = {"train": spec.data_dir} | ({"valid": spec.valid_dir} if spec.valid_dir else {})
    files = {
        part: audio_files.scan_folder(folder, workdir / f"{part}_files.jsonl", bad_files=spec.bad_files)
        for part, folder in folders.items()
    }
    if "valid" not in files:
        files["train"], files["valid"] = audio_files.split_files(files["train"], valid_fraction=0.05)
    return files


def _training_data(config: ConfigDict, tokenizer: Any, files: list | None, seed: int) -> tuple[Any, int | None]:
    """Return the stream of training batches, and the steps of an epoch (None for synthetic music)."""
    spec = config.input
    if spec.num_tokens < 1 or spec.num_tokens % max(1, config.model.downsample):
        raise InputError(f"input.num_tokens={spec.num_tokens} is not a positive multiple of model.downsample")
    segment_samples = tokenizer.segment_samples(spec.num_tokens)
    loader = pipeline.build_audio_pipeline(
        files=files,
        sample_rate=spec.sample_rate,
        segment_samples=segment_samples,
        batch_size=spec.batch_size // jax.process_count(),
        seed=seed,
        channels=spec.channels,
        gain_db=tuple(spec.gain_db),
        polarity=spec.polarity,
        silence_db=spec.silence_db,
        short_files=spec.short_files,
        read_threads=spec.read_threads,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
    if files is None:
        return loader, None
    segments = pipeline.segments_per_epoch(files, spec.sample_rate, segment_samples, spec.short_files)
    return loader, max(1, segments // spec.batch_size)


def _evaluation_clips(
    config: ConfigDict, tokenizer: Any, files: list | None, num_clips: int, seconds: float
) -> tuple[np.ndarray, list[str]]:
    """Return fixed clips of about `seconds`, of a length that fills whole latents."""
    step = config.model.downsample
    num_tokens = step * round(seconds * config.input.sample_rate / tokenizer.samples_per_token / step)
    return pipeline.eval_clips(
        files=files,
        sample_rate=config.input.sample_rate,
        segment_samples=tokenizer.segment_samples(max(step, num_tokens)),
        num_clips=num_clips,
        channels=config.input.channels,
        seed=0,  # the same clips for every run
    )


def _measure_scale(config: ConfigDict, tokenizer: Any, files: list | None) -> jax.Array:
    """Return each feature's RMS after companding, over at least 256 training segments drawn for this alone."""
    data = iter(_training_data(config, tokenizer, files, config.seed ^ 1)[0])
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
    config: ConfigDict, tokenizer: Any, state: TrainState, files: list | None, first_step: int, total_steps: int
) -> None:
    """Log what is about to happen, the data first."""
    if files is None:
        log.info("data: built-in synthetic music; input.data_dir trains on a folder of audio")
    else:
        hours = sum(file.duration for file in files) / 3600
        log.info("data: %.2f h of audio in %d files of %s", hours, len(files), config.input.data_dir)
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
