"""objectives.py: identities between the objectives, exact error floors, two modes in one step."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.trainers import flow, objectives
from meanflow_audio_codec.trainers.objectives import OBJECTIVES

pytestmark = pytest.mark.usefixtures("compile_fast")
FLOWS = ["flow_matching", "mean_flow", "improved_mean_flow"]
MEAN_FLOWS = ["mean_flow", "improved_mean_flow"]


def config(**overrides):
    fields = {
        "time_sampler": "mixture",
        "P_mean": -0.4,
        "P_std": 1.0,
        "fm_fraction": 0.5,
        "hdudt_limit": 0.0,
        "norm_p": 1.0,
        "norm_eps": 1e-2,
    }
    return SimpleNamespace(**(fields | overrides))


def key(seed=0):
    return jax.random.key(seed)


def loss_and_gradients(name, mlp, params, x, cond, cfg):
    """Loss, and gradients with respect to the network and the condition."""
    loss = lambda params, cond: OBJECTIVES[name](functools.partial(mlp.apply, params), x, cond, key(7), cfg)[0]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, cond)


@pytest.fixture
def problem(mlp):
    """A random network, data and condition."""
    rng_params, rng_x, rng_cond = jax.random.split(key(), 3)
    return (
        mlp.init(rng_params, d=3, depth=0),
        jax.random.normal(rng_x, (16, 3)),
        jax.random.normal(rng_cond, (16, 3)),
    )


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_objectives_are_known_by_their_names():
    assert list(OBJECTIVES) == ["autoencoder", *FLOWS]
    assert all(OBJECTIVES[name].__name__ == name for name in OBJECTIVES)


# --- identities between objectives


def test_with_r_equal_t_everywhere_the_three_flows_are_one(mlp, problem):
    """Bitwise, loss and gradients: the anchor of every mean flow is flow matching."""
    flows = [loss_and_gradients(name, mlp, *problem, config(fm_fraction=1.0)) for name in FLOWS]
    assert_trees_equal(flows[0], flows[1])
    assert_trees_equal(flows[0], flows[2])
    assert flows[0][0] > 0


@pytest.mark.parametrize("tangent", ["_conditional_velocity", "_boundary_velocity"])
def test_rows_with_a_derivative_become_flow_matching_at_r_equal_t(mlp, problem, tangent):
    """The same through the derivative's own path: h = 0 removes it, bitwise."""
    params, x, cond = problem
    e, t = jax.random.normal(key(1), x.shape), jax.random.uniform(key(2), (16,))
    tangent = getattr(objectives, tangent)

    def sum_of_squares(residual_of):
        loss = lambda params, cond: jnp.sum(residual_of(functools.partial(mlp.apply, params), cond) ** 2)
        return jax.value_and_grad(loss, argnums=(0, 1))(params, cond)

    v_rows = sum_of_squares(lambda u_fn, cond: objectives._v_residual(u_fn, x, e, t, cond))
    u_rows = sum_of_squares(lambda u_fn, cond: objectives._u_residual(u_fn, x, e, t, t, cond, tangent, 0.0)[0])
    assert_trees_equal(v_rows, u_rows)


def test_improved_mean_flow_with_the_conditional_tangent_is_mean_flow(mlp, problem, monkeypatch):
    mean_flow = loss_and_gradients("mean_flow", mlp, *problem, config())
    monkeypatch.setattr(objectives, "_boundary_velocity", objectives._conditional_velocity)
    assert_trees_equal(mean_flow, loss_and_gradients("improved_mean_flow", mlp, *problem, config()))


def test_residuals_are_the_published_ones(x64, mlp, problem):
    """Both mean flows as their papers write them, the derivative by central difference."""
    params, x, cond = jax.tree.map(lambda a: a.astype(float), problem)
    u_fn = functools.partial(mlp.apply, params)
    e = jax.random.normal(key(1), x.shape)
    t, r = jnp.linspace(0.3, 0.99, 16), jnp.linspace(0.0, 0.8, 16)
    z, v, h = (1 - t)[:, None] * x + t[:, None] * e, e - x, (t - r)[:, None]

    def derivative(w, d=1e-5):
        ahead, behind = u_fn(z + d * w, t + d, r, cond), u_fn(z - d * w, t - d, r, cond)
        return (ahead - behind) / (2 * d)

    u_tgt = v - h * derivative(v)
    residual, _ = objectives._u_residual(u_fn, x, e, t, r, cond, objectives._conditional_velocity, 0.0)
    np.testing.assert_allclose(residual, u_fn(z, t, r, cond) - u_tgt, atol=1e-7)

    V = u_fn(z, t, r, cond) + h * derivative(u_fn(z, t, t, cond))
    residual, _ = objectives._u_residual(u_fn, x, e, t, r, cond, objectives._boundary_velocity, 0.0)
    np.testing.assert_allclose(residual, V - v, atol=1e-7)


