"""The .mfac file: exact round trips, sizes against entropy, the format as documented and frozen, damage of all kinds.

Two outside oracles work in integers alone: the reader printed in documentation/bitstream.md, and `range_encode` here.
"""

import io
import itertools
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from meanflow_audio_codec.bitstream import (
    MAX_HEADER_BYTES,
    Header,
    Reader,
    Writer,
    fit_tables,
    info,
    read_header,
    tables_checksum,
)
from meanflow_audio_codec.errors import InputError

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "test/golden"
MUTATIONS = 400  # seconds; check_mutations(0, 10_000) without beartype takes a minute


class Pipe:
    """Neither seekable nor generous: a read returns at most 7 bytes."""

    def __init__(self, data=b""):
        self.data, self.written = io.BytesIO(data), bytearray()

    def read(self, size):
        return self.data.read(min(size, 7))

    def write(self, data):
        self.written += data


def make_tables(k, contexts, cardinality):
    """Return skewed tables by an integer formula, in which the last code takes the rest."""
    i, q, a = np.ogrid[:k, :contexts, :cardinality]
    most = 2 * (2**16 // (2 * cardinality))  # even
    counts = 1 + (i * 7919 + q * 104_729 + a * 611_953 + i * q * a) % (most - 1)
    counts[..., -1] += 2**16 - counts.sum(axis=2)
    return counts.astype(np.uint32)


def make_codes(c, k, n, cardinality):
    """Return codes by an integer formula."""
    i, j, frame = np.ogrid[:c, :k, :n]
    return (i * 5 + j * 3 + frame * frame // 3 + frame * (j + 1)) % cardinality


def make_likely_codes(c, k, n, tables, rare=7):
    """Return codes of which range coding makes less than packing does: the likeliest, but for one in `rare`."""
    codes = make_codes(c, k, n, tables.shape[2])
    for frame, channel, j in np.ndindex(n, c, k):
        context = 1 + codes[channel, j, frame - 1] if tables.shape[1] > 1 and frame else 0
        if (channel + 2 * j + 3 * frame) % rare:
            codes[channel, j, frame] = tables[j, context].argmax()
    return codes


def draw_codes(c, k, n, cardinality, seed=0):
    return np.random.default_rng(seed).integers(0, cardinality, (c, k, n))


def make_header(c, k, cardinality, entropy="none", **fields):
    defaults = {"codec": "test_1", "fingerprint": "0123456789abcdef", "sample_rate": 44_100, "block_frames": 8}
    return Header(channels=c, num_codebooks=k, cardinality=cardinality, entropy=entropy, **(defaults | fields))


def encode(header, codes, tables=None, samples=None, steps=()):
    pipe = Pipe()
    writer, start = Writer(pipe, header, tables), 0
    for step in (*steps, codes.shape[2]):
        writer.write(codes[:, :, start : start + step])
        start = min(start + step, codes.shape[2])
    writer.close(codes.shape[2] * 900 if samples is None else samples)
    return bytes(pipe.written)


def decode(data, tables=None):
    reader = Reader(Pipe(data), tables)
    shape = (reader.header.channels, reader.header.num_codebooks, 0)
    blocks = [np.zeros(shape, np.int32), *(codes for codes, _ in reader)]
    assert all(block.dtype == np.int32 for block in blocks)
    return np.concatenate(blocks, axis=2), reader.samples


def documented_reader():
    """Return the namespace of the Python code in the documentation."""
    text = (ROOT / "documentation/bitstream.md").read_text()
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], namespace)
    return namespace


def range_encode(intervals):
    """Return the words of (cumulative, count) pairs in units of 2^-24: lower is one integer, so no carries arise."""
    lower, width, shifts = 0, 2**64 - 1, 0
    for cumulative, count in intervals:
        scale = width >> 24
        lower, width = lower + scale * cumulative, scale * count
        if width < 2**32:
            lower, width, shifts = lower << 32, width << 32, shifts + 1
    point = (lower + 2**32 - 1) >> 32
    words = [point, 0] if (lower + width) >> 32 == point else [point]
    return [point >> 32 * i & 0xFFFFFFFF for i in range(shifts, 0, -1)] + [word & 0xFFFFFFFF for word in words]


def run_python(code, threads="1"):
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        "PYTHONHASHSEED": threads,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "test")]),
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


CODED = [  # channels, codebooks, cardinality, contexts of the tables (None: no entropy coding)
    (1, 3, 2, None),
    (6, 2, 3, None),
    (2, 4, 4, None),
    (1, 5, 5, None),
    (3, 2, 16, None),
    (2, 9, 1024, None),
    (1, 1, 65_536, None),
    (2, 3, 2, 3),
    (1, 4, 3, 1),
    (2, 8, 4, 5),
    (5, 2, 5, 6),
    (4, 3, 16, 17),
    (2, 2, 1024, 1),
    (1, 1, 1024, 1025),
]


