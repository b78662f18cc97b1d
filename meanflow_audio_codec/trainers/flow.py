"""The path between data and noise: times drawn on it, derivatives along it, solvers back.

Convention: t = 1 is noise, t = 0 is data, 0 <= r <= t <= 1, h = t - r, and

    z_t = (1 - t) x + t e,     e ~ N(0, I),     v = e - x                             (1)
    u(z_t, t, r) = 1/h int_r^t v(z_s, s) ds,    u(z, t, t) = v(z, t)                  (2)
    z_r = z_t - h u(z_t, t, r)                                                        (3)
    d/dt u(z_t, t, r) = v d_z u + d_t u         (r held fixed)                        (4)

(2)-(4) are equations 3, 12 and 8 of "Mean Flows for One-step Generative Modeling" (arXiv
2505.13447). A network is any function `u_fn(z, t, r, cond)` of z [b, ...], t [b], r [b] and a
condition: None, or any pytree of arrays with leading axis b. Times have jax's default float type.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from meanflow_audio_codec.errors import InputError

UFn = Callable[[Array, Array, Array, Any], Array]


def per_row(t: Float[Array, "b"], like: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Give `t` the rank of `like`, so that it multiplies row by row."""
    return t.reshape(t.shape + (1,) * (like.ndim - 1))


def interpolate(x: Float[Array, "b *d"], e: Float[Array, "b *d"], t: Float[Array, "b"]) -> Float[Array, "b *d"]:
    """Return z_t of equation (1): `x` at t = 0, `e` at t = 1."""
    t = per_row(t, x)
    return (1 - t) * x + t * e


def sample_t(rng: PRNGKeyArray, batch: int, cfg: Any) -> Float[Array, "b"]:
    """Draw times for rows with r = t.

    Args:
        rng: Random key.
        batch: Number of rows.
        cfg: `time_sampler`: "official" is the logit-normal(P_mean, P_std); "mixture" is 90 %
            logit-normal(0, 1) and 10 % exactly t = 1, where a one-step sampler starts.

    Returns:
        t in [0, 1].

    Raises:
        InputError: `time_sampler` has no such name.
    """
    match cfg.time_sampler:
        case "official":
            return _logit_normal(jax.random.normal(rng, (batch,)), cfg.P_mean, cfg.P_std)
        case "mixture":
            rng_t, rng_kind = jax.random.split(rng)
            at_noise = jax.random.uniform(rng_kind, (batch,)) < 0.1
            t = _logit_normal(jax.random.normal(rng_t, (batch,)), 0.0, 1.0)
            return jnp.where(at_noise, 1.0, t)
        case name:
            raise _unknown_time_sampler(name)