@pytest.mark.parametrize("name", MEAN_FLOWS)
def test_the_target_carries_no_gradient(mlp, problem, name):
    """Freezing du/dt, and the tangent with it, by hand gives the same gradient."""
    params, x, cond = problem
    cfg = config(fm_fraction=0.0, norm_p=0.0)
    _, (gradient, _) = loss_and_gradients(name, mlp, params, x, cond, cfg)

    x, e, _, rng_t_r = objectives._draw(key(7), x)
    t, r = flow.sample_t_r(rng_t_r, 16, cfg)
    z, v, h = flow.interpolate(x, e, t), e - x, (t - r)[:, None]
    u_fn = functools.partial(mlp.apply, params)
    w = v if name == "mean_flow" else u_fn(z, t, t, cond)
    u_tgt = v - h * flow.average_velocity_jvp(u_fn, z, t, r, cond, w)[1]  # a constant below
    by_hand = jax.grad(lambda params: jnp.mean(jnp.sum((mlp.apply(params, z, t, r, cond) - u_tgt) ** 2, axis=1)))(
        params
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradient, by_hand)


# --- error floors


def test_exact_velocity_reaches_the_floor_of_flow_matching_in_every_quarter_of_t(gaussian):
    x = gaussian.m + gaussian.s * jax.random.normal(key(), (20_000, 2))
    _, metrics = objectives.flow_matching(gaussian.u, x, None, key(1), config())
    _, _, rng_t, _ = objectives._draw(key(1), x)
    t = flow.sample_t(rng_t, len(x), config())
    floor = np.asarray(gaussian.velocity_variance(t))
    np.testing.assert_allclose(metrics["v_mse"], floor.mean(), rtol=0.03)
    for i, name in enumerate(objectives.T_QUARTERS):
        inside = (t >= i / 4) & ((t < (i + 1) / 4) | (i == 3))
        np.testing.assert_allclose(metrics[f"v_share_{name}"], inside.mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics[f"v_mse_{name}"], floor[inside].mean(), rtol=0.06)


@pytest.mark.parametrize("name, power", [("mean_flow", 4), ("improved_mean_flow", 2)])
def test_exact_average_velocity_leaves_the_tangents_own_noise(gaussian, monkeypatch, name, power):
    """At (t, r) = (1, 0): s^2 along u(z, t, t); along e - x, that times the map's squared slope."""
    monkeypatch.setattr(flow, "sample_t_r", lambda rng, b, cfg: (jnp.ones(b), jnp.zeros(b)))
    x = gaussian.m + gaussian.s * jax.random.normal(key(), (20_000, 2))
    _, metrics = OBJECTIVES[name](gaussian.u, x, None, key(1), config(fm_fraction=0.0))
    np.testing.assert_allclose(metrics["u_mse"], gaussian.s**power, rtol=0.03)


def test_derivative_ratio_of_a_linear_network(problem):
    """u = 2 t + 3 r has du/dt = 2."""
    _, x, _ = problem
    cfg = config(fm_fraction=0.0)
    u_fn = lambda z, t, r, cond: 2 * t[:, None] + 3 * r[:, None] + jnp.zeros_like(z)
    _, metrics = objectives.improved_mean_flow(u_fn, x, None, key(7), cfg)
    t, r = map(np.asarray, flow.sample_t_r(objectives._draw(key(7), x)[3], 16, cfg))
    expected = np.linalg.norm((t - r) * 2) / np.linalg.norm(2 * t + 3 * r)
    np.testing.assert_allclose(metrics["hdudt_over_u"], expected, rtol=1e-5)


# --- the autoencoder


def test_autoencoder_is_one_step_from_zero_noise(mlp, problem):
    params, x, cond = problem
    u_fn = functools.partial(mlp.apply, params)
    loss, metrics = objectives.autoencoder(u_fn, x, cond, key(), config(norm_p=0.0))
    # The network's x_hat at z = 0, t = 1, r = 0; u = (z - x_hat) / 1.
    x_hat = -mlp.apply(params, jnp.zeros_like(x), jnp.ones(16), jnp.zeros(16), cond)
    np.testing.assert_allclose(metrics["x_mse"], np.mean((x_hat - x) ** 2), rtol=1e-6)
    np.testing.assert_allclose(loss, np.mean(np.sum((x_hat - x) ** 2, axis=1)), rtol=1e-6)
    again, _ = objectives.autoencoder(u_fn, x, cond, key(99), config(norm_p=0.0))
    assert again == loss