@pytest.mark.parametrize("c, k, cardinality, contexts", CODED)
def test_codes_and_length_come_back_at_every_number_of_frames(c, k, cardinality, contexts):
    tables = contexts and make_tables(k, contexts, cardinality)
    header = make_header(c, k, cardinality, "range" if contexts else "none")
    for n in (0, 1, 2, 7, 8, 9, 16, 17, 24, 41):
        codes = draw_codes(c, k, n, cardinality, n)
        data = encode(header, codes, tables, samples=n * 900 - n // 2)
        decoded, samples = decode(data, tables)
        np.testing.assert_array_equal(decoded, codes)
        assert samples == n * 900 - n // 2


def test_bytes_do_not_depend_on_how_the_codes_are_handed_over():
    tables, header = make_tables(4, 5, 4), make_header(2, 4, 4, "range")
    codes = draw_codes(2, 4, 53, 4)
    whole = encode(header, codes, tables)
    for steps in ([1] * 53, [0, 7, 0, 1], [8] * 6, [9] * 5, [16, 20], [53]):
        assert encode(header, codes, tables, steps=steps) == whole
    assert encode(header, codes.astype(np.uint8), tables) == whole


def test_blocks_are_independent():
    tables, header = make_tables(4, 5, 4), make_header(2, 4, 4, "range")
    codes = draw_codes(2, 4, 24, 4)
    records = cut(encode(header, codes, tables))[1:]
    for i in range(3):
        alone = cut(encode(header, codes[:, :, 8 * i : 8 * i + 8], tables))[1]
        assert alone[16:] == records[i][16:]


@pytest.mark.parametrize("cardinality, contexts", [(4, 5), (4, 1), (16, 17), (1024, 1)])
def test_the_coder_uses_exactly_the_counts_of_the_table(cardinality, contexts):
    """Word for word what a coder in integers makes of the table, tables of one long bar and ones included."""
    c, k, n = 2, 3, 40
    skewed = np.ones((k, contexts, cardinality), np.uint32)
    skewed[:, :, 1] += 2**16 - cardinality
    for tables in (make_tables(k, contexts, cardinality), skewed):
        codes = make_likely_codes(c, k, n, tables, rare=7 if tables is not skewed else 31)
        header = make_header(c, k, cardinality, "range", block_frames=n)
        payload = cut(encode(header, codes, tables))[1][16:]
        edges = np.concatenate([np.zeros((k, contexts, 1), int), tables.cumsum(axis=2, dtype=int)], axis=2).tolist()
        intervals = []
        for j, channel, i in itertools.product(range(n), range(c), range(k)):
            code = codes[channel, i, j]
            row = edges[i][1 + codes[channel, i, j - 1] if contexts > 1 and j else 0]
            intervals.append((2**8 * row[code], 2**8 * (row[code + 1] - row[code])))
        words = range_encode(intervals)
        assert payload == struct.pack(f"<{len(words)}I", *words)


@pytest.mark.parametrize("cardinality, contexts", [(2, 3), (4, 5), (4, 1), (16, 17), (1024, 1)])
def test_size_is_the_entropy_of_the_table(cardinality, contexts):
    """Within 0.1 % and 8 bytes a block of the sum of -log2 P, for codes drawn from the tables."""
    rng, k, n = np.random.default_rng(0), 16, 512
    tables = make_tables(k, contexts, cardinality)
    codes, bits = np.zeros((1, k, n), int), 0.0
    for i, j in itertools.product(range(k), range(n)):
        p = tables[i, 1 + codes[0, i, j - 1] if contexts > 1 and j % 256 else 0] / 2**16
        codes[0, i, j] = rng.choice(cardinality, p=p)
        bits -= np.log2(p[codes[0, i, j]])
    measured = info(io.BytesIO(encode(make_header(1, k, cardinality, "range", block_frames=256), codes, tables)))
    assert bits / 8 <= measured["payload_bytes"] <= 1.001 * bits / 8 + 2 * 8
    assert measured["total_bytes"] == measured["payload_bytes"] + measured["header_bytes"] + 2 * 16 + 32


@pytest.mark.parametrize("cardinality, contexts", [(2, 3), (4, 1), (64, 1)])
def test_entropy_coding_never_costs(cardinality, contexts):
    """Blocks that the tables do not fit are packed, others of the same file are not."""
    tables, packed_bytes = make_tables(3, contexts, cardinality), 32 * 6 * (cardinality - 1).bit_length() // 8
    unlikely = np.broadcast_to(tables[:, :1].argmin(axis=2), (2, 3, 32))
    codes = np.concatenate([unlikely, make_likely_codes(2, 3, 32, tables), unlikely], axis=2)
    data = encode(make_header(2, 3, cardinality, "range", block_frames=32), codes, tables)
    first, second, third = (len(record) - 16 for record in cut(data)[1:4])
    assert first == third == packed_bytes and second < packed_bytes
    np.testing.assert_array_equal(decode(data, tables)[0], codes)


@pytest.mark.parametrize("cardinality", [2, 3, 4, 5, 7, 16, 1000, 1024])
def test_size_without_entropy_coding_is_the_advertised_bitrate(cardinality):
    codes = draw_codes(2, 8, 256, cardinality)
    measured = info(io.BytesIO(encode(make_header(2, 8, cardinality, block_frames=256), codes)))
    advertised = codes.size * np.log2(cardinality) / 8
    if cardinality & (cardinality - 1) == 0:
        assert measured["payload_bytes"] == advertised
    assert advertised <= measured["payload_bytes"] <= 1.001 * advertised + 8


def test_fitted_tables_save_what_their_entropy_says():
    """A Markov chain of known entropy rate, 1.16 bits in place of 2: coded within 2 %."""
    rng, k, n = np.random.default_rng(0), 8, 4096
    stay = 0.75
    chain = rng.integers(0, 4, (2, k, n))
    for j in range(1, n):
        chain[:, :, j] = np.where(rng.random((2, k)) < stay, chain[:, :, j - 1], chain[:, :, j])
    p = np.array([stay + 0.25 * (1 - stay), *[0.25 * (1 - stay)] * 3])
    rate = -np.sum(p * np.log2(p))
    tables = fit_tables(chain[:1], 4, contexts=True)
    header = make_header(1, k, 4, "range", block_frames=512)
    size = info(io.BytesIO(encode(header, chain[1:], tables)))["payload_bytes"]
    assert size == pytest.approx(rate * k * n / 8, rel=0.02)
    packed = info(io.BytesIO(encode(make_header(1, k, 4, block_frames=512), chain[1:])))["payload_bytes"]
    assert size / packed == pytest.approx(rate / 2, rel=0.02)


def test_fitted_tables_are_counts_of_at_least_one_that_sum_exactly():
    rng = np.random.default_rng(0)
    for cardinality, contexts, length in [
        (2, True, 0),
        (3, True, 1),
        (4, True, 999),
        (5, False, 50),
        (1024, False, 99),
    ]:
        codes = np.minimum(rng.geometric(0.5, (3, 2, length)) - 1, cardinality - 1)
        tables = fit_tables(codes, cardinality, contexts)
        assert tables.dtype == np.uint32 and tables.shape == (2, cardinality + 1 if contexts else 1, cardinality)
        assert tables.min() >= 1 and np.all(tables.sum(axis=2) == 2**16)
    tables = fit_tables(np.tile([0, 1, 2], 3000).reshape(1, 1, -1), 4, True)[0]
    np.testing.assert_allclose(tables[0] / 2**16, [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-3)  # the marginal
    np.testing.assert_allclose(tables[1:4] / 2**16, np.eye(4)[[1, 2, 0]], atol=1e-3)
    np.testing.assert_allclose(tables[4] / 2**16, tables[0] / 2**16, atol=1e-3)  # never seen: falls back


# Files of 2026, which every later version must read and write.
GOLDEN_FILES = {  # channels, codebooks, cardinality, contexts, frames, samples
    "packed": (2, 3, 4, None, 21, 18_500),
    "uniform": (1, 2, 5, None, 19, 17_000),
    "contexts": (2, 4, 4, 5, 20, 17_777),
    "rvq": (1, 3, 64, 1, 17, 15_001),
    "surround": (6, 1, 2, 3, 9, 8_000),
    "empty": (1, 2, 4, None, 0, 0),
}


def golden(name):
    """Return header, codes, tables, samples and the bytes as they must be."""
    c, k, cardinality, contexts, frames, samples = GOLDEN_FILES[name]
    tables = make_tables(k, contexts, cardinality) if contexts else None
    header = make_header(c, k, cardinality, "range" if contexts else "none", codec=f"golden_{name}", seed=7)
    codes = make_likely_codes(c, k, frames, tables) if contexts else make_codes(c, k, frames, cardinality)
    return header, codes, tables, samples, (GOLDEN / f"{name}.mfac").read_bytes()


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_files_are_read_and_written_byte_for_byte(name):
    header, codes, tables, samples, data = golden(name)
    decoded, length = decode(data, tables)
    np.testing.assert_array_equal(decoded, codes)
    assert length == samples
    assert encode(header, codes, tables, samples) == data


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_the_documented_reader_reads_the_golden_files(name):
    _, codes, tables, samples, data = golden(name)
    header, decoded, length = documented_reader()["read"](data, None if tables is None else tables.tolist())
    assert decoded == codes.transpose(2, 0, 1).ravel().tolist()
    assert length == samples
    assert header["tables"] == ("" if tables is None else tables_checksum(tables))


def test_another_process_with_other_threads_and_hash_seed_decodes_and_encodes_the_same():
    code = (
        "import sys, zlib, test_bitstream as t\n"
        "for name in t.GOLDEN_FILES:\n"
        "    header, codes, tables, samples, data = t.golden(name)\n"
        "    decoded, _ = t.decode(data, tables)\n"
        "    print(name, zlib.crc32(decoded.tobytes()), zlib.crc32(t.encode(header, decoded, tables, samples)))\n"
    )
    outputs = {run_python(code, threads) for threads in ("1", "4")}
    expected = "".join(
        f"{name} {zlib.crc32(codes.astype(np.int32).tobytes())} {zlib.crc32(data)}\n"
        for name in GOLDEN_FILES
        for _, codes, _, _, data in [golden(name)]
    )
    assert outputs == {expected}


def test_the_first_codebooks_decode_with_the_tables_of_all():
    tables, codes = make_tables(8, 5, 4), draw_codes(1, 8, 20, 4)
    header = make_header(1, 3, 4, "range")
    data = encode(header, codes[:, :3], tables)
    np.testing.assert_array_equal(decode(data, tables)[0], codes[:, :3])
    np.testing.assert_array_equal(
        decode(data, lambda fingerprint: {header.fingerprint: tables}[fingerprint])[0], codes[:, :3]
    )


def test_other_tables_are_refused_before_any_code():
    header, _, tables, _, data = golden("contexts")
    other = tables.copy()
    other[0, 0, :2] += np.array([1, -1], dtype=np.int64).astype(np.uint32)
    with pytest.raises(
        InputError, match="written with entropy tables [0-9a-f]{8}, not .* fingerprint 0123456789abcdef"
    ):
        Reader(io.BytesIO(data), other)
    for wrong, message in [
        (None, "needs the tables of golden_contexts"),
        (tables[:3], "do not fit 4 codebooks"),
        (tables[:, :2], "do not fit"),
        (tables.astype(np.float32), "must hold integers"),
        (tables * np.uint32(2), "rows sum to 65536"),
    ]:
        with pytest.raises(InputError, match=message):
            Reader(io.BytesIO(data), wrong, name="song.mfac")
    with pytest.raises(InputError, match="needs the tables"):
        Writer(io.BytesIO(), header)


@pytest.mark.parametrize(
    "field, value",
    [
        ("channels", 0),
        ("channels", 65),
        ("sample_rate", 768_001),
        ("num_codebooks", 8193),
        ("cardinality", 1),
        ("cardinality", 65_537),
        ("block_frames", 4097),
        ("seed", -1),
        ("seed", 2**32),
        ("codec", "../../etc/passwd"),
        ("codec", ".."),
        ("codec", "/tmp/x"),
        ("codec", "a" * 65),
        ("fingerprint", "xyz"),
        ("entropy", "zip"),
        ("tables", "1234567"),
    ],
)
def test_header_fields_outside_their_limits_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{field}="):
        Header(**(vars(make_header(1, 1, 4)) | {field: value}))


def test_a_block_of_more_codes_than_the_bound_is_refused():
    make_header(64, 4, 4, block_frames=4096)
    with pytest.raises(InputError, match="choose a smaller block_frames"):
        make_header(64, 5, 4, block_frames=4096)


def test_codes_and_lengths_that_do_not_fit_are_refused():
    writer = Writer(io.BytesIO(), make_header(2, 3, 4))
    for codes in (np.zeros((1, 3, 5), int), np.zeros((2, 4, 5), int), np.zeros((2, 3)), np.zeros((2, 3, 5))):
        with pytest.raises((InputError, TypeError)):  # beartype may be first
            writer.write(codes)
    for bad in (-1, 4):
        with pytest.raises(InputError, match=r"must lie in \[0, 4\)"):
            writer.write(np.full((2, 3, 5), bad))
    for samples in (-1, 1):
        with pytest.raises(InputError, match="do not fit 0 code frames"):
            writer.close(samples)


# --- Damage ---------------------------------------------------------------------------------------------------------


def cut(data):
    """Return header and records of a whole file."""
    (length,) = struct.unpack_from("<I", data, 5)
    parts, at = [data[: 13 + length]], 13 + length
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        parts.append(data[at : at + 16 + size])
        at += 16 + size
    return parts


def repair(parts):
    """Return a file whose checksums and lengths are right, whatever its parts say."""
    text = parts[0][9:-4]
    head = struct.pack("<4sBI", b"MFAC", 1, len(text)) + text
    data, seed = head + struct.pack("<I", zlib.crc32(head)), zlib.crc32(head)
    for part in parts[1:]:
        frames, index = struct.unpack_from("<HH", part.ljust(4, b"\0"))
        payload = part[16:]
        head = struct.pack("<HHII", frames, index, len(payload), zlib.crc32(payload))
        data += head + struct.pack("<I", zlib.crc32(head, seed)) + payload
    return data


def subject():
    """Return data of 6 blocks (the last one short), codes and tables."""
    tables = make_tables(4, 5, 4)
    codes = draw_codes(2, 4, 45, 4)
    return encode(make_header(2, 4, 4, "range"), codes, tables), codes, tables


def salvage(data, tables):
    reader = Reader(Pipe(data), tables, salvage=True)
    return list(reader), reader


def assert_salvaged(blocks, codes):
    """Every block is either None or what stood at its place in time."""
    at = 0
    for block, frames in blocks:
        if block is not None:
            np.testing.assert_array_equal(block, codes[:, :, at : at + frames])
        at += frames
    return at


def test_a_damaged_payload_costs_its_block():
    data, codes, tables = subject()
    parts = cut(data)
    offset = sum(map(len, parts[:3]))
    broken = bytearray(data)
    broken[offset + 16 + 5] ^= 1
    with pytest.raises(InputError, match=rf"song.mfac: block 2 at byte {offset} is damaged; --salvage"):
        list(Reader(io.BytesIO(broken), tables, name="song.mfac"))
    blocks, reader = salvage(broken, tables)
    assert [codes is None for codes, _ in blocks] == [False, False, True, False, False, False]
    assert assert_salvaged(blocks, codes) == 45
    assert reader.samples == 45 * 900 and reader.lost == [f"block 2 at byte {offset} is damaged"]


@pytest.mark.parametrize("extra", [-20, -1, 1, 200])
def test_bytes_lost_or_added_within_a_payload_cost_its_block(extra):
    data, codes, tables = subject()
    parts = cut(data)
    for i in (1, 3, 6):
        part = parts[i][:extra] if extra < 0 else parts[i][:20] + b"\x55" * extra + parts[i][20:]
        blocks, reader = salvage(b"".join([*parts[:i], part, *parts[i + 1 :]]), tables)
        assert [codes is None for codes, _ in blocks] == [j == i for j in range(1, 7)]
        assert assert_salvaged(blocks, codes) == 45
        assert reader.samples == 45 * 900


@pytest.mark.parametrize("byte", range(16))
def test_a_damaged_head_costs_its_block(byte):
    data, codes, tables = subject()
    broken = bytearray(data)
    broken[sum(map(len, cut(data)[:3])) + byte] ^= 0x41
    with pytest.raises(InputError, match="the head of block 2 at byte"):
        list(Reader(io.BytesIO(broken), tables))
    blocks, reader = salvage(broken, tables)
    assert [codes is None for codes, _ in blocks] == [False, False, True, False, False, False]
    assert assert_salvaged(blocks, codes) == 45
    assert reader.samples == 45 * 900 and len(reader.lost) == 2


def test_the_next_head_is_found_behind_any_number_of_bytes():
    """Payloads of 128 KiB, longer than what is searched at once."""
    header = make_header(2, 64, 4, block_frames=4096)
    codes = draw_codes(2, 64, 3 * 4096, 4).astype(np.uint8)
    parts = cut(encode(header, codes))
    for gone in (parts[2][1:], parts[2][:-1], parts[2][:100], b"\0" * 300_000, b"\xff" * 65_536, parts[2][16:]):
        data = b"".join([*parts[:2], gone, *parts[3:]])
        reader = Reader(io.BytesIO(data), salvage=True)
        blocks = list(reader)
        assert [codes is None for codes, _ in blocks] == [False, True, False]
        assert assert_salvaged(blocks, codes) == 3 * 4096 and reader.samples == 3 * 4096 * 900


@pytest.mark.parametrize("first, last", [(1, 1), (2, 4), (5, 6), (1, 6)])
def test_missing_blocks_are_filled_in_to_their_length(first, last):
    data, codes, tables = subject()
    parts = cut(data)
    blocks, reader = salvage(b"".join(parts[:first] + parts[last + 1 :]), tables)
    assert [codes is None for codes, _ in blocks] == [first <= i <= last for i in range(1, 7)]
    assert assert_salvaged(blocks, codes) == 45
    assert reader.samples == 45 * 900
    assert reader.lost[0].startswith(f"blocks {first - 1} to {last - 1} are missing before byte ")
    with pytest.raises(InputError, match=f"blocks {first - 1} to {last - 1} are missing"):
        list(Reader(io.BytesIO(b"".join(parts[:first] + parts[last + 1 :])), tables))


def test_every_truncation_is_noticed_and_keeps_what_was_whole():
    data, codes, tables = subject()
    parts = cut(data)
    ends = np.cumsum([len(part) for part in parts])
    for size in range(len(data)):
        with pytest.raises(InputError, match="truncated|not an .mfac file"):
            list(Reader(io.BytesIO(data[:size]), tables))
        if size < ends[0]:
            with pytest.raises(InputError):
                Reader(io.BytesIO(data[:size]), tables, salvage=True)
            continue
        blocks, reader = salvage(data[:size], tables)
        assert len(blocks) == min(np.searchsorted(ends, size, side="right") - 1, 6)
        assert all(block is not None for block, _ in blocks)
        assert_salvaged(blocks, codes)
        assert reader.samples is None and reader.lost


def test_bytes_after_the_end_are_refused():
    data, codes, tables = subject()
    with pytest.raises(InputError, match=f"bytes follow the end, from byte {len(data)} on"):
        list(Reader(io.BytesIO(data + data), tables))
    blocks, reader = salvage(data + b"\0", tables)
    assert assert_salvaged(blocks, codes) == 45 and reader.samples == 45 * 900 and len(reader.lost) == 1


def test_a_block_of_another_file_or_place_does_not_pass():
    data, codes, tables = subject()
    parts = cut(data)
    other = cut(encode(make_header(2, 4, 4, "range", seed=1), codes, tables))
    for wrong in (
        [*parts[:2], other[2], *parts[3:]],
        [*parts[:2], parts[3], parts[2], *parts[4:]],
        [*parts[:2], *parts[1:]],
    ):
        with pytest.raises(InputError, match="--salvage"):
            list(Reader(io.BytesIO(b"".join(wrong)), tables))
        assert assert_salvaged(salvage(b"".join(wrong), tables)[0], codes) == 45


def check_wrap():
    """Measure a file of 65,600 blocks of a frame, one of them damaged."""
    codes = draw_codes(1, 1, 65_600, 2)
    data = bytearray(encode(make_header(1, 1, 2, block_frames=1), codes))
    at = len(data) - 32 - 30 * 17
    data[at] ^= 1
    measured = info(io.BytesIO(data))
    assert (measured["blocks"], measured["frames"], measured["samples"]) == (65_600, 65_600, 65_600 * 900)
    assert measured["lost"] == [
        f"the head of block 65570 at byte {at} is damaged",
        f"blocks 65570 to 65570 are missing before byte {at + 17}",
    ]


def test_indices_wrap_around():
    """In another process, for with the shapes checked it takes a minute."""
    run_python("import test_bitstream; test_bitstream.check_wrap()")


def test_info_measures_whole_and_damaged_files(tmp_path):
    data, _, _ = subject()
    path = tmp_path / "a.mfac"
    path.write_bytes(data)
    with open(path, "rb") as file:
        whole = info(file)
    assert (whole["samples"], whole["seconds"], whole["frames"], whole["blocks"]) == (40_500, 40_500 / 44_100, 45, 6)
    assert (whole["damaged_blocks"], whole["lost"], whole["total_bytes"]) == (0, [], len(data))
    assert whole["header_bytes"] == len(cut(data)[0])
    assert whole["payload_bytes"] == len(data) - len(cut(data)[0]) - 6 * 16 - 32
    assert whole["total_kbps"] == pytest.approx(len(data) * 8 / whole["seconds"] / 1000)
    assert whole["payload_kbps"] == pytest.approx(whole["payload_bytes"] * 8 / whole["seconds"] / 1000)
    broken = bytearray(data)
    broken[len(cut(data)[0]) + 20] ^= 1
    damaged = info(io.BytesIO(broken))
    assert (damaged["damaged_blocks"], damaged["frames"], damaged["samples"]) == (1, 45, 40_500)
    cut_off = info(io.BytesIO(data[:-1]))
    assert (cut_off["samples"], cut_off["total_kbps"], cut_off["frames"], len(cut_off["lost"])) == (None, None, 45, 1)
    empty = info(io.BytesIO(golden("empty")[-1]))
    assert (empty["samples"], empty["frames"], empty["total_kbps"]) == (0, 0, None)


def test_read_header_stops_where_the_blocks_start():
    data, _, _ = subject()
    file = io.BytesIO(data)
    assert read_header(file).channels == 2
    assert file.tell() == len(cut(data)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-1] + b',"path":"/etc/passwd"}', "unknown or missing header fields: .'path'"),
        (lambda text: text.replace(b'"seed":0,', b""), "fields: .'seed'"),
        (lambda text: text.replace(b'"seed":0', b'"seed": 0'), "canonical"),
        (lambda text: text.replace(b'"seed":0', b'"seed":0,"seed":0'), "canonical"),
        (lambda text: text.replace(b'"seed":0', b'"seed":0.0'), "seed=0.0"),
        (lambda text: text.replace(b'"seed":0', b'"seed":' + b"9" * 3000), "seed=9999"),
        (lambda text: text.replace(b'"channels":2', b'"channels":99999999'), "channels=99999999"),
        (lambda text: text.replace(b'"channels":2', b'"channels":null'), "channels=None"),
        (lambda text: text.replace(b'"codec":"test_1"', b'"codec":"../x"'), "codec='../x'"),
        (lambda text: text.replace(b"0123456789abcdef", b"0123456789ABCDEF"), "fingerprint="),
        (lambda text: re.sub(rb'"tables":"\w+"', b'"tables":""', text), "does not go with entropy=range"),
        (lambda text: b"[" * MAX_HEADER_BYTES, "not JSON"),
        (lambda text: b'{"a":' * 800, "not JSON"),
        (lambda text: b"[]", "unknown or missing"),
        (lambda text: b"\xff\xfe", "not JSON"),
        (lambda text: b"", "not JSON"),
        (lambda text: text + b" " * MAX_HEADER_BYTES, "longer than 4096"),
    ],
)
def test_hostile_headers_are_refused(change, message):
    data, _, tables = subject()
    parts = cut(data)
    hostile = repair([parts[0][:9] + change(parts[0][9:-4]) + b"....", *parts[1:]])
    for function in (lambda file: Reader(file, tables, salvage=True), info, read_header):
        with pytest.raises(InputError, match=message):
            function(io.BytesIO(hostile))


