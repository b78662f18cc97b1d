"""The code of gain and shape: the level of each band, the width of the cells, and in which cell each coefficient lies.

    x [b, l, f] -> levels [b, m, d B] -> gain [b, l, f]           of d frames of B bands each latent, m = l / d
    levels, step [b, m] -> openness [b, l, B]                     nepers by which the gain exceeds the cells' width
    x, openness -> cells q [b, l, f] -> known, deviation [b, l, f]
    x = gain (known + deviation w)                                w has level 1 everywhere: the flow's data

q is a uniform quantizer with a dead zone, to be entropy coded: at a low rate little is gained over it by any other code
(Sullivan, IEEE Trans. Inform. Theory 42, 1996). Cells of one width everywhere spend the bits where the squared error
asks for them (reverse water-filling, Cover & Thomas, section 10.3.3). Ears ask otherwise, so cells are wider in loud
bands, by the power 1 - `SHARE` of their gain, and by `TILT` a band towards the treble. Step i of 256 is 1/16 neper
finer than step i - 1; all else both sides know from the levels, which are whole steps of 2^-8 nepers: two programs that
round otherwise must not disagree on a cell's width. Where the gain is far below it there is nothing to say: q is 0.

Beyond 16 widths cells grow with the magnitude, so that 255 of them hold whatever a wrong level makes.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from meanflow_audio_codec.models.quantizers import LEVEL_STEP

LEVEL_FLOOR = 1e-4  # RMS, -80 dB of full scale where x is not scaled: what is quieter is silent
STEPS, CELLS = 256, 128  # of width, and of magnitude
NUM_CLASSES = 28  # of openness, of 1/4 neper each
SHARE, TILT = 166, 20  # 166 / 256 of a band's level is above the cells; level steps by which a band's cells are wider
_CLASS_STEPS, _LOWEST_CLASS = 64, -10
_DEAD_ZONE, _LINEAR = 0.6, 16.0  # widths: up to which q is 0, and up to which cells are of one width


@dataclasses.dataclass(frozen=True)
class GainShape:
    """What the levels of a latent say of its tokens, and what cells add.

    Attributes:
        bands: Of each feature, from 0 without gaps.
        frames: Tokens of a latent, d.
    """

    bands: tuple[int, ...]
    frames: int

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

    def openness(self, levels: Float[Array, "b m n"], step: Int[Array, "b m"]) -> Int[Array, "b l bands"]:
        """Return the logarithm of the gain over the cells' width, in level steps, of each frame and band."""
        levels = jnp.round(self.of_frames(levels) / LEVEL_STEP).astype(jnp.int32)
        return openness(levels, jnp.repeat(step, self.frames, axis=1)[..., None])

    def quantize(
        self, x: Float[Array, "b l f"], levels: Float[Array, "b m n"], step: Int[Array, "b m"]
    ) -> Int[Array, "b l f"]:
        """Return the cells of x, -127 to 127."""
        open_ = self.openness(levels, step)[..., np.array(self.bands)]
        v = x / self.gain(self.of_frames(levels)) * jnp.exp(open_ * LEVEL_STEP)
        cells = jnp.floor(_companded(jnp.abs(v), jnp) + 1 - _DEAD_ZONE).astype(jnp.int32)
        cells = jnp.where(openness_class(open_) < 0, 0, jnp.minimum(cells, CELLS - 1))
        return jnp.where(v < 0, -cells, cells)

    def known(
        self, q: Int[Array, "b l f"], levels: Float[Array, "b m n"], step: Int[Array, "b m"]
    ) -> tuple[Float[Array, "b l f"], Float[Array, "b l f"]]:
        """Return what the cells tell of x / gain, and the deviation left; 0 and 1 where nothing is said."""
        open_ = self.openness(levels, step)[..., np.array(self.bands)]
        means, deviations, _ = (jnp.asarray(table) for table in cell_tables())
        at = jnp.maximum(openness_class(open_), 0), jnp.minimum(jnp.abs(q), CELLS - 1)
        said, width = openness_class(open_) >= 0, jnp.exp(-open_ * LEVEL_STEP)
        known = jnp.where(said, jnp.sign(q) * means[at] * width, 0.0)
        return known, jnp.where(said, deviations[at] * width, 1.0)

    def bits(self, levels: Float[Array, "b m n"], step: Int[Array, "b m"]) -> Float[Array, "b"]:
        """Return what the cells of a latent take, the mean over a clip's, by the law of `cell_tables`."""
        *_, shares = cell_tables()
        entropy = np.sum(-shares * np.log2(np.maximum(shares, 1e-30)), axis=1) + 1 - shares[:, 0]  # and a sign
        classes = openness_class(self.openness(levels, step))
        bits = jnp.where(classes < 0, 0.0, jnp.asarray(entropy, jnp.float32)[jnp.maximum(classes, 0)])
        return jnp.sum(bits * np.bincount(self.bands), axis=(1, 2)) / levels.shape[1]

    def step_for(self, levels: Float[Array, "b m n"], bits: Int[Array, "b"]) -> Int[Array, "b m"]:
        """Return the finest step, one for all latents of a clip, whose cells take up to so many bits a latent."""
        step = jnp.zeros(levels.shape[:2], jnp.int32)
        for digit in (1 << i for i in reversed(range(8))):
            step += jnp.where(self.bits(levels, step + digit) <= bits, digit, 0)[:, None]
        return step


