"""contexts.py: what a code of gain and shape takes, that tables fit, and that writer and reader agree."""

import io
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_audio_codec import bitstream
from meanflow_audio_codec.contexts import ShapeContexts
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models.gain_shape import CELLS, STEPS, GainShape

ROOT = Path(__file__).parents[1]
BANDS, FRAMES, STAGES = (0, 0, 0, 1, 1, 2, 2, 2), 2, 2
SHAPE = GainShape(BANDS, FRAMES)
NUM_CODEBOOKS = 1 + STAGES + FRAMES * len(BANDS)


@pytest.fixture(scope="module")
def contexts():
    return ShapeContexts(draw_entries(), SHAPE)


def draw_entries():
    return np.random.default_rng(0).integers(-300, 300, (STAGES, 256, FRAMES * 3))


def draw_codes(contexts, channels=2, frames=9, seed=0):
    """Codes that a network may give: nothing where nothing is said; in bursts, so that frames foretell the next."""
    rng = np.random.default_rng(seed)
    codes = contexts.blank(channels, frames)
    codes[:, 0] = 60 + (np.arange(frames) > frames // 2)
    codes[:, 1 : 1 + STAGES] = rng.integers(0, 256, (channels, STAGES, frames))
    places, loud = np.arange(codes.size).reshape(codes.shape), 1.0
    for number, (place, _) in enumerate(contexts.parts(codes)):
        if number > channels * frames:
            loud = max(0.2, loud * rng.choice([0.5, 2.0]))
            codes.reshape(-1)[place] = CELLS - 1 + np.round(rng.laplace(0, min(loud, 8), place.shape)).astype(int)
    assert places.size == codes.size
    return codes


def write(codes, contexts, block_frames=4):
    file = io.BytesIO()
    fields = {"codec": "x", "fingerprint": "0123abcd", "sample_rate": 8000, "channels": len(codes)}
    fields |= {"num_codebooks": codes.shape[1], "cardinality": 256, "block_frames": block_frames}
    writer = bitstream.Writer(file, bitstream.Header(**fields, entropy="contexts"), contexts)
    writer.write(codes)
    writer.close(codes.shape[2] * 100)
    return file.getvalue()


def read(data, contexts):
    return np.concatenate([block.codes for block in bitstream.Reader(io.BytesIO(data), contexts)], axis=2)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_what_is_written_is_read(contexts, channels):
    codes = draw_codes(contexts, channels)
    data = write(codes, contexts)
    np.testing.assert_array_equal(read(data, contexts), codes)
    assert len({(codes[c] != CELLS - 1).sum() for c in range(channels)}) == channels


def documented(codes, entries):
    """(place in codes, row) of every code that is coded, by documentation/bitstream.md."""
    channels, _, frames = codes.shape
    coded, row = [], 0
    for n, c in itertools.product(range(frames), range(channels)):
        coded.append(((c, 0, n), row))
        row = 1 + codes[c, 0, n]
    coded += [((c, 1 + s, n), 257 + s) for c, s, n in np.ndindex(channels, STAGES, frames)]
    place = lambda c, t, i: (c, 1 + STAGES + t % FRAMES * len(BANDS) + i, t // FRAMES)
    a = lambda c, t, i: abs(codes[place(c, t, i)] - 127) if t >= 0 and 0 <= i < len(BANDS) else 0
    for t, c, i in np.ndindex(frames * FRAMES, channels, len(BANDS)):
        n, band = t // FRAMES, BANDS[i]
        level = sum(entries[s][codes[c, 1 + s, n]][t % FRAMES * 3 + band] for s in range(STAGES))
        openness = (166 * level >> 8) - 20 * band - 16 * (64 - codes[c, 0, n])
        class_ = min(openness // 64 + 10, 27)
        near = 2 * a(c, t - 1, i) + a(c, t - 1, i - 1) + a(c, t - 1, i + 1) + 2 * a(c, t - 2, i)
        if class_ >= 0:
            near = [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 7, 7, 8][min(near, 13)]
            coded.append((place(c, t, i), 257 + STAGES + 9 * class_ + near))
    return coded


def test_order_and_rows_are_the_documented_ones(contexts):
    codes = draw_codes(contexts)
    codes[0, 0] = 0  # a channel whose cells are too wide for anything
    places, rows = (np.concatenate(part) for part in zip(*contexts.parts(codes), strict=True))
    expected = documented(codes, draw_entries())
    assert list(zip(places, rows, strict=True)) == [
        (np.ravel_multi_index(place, codes.shape), row) for place, row in expected
    ]
    assert {place[0] for place, row in expected if row >= 257 + STAGES} == {1} and len(set(rows)) > 50


def test_golden_file():
    """Made from whole numbers alone: bytes that must not change."""
    weights = 1 + np.arange(1 + STEPS + STAGES + 28 * 9)[:, None] * np.arange(256) % 251
    tables = np.stack([bitstream.round_to_total(row / row.sum()) for row in weights])
    contexts = ShapeContexts(draw_golden_entries(), SHAPE, tables.astype(np.uint32))
    codes = contexts.blank(2, 11)
    codes[:, 0] = 50 + np.arange(11) // 4
    codes[:, 1 : 1 + STAGES] = np.arange(2 * STAGES * 11).reshape(2, STAGES, 11) * 37 % 256
    for place, _ in contexts.parts(codes):
        if place.min() % codes[0].size >= (1 + STAGES) * 11:
            codes.reshape(-1)[place] = 127 + place % 5 - 2
    data = write(codes, contexts)
    assert data == (ROOT / "test/golden/shape.mfac").read_bytes()
    np.testing.assert_array_equal(read(data, contexts), codes)


def draw_golden_entries():
    return np.arange(STAGES * 256 * FRAMES * 3).reshape(STAGES, 256, -1) * 101 % 601 - 300


def bits(contexts, codes):
    flat = codes.reshape(-1)
    return sum(-np.log2(contexts.tables[rows, flat[places]] / 2**16).sum() for places, rows in contexts.parts(codes))


def test_cost_is_that_of_the_rows_and_of_the_file(contexts):
    """Of all frames, of the first ones."""
    codes = draw_codes(contexts, frames=40)
    codes[:, 0] = 30  # cells so wide that a block is not packed
    codes[:, 0, 20:] = 29
    step, level_codes = jnp.asarray(codes[:, 0]), jnp.asarray(codes[:, 1 : 1 + STAGES].swapaxes(1, 2))
    levels = sum(draw_entries()[s][codes[:, 1 + s]] for s in range(STAGES))
    q = codes[:, 1 + STAGES :].swapaxes(1, 2).reshape(2, -1, len(BANDS)) - 127
    cost = jax.jit(lambda q, n: contexts.cost(level_codes, jnp.float32(levels / 256), step, q, n))
    for frames in (40, 23):
        spent = bits(contexts, codes[:, :, :frames].copy())
        assert cost(jnp.asarray(q), jnp.int32(frames)) / 256 == pytest.approx(spent, rel=1e-3)
    measured = bitstream.info(io.BytesIO(write(codes, contexts, block_frames=40)))
    assert 8 * measured["payload_bytes"] == pytest.approx(bits(contexts, codes), abs=64, rel=2e-3)


def test_fitted_tables_save(contexts):
    train, held_out = [draw_codes(contexts, frames=100, seed=seed) for seed in range(6)], draw_codes(contexts, seed=9)
    fitted = ShapeContexts(draw_entries(), SHAPE, contexts.fit(train))
    assert fitted.tables.shape == contexts.tables.shape and (fitted.tables.sum(axis=1) == 2**16).all()
    assert bits(fitted, held_out) < 0.9 * bits(contexts, held_out)
    cells = fitted.tables[1 + STEPS + STAGES :]
    np.testing.assert_allclose(cells[:, :-1], cells[:, -2::-1], atol=1)  # both signs alike
    np.testing.assert_array_equal(read(write(held_out, fitted), fitted), held_out)
    with pytest.raises(InputError, match="written with entropy tables"):
        read(write(held_out, fitted), contexts)


def test_tables_and_contexts_are_not_confused(contexts):
    codes = draw_codes(contexts)
    with pytest.raises(InputError, match="entropy=contexts does not go with the tables"):
        read(write(codes, contexts), np.full((NUM_CODEBOOKS, 1, 256), 256))
    with pytest.raises(InputError, match="needs the tables of x"):
        read(write(codes, contexts), None)


def test_any_payload_gives_codes_or_is_refused(contexts):
    """Random words, and files with a byte changed and their checksums made right again, as by a hostile writer."""
    rng = np.random.default_rng(0)
    header = bitstream.Reader(io.BytesIO(write(draw_codes(contexts), contexts)), contexts).header
    coder, _ = bitstream._check_tables(header, contexts)
    for size in [0, 3, *range(4, 400, 4)]:
        codes = bitstream._decode(header, coder, 4, rng.integers(0, 256, size, np.uint8).tobytes())
        assert codes is None or (codes.shape == (2, NUM_CODEBOOKS, 4) and 0 <= codes.min() <= codes.max() < 256)