def test_a_newer_version_is_refused():
    data, _, _ = subject()
    with pytest.raises(InputError, match="version 2 is not 1: update"):
        read_header(io.BytesIO(data[:4] + b"\2" + data[5:]))


def test_memory_is_bounded_whatever_a_file_says():
    """The largest block that a header may announce, lengths that lie, holes: at most 64 MiB."""
    largest = make_header(64, 16, 65_536, block_frames=1024)
    text = largest.to_bytes()
    header = struct.pack("<4sBI", b"MFAC", 1, len(text)) + text
    header += struct.pack("<I", zlib.crc32(header))
    seed = zlib.crc32(header[:-4])

    def record(frames, index, length, payload):
        head = struct.pack("<HHII", frames, index, length, zlib.crc32(payload))
        return head + struct.pack("<I", zlib.crc32(head, seed)) + payload

    files = [
        header + record(1024, 0, 4 * 2**20 + 8, b"few"),
        header + record(1024, 0, 2**21, bytes(2**21)) + record(0, 1, 16, struct.pack("<QQ", 2**63, 2**63)),
        header + record(1024, 1000, 2**32 - 1, b""),
        header + record(1024, 1024, 3, b"few"),
        b"MFAC\1" + struct.pack("<I", 2**32 - 1) + bytes(5000),
        header + bytes(2**20),
    ]
    tracemalloc.start()
    for data in files:
        tracemalloc.reset_peak()
        with pytest.raises(InputError):
            for _ in Reader(io.BytesIO(data)):
                pass
        if data.startswith(header):
            for codes, frames in Reader(io.BytesIO(data), salvage=True):
                assert frames == 1024 and (codes is None or codes.shape == (64, 16, 1024))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_a_long_stream_is_written_and_read_in_constant_memory():
    class Endless:
        """Hands a file over while it is being written."""

        def __init__(self):
            self.buffer = bytearray()
            self.writer = Writer(self, make_header(2, 16, 4, block_frames=256))
            self.rounds = 50

        def write(self, data):
            self.buffer += data

        def read(self, size):
            while not self.buffer and self.rounds:
                self.rounds -= 1
                self.writer.write(codes) if self.rounds else self.writer.close(1000)
            data = bytes(self.buffer[:size])
            del self.buffer[:size]
            return data

    codes = draw_codes(2, 16, 1024, 4).astype(np.uint8)
    tracemalloc.start()
    frames = sum(frames for _, frames in Reader(Endless()))
    assert frames == 49 * 1024 and tracemalloc.get_traced_memory()[1] < 2**20  # the codes are 6 MiB
    tracemalloc.stop()


