"""objectives.py against its papers, written out a second time in numpy float64 without any code in common.

    MeanFlow            arXiv 2505.13447, equations 6-12 and 22, Algorithm 1
    improved MeanFlow   arXiv 2512.02012, equations 9-12, Algorithm 1
    pixel MeanFlow      arXiv 2601.22158, u = (z - x_hat) / clip(t, 0.05, 1)

As their algorithms do, the numpy side takes the derivative in every row and sets r := t in some; the project leaves it
out there. Its forward mode is derived by hand, layer by layer. Its gradient holds constant what stands under a
stop-gradient and steps every parameter into the complex plane, Im f(p + i d) / d, which has no rounding error of a
difference. Data, noise, times and parameters are the same numbers on both sides; the times include (1, 0), where
one-step sampling happens, and t below the clip.
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.trainers import flow
from meanflow_audio_codec.trainers.objectives import OBJECTIVES

CLIPS, SHAPE = 8, (3, 2)
FREQUENCIES = np.array([0.5, 3.0])  # radians per unit of time
FM_ROWS = {0.0: 0, 0.5: 4, 1.0: 8}  # of the clips, by fm_fraction
MEAN_FLOWS = ["mean_flow", "improved_mean_flow"]
PRECISIONS = pytest.mark.parametrize("bits, rtol", [(32, 1e-6), (64, 1e-12)])
OUTPUTS = pytest.mark.parametrize("output", ["u", "x"])


# --- the papers, in numpy


def np_network(w, output, z, t, r, cond, dz=None, dt=0.0, dr=0.0, head="u"):
    """Return u(z, t, r) and its derivative along (dz, dt, dr), value and tangent side by side."""
    dz = np.zeros_like(z) if dz is None else dz
    flat = lambda a: a.reshape(CLIPS, -1)
    angle_t, dangle_t = t[:, None] * FREQUENCIES, dt * FREQUENCIES
    angle_h, dangle_h = (t - r)[:, None] * FREQUENCIES, (dt - dr) * FREQUENCIES
    y = np.hstack([flat(z), cond, np.sin(angle_t), np.cos(angle_t), np.sin(angle_h), np.cos(angle_h)])
    dtimes = [np.cos(angle_t) * dangle_t, -np.sin(angle_t) * dangle_t]
    dtimes += [np.cos(angle_h) * dangle_h, -np.sin(angle_h) * dangle_h]
    dy = np.hstack([flat(dz), np.zeros_like(cond), *dtimes])

    a, da = y @ w["w1"] + w["b1"], dy @ w["w1"]
    y = np.tanh(a)
    dy = (1 - y**2) * da
    a, da = y @ w["w2"] + w["b2"], dy @ w["w2"]
    gate = 1 / (1 + np.exp(-a))
    y, dy = a * gate, (gate + a * gate * (1 - gate)) * da
    raw = (y @ w[head] + w[head + "_bias"]).reshape(z.shape)
    draw = (dy @ w[head]).reshape(z.shape)
    if output == "u":
        return raw, draw

    # Times end at 1: the clip's upper bound is never crossed, and the slope up to it, 1 itself included, is 1.
    above = t.real > 0.05
    bound, dbound = column(np.where(above, t, 0.05)), column(np.where(above, dt, 0.0))
    u = (z - raw) / bound
    return u, (dz - draw) / bound - u * dbound / bound


class Term(NamedTuple):
    """mean_b weight_b ||network(z_b, t_b, r_b) + constant_b||^2, of which only the network has a gradient."""

    head: str
    z: np.ndarray
    t: np.ndarray
    r: np.ndarray
    constant: np.ndarray
    weight: np.ndarray
    error: np.ndarray
    metrics: dict


def column(t):
    return t[:, None, None]


def np_weight(error, cfg):
    """MeanFlow, equation 22."""
    delta2 = (error**2).sum((1, 2))
    return 1 / (delta2 + cfg.norm_eps) ** cfg.norm_p


def np_objective(name, w, output, p, cfg, weight=np_weight, dt_dr=(1.0, 0.0), swap=False, v_head=False):
    """Return the terms of the loss; the keywords after `cfg` are what papers and codes disagree about."""
    net = functools.partial(np_network, w, output)
    if name == "autoencoder":  # x_hat = 0 - u(0, 1, 0), so x_hat - x is -(u + x)
        zero, one = np.zeros(CLIPS), np.ones(CLIPS)
        error = net(np.zeros_like(p.x), one, zero, p.cond)[0] + p.x
        metrics = {"x_mse": (error**2).mean()}
        return [Term("u", np.zeros_like(p.x), one, zero, p.x, weight(error, cfg), error, metrics)]

    n_fm = CLIPS if name == "flow_matching" else FM_ROWS[cfg.fm_fraction]
    t = p.t
    r = np.where(np.arange(CLIPS) < n_fm, t, p.r)
    h = column(t - r)
    z = (1 - column(t)) * p.x + column(t) * p.e
    v = p.e - p.x
    v_theta = net(z, t, t, p.cond, head="v" if v_head else "u")[0]
    tangent = v if (name == "mean_flow") != swap else v_theta
    u, du_dt = net(z, t, r, p.cond, tangent, *dt_dr)
    if name == "improved_mean_flow":
        V = u + h * du_dt  # equation 12
        error = V - v
    else:
        u_tgt = v - h * du_dt  # MeanFlow, equation 10; v itself where r = t, as in flow matching
        error = u - u_tgt
    metrics = {"v_mse": (error[:n_fm] ** 2).mean() if n_fm else 0.0}
    if name in MEAN_FLOWS:
        some = n_fm < CLIPS
        metrics["u_mse"] = (error[n_fm:] ** 2).mean() if some else 0.0
        metrics["hdudt_over_u"] = np.linalg.norm((h * du_dt)[n_fm:]) / np.linalg.norm(u[n_fm:]) if some else 0.0
    terms = [Term("u", z, t, r, h * du_dt - v, weight(error, cfg), error, metrics)]
    if v_head:
        error = v_theta - v
        terms.append(Term("v", z, t, t, -v, weight(error, cfg), error, {"v_head_mse": (error**2).mean()}))
    return terms


def np_loss(terms):
    return sum((term.weight * (term.error**2).sum((1, 2))).sum() for term in terms) / CLIPS


def np_gradient(terms, w, output, cond):
    """Gradient of the loss in every parameter and every entry of the condition, targets and weights held constant."""
    step = 1e-30

    def loss(leaves):
        loss = 0
        for term in terms:
            u, _ = np_network(leaves, output, term.z, term.t, term.r, leaves["cond"], head=term.head)
            loss += (term.weight * ((u + term.constant) ** 2).sum((1, 2))).sum()
        return loss / CLIPS

    leaves = w | {"cond": cond}
    gradient = {name: np.zeros_like(leaf) for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        for i in np.ndindex(leaf.shape):
            moved = leaf.astype(complex)
            moved[i] += 1j * step
            gradient[name][i] = loss(leaves | {name: moved}).imag / step
    return gradient


# --- the project's side


def jax_network(w, output, head="u"):
    def u_fn(z, t, r, cond):
        angle_t, angle_h = t[:, None] * FREQUENCIES, (t - r)[:, None] * FREQUENCIES
        times = [jnp.sin(angle_t), jnp.cos(angle_t), jnp.sin(angle_h), jnp.cos(angle_h)]
        y = jnp.concatenate([z.reshape(len(z), -1), cond, *times], axis=1)
        y = jnp.tanh(y @ w["w1"] + w["b1"])
        y = jax.nn.silu(y @ w["w2"] + w["b2"])
        raw = (y @ w[head] + w[head + "_bias"]).reshape(z.shape)
        # Not jnp.clip, whose derivative at t = 1 exactly is 1/2.
        return raw if output == "u" else (z - raw) / jnp.maximum(t, 0.05)[:, None, None]

    return u_fn


def config(**overrides):
    # norm_eps is large, so that its place in the weight is seen.
    return SimpleNamespace(**({"fm_fraction": 0.5, "hdudt_limit": 0.0, "norm_p": 1.0, "norm_eps": 0.3} | overrides))


def problem(bits):
    """Parameters and batch as numpy float64 that `bits` can represent, and the same as jax arrays."""
    rng = np.random.default_rng(0)
    d, k, width = int(np.prod(SHAPE)), 2, 5
    inputs = d + k + 4 * len(FREQUENCIES)
    dense = lambda i, o: rng.normal(size=(i, o)) / np.sqrt(i)
    w = {
        "w1": dense(inputs, width) * 2,
        "b1": rng.normal(size=width),
        "w2": dense(width, width) * 2,
        "b2": rng.normal(size=width),
        "u": dense(width, d) * 2,
        "u_bias": rng.normal(size=d),
        "v": dense(width, d) * 2,
        "v_bias": rng.normal(size=d),
    }
    batch = {
        "x": rng.normal(size=(CLIPS, *SHAPE)),
        "e": rng.normal(size=(CLIPS, *SHAPE)),
        "cond": rng.normal(size=(CLIPS, k)),
        "t": np.array([0.03, 0.40, 0.90, 1.00, 0.04, 0.55, 0.98, 1.00]),
        "r": np.array([0.01, 0.10, 0.00, 0.00, 0.02, 0.30, 0.70, 0.00]),
    }
    on_device = jax.tree.map(lambda a: jnp.asarray(a, f"float{bits}"), (w, batch))
    w, batch = jax.tree.map(lambda a: np.asarray(a, np.float64), on_device)
    return w, SimpleNamespace(**batch), on_device[0], SimpleNamespace(**on_device[1])


def fix_draws(monkeypatch, p):
    """Let the project draw the noise and the times of `p`."""
    monkeypatch.setattr(jax.random, "normal", lambda rng, shape, dtype: p.e.astype(dtype).reshape(shape))
    monkeypatch.setattr(flow, "sample_t", lambda rng, n, cfg: p.t[:n])
    monkeypatch.setattr(flow, "sample_t_r", lambda rng, n, cfg: (p.t[CLIPS - n :], p.r[CLIPS - n :]))


def jax_loss(leaves, name, output, p, cfg, v_head=False):
    """Return (loss, metrics) of the project; `leaves` are the parameters and the condition."""
    options = {"v_fn": lambda z, t, cond: jax_network(leaves, output, "v")(z, t, t, cond)} if v_head else {}
    return OBJECTIVES[name](jax_network(leaves, output), p.x, leaves["cond"], jax.random.key(0), cfg, **options)


jax_loss_and_gradient = jax.value_and_grad(jax_loss, has_aux=True)


def assert_close(actual, expected, rtol):
    """Relative to the largest entry: `expected` is one array whose entries share the rounding of a sum."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def check_against_the_papers(monkeypatch, name, output, cfg, bits, rtol, v_head=False):
    with jax.enable_x64(bits == 64):
        w, p, jax_w, jax_p = problem(bits)
        fix_draws(monkeypatch, jax_p)
        inputs = (jax_w | {"cond": jax_p.cond}, name, output, jax_p, cfg, v_head)
        loss, metrics = jax_loss(*inputs)
        assert loss.dtype == f"float{bits}"
        terms = np_objective(name, w, output, p, cfg, v_head=v_head)
        np.testing.assert_allclose(loss, np_loss(terms), rtol=rtol)
        for key, expected in (terms[0].metrics | terms[-1].metrics).items():
            # The ratio's denominator has 1e-8 on it, for networks that start at zero.
            bound = max(rtol, 1e-8) if key == "hdudt_over_u" else rtol
            np.testing.assert_allclose(metrics[key], expected, rtol=bound, err_msg=key)
        if bits == 64:
            _, gradient = jax_loss_and_gradient(*inputs)
            expected = np_gradient(terms, w, output, p.cond)
            assert set(gradient) == set(expected)
            for key in expected:
                assert_close(gradient[key], expected[key], rtol)


