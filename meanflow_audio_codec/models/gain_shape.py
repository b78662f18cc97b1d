"""The code of gain and shape: the level of each band is said first, and decides which coefficients are said next.

    x [b, l, f] -> levels [b, m, d B] -> gain [b, l, f]           of d frames of B bands each latent, m = l / d
    x / gain -> values [b, m, k], the loudest first -> known, deviation [b, l, f]
    x = gain (known + deviation w)                                 w has level 1 everywhere: the flow's data

Both sides know the quantized levels, so the order of the values needs no bits, as the bit allocation of a transform
codec (CELT, RFC 6716, section 4.3). The levels are multiples of 2^-8 nepers, whose sums are exact: two programs that
round otherwise must not disagree on what a code means. A value is a coefficient over its gain, rounded by FSQ; the
loudest are said again, `REFINEMENTS` times at most: what was left over, before others are said at all.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import ndtri

from meanflow_audio_codec.models import quantizers

LEVEL_FLOOR = 1e-4  # RMS, -80 dB of full scale where x is not scaled: what is quieter is silent
REFINEMENTS = 2
_TILT = 13 * quantizers.LEVEL_STEP  # nepers by which a band counts less than the one below it


@dataclasses.dataclass(frozen=True)
class GainShape:
    """What the levels of a latent say of its tokens.

    Attributes:
        bands: Of each feature, from 0 without gaps.
        frames: Tokens of a latent, d.
        num_values: Values of a latent, k.
        fsq_levels: Values that one may have; even, for 0 says that it is not sent.
    """

    bands: tuple[int, ...]
    frames: int
    num_values: int
    fsq_levels: int

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

    def gain(self, levels: Float[Array, "b m n"]) -> Float[Array, "b l f"]:
        """Return the RMS that `levels` give each feature."""
        return jnp.exp(self.of_frames(levels)[..., np.array(self.bands)])

    def quantize(
        self, shape: Float[Array, "b l f"], levels: Float[Array, "b m n"], kept: quantizers.Kept = None
    ) -> quantizers.Quantized:
        """Round the values of x / gain that come first in the order of `levels`."""
        before, after, deviation = gaussian_fsq(self.fsq_levels)
        left_over = shape.reshape(*levels.shape[:2], self.frames * len(self.bands))
        refinements = []
        for _ in range(REFINEMENTS):
            refinements.append(before * left_over)
            rounded, _, _ = quantizers.fsq(before * left_over, self.fsq_levels)
            left_over = (left_over - after * rounded) / deviation
        values = jnp.concatenate(refinements, axis=-1)
        said = jnp.take_along_axis(values, self._order(levels), axis=-1)
        return quantizers.fsq(said, self.fsq_levels, kept)

    def place(
        self, values: Float[Array, "b m k"], levels: Float[Array, "b m n"]
    ) -> tuple[Float[Array, "b l f"], Float[Array, "b l f"]]:
        """Return what quantized values say of x / gain, 0 where nothing, and the deviation that they leave it."""
        _, after, deviation = gaussian_fsq(self.fsq_levels)
        place = jnp.minimum(self._places(levels), self.num_values)
        unsent = jnp.pad(values, ((0, 0), (0, 0), (0, 1)))
        found = jnp.take_along_axis(unsent, place, axis=-1)
        found = found.reshape(*levels.shape[:2], REFINEMENTS, self.frames * len(self.bands))
        shares = deviation ** np.arange(REFINEMENTS, dtype=np.float32)[:, None]
        known = jnp.sum(after * shares * found, axis=2)
        left_over = np.float32(deviation) ** jnp.sum(found != 0, axis=2)
        of_frames = lambda a: a.reshape(len(levels), -1, len(self.bands))
        return of_frames(known), of_frames(left_over)

    def _starts(self, levels: Float[Array, "b m n"]) -> Int[Array, "b m e"]:
        """Return the place in the order at which each group of values starts; a group is (refinement, frame, band)."""
        _, _, deviation = gaussian_fsq(self.fsq_levels)
        lower = round(math.log(deviation) / quantizers.LEVEL_STEP) * quantizers.LEVEL_STEP
        offsets = lower * np.arange(REFINEMENTS)[:, None, None] - _TILT * np.arange(self.num_bands)
        levels = levels.reshape(*levels.shape[:2], 1, self.frames, self.num_bands)
        priority = (levels + offsets.astype(np.float32)).reshape(*levels.shape[:2], -1)
        one, other = priority[..., :, None], priority[..., None, :]
        earlier = np.tri(priority.shape[-1], k=-1, dtype=bool)
        comes_before = (other > one) | ((other == one) & earlier)
        return jnp.sum(jnp.where(comes_before, self._groups[0], 0), axis=-1)

    def _places(self, levels: Float[Array, "b m n"]) -> Int[Array, "b m p"]:
        """Return the place in the order of each value [refinement, frame, feature]."""
        _, _, group, rank = self._groups
        return self._starts(levels)[..., group] + rank

    def _order(self, levels: Float[Array, "b m n"]) -> Int[Array, "b m k"]:
        """Return which values [refinement, frame, feature] come first, the inverse of `_places`."""
        sizes, members, _, _ = self._groups
        start = self._starts(levels)[..., None, :]
        number = np.arange(self.num_values)[:, None]
        group = jnp.argmax((start <= number) & (number < start + sizes), axis=-1)
        rank = number[:, 0] - jnp.take_along_axis(start[..., 0, :], group, axis=-1)
        return jnp.asarray(members)[group, rank]

    @functools.cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return each group's size and members [e, most], and each value's group and rank in it."""
        bands = np.array(self.bands)
        steps = np.arange(REFINEMENTS * self.frames)[:, None]
        group = (steps * self.num_bands + bands).ravel()
        sizes = np.bincount(group)
        rank = np.empty_like(group)
        members = np.zeros((len(sizes), sizes.max()), np.int32)
        for i, size in enumerate(sizes):
            inside = np.flatnonzero(group == i)
            rank[inside], members[i, :size] = np.arange(size), inside
        return sizes, members, group, rank


@functools.cache
def gaussian_fsq(levels: int) -> tuple[float, float, float]:
    """Return what to multiply a Gaussian of variance 1 by before and after `fsq` for the least error, and its RMS."""
    x = ndtri((np.arange(2**14) + 0.5) / 2**14)
    choices = []
    for before in np.linspace(0.2, 2.0, 181):
        values = np.round((np.tanh(before * x) + 1) / 2 * (levels - 1)) * 2 / (levels - 1) - 1
        after = (x @ values) / (values @ values)
        choices.append((np.sqrt(np.mean((x - after * values) ** 2)), before, after))
    error, before, after = min(choices)
    return float(before), float(after), float(error)
