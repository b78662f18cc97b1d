"""The training loop, top to bottom.

Order of a step, which exact resume rests on: draw the batch, update, log, evaluate, save state and data position
together, and only then draw the next batch. All that belongs to a saved step is on disk when its save begins.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from meanflow_audio_codec import configuration
from meanflow_audio_codec.datasets.inputs import INPUTS, AudioInput, MnistInput, signals
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import common as evaluators
from meanflow_audio_codec.evaluators.report import write_report
from meanflow_audio_codec.models.classifier import Classifier
from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.models.quantizers import fit_levels
from meanflow_audio_codec.models.train_state import TrainState
from meanflow_audio_codec.preprocessing import scaling
from meanflow_audio_codec.preprocessing.tokenizers import build_tokenizer
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
    if batch_size < 1 or batch_size % mesh.size:
        raise InputError(
            f"input.batch_size={batch_size} is not a positive multiple of the {mesh.size} devices; choose one"
        )

    ################################################ Input
    classifying = config.objective.name == "classification"
    tokenizer = None if classifying else build_tokenizer(config.tokens)
    source = _open_input(config, tokenizer, workdir)
    total_steps = configuration.duration_steps(config, "total", batch_size, source.steps_per_epoch, None)
    every = lambda spec, name: configuration.duration_steps(spec, name, batch_size, source.steps_per_epoch, total_steps)

    ################################################ Model and optimizer
    if classifying:
        model = Classifier(**_checked_fields("model", Classifier, config.model))
        loss_fn, predict_fns = training_steps.classifier_loss(model), training_steps.classifier_predict_fns(model)
        features, example = 1, (jnp.zeros((1, 28, 28, 1)),)
    else:
        features = tokenizer.num_features(source.segment[1])
        bands = tuple(tokenizer.bands(source.segment[1], source.sample_rate).tolist())
        model = CodecModel(features=features, bands=bands, **_checked_fields("model", CodecModel, config.model))
        _check_kept(config, model)
        loss_fn = training_steps.codec_loss(model, tokenizer, config)
        predict_fns = training_steps.codec_predict_fns(model, tokenizer, config)
        example = (jnp.zeros((1, tokenizer.num_tokens(source.segment[0]), features)), jnp.zeros(1, jnp.int32))
    tx, schedule = make_optimizer(config, total_steps, source.steps_per_epoch)

    @functools.partial(jax.jit, out_shardings=replicated)  # as steps take it: they are traced once
    def init(rng, scale):
        return TrainState.create(model.init(rng, *example)["params"], tx, scale)

    state = init(jax.random.key(config.seed), jnp.ones(features))
    train_step = training_steps.make_train_step(loss_fn, tx, config.ema.decay)
    batch_like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batched), source.batch)
    jax.eval_shape(train_step, state, batch_like, config.seed)  # finds a wrong field

    ################################################ Evaluators
    context = evaluators.Context(
        predict_fns,
        examples=source.examples,
        sample_rate=source.sample_rate,
        batch_size=batch_size,
        workdir=workdir,
        lower_train_step=lambda state: train_step.lower(state, batch_like, config.seed),
        load_classifier=load_classifier,
    )
    evals = [
        (every(spec, "first"), every(spec, "every"), evaluator)
        for spec, evaluator in evaluators.from_config(config.evals, context)
    ]
    log_steps, checkpoint_steps = every(config, "log"), every(config, "checkpoint")

    ################################################ Restore: own checkpoint, another run's, its parameters, or scratch
    data = iter(source.stream(config.seed))
    if newest_step(workdir) is not None:
        state = restore(workdir, "--workdir", state, data)
    elif config.resume:
        state = restore(config.resume, "resume", state, data)
    else:
        if not classifying:
            state = state.replace(scale=_measure_scale(config, tokenizer, source))
            if model.has_levels:
                codebook = _fit_levels(config, tokenizer, source, model, state.scale)
                state = state.start_from(state.params | {"level_quantizer": {"codebook": codebook}})
        if config.init_from:
            params = restore(config.init_from, "init_from", {"ema_params": state.params})["ema_params"]
            state = state.start_from(params)
    state = jax.device_put(state, replicated)
    first_step = int(state.step)

    ################################################ Workdir: from here on things are written
    workdir.mkdir(parents=True, exist_ok=True)
    configuration.save(config, workdir / "config.json")
    source.save(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logging_to(workdir))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
        writer = stack.enter_context(contextlib.closing(MetricWriter(workdir, first_step)))
        _announce(config, model, source, state, first_step, total_steps)

        ############################################ Loop
        progress = stack.enter_context(contextlib.closing(Progress(first_step, total_steps, batch_size)))
        stack.enter_context(logging_redirect_tqdm())  # log lines go above the bar
        for step in range(first_step + 1, total_steps + 1):
            with progress.waiting(state.step):
                batch = next(data)
            batch = {name: jax.make_array_from_process_local_data(batched, rows) for name, rows in batch.items()}
            state, metrics = train_step(state, batch, config.seed)
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


def load_classifier(workdir: str) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    """Return the classifier trained in `workdir` as a function from images [b, 28, 28, 1] to logits and features."""
    folder = epath.Path(workdir).expanduser()
    if not (folder / "config.json").exists():
        raise InputError(f"classifier: {workdir} holds no run; train one by configs/mnist_classifier.py")
    spec = json.loads((folder / "config.json").read_text())
    if spec["objective"]["name"] != "classification":
        raise InputError(f"classifier: {workdir} holds no classifier; train one by configs/mnist_classifier.py")
    model = Classifier(**spec["model"])
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    params = restore(workdir, "classifier", {"ema_params": template})["ema_params"]
    return functools.partial(jax.jit(model.apply), {"params": params})


def _check_objective(config: ConfigDict) -> None:
    name = config.objective.name
    if name not in (*OBJECTIVES, "classification"):
        raise InputError(f"objective.name is {name!r}; choose one of {', '.join(OBJECTIVES)} or classification")
    if (name == "classification") == ("tokens" in config):
        raise InputError(
            f"objective.name is {name!r}: a classifier has no tokens, all else has; begin with its own config"
        )
    if config.model.get("velocity_head") and name != "improved_mean_flow":
        raise InputError(f"model.velocity_head serves objective improved_mean_flow; {name} has no use for it")
    for key, spec in config.evals.items():
        evaluations = spec.get("nfe", (1,))
        if min(evaluations) < 1:
            raise InputError(f"evals.{key}.nfe={evaluations}: give numbers of network evaluations from 1 on")
        if name == "autoencoder" and set(evaluations) != {1}:
            raise InputError(f"evals.{key}.nfe={evaluations}: an autoencoder decodes by one evaluation; set it to (1,)")


def _check_kept(config: ConfigDict, model: CodecModel) -> None:
    for key, spec in config.evals.items():
        for kept in spec.get("kept", ()):
            least, most = model.kept_range
            if not least <= kept <= most:
                raise InputError(f"evals.{key}.kept={kept}: choose {least} to {most}")


def _open_input(config: ConfigDict, tokenizer: Any, workdir: epath.Path) -> AudioInput | MnistInput:
    """Return the data; a run that is continued keeps what it began with."""
    name = config.input.name
    if name not in INPUTS:
        raise InputError(f"input.name is {name!r}; choose one of {', '.join(INPUTS)}")
    continues = None
    if newest_step(workdir) is not None:
        continues = workdir
    elif config.resume:
        continues = epath.Path(config.resume).expanduser()
    return INPUTS[name](config, tokenizer, workdir, continues)


def _measure_scale(config: ConfigDict, tokenizer: Any, source: AudioInput | MnistInput) -> jax.Array:
    """Return each feature's RMS after companding, over at least 256 training examples drawn for this alone.

    With `tokens.scale` "none" it is 1, and the tokens are what the transform makes of the signal.
    """
    samples, channels = source.segment
    match config.tokens.scale:
        case "none":
            return jnp.ones(tokenizer.num_features(channels))
        case "band":
            bands = tokenizer.bands(channels, source.sample_rate)

            @jax.jit
            def measure(signal):
                tokens = scaling.compand(tokenizer.tokenize(signal), config.tokens.exponent, config.tokens.eps)
                return scaling.band_scale(tokens, bands)

            return measure(np.concatenate(list(_draw_signals(config, source, 256))))
        case name:
            raise InputError(f"tokens.scale is {name!r}; choose band or none")


def _fit_levels(
    config: ConfigDict, tokenizer: Any, source: AudioInput | MnistInput, model: CodecModel, scale: jax.Array
) -> jax.Array:
    """Return the entries of the model's level quantizer, fitted to at least 1024 training examples a stage."""

    @jax.jit
    def measure(signal):
        return model.gain_shape.levels(training_steps.to_tokens(signal, scale, tokenizer, config))

    levels = jnp.concatenate([measure(batch) for batch in _draw_signals(config, source, 1024 * model.level_stages)])
    return fit_levels(levels.reshape(-1, levels.shape[-1]), model.level_stages)