# --- the oracle itself


@OUTPUTS
@pytest.mark.parametrize("head", ["u", "v"])
@PRECISIONS
def test_the_two_networks_are_one(output, head, bits, rtol):
    with jax.enable_x64(bits == 64):
        w, p, jax_w, jax_p = problem(bits)
        z = jax_network(jax_w, output, head)(jax_p.x, jax_p.t, jax_p.r, jax_p.cond)
        assert_close(z, np_network(w, output, p.x, p.t, p.r, p.cond, head=head)[0], rtol)


@OUTPUTS
def test_the_derivative_by_hand_is_that_of_a_complex_step(output):
    with jax.enable_x64(True):
        w, p, _, _ = problem(64)
    _, by_hand = np_network(w, output, p.x, p.t, p.r, p.cond, p.e, 0.7, -0.4)
    moved, _ = np_network(w, output, p.x + 1e-30j * p.e, p.t + 0.7e-30j, p.r - 0.4e-30j, p.cond)
    np.testing.assert_allclose(by_hand, moved.imag / 1e-30, rtol=1e-12)


# --- the project against its papers


@OUTPUTS
@pytest.mark.parametrize("tangent", ["conditional", "boundary"])
@PRECISIONS
def test_derivative_along_the_path(output, tangent, bits, rtol):
    """MeanFlow, equation 8: v d_z u + d_t u, not d_r u."""
    with jax.enable_x64(bits == 64):
        w, p, jax_w, jax_p = problem(bits)
        net = functools.partial(np_network, w, output, p.x, p.t)
        direction = p.e - p.x if tangent == "conditional" else net(p.t, p.cond)[0]
        u, du_dt = net(p.r, p.cond, direction, 1.0, 0.0)
        inputs = (jax_p.x, jax_p.t, jax_p.r, jax_p.cond, jnp.asarray(direction, f"float{bits}"))
        jax_u, jax_du_dt = flow.average_velocity_jvp(jax_network(jax_w, output), *inputs)
        swapped = net(p.r, p.cond, direction, 0.0, 1.0)[1]
        for row in range(CLIPS):  # below the clip u and du/dt are larger by far
            assert_close(jax_u[row], u[row], rtol)
            assert_close(jax_du_dt[row], du_dt[row], rtol)
            assert np.abs(swapped[row] - jax_du_dt[row]).max() > 0.01 * np.abs(du_dt[row]).max()


