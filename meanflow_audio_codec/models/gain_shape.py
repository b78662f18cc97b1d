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

Loud coefficients come in company: a tone fills a few bins of many frames. With `neighbour_share` each code that makes
its coefficient louder or quieter than was expected moves, by a share of that, what is expected of the neighbours in the
same latent of which nothing is said yet: their gain, and with it their place in the order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from meanflow_audio_codec.models import quantizers

LEVEL_FLOOR = 1e-4  # RMS, -80 dB of full scale where x is not scaled: what is quieter is silent
DEPTH = 4  # codes of a coefficient at most
_THRESHOLD, _EXPONENT = 1.3, 1.5  # of the companding
_TILT = 13  # level steps by which a band counts less than the one below it
# Frames and features to the neighbours, and what part of the share is theirs.
_NEIGHBOURS = {(-1, 0): 1.0, (1, 0): 1.0} | dict.fromkeys(
    [(-2, 0), (2, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)], 0.5
)


class Said(NamedTuple):
    """What codes say, each in its turn."""

    codes: Int[Array, "b m q"]
    places: Int[Array, "b m q"]  # of which coefficient [frame, feature]
    cells: Int[Array, "b m q"]  # that it is in from then on
    moves: Int[Array, "b m q e"]  # level steps by which that moves its neighbours