# --- the weight


@pytest.mark.parametrize("norm_p", [0.0, 0.75, 1.0])
def test_adaptive_weight_by_hand(norm_p):
    """Summed over a clip before weighting, averaged over clips after; the weight is constant."""
    x = jax.random.normal(key(), (4, 5, 2))
    cond = 2 * jax.random.normal(key(1), x.shape)
    cfg = config(norm_p=norm_p, norm_eps=0.3)
    loss = lambda cond: objectives.autoencoder(lambda z, t, r, c: -c, x, cond, key(), cfg)[0]

    residual = np.asarray(cond - x, np.float64)
    delta2 = (residual**2).sum((1, 2))
    weight = (delta2 + 0.3) ** -norm_p
    np.testing.assert_allclose(loss(cond), (weight * delta2).mean(), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(cond), 2 * weight[:, None, None] * residual / 4, rtol=1e-5)


@pytest.mark.parametrize("name", MEAN_FLOWS)
def test_a_derivative_that_ran_away_counts_as_so_many_times_u(name):
    x, cfg = jax.random.normal(key(), (64, 5)), config(fm_fraction=0.0, hdudt_limit=1.5)
    u_fn = lambda z, t, r, cond: jnp.broadcast_to(2 + jnp.sin(9 * t)[:, None], z.shape)
    _, metrics = OBJECTIVES[name](u_fn, x, None, key(1), cfg)

    _, e, _, rng_t_r = objectives._draw(key(1), x)
    t, r = (np.asarray(a)[:, None] for a in flow.sample_t_r(rng_t_r, 64, cfg))
    u, h_du_dt = 2 + np.sin(9 * t), (t - r) * 9 * np.cos(9 * t)
    limited = np.clip(h_du_dt, -1.5 * u, 1.5 * u)
    assert 0 < (limited != h_du_dt).sum() < 64
    np.testing.assert_allclose(metrics["u_mse"], np.mean((u + limited - np.asarray(e - x)) ** 2), rtol=1e-5)
    ratio = np.sqrt(np.sum(h_du_dt**2) / np.sum(u**2))
    np.testing.assert_allclose(metrics["hdudt_over_u"], ratio, rtol=1e-5)  # as it is, for the log to warn


# --- rows