def mutate(rng, data, others):
    """Return data with one to three random damages, in one file of four its header included."""
    start = 0 if rng.random() < 0.25 else len(cut(data)[0])
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = len(data)
        a, b = sorted(rng.integers(min(start, size), size + 1, 2))
        chunk = rng.bytes(int(rng.integers(1, 40)))
        other = others[rng.integers(len(others))]
        kind = rng.integers(0, 11)
        if kind <= 2 and a < size:
            data[a] ^= 1 << rng.integers(8)
        elif kind == 3:
            data[a : a + len(chunk)] = chunk
        elif kind == 4:
            del data[a:]
        elif kind == 5:
            data[a:a] = chunk
        elif kind == 6:
            del data[a : a + len(chunk)]
        elif kind == 7:
            data[a:a] = data[b : b + 200]
        elif kind == 8:
            data[a : a + len(chunk)] = bytes([rng.choice([0, 255])]) * len(chunk)
        elif kind == 9:
            data[a:b] = other[a:b]
        else:
            data = bytearray(rng.bytes(int(rng.integers(0, 300))) if rng.random() < 0.2 else data[:a] + other)
    return bytes(data)


def mutate_and_repair(rng, data):
    """Return data with hostile contents under right checksums."""
    parts = cut(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(parts)))
        if at == 0:
            numbers = list(re.finditer(rb"(?<=:)\d+", parts[0]))
            number = numbers[rng.integers(len(numbers))]
            value = rng.choice([0, 1, 2, 3, 5, 64, 65, 1024, 4096, 65_536, 2**31, 2**32, 2**53])
            parts[0] = parts[0][: number.start()] + str(value).encode() + parts[0][number.end() :]
            continue
        part = bytearray(parts[at].ljust(24, b"\0"))
        kind = rng.integers(0, 6)
        if kind == 0:
            part[0:2] = struct.pack("<H", rng.choice([0, 1, 7, 8, 9, 65_535]))
        elif kind == 1:
            part[2:4] = struct.pack("<H", rng.choice([0, 1, 2, 5, 1024, 1025, 65_535]))
        elif kind == 2:
            part[16:] = rng.bytes(int(rng.choice([0, 1, 3, 4, 8, 16, 20, 500])))
        elif kind == 3:
            part[16 + rng.integers(len(part) - 16)] ^= 1 << rng.integers(8)
        elif kind == 4:
            part[16:] = b"\xff" * (len(part) - 16)
        else:
            part[16:32] = struct.pack("<QQ", *rng.integers(0, 2**63, 2))
        parts[at] = bytes(part)
    return repair(parts)


