"""The four training objectives, rungs of one ladder: each adds one idea to the one before.

With t = 1 noise, t = 0 data, h = t - r, z_t = (1 - t) x + t e, v = e - x (see `flow.py`), and sg[.]
for stop-gradient, the residual of a clip is

    autoencoder           0 - u(0, 1, 0) - x                                             (1)
    flow_matching         u(z_t, t, t) - v                                               (2)
    mean_flow             u(z_t, t, r) - sg[v - h du/dt],   du/dt along v                (3)
    improved_mean_flow    u(z_t, t, r) + h sg[du/dt] - v,   du/dt along sg[u(z_t, t, t)] (4)

(2) is flow matching on the straight path (arXiv 2210.02747), (3) equations 9-11 of MeanFlow (arXiv
2505.13447), (4) equations 9-12 of improved MeanFlow (arXiv 2512.02012) with the boundary velocity
as tangent, or with the velocity of an auxiliary head, which then adds its own error ||v_head - v||^2
to the loss. (3) and (4) are one residual: they differ in the tangent alone. (1) is the one-step
decoder of (3) and (4) with its noise switched off, so it learns the mean of the data given `cond`.

The share `fm_fraction` of the rows of (3) and (4) has r = t and residual (2), which anchors
u(z, t, t) at the velocity. (Public codes use one word for this share and for its complement.) They
are the first rows of the batch, a static slice through the plain forward: only the others pay for
the derivative.

Adaptive weight (MeanFlow, equation 22), with Delta_b^2 the SUM, not the mean, of the squared
residual over all axes of clip b:

    loss = mean_b [ Delta_b^2 / sg(Delta_b^2 + norm_eps)^norm_p ]                        (5)

`norm_p = 0` is the plain sum of squares. With `norm_p = 1` a loss near 1 and flat is normal:
progress shows in the raw errors, which are in the metrics. Over the many coefficients of a clip
Delta_b^2 hardly varies about its mean and the weight leaves the optimum in place; over one or two
it moves it from the mean towards a mode.

Beside another loss of the same network the weight can lose (3) and (4): the farther du/dt runs away, the larger is
Delta_b, and the less they pull. With `hdudt_limit` a row's h du/dt is at most so many times ||u||.

With `weight` [f] the squares in Delta_b^2 count by the feature, the last axis: the optimum stays the same, what a small
network and a short code are spent on does not.

Every objective is `objective(u_fn, x, cond, rng, cfg) -> (loss, metrics)`. `cfg` has `norm_p` and
`norm_eps`, for the flows `time_sampler`, `P_mean`, `P_std`, `fm_fraction`, and for mean flows
`hdudt_limit`, 0 for none. Times, residuals and losses are float32 whatever the network works in
(float64 for float64 data). Gradients reach the network and `cond` through the primal u only.

Metrics are scalars, finite where the residuals are, and an objective's keys never change. Errors
are raw: unweighted means over coefficients, in units of x squared. `v_mse` is (2) over the r = t
rows, `v_mse_t0_25` ... `v_mse_t75_100` the same in a quarter of t, `v_share_t0_25` ... the share of
those rows that fall in it: an error over no rows is 0 and has share 0, so average with the shares
as weights. `u_mse` is (3) or (4) over the other rows; `hdudt_over_u` is ||h du/dt|| / ||u|| over
them, healthy below about 1.5. `x_mse` is (1). `v_head_mse` is the auxiliary head's error.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.trainers import flow

Weight = Float[Array, "f"] | None
Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
Tangent = Callable[[flow.UFn, Array, Array, Any, Array], Array]

T_QUARTERS = ("t0_25", "t25_50", "t50_75", "t75_100")


def autoencoder(
    u_fn: flow.UFn, x: Float[Array, "b ..."], cond: Any, rng: PRNGKeyArray, cfg: Any, weight: Weight = None
) -> Loss:
    """Regress the data by one step from z = 0, equation (1). Deterministic: `rng` is not used."""
    x = _at_least_float32(x)
    x_hat = flow.flow_map_sample(u_fn, jnp.zeros_like(x), cond, nfe=1)
    residual = x_hat - x
    loss = jnp.mean(_weighted(residual, cfg, weight))
    return loss, jax.lax.stop_gradient({"loss": loss, "x_mse": _mean(residual**2)})


def flow_matching(
    u_fn: flow.UFn, x: Float[Array, "b ..."], cond: Any, rng: PRNGKeyArray, cfg: Any, weight: Weight = None
) -> Loss:
    """Regress the velocity at r = t, equation (2)."""
    x, e, rng_t, _ = _draw(rng, x)
    t = flow.sample_t(rng_t, len(x), cfg)
    residual = _v_residual(u_fn, x, e, t, cond)
    loss = jnp.mean(_weighted(residual, cfg, weight))
    return loss, jax.lax.stop_gradient({"loss": loss, **_v_metrics(residual, t)})


def mean_flow(
    u_fn: flow.UFn, x: Float[Array, "b ..."], cond: Any, rng: PRNGKeyArray, cfg: Any, weight: Weight = None
) -> Loss:
    """Regress the average velocity, equation (3), with the derivative along v = e - x."""
    return _mean_flow_loss(u_fn, x, cond, rng, cfg, weight, _conditional_velocity)


def improved_mean_flow(
    u_fn: flow.UFn,
    x: Float[Array, "b ..."],
    cond: Any,
    rng: PRNGKeyArray,
    cfg: Any,
    weight: Weight = None,
    v_fn: Callable[[Array, Array, Any], Array] | None = None,
) -> Loss:
    """Regress the average velocity, equation (4), with the derivative along u(z, t, t).

    With `v_fn(z, t, cond)`, an auxiliary head, the derivative goes along its velocity instead, and the head learns by
    its own weighted error over all rows (arXiv 2512.02012, appendix A).
    """
    return _mean_flow_loss(u_fn, x, cond, rng, cfg, weight, _boundary_velocity, v_fn)


OBJECTIVES = {f.__name__: f for f in (autoencoder, flow_matching, mean_flow, improved_mean_flow)}


def _mean_flow_loss(
    u_fn: flow.UFn,
    x: Array,
    cond: Any,
    rng: PRNGKeyArray,
    cfg: Any,
    weight: Weight,
    tangent: Tangent,
    v_fn: Callable | None = None,
) -> Loss:
    x, e, rng_t, rng_t_r = _draw(rng, x)
    n_fm = _num_fm_rows(cfg.fm_fraction, len(x))
    first, rest = slice(None, n_fm), slice(n_fm, None)
    if v_fn is not None:
        tangent = lambda u_fn, z, t, cond, v: jax.lax.stop_gradient(v_fn(z, t, cond)).astype(z.dtype)

    t = flow.sample_t(rng_t, n_fm, cfg)
    v_residual = _v_residual(u_fn, x[first], e[first], t, _rows(cond, first))
    t_mf, r_mf = flow.sample_t_r(rng_t_r, len(x) - n_fm, cfg)
    u_residual, hdudt_over_u = _u_residual(
        u_fn, x[rest], e[rest], t_mf, r_mf, _rows(cond, rest), tangent, cfg.hdudt_limit
    )

    terms = jnp.concatenate([_weighted(v_residual, cfg, weight), _weighted(u_residual, cfg, weight)])
    metrics = {**_v_metrics(v_residual, t), "u_mse": _mean(u_residual**2), "hdudt_over_u": hdudt_over_u}
    if v_fn is not None:
        times = jnp.concatenate([t, t_mf])
        head_residual = v_fn(flow.interpolate(x, e, times), times, cond) - (e - x)
        terms += _weighted(head_residual, cfg, weight)
        metrics["v_head_mse"] = _mean(head_residual**2)
    loss = jnp.mean(terms)
    return loss, jax.lax.stop_gradient({"loss": loss, **metrics})


def _v_residual(u_fn: flow.UFn, x: Array, e: Array, t: Array, cond: Any) -> Array:
    """Equation (2)."""
    if not len(x):
        return jnp.zeros_like(x)
    return u_fn(flow.interpolate(x, e, t), t, t, cond) - (e - x)


def _u_residual(
    u_fn: flow.UFn, x: Array, e: Array, t: Array, r: Array, cond: Any, tangent: Tangent, limit: float
) -> tuple[Array, Array]:
    """Equations (3) and (4), and ||h du/dt|| / ||u|| before the limit."""
    if not len(x):
        return jnp.zeros_like(x), jnp.zeros((), x.dtype)
    v = e - x
    z = flow.interpolate(x, e, t)
    u, du_dt = flow.average_velocity_jvp(u_fn, z, t, r, cond, tangent(u_fn, z, t, cond, v))
    u = u.astype(x.dtype)
    h_du_dt = flow.per_row(t - r, x) * jax.lax.stop_gradient(du_dt).astype(x.dtype)
    # The small number serves a zero-initialised network, where the ratio is 0 / 0.
    ratio = jnp.sqrt(jnp.sum(h_du_dt**2)) / (jnp.sqrt(jnp.sum(u**2)) + 1e-8)
    if limit:
        size, of_u = (jnp.sqrt(jnp.sum(a**2, axis=tuple(range(1, x.ndim)), keepdims=True)) for a in (h_du_dt, u))
        h_du_dt *= jax.lax.stop_gradient(jnp.minimum(1.0, limit * of_u / (size + 1e-8)))
    return u + h_du_dt - v, ratio


def _conditional_velocity(u_fn: flow.UFn, z: Array, t: Array, cond: Any, v: Array) -> Array:
    return v


def _boundary_velocity(u_fn: flow.UFn, z: Array, t: Array, cond: Any, v: Array) -> Array:
    return jax.lax.stop_gradient(u_fn(z, t, t, cond)).astype(z.dtype)


def _draw(rng: PRNGKeyArray, x: Array) -> tuple[Array, Array, PRNGKeyArray, PRNGKeyArray]:
    """Return x in float32, noise for all rows, and the keys for t and for (t, r)."""
    x = _at_least_float32(x)
    rng_e, rng_t, rng_t_r = jax.random.split(rng, 3)
    return x, jax.random.normal(rng_e, x.shape, x.dtype), rng_t, rng_t_r


def _num_fm_rows(fm_fraction: float, batch: int) -> int:
    if not 0 <= fm_fraction <= 1:
        raise InputError(f"objective.fm_fraction={fm_fraction}: must lie between 0 and 1")
    return round(fm_fraction * batch)


def _rows(cond: Any, rows: slice) -> Any:
    return jax.tree.map(lambda a: a[rows], cond)


def _weighted(residual: Float[Array, "b ..."], cfg: Any, weight: Weight) -> Float[Array, "b"]:
    """Each clip's term of equation (5)."""
    squares = residual**2 if weight is None else residual**2 * weight
    delta2 = jnp.sum(squares, axis=tuple(range(1, residual.ndim)))
    return delta2 / jax.lax.stop_gradient(delta2 + cfg.norm_eps) ** cfg.norm_p


def _v_metrics(residual: Float[Array, "b ..."], t: Float[Array, "b"]) -> dict[str, Array]:
    row_mse = jnp.mean(residual**2, axis=tuple(range(1, residual.ndim)))
    quarter = jnp.minimum((4 * t).astype(int), 3)  # t = 1 belongs to the last
    inside = quarter[None, :] == jnp.arange(4)[:, None]
    count = inside.sum(1)
    mse = jnp.where(inside, row_mse[None, :], 0).sum(1) / jnp.maximum(count, 1)
    share = count / jnp.maximum(len(t), 1)
    return {
        "v_mse": _mean(row_mse),
        **{f"v_mse_{name}": mse[i] for i, name in enumerate(T_QUARTERS)},
        **{f"v_share_{name}": share[i] for i, name in enumerate(T_QUARTERS)},
    }


def _mean(a: Array) -> Float[Array, ""]:
    """The mean, and 0 where there is nothing to average."""
    return jnp.sum(a) / max(a.size, 1)


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
