"""flow.py against laws whose flow is known exactly, and samplers against their distributions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.trainers import flow

pytestmark = pytest.mark.usefixtures("compile_fast")
OFFICIAL = SimpleNamespace(time_sampler="official", P_mean=-0.4, P_std=1.0)
MIXTURE = SimpleNamespace(time_sampler="mixture", P_mean=-0.4, P_std=1.0)


def key(seed=0):
    return jax.random.key(seed)


def z_t_r(seed=0, batch=64, d=1):
    """States and times inside the square 0 < r < t < 1."""
    rng_z, rng_t, rng_r = jax.random.split(key(seed), 3)
    t = jax.random.uniform(rng_t, (batch,), minval=0.2, maxval=0.99)
    r = t * jax.random.uniform(rng_r, (batch,), minval=0.0, maxval=0.9)
    return jax.random.normal(rng_z, (batch, d)), t, r


# --- the path


def test_interpolate_ends_at_data_and_at_noise_and_broadcasts_over_any_rank():
    x, e = jnp.full((3, 2, 4), 2.0), jnp.full((3, 2, 4), -6.0)
    z = flow.interpolate(x, e, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_array_equal(z[:, 0, 0], [2.0, 0.0, -6.0])
    assert z.shape == x.shape


# --- the derivative


def test_exact_average_velocity_satisfies_the_mean_flow_identity(x64, gaussian):
    z, t, r = z_t_r(d=3)
    v = gaussian.v(z, t)
    u, du_dt = flow.average_velocity_jvp(gaussian.u, z, t, r, None, v)
    np.testing.assert_allclose(u + (t - r)[:, None] * du_dt, v, rtol=0, atol=1e-12)


def test_swapped_tangent_violates_the_mean_flow_identity(x64, gaussian):
    """So the test above would notice it."""
    z, t, r = z_t_r(d=3)
    v = gaussian.v(z, t)
    swapped = lambda z, a, b, cond: gaussian.u(z, b, a)
    u, du_dt = flow.average_velocity_jvp(swapped, z, r, t, None, v)
    assert jnp.max(jnp.abs(u + (t - r)[:, None] * du_dt - v)) > 0.1


def test_derivative_of_a_linear_network_is_known(x64):
    rng_a, rng_v = jax.random.split(key())
    A = jax.random.normal(rng_a, (3, 3))
    b, c = jnp.array([1.0, 2.0, 3.0]), jnp.array([-5.0, 7.0, 11.0])
    u_fn = lambda z, t, r, cond: z @ A.T + t[:, None] * b[None] + r[:, None] * c[None]
    z, t, r = z_t_r(d=3)
    v = jax.random.normal(rng_v, z.shape)
    u, du_dt = flow.average_velocity_jvp(u_fn, z, t, r, None, v)
    np.testing.assert_array_equal(u, u_fn(z, t, r, None))
    np.testing.assert_allclose(du_dt, v @ A.T + b[None], rtol=1e-13)


def test_derivative_equals_a_central_difference_along_the_path(x64, mlp):
    params = mlp.init(key(), d=3, depth=1)
    z, t, r = z_t_r(d=3)
    cond, v = z[::-1], jnp.sin(z)
    u_fn = lambda z, t, r, cond: mlp.apply(params, z, t, r, cond)
    _, du_dt = flow.average_velocity_jvp(u_fn, z, t, r, cond, v)
    d = 1e-5
    ahead, behind = u_fn(z + d * v, t + d, r, cond), u_fn(z - d * v, t - d, r, cond)
    # t stays away from the kink of clip(t, 0.05, 1); the difference errs by O(d^2) + eps / d.
    np.testing.assert_allclose(du_dt, (ahead - behind) / (2 * d), rtol=0, atol=1e-7)


# --- closed forms


@pytest.mark.parametrize("law", ["gaussian", "bimodal"])
def test_average_velocity_of_the_closed_forms_is_additive_over_intervals(x64, request, law):
    """(t - r) u(z_t, t, r) = (t - s) u(z_t, t, s) + (s - r) u(z_s, s, r)."""
    law = request.getfixturevalue(law)
    z, t, r = z_t_r()
    s = (t + r) / 2
    whole = (t - r)[:, None] * law.u(z, t, r)
    first = (t - s)[:, None] * law.u(z, t, s)
    second = (s - r)[:, None] * law.u(z - first, s, r)
    np.testing.assert_allclose(first + second, whole, rtol=0, atol=1e-12)


def test_bimodal_closed_form_agrees_with_the_ode(x64, bimodal):
    """The oracle's own check: quantile map against Runge-Kutta through the posterior velocity."""
    z, t, r = z_t_r(batch=16)
    step = (t - r)[:, None] / 400

    def runge_kutta(_, state):
        y, s = state
        k1 = bimodal.v(y, s)
        k2 = bimodal.v(y - step / 2 * k1, s - step / 2)
        k3 = bimodal.v(y - step / 2 * k2, s - step / 2)
        k4 = bimodal.v(y - step * k3, s - step)
        return y - step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), s - step

    y, _ = jax.lax.fori_loop(0, 400, runge_kutta, (z, t[:, None]))
    np.testing.assert_allclose(y, bimodal.flow(z, t[:, None], r[:, None]), rtol=0, atol=1e-7)


