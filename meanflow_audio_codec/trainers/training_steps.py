"""The jitted steps: one update, and what evaluators may ask of the model.

audio [b, s, c] -> tokenize -> compand, scale -> x [b, l, f] -> condition -> objective(u, x, cond)
x -> condition -> sampler(u, noise, cond) -> x_hat -> unscale, expand -> detokenize -> audio
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.models.train_state import TrainState, ema_update
from meanflow_audio_codec.preprocessing import scaling
from meanflow_audio_codec.preprocessing.tokenizers import MdctTokenizer, ReshapeTokenizer
from meanflow_audio_codec.trainers import flow
from meanflow_audio_codec.trainers.objectives import OBJECTIVES

Tokenizer = MdctTokenizer | ReshapeTokenizer

# How each objective's network decodes: the walk, and whether it starts from noise or, as the autoencoder, from zero.
SAMPLERS = {
    "autoencoder": (flow.flow_map_sample, 0.0),
    "flow_matching": (flow.euler_sample, 1.0),
    "mean_flow": (flow.flow_map_sample, 1.0),
    "improved_mean_flow": (flow.flow_map_sample, 1.0),
}


def make_train_step(
    model: CodecModel, tokenizer: Tokenizer, tx: optax.GradientTransformation, config: ConfigDict
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Return `train_step(state, batch) -> (state, metrics)`, a pure function: its randomness is fold_in(seed, step)."""
    objective = OBJECTIVES[config.objective.name]

    def loss_fn(params: Any, x: Array, rng: PRNGKeyArray):
        # The code is computed once, outside the objective's JVP: along the path it is constant.
        cond, code_metrics = _apply(model, params, "condition")(x)
        loss, metrics = objective(_apply(model, params, "flow"), x, cond, rng, config.objective)
        return loss, metrics | {f"code_{name}": value for name, value in code_metrics.items()}

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        x = to_tokens(batch["audio"], state.scale, tokenizer, config)
        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params, x, rng)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {"grad": gradients, "param": params, "update": updates}
        metrics |= {f"{name}_norm": optax.tree.norm(tree) for name, tree in norms.items()}
        state = state.replace(
            step=state.step + 1,
            params=params,
            ema_params=ema_update(state.ema_params, params, state.step, config.ema.decay),
            opt_state=opt_state,
        )
        return state, metrics

    # Not donated on a CPU: a checkpoint under way may still read the old state's memory there.
    return jax.jit(train_step, donate_argnums=() if jax.default_backend() == "cpu" else 0)


def make_predict_fns(model: CodecModel, tokenizer: Tokenizer, config: ConfigDict) -> dict[str, Callable]:
    """Return what evaluators call, all with the averaged parameters.

    `loss(state, audio, rng)`: the objective's raw metrics.
    `reconstruct(state, audio, rng, nfe)`: decoded audio [b, s, c], and the squared error of each clip's tokens [b].
    """
    name = config.objective.name

    @jax.jit
    def loss(state: TrainState, audio: Float[Array, "b s c"], rng: PRNGKeyArray):
        x = to_tokens(audio, state.scale, tokenizer, config)
        cond, code_metrics = _apply(model, state.ema_params, "condition")(x)
        u_fn = _apply(model, state.ema_params, "flow")
        _, metrics = OBJECTIVES[name](u_fn, x, cond, rng, config.objective)
        return metrics | {f"code_{key}": value for key, value in code_metrics.items()}

    @functools.partial(jax.jit, static_argnames="nfe")
    def reconstruct(state: TrainState, audio: Float[Array, "b s c"], rng: PRNGKeyArray, nfe: int):
        x = to_tokens(audio, state.scale, tokenizer, config)
        cond, _ = _apply(model, state.ema_params, "condition")(x)
        sampler, temperature = SAMPLERS[name]
        z = jnp.broadcast_to(temperature * frame_noise(rng, *x.shape[1:]), x.shape)
        x_hat = sampler(_apply(model, state.ema_params, "flow"), z, cond, nfe)
        tokens = scaling.denormalize(x_hat, state.scale, config.tokens.exponent, config.tokens.eps)
        decoded = tokenizer.detokenize(tokens, audio.shape[1], audio.shape[2])
        return decoded, jnp.mean((x_hat - x) ** 2, axis=(1, 2))

    return {"loss": loss, "reconstruct": reconstruct}


def to_tokens(
    audio: Float[Array, "b s c"], scale: Float[Array, "f"], tokenizer: Tokenizer, config: ConfigDict
) -> Float[Array, "b l f"]:
    """Tokenize, compand and scale audio to x, the flow's data."""
    return scaling.normalize(tokenizer.tokenize(audio), scale, config.tokens.exponent, config.tokens.eps)


def frame_noise(rng: PRNGKeyArray, num_frames: int, features: int) -> Float[Array, "l f"]:
    """Draw a file's decoding noise: frame i depends on `rng` and i alone, so any chunk gets what the whole would."""
    draw = lambda frame: jax.random.normal(jax.random.fold_in(rng, frame), (features,))
    return jax.vmap(draw)(jnp.arange(num_frames))


def _apply(model: CodecModel, params: Any, method: str) -> Callable:
    return functools.partial(model.apply, {"params": params}, method=method)
