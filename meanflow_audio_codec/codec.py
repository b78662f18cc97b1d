"""A trained codec: audio to codes and back, arrays or files, whole or streamed.

    codec = Codec.load("music_44k")                  # or a bundle, or the workdir of a run
    codes = codec.encode(audio, sample_rate)         # [..., s] -> int32 [..., k, l]
    audio = codec.decode(codes)                      # at codec.sample_rate
    data = codec.compress("song.wav", kbps=12)       # bytes of a .mfac file
    audio, sample_rate = codec.decompress(data)      # the original's rate and exact length

The network is mono: every channel is a row of its own, and stereo is coded as (l + r) / 2 and (l - r) / 2. It works in
blocks of `BLOCK` tokens on a grid fixed to the start of the file, each with as many neighbours as the network can see;
beyond the ends of a file there is silence. So what comes out depends on the audio alone, not on how it was cut: whole,
chunked and streamed are one computation, and a batch is its rows. Decoding noise is a function of the seed, the channel
and the absolute frame.

A code of gain and shape (models/gain_shape.py) spends the bits of a block where there is most to say, in all channels
of a file: one step of the cells' width holds for all, the finest by which the block, as the entropy tables count it,
stays within its bitrate.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
import soxr
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from meanflow_audio_codec import bitstream
from meanflow_audio_codec.contexts import ShapeContexts
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models.codec import CodecModel
from meanflow_audio_codec.models.gain_shape import STEPS
from meanflow_audio_codec.models.quantizers import LEVEL_STEP
from meanflow_audio_codec.preprocessing import scaling
from meanflow_audio_codec.preprocessing.tokenizers import build_tokenizer
from meanflow_audio_codec.trainers import flow

PRETRAINED = Path(__file__).parent / "pretrained"
BLOCK = 64  # tokens computed at a time, for which streaming waits
FILE_BLOCK = 512  # tokens of a block of a file: its length and checksum are some 0.5 % of it
_READ_SAMPLES = 1 << 18  # of a file at a time
_SEQUENCE = 32  # frames, of which tables are counted
_MAX_CONTEXTS = 16  # of a code: beyond, an hour is too little for tables of its square


class EncodeState(NamedTuple):
    """What `encode_step` carries: samples still in the network's view, and what was taken and given."""

    pending: Float32[np.ndarray, "c n"]
    samples: int
    frames: int
    kbps: float


class DecodeState(NamedTuple):
    """What `decode_step` carries: codes still in the network's view, what was taken and given, and how to decode."""

    pending: Int32[np.ndarray, "c k n"]
    received: int
    frames: int
    nfe: int
    seed: int


