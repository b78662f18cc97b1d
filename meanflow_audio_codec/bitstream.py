"""The .mfac file: codes of a codec in independent, checksummed blocks, bit-packed or range-coded, written and read as a
stream. documentation/bitstream.md gives every byte, so that a reader can be written from it alone.

    file   = "MFAC" version header-length header-JSON CRC32, records, end record
    record = frames index length CRC32(payload) CRC32(head) payload

A block's codes are ordered by frame, then channel, then codebook. Entropy coding is a range coder (G. Martin, "Range
encoding: an algorithm for removing redundancy from a digitised message", 1979) as `constriction` implements it: 64-bit
state, 32-bit words, probabilities in units of 2^-24. The model is a table of integer counts, nothing is computed in
floating point that a machine could round otherwise:

    P(code a of codebook i | context q) = tables[i, q, a] / 2^16
    q = 0 in the first frame of a block, else 1 + the code of this codebook and channel one frame before

or q = 0 throughout if the tables have one context. A block that this does not make shorter than bit-packing is packed,
and known by its length. A codec that knows better from which row a code should be coded, and in which order, gives
`Contexts` of its own. constriction takes floating-point weights w_a of n symbols and uses
the cumulative counts floor(s sum_{b<a} w_b) + a with s = (2^24 - n) / sum_b w_b. For w_a = 2^8 tables[i, q, a] - 1 the
sum is 2^24 - n, so s = 1, and all partial sums are integers below 2^24, which float32 holds exactly in any order of
summation: the cumulative counts are 2^8 times those of the table. The tests hold this against a coder in integers.
"""

import dataclasses
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer, UInt32

from meanflow_audio_codec.errors import InputError

MAGIC = b"MFAC"
VERSION = 1
MAX_HEADER_BYTES = 4096
MAX_BLOCK_CODES = 2**20  # of all channels: bounds the memory of a reader, whatever a header says
MAX_GAP_BLOCKS = 1024  # that salvage fills in for one hole
MAX_SEARCHES = 64  # for a head within a payload
MAX_LINES = 1000  # about damage
TABLE_TOTAL = 2**16

_MODEL_BITS = 24  # constriction's precision
_PREFIX = struct.Struct("<4sBI")
_CRC = struct.Struct("<I")
_HEAD = struct.Struct("<HHIII")
_END = struct.Struct("<QQ")
_LIMITS = {
    "sample_rate": (1, 768_000),
    "channels": (1, 64),
    "num_codebooks": (1, 8192),
    "cardinality": (2, 65_536),
    "block_frames": (1, 4096),
    "seed": (0, 2**32 - 1),
}
_TEXTS = {
    "codec": "[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
    "fingerprint": "[0-9a-f]{8,64}",
    "entropy": "none|range|contexts",
    "tables": "|[0-9a-f]{8}",
}
_PIECE_BYTES = 2**16  # read at a time: a length that lies allocates no more than what is there
_GATHERED_WEIGHTS = 2**20


@dataclasses.dataclass(frozen=True)
class Header:
    """What a reader must know before the first block; every field is checked against an explicit limit.

    Attributes:
        codec: Name of the codec, of letters, digits, `.`, `_`, `-`; never a path.
        fingerprint: Of the bundle that wrote the file, 8 to 64 hexadecimal digits.
        sample_rate: Hz, of the original audio, which decoding restores; up to 768000.
        channels: Up to 64.
        num_codebooks: Kept in this file, up to 8192.
        cardinality: Each code is an integer in [0, cardinality); 2 to 65536.
        block_frames: Code frames a block, up to 4096, and channels x num_codebooks x block_frames up to 2^20.
        seed: Of the decoding noise, in [0, 2^32).
        entropy: "none", "range", or "contexts": by rows and in an order that the codec knows.
        tables: `tables_checksum` of the entropy tables, "" without them; `Writer` fills it in.

    Raises:
        InputError: a field has another type or lies outside its limits.
    """

    codec: str
    fingerprint: str
    sample_rate: int
    channels: int
    num_codebooks: int
    cardinality: int
    block_frames: int = 256
    seed: int = 0
    entropy: str = "none"
    tables: str = ""

    def __post_init__(self):
        _check_fields(vars(self))
        if self.block_codes > MAX_BLOCK_CODES:
            raise InputError(
                f"header fields channels x num_codebooks x block_frames make {self.block_codes} codes a block: at most "
                f"{MAX_BLOCK_CODES}; choose a smaller block_frames"
            )

    @property
    def block_codes(self) -> int:
        """Codes of a whole block."""
        return self.channels * self.num_codebooks * self.block_frames

    def to_bytes(self) -> bytes:
        """Return the canonical JSON: all keys, sorted, no spaces, ASCII."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":")).encode("ascii")


@runtime_checkable
class Readable(Protocol):
    """A file, pipe or socket: all that a reader asks of it."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""