@pytest.mark.parametrize("name", MEAN_FLOWS)
def test_rows_with_r_equal_t_do_not_pay_for_the_derivative(name):
    calls = []

    def u_fn(z, t, r, cond):
        calls.append((len(z), len(t), len(cond["c"]), isinstance(z, jax.core.Tracer)))
        return z * cond["c"][:, None]

    x, cond = jnp.ones((10, 2)), {"c": jnp.arange(10.0)}
    OBJECTIVES[name](u_fn, x, cond, key(), config(fm_fraction=0.7))
    boundary = [(3, 3, 3, False)] if name == "improved_mean_flow" else []
    assert calls == [(7, 7, 7, False), *boundary, (3, 3, 3, True)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_reaches_the_condition_of_every_row(mlp, problem, name):
    _, (_, cond_gradient) = loss_and_gradients(name, mlp, *problem, config())
    assert (jnp.abs(cond_gradient).max(axis=1) > 0).all()


@pytest.mark.parametrize(
    "name, fm_fraction",
    [("autoencoder", 0.5), ("flow_matching", 0.5)]
    + [(name, fraction) for name in MEAN_FLOWS for fraction in (0.0, 0.5, 1.0)],
)
def test_metrics_are_finite_scalars_with_fixed_names(name, fm_fraction):
    """Also where no rows exist to average over, and for a network that starts at zero."""
    cfg = config(fm_fraction=fm_fraction)
    zero = lambda z, t, r, cond: 0 * z
    loss, metrics = jax.jit(lambda x: OBJECTIVES[name](zero, x, None, key(), cfg))(jnp.ones((4, 3, 2)))
    quarters = [f"{m}_{q}" for m in ("v_mse", "v_share") for q in objectives.T_QUARTERS]
    expected = {
        "autoencoder": {"loss", "x_mse"},
        "flow_matching": {"loss", "v_mse", *quarters},
    }.get(name, {"loss", "v_mse", *quarters, "u_mse", "hdudt_over_u"})
    assert set(metrics) == expected
    assert metrics["loss"] == loss
    assert all(m.shape == () and jnp.isfinite(m) for m in metrics.values())
    if name in MEAN_FLOWS:
        assert (metrics["v_mse"] > 0) == (fm_fraction > 0)
        assert (metrics["u_mse"] > 0) == (fm_fraction < 1)


@pytest.mark.parametrize("fm_fraction", [-0.1, 1.5])
def test_fm_fraction_outside_the_unit_interval_is_refused(problem, fm_fraction):
    with pytest.raises(InputError, match="objective.fm_fraction"):
        objectives.mean_flow(lambda z, t, r, cond: z, problem[1], None, key(), config(fm_fraction=fm_fraction))


@pytest.mark.parametrize("name", FLOWS)
def test_noise_and_times_follow_the_key(problem, name):
    u_fn = lambda z, t, r, cond: z * r[:, None]
    run = jax.jit(lambda rng: OBJECTIVES[name](u_fn, problem[1], None, rng, config())[0])
    assert run(key(1)) == run(key(1)) != run(key(2))


# --- precision


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_float32_around_a_bfloat16_network(mlp, problem, name):
    params, x, cond = problem

    def u_fn(z, t, r, cond):
        assert z.dtype == t.dtype == r.dtype == jnp.float32
        half = lambda a: a.astype(jnp.bfloat16)
        return mlp.apply(jax.tree.map(half, params), half(z), half(t), half(r), half(cond))

    loss, metrics = OBJECTIVES[name](u_fn, x.astype(jnp.bfloat16), cond, key(7), config(norm_p=0.0))
    assert all(m.dtype == jnp.float32 for m in metrics.values())
    reference = loss_and_gradients(name, mlp, params, x.astype(jnp.bfloat16), cond, config(norm_p=0.0))[0]
    # bfloat16 keeps 8 bits; the derivative of (z - x_hat) / t multiplies its error.
    np.testing.assert_allclose(loss, reference, rtol=0.1)


# --- training


@pytest.fixture
def train(mlp, bimodal):
    """`train(name) -> u_fn`: a small network, fitted to the two modes."""

    def fit(name, steps=2000, batch=256):
        tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
        cfg = config(norm_p=0.0)  # in one dimension the weight would move the mean to a mode

        def update(state, step):
            params, opt_state = state
            rng_x, rng = jax.random.split(jax.random.fold_in(key(3), step))
            x = bimodal.sample(rng_x, (batch, 1))
            loss = lambda params: OBJECTIVES[name](functools.partial(mlp.apply, params), x, None, rng, cfg)
            gradient, metrics = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), metrics

        params = mlp.init(key(4), d=1, width=64, depth=2)
        scan = jax.jit(lambda state: jax.lax.scan(update, state, jnp.arange(steps)))
        (params, _), metrics = scan((params, tx.init(params)))
        assert all(jnp.isfinite(m).all() for m in metrics.values())
        return functools.partial(mlp.apply, params)

    return fit


def test_one_step_hits_both_modes_where_flow_matching_collapses(train, bimodal):
    e = jax.random.normal(key(5), (4000, 1))

    improved = train("improved_mean_flow")
    left, right = bimodal.near_modes(flow.flow_map_sample(improved, e, None, 1))
    assert left + right > 0.8
    assert min(left, right) > 0.35

    matching = train("flow_matching")
    assert sum(bimodal.near_modes(flow.euler_sample(matching, e, None, 1))) < 0.2
    assert sum(bimodal.near_modes(flow.euler_sample(matching, e, None, 64))) > 0.8


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weighted_features_count_by_their_weight(name):
    """Weight 0 silences a feature, weight 4 counts as a residual of twice the size."""
    u_fn = lambda z, t, r, cond: 0.3 * z
    x, cfg = jax.random.normal(key(1), (8, 5, 2)), config(norm_p=0.0)
    whole = lambda weight: OBJECTIVES[name](u_fn, x, None, key(), cfg, jnp.array(weight))[0]
    first, second, both = whole([1.0, 0.0]), whole([0.0, 4.0]), whole([1.0, 4.0])
    np.testing.assert_allclose(first + second, both, rtol=1e-6)
    np.testing.assert_allclose(second, 4 * whole([0.0, 1.0]), rtol=1e-6)
    np.testing.assert_allclose(whole([1.0, 1.0]), OBJECTIVES[name](u_fn, x, None, key(), cfg)[0], rtol=1e-6)