# --- solvers


@pytest.mark.parametrize("nfe", [1, 2, 4, 16])
def test_exact_average_velocity_lands_on_the_data_in_any_number_of_steps(x64, gaussian, nfe):
    e = jax.random.normal(key(), (32, 3))
    x = flow.flow_map_sample(gaussian.u, e, None, nfe)
    np.testing.assert_allclose(x, gaussian.m + gaussian.s * e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nfe", [1, 4])
def test_exact_average_velocity_of_two_modes_draws_both(x64, bimodal, nfe):
    e = jax.random.normal(key(), (4000, 1))
    x = flow.flow_map_sample(bimodal.u, e, None, nfe)
    # Kolmogorov-Smirnov against the law itself; the same noise makes the test deterministic.
    assert scipy.stats.kstest(x[:, 0], lambda q: bimodal.cdf(q, 0.0)).pvalue > 0.01
    left, right = bimodal.near_modes(x)
    assert abs(left - 0.5) < 0.03 and abs(right - 0.5) < 0.03


def test_one_euler_step_collapses_to_the_mean_of_the_data(x64, bimodal, gaussian):
    e = jax.random.normal(key(), (100, 1))
    np.testing.assert_allclose(flow.euler_sample(bimodal.u, e, None, 1), 0.0, atol=1e-12)
    np.testing.assert_allclose(flow.euler_sample(gaussian.u, e, None, 1), gaussian.m, atol=1e-12)


def test_euler_converges_to_the_flow_at_first_order(x64, gaussian):
    e = jax.random.normal(key(), (32, 3))
    exact = gaussian.m + gaussian.s * e
    error = [jnp.abs(flow.euler_sample(gaussian.u, e, None, nfe) - exact).max() for nfe in (32, 64, 128)]
    np.testing.assert_allclose([error[0] / error[1], error[1] / error[2]], 2.0, rtol=0.05)


def test_solvers_visit_the_uniform_grid_and_pass_the_condition():
    cond = {"a": jnp.arange(2.0)}
    visits = []

    def u_fn(z, t, r, cond):
        jax.debug.callback(lambda t, r: visits.append((float(t[0]), float(r[0]))), t, r)
        return cond["a"][:, None] * jnp.ones_like(z)

    z = jnp.zeros((2, 3))
    x = flow.flow_map_sample(u_fn, z, cond, 4)
    jax.effects_barrier()
    assert sorted(visits, reverse=True) == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]
    np.testing.assert_array_equal(x, [[0, 0, 0], [-1, -1, -1]])
    visits.clear()
    flow.euler_sample(u_fn, z, cond, 2)
    jax.effects_barrier()
    assert sorted(visits, reverse=True) == [(1, 1), (0.5, 0.5)]


@pytest.mark.parametrize("solver", [flow.flow_map_sample, flow.euler_sample])
def test_solver_program_does_not_grow_with_the_number_of_steps(solver, gaussian):
    size = lambda nfe: len(
        str(jax.make_jaxpr(lambda z: solver(gaussian.u, z, None, nfe))(jnp.zeros((2, 1)))).split("\n")
    )
    assert size(200) == size(2)