def openness(levels: np.ndarray | Array, step: np.ndarray | Array) -> np.ndarray | Array:
    """Return SHARE of the levels [..., B] less the width's logarithm, all in level steps, all whole numbers."""
    num_bands = levels.shape[-1]
    return (levels * SHARE >> 8) - TILT * np.arange(num_bands, dtype=np.int32) - 16 * (STEPS // 4 - step)


def openness_class(openness: np.ndarray | Array) -> np.ndarray | Array:
    """Return the class, 0 to NUM_CLASSES - 1, or less than 0 where nothing is to be said."""
    return (openness // _CLASS_STEPS - _LOWEST_CLASS).clip(-1, NUM_CLASSES - 1)


def _companded(magnitude: np.ndarray | Array, np_: object) -> np.ndarray | Array:
    """Return the magnitude where cells are of one width, and that of cells, beyond."""
    return np_.where(magnitude < _LINEAR, magnitude, _LINEAR * (1 + np_.log(np_.maximum(magnitude, 1) / _LINEAR)))


@functools.cache
def cell_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and deviation of magnitudes, in widths, and share, [class of openness, cell].

    Coefficients over their gain are taken to have Student's t-distribution of 4 degrees of freedom and scale 0.93, as
    music's about have. The deviation of cell 0 is that of both signs together.
    """
    v = np.geomspace(1e-5, 20_000, 60_000)
    mass = (1 + (v / 0.93) ** 2 / 4) ** -2.5 * np.gradient(v)
    mass /= mass.sum()
    cells = np.arange(CELLS)
    # Of a cell in which nothing lies: its middle, and the deviation of what is uniform.
    edges = np.where(cells < _LINEAR, cells, _LINEAR * np.exp(cells / _LINEAR - 1))
    tables = []
    for number in range(NUM_CLASSES):
        y = v * np.exp((number + _LOWEST_CLASS + 0.5) * _CLASS_STEPS * LEVEL_STEP)
        at = np.minimum(np.floor(_companded(y, np) + 1 - _DEAD_ZONE), CELLS - 1).astype(int)
        share, first, second = (np.bincount(at, mass * y**power, CELLS) for power in range(3))
        there = share > 1e-12
        share = np.maximum(share, 1e-12)
        mean = np.where(there, first / share, edges)
        deviation = np.sqrt(np.where(there, np.maximum(second / share - mean**2, 1e-4), 1 / 12))
        mean[0], deviation[0] = 0.0, np.sqrt(second[0] / share[0])
        tables.append((mean, deviation, share / share.sum()))
    return tuple(np.stack(table).astype(np.float32) for table in zip(*tables, strict=True))
