"""The jitted steps: one update, and what evaluators may ask of the model; for the codec and for the classifier.

signal [b, s, c] -> tokenize -> compand, scale -> x [b, l, f] -> condition -> objective(u, to_flow(x), cond)
x -> condition -> from_flow(sampler(u, noise, cond)) -> x_hat -> unscale, expand -> detokenize -> signal
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32
from ml_collections import ConfigDict

from meanflow_audio_codec.datasets.inputs import Tokenizer, signals
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models.classifier import Classifier
from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.models.quantizers import draw_kept
from meanflow_audio_codec.models.train_state import TrainState, ema_update
from meanflow_audio_codec.preprocessing import scaling
from meanflow_audio_codec.trainers import flow, spectral
from meanflow_audio_codec.trainers.objectives import OBJECTIVES

Batch = dict[str, Array]
# loss_fn(params, scale [f], batch, rng) -> (loss, metrics)
LossFn = Callable[[Any, Array, Batch, PRNGKeyArray], tuple[Float[Array, ""], dict[str, Array]]]

# Beyond the small numbers, for fold_in(rng, i) is the i-th key that the objective splits off.
QUANTIZER_DROPOUT_STREAM, MEL_STREAM = 1 << 20, 1 << 21


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, ema_decay: float
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Array]]]:
    """Return `train_step(state, batch, seed) -> (state, metrics)`, jitted, pure: its randomness is fold_in(seed, step).

    The seed is an argument, for runs that differ in it alone to share one compiled program.
    """

    def train_step(state: TrainState, batch: Batch, seed: int | Int[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params, state.scale, batch, rng)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {"grad": gradients, "param": params, "update": updates}
        metrics |= {f"{name}_norm": optax.tree.norm(tree) for name, tree in norms.items()}
        state = state.replace(
            step=state.step + 1,
            params=params,
            ema_params=ema_update(state.ema_params, params, state.step, ema_decay),
            opt_state=opt_state,
        )
        return state, metrics

    # Not donated on a CPU: a checkpoint under way may still read the old state's memory there.
    return jax.jit(train_step, donate_argnums=() if jax.default_backend() == "cpu" else 0)


def codec_loss(model: CodecModel, tokenizer: Tokenizer, config: ConfigDict) -> LossFn:
    """Return the loss of `config.objective` for the codec."""
    objective = OBJECTIVES[config.objective.name]
    sampler, temperature = flow.SAMPLERS[config.objective.name]
    weight = _feature_weight(tokenizer, config)

    def one_step_mels(params: Any, scale: Array, signal: Array, cond: Array, rng: PRNGKeyArray) -> tuple[Array, Array]:
        """Return the mel distance of what one evaluation makes of fresh noise, and that between two such samples."""
        noise = jax.random.normal(jax.random.fold_in(rng, MEL_STREAM), (2 * len(cond), cond.shape[1], model.features))
        twice = jnp.concatenate([cond, cond])
        x_hat = model.from_flow(sampler(_apply(model, params, "flow"), temperature * noise, twice, 1), twice)
        decoded = from_tokens(x_hat, scale, tokenizer, config, (len(twice), *signal.shape[1:]))
        mels = lambda audio: spectral.log_mels(
            jnp.swapaxes(audio, 1, 2).reshape(-1, audio.shape[1]), config.input.sample_rate
        )
        original, first, second = (mels(audio) for audio in (signal, *jnp.split(decoded, 2)))
        distances = [spectral.mel_distance(original, sample) for sample in (first, second)]
        return jnp.mean(jnp.stack(distances)), jnp.mean(spectral.mel_distance(first, second))

    def loss_fn(params: Any, scale: Array, batch: Batch, rng: PRNGKeyArray):
        x = to_tokens(signals(batch), scale, tokenizer, config)
        # The code is computed once, outside the objective's JVP: along the path it is constant.
        kept = _draw_kept(model, rng, len(x))
        cond, code_metrics = _apply(model, params, "condition")(x, batch.get("label"), kept)
        x = model.to_flow(x, cond)
        heads = {"v_fn": _apply(model, params, "velocity")} if model.velocity_head else {}
        loss, metrics = objective(_apply(model, params, "flow"), x, cond, rng, config.objective, weight, **heads)
        if "loss" in code_metrics:
            loss += code_metrics["loss"]
        if config.objective.get("mel_weight"):
            scored = slice(_num_mel_rows(config.objective.mel_fraction, len(x)))
            distance, spread = one_step_mels(params, scale, signals(batch)[scored], cond[scored], rng)
            loss += config.objective.mel_weight * (distance - spread / 2)
            metrics |= {"mel_distance": distance, "mel_spread": spread}
        if "bits" in code_metrics and "sample_rate" in config.input:
            latent_rate = config.input.sample_rate / tokenizer.samples_per_token / model.downsample
            code_metrics["kbps"] = code_metrics["bits"] * model.num_codebooks * latent_rate / 1000
        return loss, metrics | {f"code_{name}": value for name, value in code_metrics.items()}

    return loss_fn


def _feature_weight(tokenizer: Tokenizer, config: ConfigDict) -> Float[Array, "f"] | None:
    match config.objective.get("weighting", "feature"):  # images have no other
        case "feature":
            return None
        case "band":
            return jnp.asarray(scaling.band_weight(tokenizer.bands(config.input.channels, config.input.sample_rate)))
        case name:
            raise InputError(f"objective.weighting is {name!r}; choose feature or band")


def _num_mel_rows(mel_fraction: float, batch: int) -> int:
    rows = round(mel_fraction * batch)
    if not 1 <= rows <= batch:
        raise InputError(f"objective.mel_fraction={mel_fraction}: is {rows} of {batch} clips; choose 1 to all of them")
    return rows


def _draw_kept(model: CodecModel, rng: PRNGKeyArray, rows: int) -> Int[Array, "b"] | None:
    """Draw how much of its code each clip keeps, None for all, by the step's key."""
    if not model.quantizer_dropout:
        return None
    rng = jax.random.fold_in(rng, QUANTIZER_DROPOUT_STREAM)
    return draw_kept(rng, rows, model.kept_steps, model.quantizer_dropout)


