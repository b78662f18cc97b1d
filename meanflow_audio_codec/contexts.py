"""The entropy tables of a code of gain and shape: in which order its codes are coded, and by which row each.

    codes [c, k, n]: of each latent the step, the codes of its levels, and the cells of its frames, one after another

First come the steps, frame by frame and channel by channel, each by the row of the one before; then the codes of the
levels, by stage; then the cells, frame by frame, of all channels and features. The row of a cell is that of its class
of openness (gain_shape.py) and of what lies around it in the two frames before, all of which a reader knows by then.
Where nothing is said a cell is 0, and takes no bits. A block knows nothing of the one before.

All is in whole numbers, for writer and reader must agree to the bit.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, UInt32

from meanflow_audio_codec.bitstream import TABLE_TOTAL, round_to_total
from meanflow_audio_codec.models.gain_shape import (
    CELLS,
    NUM_CLASSES,
    STEPS,
    GainShape,
    cell_tables,
    openness,
    openness_class,
)

_ZERO = CELLS - 1  # the code of cell 0
# The neighbourhood of a weighted sum of magnitudes, of which the last stands for all above.
_NEIGHBOURHOOD = np.array([0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 7, 7, 8])
_NUM_NEIGHBOURHOODS = 9
_PRIOR_COUNTS, _CLASS_COUNTS = 10.0, 30.0  # what a law, and a class's mean, weigh in a row


class ShapeContexts:
    """Contexts of codes of gain and shape, see `bitstream.Contexts`.

    Args:
        level_entries: Of the levels' quantizer [s, e, d B], in level steps.
        shape: What the codes are of: the bands of f features, d tokens a latent.
        tables: From `fit`; None: what the law of `gain_shape.cell_tables` says.

    Attributes:
        tables: Counts, as in `bitstream.Contexts`.
        costs: Of each value in each row, in 1/256 bits: whole numbers, whose sum no order changes.
    """

    def __init__(
        self,
        level_entries: Int[np.ndarray, "s e n"],
        shape: GainShape,
        tables: UInt32[np.ndarray, "r a"] | None = None,
    ):
        self._entries, self._shape, self._bands = level_entries, shape, np.array(shape.bands)
        self._first_level_row = 1 + STEPS
        self._first_cell_row = self._first_level_row + len(level_entries)
        self.tables = self._round(self._prior()) if tables is None else tables
        self.costs = np.round(-256 * np.log2(self.tables / TABLE_TOTAL)).astype(np.int32)

    @property
    def _num_codebooks(self) -> int:
        return 1 + len(self._entries) + self._shape.frames * len(self._bands)

    def blank(self, channels: int, frames: int) -> Int32[np.ndarray, "c k n"]:
        """Return codes of cells of 0."""
        return np.full((channels, self._num_codebooks, frames), _ZERO, np.int32)

    def parts(self, codes: Int[np.ndarray, "c k n"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places and rows, see `bitstream.Contexts`."""
        flat = codes.reshape(-1)
        places = np.arange(codes.size).reshape(codes.shape)
        row = 0
        for place in places[:, 0].T.reshape(-1):
            yield np.array([place]), np.array([row])
            row = 1 + flat[place]
        yield self._level_parts(places)
        cells, classes = self._cells(places), self._classes(codes)
        around = np.zeros((2, *cells.shape[1:]), int)
        for cell, class_ in zip(cells, classes, strict=True):
            said = class_ >= 0
            yield cell[said], self._cell_rows(class_, around[1], around[0])[said]
            around = np.stack([around[1], np.abs(flat[cell] - _ZERO)])

    def _level_parts(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stages = len(self._entries)
        levels = places[:, 1 : 1 + stages]
        rows = np.broadcast_to(self._first_level_row + np.arange(stages)[:, None], levels.shape)
        return levels.reshape(-1), rows.reshape(-1)

    def _cells(self, codes: Int[np.ndarray, "c k n"]) -> Int[np.ndarray, "l c f"]:
        cells = codes[:, 1 + len(self._entries) :].reshape(len(codes), self._shape.frames, len(self._bands), -1)
        return cells.transpose(3, 1, 0, 2).reshape(-1, len(codes), len(self._bands))

    def _classes(self, codes: Int[np.ndarray, "c k n"]) -> Int[np.ndarray, "l c f"]:
        stages = len(self._entries)
        levels = self._entries[np.arange(stages)[:, None, None], codes[:, 1 : 1 + stages].swapaxes(0, 1)].sum(axis=0)
        levels = levels.reshape(*levels.shape[:2], self._shape.frames, self._shape.num_bands)  # [c, n, d, B]
        classes = openness_class(openness(levels, codes[:, 0, :, None, None]))[..., self._bands]
        return classes.transpose(1, 2, 0, 3).reshape(-1, len(codes), len(self._bands))

    def _cell_rows(
        self, classes: Int[np.ndarray, "c f"], before: Int[np.ndarray, "c f"], earlier: Int[np.ndarray, "c f"]
    ) -> Int[np.ndarray, "c f"]:
        """Return the rows of cells, given the magnitudes one and two frames before."""
        return self._first_cell_row + classes * _NUM_NEIGHBOURHOODS + _neighbourhood(before, earlier, np)

    def cost(
        self,
        level_codes: Int[Array, "c l s"],
        levels: Float[Array, "c l n"],
        step: Int[Array, "c l"],
        q: Int[Array, "c t f"],
        frames: Int[Array, ""],
    ) -> Int[Array, ""]:
        """Return what the first frames of a block take, in 1/256 bits, for programs that JAX compiles."""
        costs = jnp.asarray(self.costs)
        valid = jnp.arange(step.shape[1]) < frames
        classes = openness_class(self._shape.openness(levels, step))[..., self._bands]
        around = jnp.pad(jnp.abs(q), ((0, 0), (2, 0), (0, 0)))
        rows = classes * _NUM_NEIGHBOURHOODS + _neighbourhood(around[:, 1:-1], around[:, :-2], jnp)
        rows = jnp.where(classes < 0, 0, self._first_cell_row + rows)
        of_cells = jnp.where(classes < 0, 0, costs[rows, q + _ZERO]).sum(axis=2).reshape(*step.shape, -1).sum(axis=2)
        of_levels = costs[self._first_level_row + np.arange(level_codes.shape[2]), level_codes].sum(axis=2)
        in_order = step.T.reshape(-1)
        of_steps = costs[jnp.concatenate([jnp.zeros(1, int), 1 + in_order[:-1]]), in_order].reshape(step.T.shape).T
        return jnp.sum(jnp.where(valid, of_cells + of_levels + of_steps, 0))

    def fit(self, blocks: Iterable[Int[np.ndarray, "c k n"]]) -> UInt32[np.ndarray, "r a"]:
        """Return tables counted from codes of training data, of various bitrates."""
        counts = np.zeros(self.tables.shape)
        for codes in blocks:
            flat = codes.reshape(-1)
            for places, rows in self.parts(codes):
                np.add.at(counts, (rows, flat[places]), 1)
        prior = self._prior()
        first, cells = self._first_cell_row, slice(self._first_cell_row, None)
        # Steps by how far they are from the one before, whatever that is.
        moves = sum(np.bincount(np.arange(STEPS) - i + STEPS, counts[1 + i], 2 * STEPS) for i in range(STEPS))
        for i in range(STEPS):
            counts[1 + i] = moves[STEPS - i : 2 * STEPS - i]
        counts[:first] += _PRIOR_COUNTS * prior[:first]
        by_class = counts[cells].reshape(NUM_CLASSES, _NUM_NEIGHBOURHOODS, STEPS)
        by_class[..., :-1] += by_class[..., -2::-1]  # both signs alike
        mean = _shared(by_class.sum(axis=1) + _PRIOR_COUNTS * prior[cells][::_NUM_NEIGHBOURHOODS])
        counts[cells] = (by_class + _CLASS_COUNTS * mean[:, None]).reshape(-1, STEPS)
        return self._round(_shared(counts))

    def _prior(self) -> np.ndarray:
        """Return what is to be expected without data."""
        flat = np.full((self._first_cell_row, STEPS), 1 / STEPS)
        flat[1 : 1 + STEPS] = (flat[1 : 1 + STEPS] + np.eye(STEPS)) / 2  # often the step before
        *_, share = cell_tables()
        side = share[:, 1:] / 2
        cells = np.concatenate([side[:, ::-1], share[:, :1], side, np.zeros((NUM_CLASSES, 1))], axis=1)
        return np.concatenate([flat, np.repeat(cells, _NUM_NEIGHBOURHOODS, axis=0)])

    @staticmethod
    def _round(shares: np.ndarray) -> UInt32[np.ndarray, "r a"]:
        return np.stack([round_to_total(row) for row in shares]).astype(np.uint32)


def _neighbourhood(before: Any, earlier: Any, np_: Any) -> Any:
    """Return the neighbourhood of each cell [..., f], given the magnitudes one and two frames before."""
    beside = np_.pad(before, [(0, 0)] * (before.ndim - 1) + [(1, 1)])
    near = 2 * (before + earlier) + beside[..., :-2] + beside[..., 2:]
    return np_.asarray(_NEIGHBOURHOOD)[np_.minimum(near, len(_NEIGHBOURHOOD) - 1)]


def _shared(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum(axis=-1, keepdims=True)
