"""Laws whose average velocity is known exactly, and a small network, for the flow tests."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.scipy.special import ndtr


class Gaussian:
    """x ~ N(m, s^2) in every coordinate. The marginal at t is N((1 - t) m, S_t^2)."""

    m, s = 0.7, 0.4

    def S(self, t):
        return jnp.sqrt((1 - t) ** 2 * self.s**2 + t**2)

    def v(self, z, t):
        t = t[:, None]
        gain = (t - (1 - t) * self.s**2) / self.S(t) ** 2
        return -self.m + gain * (z - (1 - t) * self.m)

    def u(self, z, t, r, cond=None):
        """The mean of v along z_r = mu_r + S_r / S_t (z_t - mu_t), without 0 / 0 at r = t."""
        t, r = t[:, None], r[:, None]
        gain = ((t + r) * (1 + self.s**2) - 2 * self.s**2) / (self.S(t) + self.S(r))
        return -self.m + (z - (1 - t) * self.m) / self.S(t) * gain

    def velocity_variance(self, t):
        """Var(e - x | z_t), the error that no network can go below."""
        return self.s**2 / self.S(t) ** 2


class Bimodal:
    """x ~ half N(-1, s^2), half N(1, s^2), in one dimension, where the flow preserves quantiles."""

    s = 0.1

    def S(self, t):
        return jnp.sqrt((1 - t) ** 2 * self.s**2 + t**2)

    def cdf(self, z, t):
        return 0.5 * sum(ndtr((z - k * (1 - t)) / self.S(t)) for k in (-1, 1))

    def sample(self, rng, shape):
        rng_mode, rng_noise = jax.random.split(rng)
        mode = jax.random.rademacher(rng_mode, shape).astype(float)
        return mode + self.s * jax.random.normal(rng_noise, shape)

    def v(self, z, t):
        """E[e - x | z_t]: each mode's Gaussian velocity, weighted by its posterior."""
        mu = jnp.stack([-(1 - t), 1 - t])
        weight = jax.nn.softmax(-0.5 * ((z - mu) / self.S(t)) ** 2, axis=0)
        gain = (t - (1 - t) * self.s**2) / self.S(t) ** 2
        return jnp.sum(weight * (jnp.array([1.0, -1.0])[:, None, None] + gain * (z - mu)), axis=0)

    def flow(self, z, t, r):
        """z_r = F_r^-1(F_t(z_t)), the inverse by bisection."""
        quantile = self.cdf(z, t)

        def halve(_, bracket):
            low, high = bracket
            mid = (low + high) / 2
            below = self.cdf(mid, r) < quantile
            return jnp.where(below, mid, low), jnp.where(below, high, mid)

        low, high = jax.lax.fori_loop(0, 60, halve, (jnp.full_like(z, -9.0), jnp.full_like(z, 9.0)))
        return (low + high) / 2

    def u(self, z, t, r, cond=None):
        t, r = t[:, None], r[:, None]
        h = jnp.where(t > r, t - r, 1.0)
        return jnp.where(t > r, (z - self.flow(z, t, r)) / h, self.v(z, t))

    def near_modes(self, x):
        """The share of samples within 3 s of the mode on the left, and of that on the right."""
        return tuple(jnp.mean(jnp.abs(x - k) < 3 * self.s) for k in (-1, 1))


@pytest.fixture
def gaussian():
    return Gaussian()


@pytest.fixture
def bimodal():
    return Bimodal()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mlp():
    """`init(rng, d, width, depth) -> params` and `apply(params, z, t, r, cond)`, a residual MLP.

    z and cond are [b, d]. The output is x_hat, u = (z - x_hat) / clip(t, 0.05, 1).
    """

    def features(z, t, r, cond):
        cond = jnp.zeros_like(z) if cond is None else cond
        return jnp.concatenate([z, cond, t[:, None], (t - r)[:, None]], axis=1)

    def init(rng, d, width=32, depth=2):
        rng_in, rng_out, *rng_blocks = jax.random.split(rng, depth + 2)
        dense = lambda rng, i, o: jax.random.normal(rng, (i, o)) / jnp.sqrt(i)
        return {
            "in": dense(rng_in, 2 * d + 2, width),
            "blocks": [{"w": dense(rng, width, width), "skip": dense(rng, 2 * d + 2, width)} for rng in rng_blocks],
            "out": 0.3 * dense(rng_out, width, d),
        }

    def apply(params, z, t, r, cond):
        inputs = features(z, t, r, cond)
        hidden = jax.nn.silu(inputs @ params["in"])
        for block in params["blocks"]:
            hidden = hidden + jax.nn.silu(hidden @ block["w"] + inputs @ block["skip"])
        x_hat = hidden @ params["out"]
        return (z - x_hat) / jnp.maximum(t, 0.05)[:, None]

    return SimpleNamespace(init=init, apply=apply)