@OUTPUTS
@pytest.mark.parametrize("norm_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "name, fm_fraction",
    [("autoencoder", 0.5), ("flow_matching", 0.5)] + [(name, share) for name in MEAN_FLOWS for share in FM_ROWS],
)
def test_objective_is_that_of_its_paper(monkeypatch, name, fm_fraction, norm_p, output):
    """Loss, raw errors, and the gradient in every parameter and in the condition."""
    cfg = config(fm_fraction=fm_fraction, norm_p=norm_p)
    check_against_the_papers(monkeypatch, name, output, cfg, bits=64, rtol=1e-12)


@OUTPUTS
@pytest.mark.parametrize("norm_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_that_of_its_paper_in_float32(monkeypatch, name, norm_p, output):
    check_against_the_papers(monkeypatch, name, output, config(norm_p=norm_p), bits=32, rtol=1e-6)


@pytest.mark.parametrize("norm_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_adaptive_weight_of_every_clip(monkeypatch, name, norm_p):
    """A batch of one clip eight times over: its loss over its squared residual, which is six times the raw error."""
    cfg = config(fm_fraction=0.0, norm_p=norm_p)
    with jax.enable_x64(True):
        w, p, jax_w, jax_p = problem(64)
        (term,) = np_objective(name, w, "x", p, cfg)
        for i in range(CLIPS):
            clip = SimpleNamespace(**{field: a[jnp.full(CLIPS, i)] for field, a in vars(jax_p).items()})
            fix_draws(monkeypatch, clip)
            loss, metrics = jax_loss(jax_w | {"cond": clip.cond}, name, "x", clip, cfg)
            raw = metrics[{"autoencoder": "x_mse", "flow_matching": "v_mse"}.get(name, "u_mse")]
            np.testing.assert_allclose(loss / (raw * 6), term.weight[i], rtol=1e-12)


# --- what must not agree


def mean_instead_of_sum(error, cfg):
    return 1 / ((error**2).mean((1, 2)) + cfg.norm_eps) ** cfg.norm_p


def eps_outside_the_power(error, cfg):
    return 1 / ((error**2).sum((1, 2)) ** cfg.norm_p + cfg.norm_eps)


def error_squared_twice(error, cfg):
    return 1 / ((error**2).sum((1, 2)) ** 2 + cfg.norm_eps) ** cfg.norm_p


def weight_over_the_batch(error, cfg):
    return np.full(CLIPS, 1 / ((error**2).sum() / CLIPS + cfg.norm_eps) ** cfg.norm_p)


@OUTPUTS
@pytest.mark.parametrize("name", MEAN_FLOWS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"dt_dr": (0.0, 1.0)},  # tangents in the order (z, r, t)
        {"dt_dr": (0.0, 0.0)},
        {"dt_dr": (1.0, 1.0)},
        {"swap": True},  # each mean flow with the other's tangent
        {"weight": mean_instead_of_sum},
        {"weight": eps_outside_the_power},
        {"weight": error_squared_twice},
        {"weight": weight_over_the_batch},
    ],
    ids=lambda wrong: "_".join(str(getattr(value, "__name__", value)) for value in wrong.values()),
)
def test_a_wrong_formula_disagrees(monkeypatch, name, output, wrong):
    cfg = config(norm_p=0.5)
    with jax.enable_x64(True):
        w, p, jax_w, jax_p = problem(64)
        fix_draws(monkeypatch, jax_p)
        loss, _ = jax_loss(jax_w | {"cond": jax_p.cond}, name, output, jax_p, cfg)
        np.testing.assert_allclose(loss, np_loss(np_objective(name, w, output, p, cfg)), rtol=1e-12)
        assert abs(np_loss(np_objective(name, w, output, p, cfg, **wrong)) / loss - 1) > 1e-3