class Codec:
    """A codec with its weights, made by `load`; nothing in it changes.

    Attributes:
        name: Of the bundle or workdir.
        sample_rate: Hz at which it works; `encode` resamples to it.
        channels: 1, for more are coded one by one.
        hop_length: Samples per code frame.
        frame_rate: Code frames per second.
        num_codebooks: Codes of a frame.
        cardinality: Values of a code.
        bitrate: kbps of one channel at most, and if none is asked for; before entropy coding where codebooks are of one
            size.
        min_bitrate: kbps of one channel at least.
        latency: Samples for which streaming through encoder and decoder waits, at `sample_rate`.
        tables: By which files are entropy coded, see `bitstream.Writer`; None: they are not.
        fingerprint: Hash of weights, config and tables, by which a file names its maker.
    """

    channels = 1

    def __init__(self, name: str, config: dict[str, Any], arrays: dict[str, np.ndarray]):
        """Take the contents of a bundle: see `export`."""
        self.name, self._config = name, config
        self._tokenizer = tokenizer = build_tokenizer(config["tokens"])
        self._model = model = build_model(config)
        self._params = _nested({path: array for path, array in arrays.items() if "/" in path})
        self._scale = jnp.asarray(arrays["scale"])
        self.sample_rate = config["sample_rate"]
        self.hop_length = tokenizer.samples_per_token * model.downsample
        self.frame_rate = self.sample_rate / self.hop_length
        self.num_codebooks, self.cardinality = model.num_codebooks, model.cardinality
        self.bitrate = self.frame_rate * model.bits / 1000
        self.min_bitrate = self.bitrate * model.kept_range[0] / model.kept_range[1]
        self.tables = arrays.get("tables")
        if model.has_levels:
            self.tables = self._shape_contexts(self.tables)
        self._block = self._in_frames(BLOCK)
        # The encoder gives whole blocks, of which the decoder needs as many more as its halo touches.
        blocks = 1 + -(-self._decode_halo(1) // self._block)
        self.latency = (self._block * blocks + self._encode_halo) * self.hop_length
        self._encode_window = jax.jit(self._encode_window)
        self._shape_block = jax.jit(self._shape_block)
        self._decode_window = jax.jit(self._decode_window, static_argnames="nfe")
        # What stands beyond the ends of a file. A bundle holds it, lest it should differ between machines.
        self._silence = arrays.get("silence")
        if self._silence is None:
            silence = np.zeros((1, self._encode_window_samples), np.float32)
            self._silence = self._encode_block(silence, self._block, None)[0, :, self._block // 2]
        self._arrays = arrays | {"silence": self._silence}
        self.fingerprint = _fingerprint(config, self._arrays)

    @classmethod
    def load(cls, source: str | os.PathLike) -> "Codec":
        """Load a codec without its optimizer and data.

        Args:
            source: The name of a codec that comes with the package, the path of a bundle, or the workdir of a run,
                whose newest averaged parameters are taken.

        Returns:
            The codec.

        Raises:
            InputError: There is nothing of that name, or it holds no codec.
        """
        path = Path(source).expanduser()
        packaged = PRETRAINED / f"{source}.npz"
        if path.is_dir():
            return cls(path.absolute().name, *_from_workdir(path))
        if packaged.is_file():
            path = packaged
        elif not path.is_file():
            names = ", ".join(sorted(p.stem for p in PRETRAINED.glob("*.npz"))) or "none"
            raise InputError(f"{source}: no such bundle or workdir; codecs that come with the package: {names}")
        return cls(path.stem, *_read_bundle(path))

    def export(self, path: str | os.PathLike, tables: UInt32[np.ndarray, "*k a"] | None = None) -> None:
        """Write a bundle: one .npz file of 16-bit weights, scale, entropy tables and config.

        Args:
            path: File to write, .npz.
            tables: From `fit_tables`. Without, files are not entropy coded, those of gain and shape by a law's tables.
        """
        arrays = {name: a.astype(np.float16) if "/" in name else a for name, a in self._arrays.items()}
        if tables is not None:
            arrays["tables"] = tables
        config = np.frombuffer(json.dumps(self._config, sort_keys=True).encode(), np.uint8)
        temporary = Path(f"{path}.part")
        with temporary.open("wb") as file:
            np.savez_compressed(file, config=config, **arrays)
        temporary.replace(path)

    def fit_tables(self, clips: Iterable[Float[np.ndarray, " s"]]) -> UInt32[np.ndarray, "*k a"]:
        """Return entropy tables for `export`, counted from training data, of one channel at the codec's rate.

        Raises:
            InputError: No clip lasts 32 code frames.
        """
        rates = [None]
        if self._model.has_levels:
            rates = self.min_bitrate + (self.bitrate - self.min_bitrate) * np.arange(1, 5) / 5
        codes = [self.encode(clip, self.sample_rate, kbps) for clip, kbps in zip(clips, itertools.cycle(rates))]
        codes = [row[:, : row.shape[1] // _SEQUENCE * _SEQUENCE] for row in codes]
        if not sum(row.shape[1] for row in codes):
            raise InputError(f"entropy tables need clips of {_SEQUENCE} code frames; give longer ones")
        if self._model.has_levels:
            return self.tables.fit(row[None] for row in codes if row.size)
        joined = np.concatenate(codes, axis=1).reshape(self.num_codebooks, -1, _SEQUENCE)
        return bitstream.fit_tables(joined.swapaxes(0, 1), self.cardinality, self.cardinality <= _MAX_CONTEXTS)

    ################################################ Arrays

    def encode(
        self, audio: Float[np.ndarray, "*b s"], sample_rate: int, kbps: float | None = None
    ) -> Int32[np.ndarray, "*b k l"]:
        """Code every row of `audio` on its own; nothing is mixed.

        Args:
            audio: In [-1, 1], any leading axes, any length.
            sample_rate: Hz; resampled to the codec's where it differs.
            kbps: Of a row, at most; default: `bitrate`. Of fsq and rvq as many codebooks as that pays for.

        Returns:
            Codes in [0, cardinality): l = ceil of (s' + one MDCT frame) / hop_length frames for s' samples at the
            codec's rate, none for no samples.

        Raises:
            InputError: The audio is not finite floats, or a number is out of range.
        """
        audio = _checked_audio(audio)
        kept = self._kept_for(kbps, 1)
        rows = audio.reshape(math.prod(audio.shape[:-1]), audio.shape[-1])
        if sample_rate != self.sample_rate:
            rows = [_Resampler(sample_rate, self.sample_rate, 1)(row[None], last=True)[0] for row in rows]
        codes = [self.encode_step(self.encode_start(1, kbps), row[None], last=True)[1][0] for row in rows]
        codes = np.stack(codes) if len(codes) else np.zeros((0, kept, self._num_frames(audio.shape[-1])), np.int32)
        return codes.reshape(*audio.shape[:-1], *codes.shape[1:])

    def decode(
        self, codes: Int[np.ndarray, "*b k l"], nfe: int = 1, seed: int = 0, length: int | None = None
    ) -> Float32[np.ndarray, "*b s"]:
        """Decode every row of `codes` on its own.

        Args:
            codes: From `encode`; of fsq and rvq the first codebooks will do.
            nfe: Network evaluations.
            seed: Of the decoding noise. A row's is that of a single row: rows of a batch share it.
            length: Samples to return, at most l * hop_length; default: all.

        Returns:
            Audio at the codec's rate.

        Raises:
            InputError: The codes are not this codec's, or a number is out of range.
        """
        codes = self._checked_codes(codes)
        rows = codes.reshape(math.prod(codes.shape[:-2]), *codes.shape[-2:])
        length = codes.shape[-1] * self.hop_length if length is None else length
        if not 0 <= length <= codes.shape[-1] * self.hop_length:
            raise InputError(f"length={length}: {codes.shape[-1]} code frames hold {codes.shape[-1] * self.hop_length}")
        decoded = [self.decode_step(self.decode_start(1, nfe, seed), row[None], last=True)[1] for row in rows]
        audio = np.concatenate(decoded) if len(decoded) else np.zeros((0, length), np.float32)
        return audio[:, :length].reshape(*codes.shape[:-2], length)

    ################################################ Streams

    def encode_start(self, channels: int = 1, kbps: float | None = None) -> EncodeState:
        """Return the state before the first sample of `channels` rows, which share `kbps`."""
        self._kept_for(kbps, channels)
        before = self._encode_halo * self.hop_length + self._tokenizer.samples_per_token
        kbps = channels * self.bitrate if kbps is None else kbps
        return EncodeState(np.zeros((channels, before), np.float32), samples=0, frames=0, kbps=kbps)

    def encode_step(
        self, state: EncodeState, audio: Float[np.ndarray, "c s"], last: bool = False
    ) -> tuple[EncodeState, Int32[np.ndarray, "c k l"]]:
        """Take any number of samples at the codec's rate and return the frames that they complete.

        With `last` the stream ends after `audio`: all remaining frames come, and the state is done with.
        """
        hop, block, window = self.hop_length, self._block, self._encode_window_samples
        samples = state.samples + audio.shape[1]
        pending, frames = np.concatenate([state.pending, audio.astype(np.float32)], axis=1), state.frames
        total = self._num_frames(samples) if last else math.inf
        if last:
            blocks = -(-(total - frames) // block)
            missing = (blocks - 1) * block * hop + window - pending.shape[1]
            pending = np.pad(pending, ((0, 0), (0, max(0, missing))))
        else:
            blocks = max(0, (pending.shape[1] - window) // (block * hop) + 1)
        codes = [np.zeros((len(pending), self._kept_for(state.kbps, len(pending)), 0), np.int32)]
        for i in range(blocks):
            start, count = i * block * hop, min(block, total - frames - i * block)
            codes.append(self._encode_block(pending[:, start : start + window], count, state.kbps))
        pending, frames = pending[:, blocks * block * hop :], frames + blocks * block
        return state._replace(pending=pending, samples=samples, frames=frames), np.concatenate(codes, axis=2)

    def decode_start(self, channels: int = 1, nfe: int = 1, seed: int = 0) -> DecodeState:
        """Return the state before the first code frame of `channels` rows; row c has the noise of channel c."""
        if nfe < 1:
            raise InputError(f"nfe={nfe}: the number of network evaluations must be at least 1")
        before = np.repeat(self._silence[None], channels, axis=0)
        return DecodeState(np.repeat(before[:, :, None], self._decode_halo(nfe), axis=2), 0, 0, nfe, seed)

    def decode_step(
        self, state: DecodeState, codes: Int[np.ndarray, "c k l"], last: bool = False
    ) -> tuple[DecodeState, Float32[np.ndarray, "c s"]]:
        """Take any number of code frames and return the samples, `hop_length` a frame, that they complete.

        With `last` the stream ends after `codes`: the samples of all frames come, and the state is done with.
        """
        kept, block, halo = codes.shape[1], self._block, self._decode_halo(state.nfe)
        received, frames = state.received + codes.shape[2], state.frames
        pending = np.concatenate([state.pending[:, :kept], codes], axis=2).astype(np.int32)
        window = block + 2 * halo
        if last:
            blocks = -(-(received - frames) // block)
            missing = (blocks - 1) * block + window - pending.shape[2]
            silence = np.broadcast_to(self._silence[None, :kept, None], (len(pending), kept, max(0, missing)))
            pending = np.concatenate([pending, silence], axis=2)
        else:
            blocks = max(0, (pending.shape[2] - window) // block + 1)
        audio = [
            [
                self._decode_window(
                    self._params,
                    self._scale,
                    np.ascontiguousarray(pending[channel, :, i * block : i * block + window].T),
                    np.array([state.seed, channel, frames + i * block - halo], np.int64).astype(np.uint32),
                    nfe=state.nfe,
                )
                for i in range(blocks)
            ]
            for channel in range(len(pending))
        ]
        audio = np.asarray(audio, np.float32).reshape(len(pending), blocks * block * self.hop_length)
        state = state._replace(
            pending=pending[:, :, blocks * block :], received=received, frames=frames + blocks * block
        )
        return state, audio[:, : (received - frames) * self.hop_length] if last else audio

    ################################################ Files

    def compress(
        self,
        source: str | os.PathLike | Float[np.ndarray, "*c s"],
        sample_rate: int | None = None,
        kbps: float | None = None,
        seed: int = 0,
    ) -> bytes:
        """Return the bytes of a .mfac file, see `bitstream`.

        Args:
            source: The path of an audio file, or audio [s] or [c, s] in [-1, 1].
            sample_rate: Hz, of an array.
            kbps: Of all channels together, at most; default: `bitrate` for each.
            seed: Of the decoding noise.

        Raises:
            InputError: The file is no audio, the array not finite floats, or a number is out of range.
        """
        file = io.BytesIO()
        if isinstance(source, np.ndarray):
            if sample_rate is None:
                raise InputError("sample_rate: an array has none; give it in Hz")
            audio = np.atleast_2d(_checked_audio(source))
            self.compress_stream([audio], sample_rate, len(audio), file, kbps, seed)
        else:
            with open_audio(source) as audio:
                blocks = read_blocks(audio, source)
                self.compress_stream(blocks, audio.samplerate, audio.channels, file, kbps, seed)
        return file.getvalue()

    def decompress(self, data: bytes, nfe: int = 1) -> tuple[Float32[np.ndarray, "c s"], int]:
        """Decode the bytes of a .mfac file.

        Returns:
            Audio at the original's sample rate and of its length, and that rate in Hz.

        Raises:
            InputError: The bytes are damaged, or another codec's.
        """
        reader, blocks = self.decompress_stream(io.BytesIO(data), nfe)
        audio = [np.zeros((reader.header.channels, 0), np.float32), *blocks]
        return np.concatenate(audio, axis=1), reader.header.sample_rate

    def compress_stream(
        self,
        blocks: Iterable[Float[np.ndarray, "c n"]],
        sample_rate: int,
        channels: int,
        file: bitstream.Writable,
        kbps: float | None = None,
        seed: int = 0,
    ) -> None:
        """Write the .mfac of audio that comes in blocks of any length, in constant memory. See `compress`."""
        kept = self._kept_for(kbps, channels)
        header = bitstream.Header(
            codec=re.sub("[^A-Za-z0-9._-]+", "-", self.name).strip("._-")[:64] or "codec",
            fingerprint=self.fingerprint,
            sample_rate=sample_rate,
            channels=channels,
            num_codebooks=kept,
            cardinality=self.cardinality,
            block_frames=min(self._in_frames(FILE_BLOCK), bitstream.MAX_BLOCK_CODES // (channels * kept)),
            seed=seed,
            entropy=self.entropy,
        )
        writer = bitstream.Writer(file, header, self.tables)
        resampler = _Resampler(sample_rate, self.sample_rate, channels)
        state, samples = self.encode_start(channels, kbps), 0
        for block in blocks:
            samples += block.shape[1]
            state, codes = self.encode_step(state, resampler(_to_mid_side(_checked_audio(block))))
            writer.write(codes)
        rest = resampler(np.zeros((channels, 0), np.float32), last=True)
        _, codes = self.encode_step(state, rest, last=True)
        writer.write(codes)
        writer.close(samples)

    def decompress_stream(
        self, file: bitstream.Readable, nfe: int = 1, salvage: bool = False
    ) -> tuple[bitstream.Reader, Iterator[Float32[np.ndarray, "c n"]]]:
        """Read a .mfac: its header at once, its audio block by block, in constant memory.

        The reader has the header, and after the last block the length and what was lost.

        Args:
            file: Open for reading bytes; a pipe will do.
            nfe: Network evaluations.
            salvage: Whether damaged blocks become silence and a missing end is overlooked, instead of raising.
        """
        reader = bitstream.Reader(file, self.tables, salvage)
        header = reader.header
        if header.fingerprint != self.fingerprint:
            raise InputError(
                f"this file was made by {header.codec} ({header.fingerprint}), "
                f"not by {self.name} ({self.fingerprint}): load that codec"
            )
        fits = self._fewest_codebooks <= header.num_codebooks <= self.num_codebooks
        if header.cardinality != self.cardinality or not fits:
            raise InputError(
                f"the header has {header.num_codebooks} codebooks of {header.cardinality} values; {self.name} has "
                f"{self.num_codebooks} of {self.cardinality}"
            )
        return reader, self._decoded_blocks(reader, nfe)

    def _decoded_blocks(self, reader: bitstream.Reader, nfe: int) -> Iterator[Float32[np.ndarray, "c n"]]:
        header = reader.header
        resampler = _Resampler(self.sample_rate, header.sample_rate, header.channels)
        state = self.decode_start(header.channels, nfe, header.seed)
        # Kept back until the end is known: the last frames reach beyond it.
        surplus = math.ceil(3 * self.hop_length * header.sample_rate / self.sample_rate)
        held, given = np.zeros((header.channels, 0), np.float32), 0
        for codes, frames in reader:
            if codes is None:
                codes = np.broadcast_to(
                    self._silence[None, : header.num_codebooks, None], (header.channels, header.num_codebooks, frames)
                )
            state, audio = self.decode_step(state, codes)
            held = np.concatenate([held, resampler(audio)], axis=1)
            if held.shape[1] > surplus:
                given += held.shape[1] - surplus
                yield _from_mid_side(held[:, :-surplus])
                held = held[:, -surplus:]
        empty = np.zeros((header.channels, header.num_codebooks, 0), np.int32)
        _, audio = self.decode_step(state, empty, last=True)
        held = np.concatenate([held, resampler(audio, last=True)], axis=1)
        if reader.samples is not None:
            held = _fitted(held, reader.samples - given)
        yield _from_mid_side(held)

    ################################################ One window of the network

    def _in_frames(self, tokens: int) -> int:
        return max(1, tokens // self._model.downsample)

    @property
    def _encode_halo(self) -> int:
        """Code frames that the encoder sees to each side, and one for the MDCT's overlap."""
        return -(-self._model.encoder_context // self._model.downsample) + 1

    def _decode_halo(self, nfe: int) -> int:
        return -(-self._model.decoder_context(nfe) // self._model.downsample) + 1

    @property
    def _encode_window_samples(self) -> int:
        return (self._block + 2 * self._encode_halo) * self.hop_length + self._tokenizer.samples_per_token

    def _encode_block(
        self, audio: Float32[np.ndarray, "c n"], frames: int, kbps: float | None
    ) -> Int32[np.ndarray, "c k l"]:
        """Return the codes of the first `frames` of a block, in whose window `audio` is, of all channels.

        Without `kbps` they are all codebooks, or those of the widest cells.
        """
        windows = [self._encode_window(self._params, self._scale, row) for row in audio]
        codes, x = (jnp.stack(parts) for parts in zip(*windows, strict=True))
        if self._model.has_levels:
            bits = 0.0 if kbps is None else kbps * 1000 / self.frame_rate * frames
            codes = self._shape_block(self._params, codes, x, np.int32(256 * bits), np.int32(frames))
        codes = np.asarray(codes).swapaxes(1, 2)
        return codes[:, : self._kept_for(kbps, len(audio)), :frames]

    def _shape_block(
        self,
        params: Any,
        level_codes: Int[Array, "c l s"],
        x: Float[Array, "c t f"],
        budget: Int[Array, ""],
        frames: Int[Array, ""],
    ) -> Int[Array, "c l k"]:
        """Return the codes of a block of gain and shape of the finest cells within `budget`, in 1/256 bits."""
        network = lambda *args, method: self._model.apply({"params": params}, *args, method=method)
        levels, block = network(level_codes, method="dequantize_levels"), level_codes.shape[1]

        def at(fineness: Array) -> tuple[Array, Array]:
            """Give the first frames a finer step than the others, for a bitrate between those of whole steps."""
            step = fineness // block + (jnp.arange(block) < fineness % block)
            step = jnp.broadcast_to(step.astype(jnp.int32), level_codes.shape[:2])
            return step, self._model.gain_shape.quantize(x, levels, step)

        def refine(i: Array, fineness: Array) -> Array:
            finer = fineness + (1 << (digits - 1 - i))
            cost = self.tables.cost(level_codes, levels, *at(finer), frames)
            return jnp.where((finer <= (STEPS - 1) * block) & (cost <= budget), finer, fineness)

        digits = (STEPS * block - 1).bit_length()
        step, q = at(jax.lax.fori_loop(0, digits, refine, jnp.int32(0)))
        step = jnp.where(jnp.any(q), step, 0)  # where nothing is said the widest cells cost least
        return network(step, level_codes, q, method="join_codes")

    def _encode_window(
        self, params: Any, scale: Float[Array, "f"], audio: Float[Array, " n"]
    ) -> tuple[Int[Array, "l k"], Float[Array, "t f"]]:
        """Return the codes of a block, of gain and shape those of levels alone, and its tokens."""
        tokens = self._tokenizer.tokenize(audio[None, :, None])
        downsample, block = self._model.downsample, slice(self._encode_halo, self._encode_halo + self._block)
        # The token before the window gave the first frame its past; those after it lack their future.
        tokens = tokens[:, 1 : 1 + (self._block + 2 * self._encode_halo) * downsample]
        x = scaling.normalize(tokens, scale, self._config["tokens"]["exponent"], self._config["tokens"]["eps"])
        network = lambda method: self._model.apply({"params": params}, x, method=method)
        codes = network("level_codes") if self._model.has_levels else network("encode")[1]
        return codes[0, block], x[0, block.start * downsample : block.stop * downsample]

    def _shape_contexts(self, tables: UInt32[np.ndarray, "r a"] | None) -> ShapeContexts:
        entries = np.asarray(self._params["level_quantizer"]["codebook"]) / LEVEL_STEP
        return ShapeContexts(entries.round().astype(int), self._model.gain_shape, tables)

    @property
    def entropy(self) -> str:
        """Return how its files are entropy coded, see `bitstream.Header`."""
        if self._model.has_levels:
            return "contexts"
        return "none" if self.tables is None else "range"

    def _decode_window(
        self, params: Any, scale: Float[Array, "f"], codes: Int[Array, "l k"], place: UInt32[Array, "3"], nfe: int
    ) -> Float[Array, " n"]:
        model, halo = self._model, self._decode_halo(nfe)
        seed, channel, first = place
        latents = model.apply({"params": params}, codes[None], method="dequantize")
        cond = model.apply({"params": params}, latents, method="condition_on")
        tokens = cond.shape[1]
        rng = jax.random.fold_in(jax.random.key(seed), channel)
        z = flow.frame_noise(rng, first * model.downsample + jnp.arange(tokens, dtype=jnp.uint32), model.features)
        sampler, temperature = flow.SAMPLERS[self._config["objective"]]
        u_fn = lambda *args: model.apply({"params": params}, *args, method="flow")
        x = model.from_flow(sampler(u_fn, temperature * z[None], cond, nfe), cond)
        x = scaling.denormalize(x, scale, self._config["tokens"]["exponent"], self._config["tokens"]["eps"])
        audio = self._tokenizer.detokenize(x, self._tokenizer.segment_samples(tokens), channels=1)
        return audio[0, halo * self.hop_length : (halo + self._block) * self.hop_length, 0]

    ################################################ Checks

    def _kept_for(self, kbps: float | None, channels: int) -> int:
        """Return how many codebooks are in the codes at `kbps` of all `channels` of a file together."""
        least, most = channels * self.min_bitrate, channels * self.bitrate
        if kbps is None:
            return self.num_codebooks
        if not least * (1 - 1e-9) <= kbps <= most * (1 + 1e-9):
            raise InputError(
                f"kbps={kbps:g}: {self.name} codes {channels} channels at {least:.3g} to {most:.4g} kbps; choose a rate"
                " in between"
            )
        return self.num_codebooks if self._model.has_levels else math.floor(self.num_codebooks * kbps / most + 1e-9)

    @property
    def _fewest_codebooks(self) -> int:
        return self.num_codebooks if self._model.has_levels else 1

    def _num_frames(self, samples: int) -> int:
        return -(-self._tokenizer.num_tokens(samples) // self._model.downsample) if samples else 0

    def _checked_codes(self, codes: Int[np.ndarray, "*b k l"]) -> Int[np.ndarray, "*b k l"]:
        codes = np.asarray(codes)
        if codes.ndim < 2 or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(f"codes are {codes.dtype} {list(codes.shape)}: give the integers [..., k, l] of encode")
        if not self._fewest_codebooks <= codes.shape[-2] <= self.num_codebooks:
            raise InputError(
                f"codes are of {codes.shape[-2]} codebooks; {self.name} has {self.num_codebooks}, of which"
                f" {self._fewest_codebooks} are needed"
            )
        if codes.size and not 0 <= codes.min() <= codes.max() < self.cardinality:
            raise InputError(
                f"codes lie in [{codes.min()}, {codes.max()}]; this codec's lie in [0, {self.cardinality})"
            )
        return codes


def open_audio(path: str | os.PathLike) -> soundfile.SoundFile:
    """Open a WAV, FLAC, OGG or MP3 file; what libsndfile says of another becomes one line."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        return soundfile.SoundFile(os.fspath(path))
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: {error.error_string} Give a WAV, FLAC, OGG or MP3 file") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: its name is not UTF-8; rename it") from error


def read_blocks(audio: soundfile.SoundFile, path: str | os.PathLike) -> Iterator[Float32[np.ndarray, "c n"]]:
    """Yield an open file's samples in order; one that ends early, as a damaged MP3 does, is refused."""
    decoded = 0
    while True:
        try:
            block = audio.read(_READ_SAMPLES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise InputError(f"{path}: it cannot be decoded ({error.error_string.strip()})") from error
        if not len(block):
            break
        decoded += len(block)
        yield block.T
    if decoded < audio.frames - audio.samplerate // 5:  # without a Xing header an MP3's length is a guess
        seconds = [count / audio.samplerate for count in (decoded, audio.frames)]
        raise InputError(f"{path}: only {seconds[0]:.2f} s of {seconds[1]:.2f} s can be decoded: it is damaged")


class _Resampler:
    """Resample [c, n] blocks of a stream; with the last one, n samples have become ceil(n to_rate / from_rate)."""

    def __init__(self, from_rate: int, to_rate: int, channels: int):
        self._rates, self._taken, self._given = (from_rate, to_rate), 0, 0
        self._stream = None
        if from_rate != to_rate:
            self._stream = soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32")

    def __call__(self, audio: Float32[np.ndarray, "c n"], last: bool = False) -> Float32[np.ndarray, "c m"]:
        if self._stream is None:
            return audio
        resampled = self._stream.resample_chunk(np.ascontiguousarray(audio.T), last=last).reshape(-1, len(audio)).T
        self._taken += audio.shape[1]
        if last:  # soxr rounds its own way
            from_rate, to_rate = self._rates
            resampled = _fitted(resampled, -(-self._taken * to_rate // from_rate) - self._given)
        self._given += resampled.shape[1]
        return resampled


def _fitted(audio: Float32[np.ndarray, "c n"], length: int) -> Float32[np.ndarray, "c m"]:
    """Crop audio to `length` samples, or fill it up with zeros."""
    return np.pad(audio[:, :length], ((0, 0), (0, max(0, length - audio.shape[1]))))


def _checked_audio(audio: Float[np.ndarray, "*c s"]) -> Float32[np.ndarray, "*c s"]:
    audio = np.asarray(audio)
    if not audio.ndim or not np.issubdtype(audio.dtype, np.floating):
        raise InputError(f"audio is {audio.dtype} {list(audio.shape)}: give floats [..., samples] in [-1, 1]")
    if not np.isfinite(audio).all():
        raise InputError("audio holds NaN or infinite samples")
    return audio.astype(np.float32)


def _to_mid_side(audio: Float[np.ndarray, "c n"]) -> Float[np.ndarray, "c n"]:
    return audio if len(audio) != 2 else np.stack([audio[0] + audio[1], audio[0] - audio[1]]) / 2


def _from_mid_side(audio: Float[np.ndarray, "c n"]) -> Float[np.ndarray, "c n"]:
    return audio if len(audio) != 2 else np.stack([audio[0] + audio[1], audio[0] - audio[1]])


def _from_workdir(workdir: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what a bundle of the run in `workdir` would hold, with its newest averaged parameters."""
    if not (workdir / "config.json").is_file():
        raise InputError(f"{workdir}: neither a bundle nor the workdir of a run")
    run = json.loads((workdir / "config.json").read_text())
    trained = run["input"]["name"], run["input"].get("channels"), run["model"]["conditioning"]
    if trained != ("audio", 1, "latent") or run["model"]["quantizer"] == "none":
        raise InputError(f"{workdir}: this run trains no codec of mono audio; give another workdir")
    from meanflow_audio_codec.trainers.checkpoints import restore  # with Orbax, a second

    config = {"objective": run["objective"]["name"], "sample_rate": run["input"]["sample_rate"]}
    config |= {"tokens": run["tokens"], "model": run["model"]}
    model = build_model(config)
    example = jnp.zeros((1, run["input"]["num_tokens"], model.features))
    params = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    scale = jax.ShapeDtypeStruct((model.features,), np.float32)
    state = restore(workdir, "codec", {"ema_params": params, "scale": scale})
    leaves, _ = jax.tree_util.tree_flatten_with_path(state["ema_params"])
    weights = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    return config, weights | {"scale": np.asarray(state["scale"])}


def build_model(config: dict[str, Any]) -> CodecModel:
    """Return the network that a bundle's config describes."""
    bands = build_tokenizer(config["tokens"]).bands(1, config["sample_rate"])
    return CodecModel(features=len(bands), bands=tuple(bands.tolist()), **config["model"])


def _read_bundle(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as bundle:
            arrays = dict(bundle)
        return json.loads(arrays.pop("config").tobytes()), arrays
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a bundle of this codec ({error}); export one from a workdir") from error


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Turn {"a/b": x} into {"a": {"b": x}}, as float32."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = jnp.asarray(array, jnp.float32)
    return tree


def _fingerprint(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