@runtime_checkable
class Writable(Protocol):
    """A file, pipe or socket: all that a writer asks of it."""

    def write(self, data: bytes, /) -> Any:
        """Take all of `data`."""


@runtime_checkable
class Contexts(Protocol):
    """From which row of its tables each code is coded, and in which order.

    Attributes:
        tables: Counts of at least 1 of each value; each row sums to 2^16.
    """

    tables: UInt32[np.ndarray, "r a"]

    def parts(self, codes: Integer[np.ndarray, "c k n"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield where in `codes`, flattened, the next codes of a block are, and their rows.

        A reader fills in what a part asks for before it asks for the next. What is in no part is left as it is there:
        `blank`.
        """

    def blank(self, channels: int, frames: int) -> Int32[np.ndarray, "c k n"]:
        """Return codes to be filled in."""


Tables = Contexts | np.ndarray  # [k, q, a], integers


class Block(NamedTuple):
    """Code frames of a file: `codes` is int32 [c, k, n], or None where salvage lost them; `frames` is n."""

    codes: np.ndarray | None
    frames: int


class Writer:
    """Write a .mfac file to anything that has `write`, in memory of one block, without knowing the length ahead.

    Args:
        file: Open for bytes; it is neither sought in nor closed.
        header: Of the file; `tables` is filled in.
        tables: Entropy tables of at least `header.num_codebooks` codebooks (the first ones are used), needed and used
            if `header.entropy` is "range"; if it is "contexts", these.

    Raises:
        InputError: the tables do not fit the header.
    """

    def __init__(self, file: Writable, header: Header, tables: Tables | None = None):
        self._coder, checksum = _check_tables(header, tables)
        self.header = dataclasses.replace(header, tables=checksum)
        text = self.header.to_bytes()
        head = _PREFIX.pack(MAGIC, VERSION, len(text)) + text
        self._file, self._seed = file, zlib.crc32(head)
        self._pending = np.empty((header.channels, header.num_codebooks, header.block_frames), np.int32)
        self._filled, self._index, self._frames = 0, 0, 0
        file.write(head + _CRC.pack(self._seed))

    def write(self, codes: Integer[np.ndarray, "c k n"]) -> None:
        """Append any number of code frames of all channels; whole blocks go to the file.

        Raises:
            InputError: the codes are of other channels or codebooks, or outside [0, cardinality).
        """
        expected = self._pending.shape[:2]
        if codes.ndim != 3 or codes.shape[:2] != expected or codes.dtype.kind not in "iu":
            raise InputError(
                f"codes are {codes.dtype} {codes.shape}: the header asks for integers [{expected[0]}, {expected[1]}, n]"
            )
        if codes.size and not 0 <= codes.min() <= codes.max() < self.header.cardinality:
            raise InputError(f"codes from {codes.min()} to {codes.max()} must lie in [0, {self.header.cardinality})")
        done = 0
        while done < codes.shape[2]:
            count = min(codes.shape[2] - done, self.header.block_frames - self._filled)
            self._pending[:, :, self._filled : self._filled + count] = codes[:, :, done : done + count]
            self._filled, done = self._filled + count, done + count
            if self._filled == self.header.block_frames:
                self._flush()

    def close(self, samples: int) -> None:
        """Write what is pending and the end record; without it a reader takes the file for truncated.

        Args:
            samples: Length of the original audio at `header.sample_rate`; a code frame lasts at most a second.
        """
        if self._filled:
            self._flush()
        if not 0 <= samples <= self._frames * self.header.sample_rate:
            raise InputError(f"samples={samples} do not fit {self._frames} code frames of at most a second each")
        self._record(0, _END.pack(samples, self._frames))

    def _flush(self) -> None:
        codes = self._pending[:, :, : self._filled]
        self._record(self._filled, _encode(self.header, self._coder, codes))
        self._frames, self._filled, self._index = self._frames + self._filled, 0, self._index + 1

    def _record(self, frames: int, payload: bytes) -> None:
        head = struct.pack("<HHII", frames, self._index % 2**16, len(payload), zlib.crc32(payload))
        self._file.write(head + _CRC.pack(zlib.crc32(head, self._seed)) + payload)


class Reader:
    """Read a .mfac file from anything that has `read`, block by block, in memory of a few blocks.

    Iterate once: each `Block` comes as soon as its bytes are there. Afterwards `samples` is the length of the original
    audio at `header.sample_rate` (None if salvage found no end), and `lost` holds a line for each damage.

    Args:
        file: Open for bytes; it is not sought in. Nothing is read past the byte after the end record.
        tables: Entropy tables or contexts, or what returns them for a fingerprint; needed if the file is range-coded.
        salvage: Yield damaged blocks as None and go on with the next whole one, instead of raising.
        name: Of the file, for messages; its own name if it has one.

    Raises:
        InputError: the header is damaged or the tables are not those of the file; while iterating without `salvage`,
            the file is damaged, truncated, or goes on after its end.
    """

    def __init__(
        self,
        file: Readable,
        tables: Callable[[str], Tables | None] | Tables | None = None,
        salvage: bool = False,
        name: str | None = None,
    ):
        self._records = _Records(file, salvage, name)
        self.header = self._records.header
        if self.header.entropy != "none" and callable(tables):
            tables = tables(self.header.fingerprint)
        try:
            self._coder, checksum = _check_tables(self.header, tables)
        except InputError as error:
            raise InputError(f"{self._records.name}: {error}") from error
        if checksum != self.header.tables:
            raise InputError(
                f"{self._records.name}: written with entropy tables {self.header.tables}, not {checksum}: decode it "
                f"with the {self.header.codec} of fingerprint {self.header.fingerprint}"
            )

    @property
    def samples(self) -> int | None:
        """Length of the original audio, once the end has been read."""
        return self._records.samples

    @property
    def lost(self) -> list[str]:
        """A line for each damage that salvage met."""
        return self._records.lost

    def __iter__(self) -> Iterator[Block]:
        for record in self._records:
            codes = None
            if record.payload is not None:
                codes = _decode(self.header, self._coder, record.frames, record.payload)
                if codes is None:
                    self._records.fail(f"block {record.index} at byte {record.offset} does not decode")
            yield Block(codes, record.frames)


def read_header(file: Readable, name: str | None = None) -> Header:
    """Read the header alone; `file` then stands at the first record.

    Raises:
        InputError: this is no .mfac file, or its header is damaged.
    """
    return _read_header(_Source(file), name or _name(file))[0]


def info(file: Readable, name: str | None = None) -> dict[str, Any]:
    """Measure a file without decoding it: checksums are verified, entropy tables are not needed.

    Returns:
        header: The `Header`.
        samples, seconds: Length of the original audio, None if the file has no end.
        frames, blocks: Code frames and blocks up to the end, damaged ones included.
        damaged_blocks, lost: Their number, and a line for each damage.
        header_bytes, payload_bytes, total_bytes: The rest is framing: 16 bytes a block and 32 at the end.
        payload_kbps, total_kbps: Over `seconds`; None if those are unknown or 0.

    Raises:
        InputError: this is no .mfac file, or its header is damaged.
    """
    records = _Records(file, True, name)
    header_bytes = records.offset
    frames = blocks = damaged = payload_bytes = 0
    for record in records:
        frames, blocks, damaged = frames + record.frames, blocks + 1, damaged + (record.payload is None)
        payload_bytes += record.length
    seconds = None if records.samples is None else records.samples / records.header.sample_rate
    kbps = {
        f"{part}_kbps": 8 * size / seconds / 1000 if seconds else None
        for part, size in (("payload", payload_bytes), ("total", records.offset))
    }
    return {
        "header": records.header,
        "samples": records.samples,
        "seconds": seconds,
        "frames": frames,
        "blocks": blocks,
        "damaged_blocks": damaged,
        "lost": records.lost,
        "header_bytes": header_bytes,
        "payload_bytes": payload_bytes,
        "total_bytes": records.offset,
        **kbps,
    }


def fit_tables(codes: Integer[np.ndarray, "n k l"], cardinality: int, contexts: bool) -> UInt32[np.ndarray, "k q a"]:
    """Count the codes of training data into entropy tables.

    The marginal is smoothed by half a count a code (the estimator of R. Krichevsky and V. Trofimov, IEEE Trans. Inform.
    Theory 27, 1981), each context by as much in all, shared out as the marginal has it. Context 0, the first frame of
    a block, has the marginal itself: a block may start anywhere.

    Args:
        codes: Sequences of code frames; previous frames are taken within a sequence.
        cardinality: Codes lie in [0, cardinality).
        contexts: Condition on the previous frame, which asks for data and memory by cardinality^2: for few levels.

    Returns:
        Counts of at least 1; each row sums to 2^16.
    """
    if codes.size and not 0 <= codes.min() <= codes.max() < cardinality:
        raise InputError(f"codes from {codes.min()} to {codes.max()} must lie in [0, {cardinality})")
    tables = np.empty((codes.shape[1], cardinality + 1 if contexts else 1, cardinality), np.uint32)
    for i in range(len(tables)):
        sequences = codes[:, i].astype(np.int64)
        counts = np.bincount(sequences.ravel(), minlength=cardinality)
        marginal = (counts + 0.5) / (counts.sum() + 0.5 * cardinality)
        tables[i, 0] = round_to_total(marginal)
        if contexts:
            pairs = sequences[:, :-1] * cardinality + sequences[:, 1:]
            pairs = np.bincount(pairs.ravel(), minlength=cardinality**2).reshape(cardinality, cardinality)
            for previous, row in enumerate(pairs):
                smoothed = (row + 0.5 * cardinality * marginal) / (row.sum() + 0.5 * cardinality)
                tables[i, previous + 1] = round_to_total(smoothed)
    return tables


def tables_checksum(tables: Integer[np.ndarray, "*k a"]) -> str:
    """Return 8 hexadecimal digits: CRC32 over the shape and the counts, all 32-bit little-endian."""
    data = struct.pack(f"<{tables.ndim}I", *tables.shape) + tables.astype("<u4").tobytes()
    return f"{zlib.crc32(data):08x}"


def round_to_total(p: np.ndarray) -> np.ndarray:
    """Share 2^16 out by `p`: one count to each, the rest by largest remainders, the first ones in ties."""
    exact = p * (TABLE_TOTAL - len(p))
    counts = np.floor(exact).astype(np.int64)
    missing = TABLE_TOTAL - len(p) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts + 1


class _PreviousCode:
    """Contexts by the code of the same codebook and channel one frame before, from tables [k, q, a]."""

    def __init__(self, tables: UInt32[np.ndarray, "k q a"]):
        self.tables, self._shape = tables.reshape(-1, tables.shape[2]), tables.shape

    def parts(self, codes: Integer[np.ndarray, "c k n"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        places = np.arange(codes.size).reshape(codes.shape).transpose(2, 0, 1).reshape(codes.shape[2], -1)
        rows = np.tile(np.arange(self._shape[0]) * self._shape[1], len(codes))  # of context 0
        if self._shape[1] == 1:
            yield places.reshape(-1), np.tile(rows, len(places))
            return
        flat = codes.reshape(-1)
        for number, place in enumerate(places):
            yield place, rows + 1 + flat[places[number - 1]] if number else rows

    def blank(self, channels: int, frames: int) -> Int32[np.ndarray, "c k n"]:
        return np.empty((channels, self._shape[0], frames), np.int32)


class _Coder(NamedTuple):
    """Contexts, and constriction's weights of their rows."""

    contexts: Contexts
    weights: np.ndarray


def _check_tables(header: Header, tables: Tables | None) -> tuple[_Coder | None, str]:
    """Return what codes by `tables`, and their checksum."""
    if header.entropy == "none":
        return None, ""
    if tables is None:
        raise InputError(f"entropy coding needs the tables of {header.codec}, fingerprint {header.fingerprint}")
    k, a = header.num_codebooks, header.cardinality
    if isinstance(tables, np.ndarray) != (header.entropy == "range"):
        raise InputError(f"header field entropy={header.entropy} does not go with the tables of {header.codec}")
    if isinstance(tables, np.ndarray):
        if tables.ndim != 3 or len(tables) < k or tables.shape[1] not in (1, a + 1) or tables.shape[2] != a:
            raise InputError(
                f"entropy tables of shape {tables.shape} do not fit {k} codebooks of cardinality {a}: give "
                f"[{k}, {a + 1} or 1, {a}]"
            )
        tables = tables[:k]
    counts = tables if isinstance(tables, np.ndarray) else tables.tables
    if counts.dtype.kind not in "ui" or counts.min() < 1 or np.any(counts.sum(axis=-1, dtype=np.int64) != TABLE_TOTAL):
        raise InputError(f"entropy tables must hold integers of at least 1, whose rows sum to {TABLE_TOTAL}")
    contexts = _PreviousCode(tables.astype(np.uint32)) if isinstance(tables, np.ndarray) else tables
    weights = contexts.tables * np.uint32(2**_MODEL_BITS // TABLE_TOTAL) - np.uint32(1)
    return _Coder(contexts, weights.astype(np.float32)), tables_checksum(counts)


def _encode(header: Header, coder: _Coder | None, codes: np.ndarray) -> bytes:
    codes = np.ascontiguousarray(codes)
    if not _packs(header):
        return _encode_range(header, coder, codes)
    flat = codes.transpose(2, 0, 1).reshape(-1)  # by frame, channel, codebook
    bits = np.unpackbits(flat.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)
    packed = np.packbits(bits[:, 16 - _bits(header.cardinality) :]).tobytes()
    if coder is None:
        return packed
    return min(packed, _encode_range(header, coder, codes), key=len)  # the first where they are as long


def _encode_range(header: Header, coder: _Coder | None, codes: np.ndarray) -> bytes:
    from constriction import stream

    encoder = stream.queue.RangeEncoder()
    if coder is None:
        encoder.encode(codes.transpose(2, 0, 1).reshape(-1), stream.model.Uniform(header.cardinality))
    else:
        family, flat = stream.model.Categorical(perfect=False), codes.reshape(-1)
        for places, rows in _pieces(coder, codes):
            encoder.encode(flat[places], family, coder.weights.take(rows, axis=0))
    return encoder.get_compressed().astype("<u4").tobytes()


def _decode(header: Header, coder: _Coder | None, frames: int, payload: bytes) -> np.ndarray | None:
    """Return int32 codes [c, k, frames], or None if no writer makes this payload."""
    count = header.channels * header.num_codebooks * frames
    size = -(-count * _bits(header.cardinality) // 8)
    if coder is not None and not (_packs(header) and len(payload) >= size):
        return _decode_contexts(header, coder, frames, payload)
    if _packs(header):
        flat = _unpack(payload, count, _bits(header.cardinality))
    else:
        flat = _decode_uniform(header, count, payload)
    if flat is None:
        return None
    return np.ascontiguousarray(flat.reshape(frames, header.channels, header.num_codebooks).transpose(1, 2, 0))


def _packs(header: Header) -> bool:
    """Return whether codes fill whole bits: then a block is packed where range coding does not make it shorter."""
    return header.cardinality & (header.cardinality - 1) == 0


def _unpack(payload: bytes, count: int, width: int) -> np.ndarray | None:
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    if len(payload) != -(-count * width // 8) or bits[count * width :].any():
        return None
    wide = np.zeros((count, 16), np.uint8)
    wide[:, 16 - width :] = bits[: count * width].reshape(count, width)
    return np.packbits(wide, axis=1).view(">u2").reshape(-1).astype(np.int32)


def _decode_uniform(header: Header, count: int, payload: bytes) -> np.ndarray | None:
    from constriction import stream

    decoder = _range_decoder(payload)
    if decoder is None:
        return None
    try:
        flat = decoder.decode(stream.model.Uniform(header.cardinality), count)
    except AssertionError:  # constriction's word for bits outside of the range
        return None
    return flat if decoder.maybe_exhausted() else None


def _decode_contexts(header: Header, coder: _Coder, frames: int, payload: bytes) -> np.ndarray | None:
    from constriction import stream

    decoder = _range_decoder(payload)
    if decoder is None:
        return None
    family, codes = stream.model.Categorical(perfect=False), coder.contexts.blank(header.channels, frames)
    flat = codes.reshape(-1)
    try:
        for places, rows in _pieces(coder, codes):
            flat[places] = decoder.decode(family, coder.weights.take(rows, axis=0))
    except AssertionError:
        return None
    return codes if decoder.maybe_exhausted() else None


def _range_decoder(payload: bytes) -> Any:
    from constriction import stream

    if not payload or len(payload) % 4:
        return None
    return stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))


def _pieces(coder: _Coder, codes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut the parts so that the weights gathered for a piece stay few."""
    step = max(1, _GATHERED_WEIGHTS // coder.weights.shape[1])
    for places, rows in coder.contexts.parts(codes):
        for start in range(0, len(places), step):
            yield places[start : start + step], rows[start : start + step]


def _bits(cardinality: int) -> int:
    return (cardinality - 1).bit_length()


class _Record(NamedTuple):
    """A record's head; its place in the file, and its payload once that is read and whole."""

    frames: int
    index: int
    length: int
    checksum: int
    offset: int = 0
    payload: bytes | None = None


class _Source:
    """Bytes of a file that need not be seekable, with a look ahead."""

    def __init__(self, file: Readable):
        self._file, self._ahead, self.offset = file, bytearray(), 0

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end, and leave them there."""
        while len(self._ahead) < size:
            piece = self._file.read(min(size - len(self._ahead), _PIECE_BYTES))
            if not piece:
                break
            self._ahead += piece
        return bytes(self._ahead[:size])

    def take(self, size: int) -> bytes:
        """Return and consume the next `size` bytes, fewer at the end."""
        taken = self.peek(size)
        del self._ahead[: len(taken)]
        self.offset += len(taken)
        return taken

    def give_back(self, data: bytes) -> None:
        """Undo the last take."""
        self._ahead[:0] = data
        self.offset -= len(data)


class _Records:
    """Iterate over the blocks' records, undecoded; the rules of framing and salvage are here."""

    def __init__(self, file: Readable, salvage: bool, name: str | None):
        self.name, self._source, self._salvage = name or _name(file), _Source(file), salvage
        self.header, self._seed = _read_header(self._source, self.name)
        self._next, self._frames, self._ended_short, self._searches = 0, 0, False, 0
        self.samples: int | None = None
        self.lost: list[str] = []

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._source.offset

    def fail(self, message: str) -> None:
        """Note a damage; without salvage, raise."""
        if not self._salvage:
            raise InputError(f"{self.name}: {message}; --salvage decodes what is whole")
        if len(self.lost) < MAX_LINES:
            self.lost.append(message)
        elif len(self.lost) == MAX_LINES:
            self.lost.append("and more, which is not listed")

    def __iter__(self) -> Iterator[_Record]:
        record = self._head()
        while record is not None:
            hole = (record.index - self._next) % 2**16
            if hole:
                first, last = self._next, self._next + hole - 1
                self.fail(f"blocks {first} to {last} are missing before byte {record.offset}")
            if record.frames:
                yield from self._fill(hole * self.header.block_frames)
            place = (
                f"block {self._next} at byte {record.offset}" if record.frames else f"the end at byte {record.offset}"
            )
            payload = self._source.take(record.length)
            whole = len(payload) == record.length and zlib.crc32(payload) == record.checksum
            if not whole:
                self.fail(f"{place} is {'damaged' if len(payload) == record.length else 'truncated'}")
            if record.frames and (whole or self._is_followed()):
                yield self._count(record._replace(index=self._next, payload=payload if whole else None))
                record = self._head()
            elif record.frames:  # bytes are missing, and the next head may lie within the payload
                self._source.give_back(payload)
                record = self._search()
            else:
                yield from self._fill(self._end(payload, hole) if whole else 0)
                if self._source.peek(1):
                    self.fail(f"bytes follow the end, from byte {self.offset} on")
                return

    def _is_followed(self) -> bool:
        """Return whether the damaged payload just taken has the length that its head says, or probably so."""
        if self._parse(self._source.peek(_HEAD.size), self._next + 1) is not None:
            return True
        self._searches += 1  # each reads a payload twice: a hostile file must not ask for it again and again
        return self._searches > MAX_SEARCHES

    def _count(self, record: _Record) -> _Record:
        self._next, self._frames = self._next + 1, self._frames + record.frames
        self._ended_short = record.frames < self.header.block_frames
        return record

    def _fill(self, frames: int) -> Iterator[_Record]:
        """Yield the lost blocks of a hole of so many frames."""
        while frames:
            size = min(frames, self.header.block_frames)
            frames -= size
            yield self._count(_Record(size, self._next, 0, 0))

    def _end(self, payload: bytes, hole: int) -> int:
        """Take the length over; return the frames of the hole before the end, 0 if the numbers contradict."""
        samples, frames = _END.unpack(payload)
        missing, size = frames - self._frames, self.header.block_frames
        least = (hole - 1) * size + 1 if hole else 0
        most = 0 if self._ended_short else hole * size
        if not least <= missing <= most or samples > frames * self.header.sample_rate:
            self.fail(f"the end says {frames} frames and {samples} samples, which the blocks contradict")
            return 0
        self.samples = samples
        return missing

    def _head(self) -> _Record | None:
        """Consume the next head that is whole and plausible; None where the file ends without one."""
        head = self._source.peek(_HEAD.size)
        record = self._parse(head, self._next)
        if record is not None:
            return self._take_head(record)
        if len(head) < _HEAD.size:
            self._source.take(len(head))
            self.fail(f"truncated at byte {self.offset}, before block {self._next} or the end")
            return None
        self.fail(f"the head of block {self._next} at byte {self.offset} is damaged")
        self._source.take(1)
        return self._search()

    def _take_head(self, record: _Record) -> _Record:
        record = record._replace(offset=self.offset)
        self._source.take(_HEAD.size)
        return record

    def _parse(self, head: bytes, expected: int) -> _Record | None:
        if len(head) < _HEAD.size or zlib.crc32(head[: -_CRC.size], self._seed) != _CRC.unpack(head[-_CRC.size :])[0]:
            return None
        record = _Record(*_HEAD.unpack(head)[:-1])
        if (record.index - expected) % 2**16 > MAX_GAP_BLOCKS:
            return None
        if record.frames == 0:
            return record if record.length == _END.size else None
        fits = record.frames <= self.header.block_frames and record.length <= self._most_bytes(record.frames)
        return record if fits and not self._ended_short else None

    def _most_bytes(self, frames: int) -> int:
        # A code takes 16 bits at most, plus the range coder's loss and its last words.
        return 4 * self.header.channels * self.header.num_codebooks * frames + 8

    def _search(self) -> _Record | None:
        """Consume all up to and with the next head, byte by byte; None and the rest of the file if there is none."""
        while True:
            window = self._source.peek(_PIECE_BYTES)
            for start in self._candidates(window):
                record = self._parse(window[start : start + _HEAD.size], self._next)
                if record is not None:
                    self._source.take(start)
                    return self._take_head(record)
            if len(window) < _PIECE_BYTES:
                self._source.take(len(window))
                self.fail(f"nothing whole follows until byte {self.offset}, where the file ends")
                return None
            self._source.take(len(window) - _HEAD.size + 1)

    def _candidates(self, window: bytes) -> list[int]:
        """Return where a head may start, without its checksum; few but in a hostile file."""
        count = len(window) - _HEAD.size + 1
        if count < 1:
            return []
        u1 = np.frombuffer(window, np.uint8)
        u2 = u1[:-1] + 256 * u1[1:].astype(np.int64)  # at every byte
        frames, index, low, high = (u2[i : i + count] for i in (0, 2, 4, 6))
        length = low + 2**16 * high
        near = (index - self._next) % 2**16 <= MAX_GAP_BLOCKS
        block = (frames <= self.header.block_frames) & (length <= self._most_bytes(self.header.block_frames))
        return np.flatnonzero(near & np.where(frames == 0, length == _END.size, block)).tolist()


def _check_fields(fields: dict[str, Any]) -> None:
    for name, (low, high) in _LIMITS.items():
        value = fields[name]
        if type(value) is not int or not low <= value <= high:
            raise InputError(f"header field {name}={value!r:.80} must be an integer from {low} to {high}")
    for name, pattern in _TEXTS.items():
        value = fields[name]
        if type(value) is not str or not re.fullmatch(pattern, value):
            raise InputError(f"header field {name}={value!r:.80} must be a text that matches {pattern}")


def _read_header(source: _Source, name: str) -> tuple[Header, int]:
    """Return the header and its checksum, which seeds those of the records' heads."""
    prefix = source.take(_PREFIX.size)
    if prefix[: len(MAGIC)] != MAGIC:
        raise InputError(f"{name}: not an .mfac file: it does not start with {MAGIC.decode()}")
    if prefix[len(MAGIC) :][:1] not in (b"", bytes([VERSION])):
        raise InputError(f"{name}: .mfac version {prefix[len(MAGIC)]} is not {VERSION}: update this program")
    if len(prefix) < _PREFIX.size:
        raise InputError(f"{name}: truncated within the header: nothing can be decoded")
    length = _PREFIX.unpack(prefix)[2]
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{name}: a header of {length} bytes is longer than {MAX_HEADER_BYTES}: damaged, or no .mfac")
    rest = source.take(length + _CRC.size)
    if len(rest) < length + _CRC.size:
        raise InputError(f"{name}: truncated within the header: nothing can be decoded")
    text, checksum = rest[:length], zlib.crc32(prefix + rest[:length])
    if _CRC.unpack(rest[length:])[0] != checksum:
        raise InputError(f"{name}: the header is damaged: nothing can be decoded")
    return _parse_header(text, name), checksum


def _parse_header(text: bytes, name: str) -> Header:
    try:
        fields = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: the header is not JSON: written by another program?") from error
    known = {field.name for field in dataclasses.fields(Header)}
    if not isinstance(fields, dict) or fields.keys() != known:
        odd = sorted(fields.keys() ^ known) if isinstance(fields, dict) else "all"
        raise InputError(f"{name}: unknown or missing header fields: {odd!s:.200}")
    try:
        _check_fields(fields)
        header = Header(**fields)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if (header.entropy == "none") != (header.tables == ""):
        raise InputError(f"{name}: header field tables={header.tables!r} does not go with entropy={header.entropy}")
    if header.to_bytes() != text:
        raise InputError(f"{name}: the header is not in its canonical form: written by another program?")
    return header


def _name(file: Readable) -> str:
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else "the .mfac stream"
