"""The code of gain and shape: the level of each band is said first, and each next code goes where most is left open.

    x [b, l, f] -> levels [b, m, d B] -> gain [b, l, f]           of d frames of B bands each latent, m = l / d
    x / gain -> codes [b, m, k] -> known, deviation [b, l, f]
    x = gain (known + deviation w)                                 w has level 1 everywhere: the flow's data

The codes of a coefficient name ever smaller cells of an embedded scalar quantizer: the first one says its sign and a
coarse cell of |v| = |x| / gain, those that follow, `DEPTH` in all, a cell within the last. The cells are equal in the
companded magnitude |v|^1.5 / (|v|^1.5 + T^1.5), the distribution function of the log-logistic law: fine near the level,
and open towards the outliers that a wrong level makes. Which coefficient comes next needs no bits, for both sides know
it: that whose deviation, given its level and the codes that it has, is largest (reverse water-filling, Cover & Thomas,
section 10.3.3, by greedy steps). Levels and deviations are whole steps of 2^-8 nepers, whose sums are exact: two
programs that round otherwise must not disagree on what a code means.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from meanflow_audio_codec.models import quantizers

LEVEL_FLOOR = 1e-4  # RMS, -80 dB of full scale where x is not scaled: what is quieter is silent
DEPTH = 4  # codes of a coefficient at most
_THRESHOLD, _EXPONENT = 1.3, 1.5  # of the companding
_TILT = 13  # level steps by which a band counts less than the one below it


@dataclasses.dataclass(frozen=True)
class GainShape:
    """What the levels of a latent say of its tokens, and what codes add.

    Attributes:
        bands: Of each feature, from 0 without gaps.
        frames: Tokens of a latent, d.
        num_codes: Codes of a latent beside those of its levels, k.
        cardinality: Values that one may have; even.
    """

    bands: tuple[int, ...]
    frames: int
    num_codes: int
    cardinality: int

    @property
    def num_bands(self) -> int:
        """Bands of a token, B."""
        return 1 + max(self.bands)

    def levels(self, x: Float[Array, "b l f"]) -> Float[Array, "b m n"]:
        """Return ln RMS of each band in each of a latent's frames, n = d B."""
        member = np.eye(self.num_bands, dtype=np.float32)[np.array(self.bands)]
        levels = 0.5 * jnp.log(x**2 @ (member / member.sum(0)) + LEVEL_FLOOR**2)
        return levels.reshape(len(x), -1, self.frames * self.num_bands)

    def of_frames(self, levels: Float[Array, "b m n"]) -> Float[Array, "b l bands"]:
        """Give each frame its own."""
        return levels.reshape(len(levels), -1, self.num_bands)

    def gain(self, levels: Float[Array, "b l bands"]) -> Float[Array, "b l f"]:
        """Return the RMS that the levels of frames give each feature."""
        return jnp.exp(levels[..., np.array(self.bands)])

    def encode(self, x: Float[Array, "b l f"], levels: Float[Array, "b m n"]) -> Int[Array, "b m k"]:
        """Return the codes of x, for which `levels` are to be said."""
        v = x / self.gain(self.of_frames(levels))
        companded = jnp.abs(v) ** _EXPONENT / (jnp.abs(v) ** _EXPONENT + _THRESHOLD**_EXPONENT)
        leaves = self.cardinality**DEPTH // 2
        leaf = jnp.minimum((companded * leaves).astype(jnp.int32), leaves - 1)
        below = self.cardinality ** (DEPTH - 1)
        first, rest = leaf // below, leaf % below
        first = jnp.where(v < 0, self.cardinality // 2 - 1 - first, self.cardinality // 2 + first)
        path = (first * below + rest).reshape(*levels.shape[:2], -1)

        def read(_: Array, place: Array, depth: Array) -> Array:
            found = jnp.take_along_axis(path, place[..., None], axis=-1)[..., 0]
            return found // self.cardinality ** (DEPTH - 1 - depth) % self.cardinality

        codes, _, _ = self._say(levels, jnp.arange(self.num_codes), read)
        return codes

    def decode(
        self, codes: Int[Array, "b m q"], levels: Float[Array, "b m n"], kept: quantizers.Kept = None
    ) -> tuple[Float[Array, "b l f"], Float[Array, "b l f"]]:
        """Return what the first codes, all or `kept`, say of x / gain, 0 where nothing, and the deviation left."""
        _, places, cells = self._say(levels, jnp.moveaxis(codes, -1, 0), lambda code, place, depth: code)
        if kept is not None:
            cells = jnp.where(quantizers.first_kept(kept, codes.shape[-1])[:, None], cells, 0)
        b, m = levels.shape[:2]
        last = jnp.zeros((b, m, self.frames * len(self.bands)), jnp.int32)
        last = last.at[np.arange(b)[:, None, None], np.arange(m)[:, None], places].max(cells)
        means, deviations = cell_tables(self.cardinality)
        of_frames = lambda table: jnp.asarray(table)[last].reshape(b, m * self.frames, len(self.bands))
        return of_frames(means), of_frames(np.exp(deviations * quantizers.LEVEL_STEP).astype(np.float32))

    def _say(
        self, levels: Float[Array, "b m n"], given: Int[Array, "q ..."], read: Callable[[Array, Array, Array], Array]
    ) -> tuple[Int[Array, "b m q"], Int[Array, "b m q"], Int[Array, "b m q"]]:
        """Return the codes, of which coefficient [frame, feature] each is, and the cell that it leads to.

        A cell has the number of a node in the complete tree of `cardinality` branches: 0 is all, then come the first
        codes, then each one's seconds. `read` gives each code by what is `given` for it, its coefficient, and how many
        that one has.
        """
        depths = np.repeat(np.arange(DEPTH + 1), self.cardinality ** np.arange(DEPTH + 1))
        depths, deviations = jnp.asarray(depths), jnp.asarray(cell_tables(self.cardinality)[1])
        size = self.frames * len(self.bands)
        rows = np.arange(levels.shape[0])[:, None], np.arange(levels.shape[1])
        steps = jnp.round(self.of_frames(levels) / quantizers.LEVEL_STEP).astype(jnp.int32)
        steps = (steps - _TILT * np.arange(self.num_bands))[..., np.array(self.bands)]
        # The place is the last digit of what is open, so that one maximum finds both; of equals the first place wins.
        open_ = steps.reshape(*levels.shape[:2], size) * size + np.arange(size)[::-1]

        def step(state: tuple[Array, Array], given: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
            open_, cells = state
            most = jnp.max(open_, axis=-1)
            place = size - 1 - most % size
            at = (*rows, place)
            before = cells[at]
            code = read(given, place, depths[before])
            cell = before * self.cardinality + 1 + code
            less = most + (deviations[cell] - deviations[before]) * size
            open_ = open_.at[at].set(jnp.where(depths[cell] < DEPTH, less, jnp.iinfo(jnp.int32).min))
            return (open_, cells.at[at].set(cell)), (code, place, cell)

        _, said = jax.lax.scan(step, (open_, jnp.zeros_like(open_)), given)
        return tuple(jnp.moveaxis(a, 0, -1) for a in said)


@functools.cache
def cell_tables(cardinality: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of each cell, by its number, and its deviation in level steps, of coefficients over their gain.

    These are taken to have Student's t-distribution of 4 degrees of freedom and scale 0.93, as music's about have.
    """
    means, deviations = [np.zeros(1)], [np.ones(1)]
    for depth in range(1, DEPTH + 1):
        cells = cardinality**depth // 2
        companded = (np.arange(cells * 64).reshape(cells, 64) + 0.5) / (cells * 64)
        odds = companded / (1 - companded)
        v = _THRESHOLD * odds ** (1 / _EXPONENT)
        mass = (1 + (v / 0.93) ** 2 / 4) ** -2.5 * v * (1 + odds) ** 2 / odds  # the density times dv / d companded
        mass /= mass.sum(axis=1, keepdims=True)
        mean = np.sum(mass * v, axis=1)
        deviation = np.sqrt(np.sum(mass * (v - mean[:, None]) ** 2, axis=1))
        mean, deviation = (a.reshape(cardinality // 2, -1) for a in (mean, deviation))  # by the first code
        means.append(np.concatenate([-mean[::-1], mean]).ravel())
        deviations.append(np.concatenate([deviation[::-1], deviation]).ravel())
    steps = np.round(np.log(np.concatenate(deviations)) / quantizers.LEVEL_STEP)
    return np.concatenate(means).astype(np.float32), steps.astype(np.int32)