def _draw_signals(config: ConfigDict, source: AudioInput | MnistInput, count: int) -> Iterator[np.ndarray]:
    """Yield batches of at least `count` training examples, drawn for this alone."""
    data = iter(source.stream(config.seed ^ 1))
    return (signals(next(data)) for _ in range(-(-count // config.input.batch_size)))


def _checked_fields(group: str, cls: type, spec: ConfigDict) -> dict[str, Any]:
    """Return `spec` as keyword arguments of `cls`, refusing those that it has not."""
    fields = {field.name for field in dataclasses.fields(cls)} - {"parent", "name", "features", "bands"}
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
    config: ConfigDict,
    model: CodecModel | Classifier,
    source: AudioInput | MnistInput,
    state: TrainState,
    first_step: int,
    total_steps: int,
) -> None:
    """Log what is about to happen, the data first."""
    log.info("data: %s", source.describe())
    task = config.objective.name
    if task != "classification":
        task += {
            "latent": f", {model.quantizer} code",
            "label": ", given the label",
            "none": ", given nothing",
        }[model.conditioning]
        if model.conditioning == "latent" and model.num_codebooks:
            task += f" of {source.rate(model.bits)}"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info(
        "%s, %.2f M parameters; steps %d to %d on %d %s",
        *(task, parameters / 1e6, first_step + 1, total_steps, jax.device_count(), jax.default_backend()),
    )


def _check_finite(step: int, param_norm: Any) -> None:
    """Keep a broken state out of the checkpoints."""
    if not math.isfinite(float(param_norm)):
        raise FloatingPointError(f"the parameters are not finite at step {step}; the last checkpoint is intact")