@pytest.mark.parametrize("solver", [flow.flow_map_sample, flow.euler_sample])
def test_solver_refuses_no_steps(solver, gaussian):
    with pytest.raises(InputError, match="nfe=0"):
        solver(gaussian.u, jnp.zeros((2, 1)), None, 0)


# --- times


def logit_normal_cdf(q, mean, std):
    return scipy.stats.norm.cdf((np.log(q) - np.log1p(-q) - mean) / std)


def fits(sample, cdf):
    return scipy.stats.kstest(np.asarray(sample, float), cdf).pvalue > 0.01


@pytest.mark.parametrize("cfg", [OFFICIAL, MIXTURE])
def test_times_are_ordered_in_the_unit_interval_and_a_function_of_the_key(cfg):
    t, r = flow.sample_t_r(key(1), 20_000, cfg)
    assert t.dtype == r.dtype == jnp.float32 and t.shape == r.shape == (20_000,)
    assert 0 <= r.min() and (r <= t).all() and t.max() <= 1
    again, other = flow.sample_t_r(key(1), 20_000, cfg), flow.sample_t_r(key(2), 20_000, cfg)
    np.testing.assert_array_equal(again, (t, r))
    assert (other[0] != t).mean() > 0.7  # the mixture repeats t = 1

    one = flow.sample_t(key(1), 20_000, cfg)
    assert one.dtype == jnp.float32 and 0 <= one.min() and one.max() <= 1
    np.testing.assert_array_equal(flow.sample_t(key(1), 20_000, cfg), one)
    assert (flow.sample_t(key(2), 20_000, cfg) != one).mean() > 0.8


def test_official_times_are_logit_normal_order_statistics():
    t, r = flow.sample_t_r(key(), 20_000, OFFICIAL)
    cdf = lambda q: logit_normal_cdf(q, -0.4, 1.0)
    assert fits(t, lambda q: cdf(q) ** 2)
    assert fits(r, lambda q: 1 - (1 - cdf(q)) ** 2)
    assert fits(flow.sample_t(key(), 20_000, OFFICIAL), cdf)
    shifted = SimpleNamespace(time_sampler="official", P_mean=0.8, P_std=0.5)
    assert fits(flow.sample_t(key(), 20_000, shifted), lambda q: logit_normal_cdf(q, 0.8, 0.5))


def test_mixture_times_have_their_shares_and_parts():
    n = 50_000
    t, r = map(np.asarray, flow.sample_t_r(key(), n, MIXTURE))
    corner, to_data = (t == 1) & (r == 0), (t < 1) & (r == 0)
    inner = ~corner & ~to_data
    # Three standard deviations of a share of n draws.
    assert abs(corner.mean() - 0.15) < 3 * np.sqrt(0.15 * 0.85 / n)
    assert abs(to_data.mean() - 0.25) < 3 * np.sqrt(0.25 * 0.75 / n)
    assert fits(t[to_data], lambda q: logit_normal_cdf(q, 1.0, 1.0))
    a, b = (lambda q: logit_normal_cdf(q, 0.4, 1.2)), (lambda q: logit_normal_cdf(q, -0.8, 1.2))
    assert fits(t[inner], lambda q: a(q) * b(q))
    assert fits(r[inner], lambda q: 1 - (1 - a(q)) * (1 - b(q)))

    t = np.asarray(flow.sample_t(key(), n, MIXTURE))
    assert abs((t == 1).mean() - 0.1) < 3 * np.sqrt(0.1 * 0.9 / n)
    assert fits(t[t < 1], lambda q: logit_normal_cdf(q, 0.0, 1.0))


def test_mixture_parts_are_drawn_row_by_row():
    """Not by the row's index, which would tie a part to the clips at that place in the batch."""
    corner = jnp.stack([flow.sample_t_r(key(seed), 16, MIXTURE)[0] == 1 for seed in range(200)])
    share = corner.mean(0)
    assert (share > 0.05).all() and (share < 0.30).all()


def test_unknown_time_sampler_is_named_with_the_accepted_values():
    cfg = SimpleNamespace(time_sampler="uniform")
    for draw in (flow.sample_t, flow.sample_t_r):
        with pytest.raises(InputError, match="objective.time_sampler='uniform'.*official.*mixture"):
            draw(key(), 4, cfg)