def sample_t_r(rng: PRNGKeyArray, batch: int, cfg: Any) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Draw (t, r) for rows with r < t.

    Args:
        rng: Random key.
        batch: Number of rows.
        cfg: `time_sampler`: "official" is the larger and the smaller of two independent
            logit-normals(P_mean, P_std). At (-0.4, 1) it visits t > 0.9, r < 0.1, where one-step
            sampling happens, in 0.03 % of rows. "mixture", which short runs need, draws for every
            row one of: 60 % the larger and the smaller of logit-normals (0.4, 1.2) and (-0.8, 1.2);
            25 % r = 0 with t from a logit-normal(1, 1); 15 % exactly (1, 0).

    Returns:
        t and r with 0 <= r <= t <= 1.

    Raises:
        InputError: `time_sampler` has no such name.
    """
    match cfg.time_sampler:
        case "official":
            a, b = _logit_normal(jax.random.normal(rng, (2, batch)), cfg.P_mean, cfg.P_std)
            return jnp.maximum(a, b), jnp.minimum(a, b)
        case "mixture":
            rng_t, rng_kind = jax.random.split(rng)
            normals = jax.random.normal(rng_t, (3, batch))
            a, b = _logit_normal(normals[0], 0.4, 1.2), _logit_normal(normals[1], -0.8, 1.2)
            t_to_data = _logit_normal(normals[2], 1.0, 1.0)
            kind = jax.random.uniform(rng_kind, (batch,))
            inner, to_data = kind < 0.60, kind < 0.85
            t = jnp.where(inner, jnp.maximum(a, b), jnp.where(to_data, t_to_data, 1.0))
            r = jnp.where(inner, jnp.minimum(a, b), 0.0)
            return t, r
        case name:
            raise _unknown_time_sampler(name)


def average_velocity_jvp(
    u_fn: UFn,
    z: Float[Array, "b *d"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    cond: Any,
    v: Float[Array, "b *d"],
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """Return u(z, t, r) and its derivative du/dt along `v`, equation (4), from one `jax.jvp`.

    The tangent of (z, t, r) is (v, 1, 0); a swapped order trains without complaint, to a far worse
    model. Nothing inside `u_fn` may stop gradients, which silences the tangent, or define only a
    reverse rule (`custom_vjp`), which has none.
    """
    return jax.jvp(
        lambda z, t, r: u_fn(z, t, r, cond),
        (z, t, r),
        (v, jnp.ones_like(t), jnp.zeros_like(r)),
    )


def flow_map_sample(u_fn: UFn, z: Float[Array, "b *d"], cond: Any, nfe: int | Int[Array, ""]) -> Float[Array, "b *d"]:
    """Walk from noise to data in `nfe` jumps of equation (3), on the uniform grid from 1 to 0.

    With the exact average velocity every `nfe` lands on the same point; one step is
    x = e - u(e, 1, 0).

    Args:
        u_fn: Average velocity.
        z: Noise, the state at t = 1, float32.
        cond: Condition of each row, or None.
        nfe: Number of network evaluations >= 1. The program does not grow with it; traced, one program serves all.

    Returns:
        The state at t = 0.

    Raises:
        InputError: `nfe`, if a Python int, is below 1.
    """
    return _walk(u_fn, z, cond, nfe)


def euler_sample(u_fn: UFn, z: Float[Array, "b *d"], cond: Any, nfe: int | Int[Array, ""]) -> Float[Array, "b *d"]:
    """Integrate the instantaneous velocity u(z, t, t) from 1 to 0 by `nfe` Euler steps.

    For flow matching. Not `flow_map_sample`: here one step returns the mean of the data given
    `cond`, and the error falls as 1 / `nfe`.

    Args:
        u_fn: Velocity; only called with r = t.
        z: Noise, the state at t = 1, float32.
        cond: Condition of each row, or None.
        nfe: Number of network evaluations >= 1. The program does not grow with it; traced, one program serves all.

    Returns:
        The state at t = 0.

    Raises:
        InputError: `nfe`, if a Python int, is below 1.
    """
    return _walk(lambda z, t, r, cond: u_fn(z, t, t, cond), z, cond, nfe)


# How each objective's network decodes: the walk, and whether it starts from noise or, as the autoencoder, from zero.
SAMPLERS = {
    "autoencoder": (flow_map_sample, 0.0),
    "flow_matching": (euler_sample, 1.0),
    "mean_flow": (flow_map_sample, 1.0),
    "improved_mean_flow": (flow_map_sample, 1.0),
}


def frame_noise(rng: PRNGKeyArray, frames: Integer[Array, "l"], features: int) -> Float[Array, "l f"]:
    """Draw decoding noise, each frame's from `rng` and its number alone: any chunk gets what the whole would."""
    return jax.vmap(lambda frame: jax.random.normal(jax.random.fold_in(rng, frame), (features,)))(frames)


def _walk(u_fn: UFn, z: Array, cond: Any, nfe: int | Array) -> Array:
    static = isinstance(nfe, int)
    if static and nfe < 1:
        raise InputError(f"nfe={nfe}: the number of network evaluations must be at least 1")
    ones = jnp.ones(len(z))

    def step(i, z):
        t, r = ones * (nfe - i) / nfe, ones * (nfe - i - 1) / nfe  # 1 and 0 come out exactly
        return z - per_row(t - r, z) * u_fn(z, t, r, cond)

    if static and nfe == 1:  # a plain call, cheap to differentiate: a rung of training and the decoder itself
        return step(0, z)
    return jax.lax.fori_loop(0, nfe, step, z)


def _logit_normal(normal: Array, mean: float, std: float) -> Array:
    return jax.nn.sigmoid(mean + std * normal)


def _unknown_time_sampler(name: Any) -> InputError:
    return InputError(f"objective.time_sampler={name!r}: must be 'official' or 'mixture'")