def codec_predict_fns(model: CodecModel, tokenizer: Tokenizer, config: ConfigDict) -> dict[str, Callable]:
    """Return what evaluators call, all jitted and with the averaged parameters.

    `loss(state, batch, rng)`: the objective's raw metrics, of the whole code.
    `reconstruct(state, batch, seeds, nfe, kept=None)`: decoded signals [b, s, c], and the squared error of
        each one's tokens [b]. Row i's noise is a function of seeds[i]. Without a code this is a sample that may know
        the label. One program serves every nfe, one more every `kept`.
    `condition(state, batch)`: what the decoder knows, [b, l, d].
    `flow(state, z, t, r, cond)`: one evaluation, u [b, l, f].
    """
    loss_fn = codec_loss(model.clone(quantizer_dropout=0.0), tokenizer, config)
    sampler, temperature = flow.SAMPLERS[config.objective.name]

    @jax.jit
    def loss(state: TrainState, batch: Batch, rng: PRNGKeyArray):
        return loss_fn(state.ema_params, state.scale, batch, rng)[1]

    @jax.jit
    def condition(state: TrainState, batch: Batch, kept: Array | None = None) -> Float[Array, "b l d"]:
        x = to_tokens(signals(batch), state.scale, tokenizer, config)
        return _apply(model, state.ema_params, "condition")(x, batch.get("label"), kept)[0]

    @jax.jit
    def u(state: TrainState, z: Array, t: Array, r: Array, cond: Array) -> Float[Array, "b l f"]:
        return _apply(model, state.ema_params, "flow")(z, t, r, cond)

    @jax.jit
    def reconstruct(state: TrainState, batch: Batch, seeds: UInt32[Array, "b"], nfe: Array, kept: Array | None = None):
        signal = signals(batch)
        x = to_tokens(signal, state.scale, tokenizer, config)
        noise = lambda seed: flow.frame_noise(jax.random.key(seed), jnp.arange(x.shape[1]), x.shape[2])
        z = temperature * jax.vmap(noise)(seeds)
        cond = condition(state, batch, kept)
        x_hat = model.from_flow(sampler(_apply(model, state.ema_params, "flow"), z, cond, nfe), cond)
        decoded = from_tokens(x_hat, state.scale, tokenizer, config, signal.shape)
        return decoded, jnp.mean((x_hat - x) ** 2, axis=(1, 2))

    return {"loss": loss, "reconstruct": reconstruct, "condition": condition, "flow": u}


def classifier_loss(model: Classifier) -> LossFn:
    """Return the cross entropy of the labels."""

    def loss_fn(params: Any, scale: Array, batch: Batch, rng: PRNGKeyArray):
        logits, _ = model.apply({"params": params}, batch["image"])
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))
        accuracy = 100 * jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        return loss, {"loss": loss, "accuracy_percent": accuracy}

    return loss_fn


def classifier_predict_fns(model: Classifier) -> dict[str, Callable]:
    """Return `loss(state, batch, rng)`, the metrics, and `classify(state, image) -> (logits, features)`, jitted."""
    loss_fn = classifier_loss(model)
    loss = jax.jit(lambda state, batch, rng: loss_fn(state.ema_params, state.scale, batch, rng)[1])
    classify = jax.jit(lambda state, image: model.apply({"params": state.ema_params}, image))
    return {"loss": loss, "classify": classify}


def to_tokens(
    signal: Float[Array, "b s c"], scale: Float[Array, "f"], tokenizer: Tokenizer, config: ConfigDict
) -> Float[Array, "b l f"]:
    """Tokenize, compand and scale a signal to x, the flow's data."""
    return scaling.normalize(tokenizer.tokenize(signal), scale, config.tokens.exponent, config.tokens.eps)


def from_tokens(
    x: Float[Array, "b l f"],
    scale: Float[Array, "f"],
    tokenizer: Tokenizer,
    config: ConfigDict,
    shape: tuple[int, int, int],
) -> Float[Array, "b s c"]:
    """Invert `to_tokens`, to a signal of `shape` [b, s, c]."""
    tokens = scaling.denormalize(x, scale, config.tokens.exponent, config.tokens.eps)
    return tokenizer.detokenize(tokens, *shape[1:])


def _apply(model: CodecModel, params: Any, method: str) -> Callable:
    return functools.partial(model.apply, {"params": params}, method=method)