@pytest.mark.parametrize("name", MEAN_FLOWS)
@pytest.mark.parametrize("fm_fraction, norm_p", [(0.0, 0.0), (1.0, 0.5)], ids=["target", "weight"])
def test_a_gradient_through_what_is_stopped_disagrees(monkeypatch, name, fm_fraction, norm_p):
    """The loss does not see a missing stop-gradient; with no weight, and with no derivative, its gradient does."""
    cfg = config(fm_fraction=fm_fraction, norm_p=norm_p)
    with jax.enable_x64(True):
        w, p, jax_w, jax_p = problem(64)
        fix_draws(monkeypatch, jax_p)
        monkeypatch.setattr(jax.lax, "stop_gradient", lambda a: a)
        (loss, _), gradient = jax_loss_and_gradient(jax_w | {"cond": jax_p.cond}, name, "u", jax_p, cfg)
        terms = np_objective(name, w, "u", p, cfg)
        expected = np_gradient(terms, w, "u", p.cond)["w1"]
        np.testing.assert_allclose(loss, np_loss(terms), rtol=1e-12)
        assert np.abs(np.asarray(gradient["w1"]) - expected).max() > 1e-2 * np.abs(expected).max()


# --- the model's own x output


def test_derivative_of_the_models_x_output():
    """With the same parameters, output "u" returns x_hat, and so du/dt of output "x" is known; at t = 1 also."""
    t, r = jnp.array([0.03, 0.4, 0.97, 1.0]), jnp.array([0.0, 0.1, 0.2, 0.0])
    z, dz, cond = jax.random.normal(jax.random.key(0), (3, 4, 2, 6))
    model = CodecModel(features=6, variant="mu", backbone="mlp", downsample=1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), z, t, r, cond, method="flow"))
    rng = np.random.default_rng(0)  # not the model's own initialisation, at which x_hat is zero
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), shapes)

    def derivative(output):
        u_fn = lambda *inputs: model.clone(output=output).apply(params, *inputs, method="flow")
        return flow.average_velocity_jvp(u_fn, z, t, r, cond, dz)

    (u, du_dt), (x_hat, dx_hat_dt) = jax.jit(lambda: (derivative("x"), derivative("u")))()
    bound, dbound = column(jnp.maximum(t, 0.05)), column((t > 0.05).astype(float))
    np.testing.assert_allclose(u, (z - x_hat) / bound, rtol=1e-5, atol=1e-5)
    expected = (dz - dx_hat_dt) / bound - (z - x_hat) * dbound / bound**2
    for row in range(len(t)):
        assert_close(du_dt[row], expected[row], rtol=1e-5)


# --- the auxiliary head


@OUTPUTS
@pytest.mark.parametrize("norm_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("fm_fraction", FM_ROWS)
def test_improved_mean_flow_with_a_velocity_head(monkeypatch, fm_fraction, norm_p, output):
    """The head is the tangent, and learns in every row; here it shares all layers but the last."""
    cfg = config(fm_fraction=fm_fraction, norm_p=norm_p)
    check_against_the_papers(monkeypatch, "improved_mean_flow", output, cfg, bits=64, rtol=1e-12, v_head=True)