@dataclasses.dataclass(frozen=True)
class GainShape:
    """What the levels of a latent say of its tokens, and what codes add.

    Attributes:
        bands: Of each feature, from 0 without gaps.
        frames: Tokens of a latent, d.
        num_codes: Codes of a latent beside those of its levels, k.
        cardinality: Values that one may have; even.
        neighbour_share: Of what is heard of a coefficient, that is expected of those beside it.
    """

    bands: tuple[int, ...]
    frames: int
    num_codes: int
    cardinality: int
    neighbour_share: float = 0.0

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

    def encode(self, x: Float[Array, "b l f"], levels: Float[Array, "b m n"]) -> Said:
        """Return what is to be said of x, for which `levels` are."""
        shape = (x / self.gain(self.of_frames(levels))).reshape(*levels.shape[:2], -1)
        below = self.cardinality ** (DEPTH - 1)
        leaves = self.cardinality // 2 * below

        def read(_: Array, place: Array, depth: Array, moved: Array) -> Array:
            v = jnp.take_along_axis(shape, place[..., None], axis=-1)[..., 0] * jnp.exp(-moved * quantizers.LEVEL_STEP)
            companded = jnp.abs(v) ** _EXPONENT / (jnp.abs(v) ** _EXPONENT + _THRESHOLD**_EXPONENT)
            leaf = jnp.minimum((companded * leaves).astype(jnp.int32), leaves - 1)
            first, rest = leaf // below, leaf % below
            first = jnp.where(v < 0, self.cardinality // 2 - 1 - first, self.cardinality // 2 + first)
            return (first * below + rest) // self.cardinality ** (DEPTH - 1 - depth) % self.cardinality

        return self._say(levels, jnp.arange(self.num_codes), read)

    def decode(self, codes: Int[Array, "b m q"], levels: Float[Array, "b m n"]) -> Said:
        """Return what the first codes of a latent say."""
        return self._say(levels, jnp.moveaxis(codes, -1, 0), lambda code, *_: code)

    def known(self, said: Said, kept: quantizers.Kept = None) -> tuple[Float[Array, "b l f"], Float[Array, "b l f"]]:
        """Return what all codes, or the first `kept`, tell of x / gain, 0 where nothing, and the deviation left."""
        _, places, cells, moves = said
        if kept is not None:
            alive = quantizers.first_kept(kept, places.shape[-1])[:, None]
            cells, moves = jnp.where(alive, cells, 0), jnp.where(alive[..., None], moves, 0)
        b, m, _ = places.shape
        rows = np.arange(b)[:, None, None], np.arange(m)[:, None]
        nothing = jnp.zeros((b, m, self.frames * len(self.bands)), jnp.int32)
        last = nothing.at[(*rows, places)].max(cells)
        near = (*(row[..., None] for row in rows), self._neighbours[0][places])
        gain = jnp.exp(nothing.at[near].add(moves, mode="drop") * quantizers.LEVEL_STEP)
        means, deviations = cell_tables(self.cardinality)
        deviations = np.exp(deviations * quantizers.LEVEL_STEP).astype(np.float32)
        return tuple((gain * jnp.asarray(table)[last]).reshape(b, -1, len(self.bands)) for table in (means, deviations))

    def _say(self, levels: Float[Array, "b m n"], given: Int[Array, "q ..."], read: Callable[..., Array]) -> Said:
        """Go where most is open, again and again.

        A cell has the number of a node in the complete tree of `cardinality` branches: 0 is all, then come the first
        codes, then each one's seconds. `read` gives each code by what is `given` for it, its coefficient, how many that
        one has, and the steps by which its neighbours moved it.
        """
        depths = np.repeat(np.arange(DEPTH + 1), self.cardinality ** np.arange(DEPTH + 1))
        depths, deviations = jnp.asarray(depths), jnp.asarray(cell_tables(self.cardinality)[1])
        beside, shares = self._neighbours
        size = self.frames * len(self.bands)
        rows = np.arange(levels.shape[0])[:, None], np.arange(levels.shape[1])
        steps = jnp.round(self.of_frames(levels) / quantizers.LEVEL_STEP).astype(jnp.int32)
        steps = (steps - _TILT * np.arange(self.num_bands))[..., np.array(self.bands)]
        # The place is the last digit of what is open, so that one maximum finds both; of equals the first place wins.
        open_ = steps.reshape(*levels.shape[:2], size) * size + np.arange(size)[::-1]

        def step(state: tuple[Array, Array, Array], given: Array) -> tuple[tuple[Array, Array, Array], Said]:
            open_, cells, moved = state
            most = jnp.max(open_, axis=-1)
            place = size - 1 - most % size
            at = (*rows, place)
            before = cells[at]
            code = read(given, place, depths[before], moved[at])
            cell = before * self.cardinality + 1 + code
            less = most + (deviations[cell] - deviations[before]) * size
            open_ = open_.at[at].set(jnp.where(depths[cell] < DEPTH, less, jnp.iinfo(jnp.int32).min))
            cells = cells.at[at].set(cell)
            near = (*(row[..., None] for row in rows), beside[place])
            unsaid = cells.at[near].get(mode="fill", fill_value=1) == 0
            moves = jnp.where(unsaid, shares[cell] - shares[before], 0)
            open_, moved = open_.at[near].add(moves * size, mode="drop"), moved.at[near].add(moves, mode="drop")
            return (open_, cells, moved), Said(code, place, cell, moves)

        nothing = jnp.zeros_like(open_)
        _, said = jax.lax.scan(step, (open_, nothing, nothing), given)
        return Said(*(jnp.moveaxis(a, 0, 2) for a in said))

    @property
    def _neighbours(self) -> tuple[Int[Array, "p e"], Int[Array, "c e"]]:
        """Return each coefficient's neighbours, p for one that is not there, and by what a cell has moved them."""
        frames, features = self.frames, len(self.bands)
        neighbours = _NEIGHBOURS if self.neighbour_share else {}
        frame, feature = np.divmod(np.arange(frames * features)[:, None], features)
        by = np.array(list(neighbours), int).reshape(-1, 2)
        frame, feature = frame + by[:, 0], feature + by[:, 1]
        there = (frame >= 0) & (frame < frames) & (feature >= 0) & (feature < features)
        beside = np.where(there, frame * features + feature, frames * features)
        means, deviations = cell_tables(self.cardinality)
        loudness = np.log(means**2 + np.exp(2 * deviations * quantizers.LEVEL_STEP)) / 2 / quantizers.LEVEL_STEP
        shares = self.neighbour_share * np.array(list(neighbours.values()))
        return jnp.asarray(beside, jnp.int32), jnp.asarray(np.round(loudness[:, None] * shares), jnp.int32)


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