def check_mutations(start, stop):
    """Attack the golden files and the subject; return how often each way out was taken."""
    data, codes, tables = subject()
    subjects = [(data, codes, tables)]
    subjects += [(data, codes, tables) for _, codes, tables, _, data in (golden(name) for name in GOLDEN_FILES)]
    others = [data for data, _, _ in subjects]
    counts = {"refused": 0, "unharmed": 0, "header lost": 0, "salvaged": 0, "blocks lost": 0, "hostile read": 0}
    for seed in range(start, stop):
        rng = np.random.default_rng(seed)
        mutated = mutate(rng, others[seed % len(subjects)], others)
        # A header put in the place of another one makes it that other file.
        data, codes, tables = next(
            (s for s in subjects if mutated.startswith(cut(s[0])[0])), subjects[seed % len(subjects)]
        )
        length = len(cut(data)[0])
        try:
            decoded, _ = decode(mutated, tables)
            np.testing.assert_array_equal(decoded, codes)
            assert mutated == data
            counts["unharmed"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
        try:
            blocks, reader = salvage(mutated, tables)
            assert_salvaged(blocks, codes)
            assert sum(frames for _, frames in blocks) <= codes.shape[2]
            assert reader.samples is None or sum(frames for _, frames in blocks) == codes.shape[2]
            assert bool(reader.lost) == (mutated != data)
            counts["salvaged"] += 1
            counts["blocks lost"] += sum(block is None for block, _ in blocks)
        except InputError:
            assert mutated[:length] != data[:length]
            counts["header lost"] += 1

        hostile = mutate_and_repair(rng, data)
        for keep_going in (False, True):
            try:
                reader = Reader(io.BytesIO(hostile), tables, salvage=keep_going)
                for block, frames in itertools.islice(reader, 2000):
                    h = reader.header
                    assert 1 <= frames <= h.block_frames
                    if block is not None:
                        assert block.shape == (h.channels, h.num_codebooks, frames)
                        assert 0 <= block.min() <= block.max() < h.cardinality
                counts["hostile read"] += not keep_going
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
    return counts


def test_mutated_truncated_and_random_inputs_end_in_an_error_or_a_salvage():
    counts = check_mutations(0, MUTATIONS)
    assert counts["refused"] > 0.9 * MUTATIONS and counts["salvaged"] > 0.3 * MUTATIONS and counts["blocks lost"] > 100
    assert counts["refused"] + counts["unharmed"] == counts["salvaged"] + counts["header lost"] == MUTATIONS
