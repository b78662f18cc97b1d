"""Procedural music for a first run: unlimited, seeded, nothing to download.

A clip is a few bars by a small band in one key and tempo: a chord progression as block chords,
arpeggio or bowed pad, with or without bass, melody, drums and a bed of noise, in some room, now and
then with a stretch of silence. Clip i is a function of (seed, i) alone.

Tones are read from wavetables of one period, table[phase], the phase an integer that wraps by
itself: phase(n) = n * inc mod 2**32, inc = 2**32 f / sample_rate. A table is a Fourier series of
harmonics 1..K; each note takes the table with the largest K that stays below the Nyquist frequency,
so nothing folds. Decays are slices of a few precomputed exponentials. Hence about 1 ms for a second
at 24 kHz.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

_TABLE_BITS = 13
_HARMONICS = tuple(int(2.0 ** (level / 2)) for level in range(21))  # half an octave apart
_NYQUIST = 0.48  # of the sample rate, with a little room for vibrato
_LONGEST_SECONDS = 2.5  # of a note; so long before the clip the band begins, for the tails
_DECAY_SECONDS = (0.08, 0.2, 0.5, 1.2, 2.4)  # to -60 dB
_NOISE_BITS = 17
_PARTS = ("chords", "bass", "melody", "drums")

_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 9, 10))
# Roots of the chords as degrees of the scale; 0 is the tonic.
_PROGRESSIONS = (
    (0, 4, 5, 3),
    (0, 5, 3, 4),
    (1, 4, 0, 0),
    (0, 3, 4, 3),
    (0, 5, 2, 6),
    (0, 6, 5, 4),
    (0, 3, 0, 4),
    (5, 3, 0, 4),
)
# Amplitude of harmonic k. Plucking at the share p of a string's length leaves sin(pi k p).
_TIMBRES = {
    "nylon": lambda k: np.abs(np.sin(0.21 * np.pi * k)) / k**1.3,
    "steel": lambda k: np.abs(np.sin(0.13 * np.pi * k)) / k**0.9,
    "piano": lambda k: np.exp(-0.3 * (k - 1)) + 0.1 / k,
    "round": lambda k: 1 / k**2.2,
    "strings": lambda k: (1 + np.cos(0.9 * k) / 2) / k,
    "reed": lambda k: (k % 2 + 0.15) / k,
    "flute": lambda k: np.exp(-1.1 * (k - 1)),
    "organ": lambda k: np.isin(k, (1, 2, 3, 4, 6, 8)) / k**0.5,
    "brass": lambda k: np.minimum(k, 4) / (4 * k**1.2),
}
# Modes of struck bars and bells: (ratio of frequencies, amplitude, index of the decay).
_MODES = {
    "marimba": ((1.0, 1.0, 2), (3.93, 0.3, 1), (9.24, 0.12, 0)),
    "glockenspiel": ((1.0, 1.0, 3), (2.76, 0.5, 2), (5.40, 0.3, 1)),
    "bell": ((0.5, 0.4, 4), (1.0, 0.8, 4), (1.19, 0.5, 3), (1.56, 0.3, 3), (2.74, 0.3, 2)),
}
_PLUCKED = (("pluck", "nylon"), ("pluck", "steel"), ("pluck", "piano"))
_BOWED = (("bow", "strings"), ("bow", "reed"), ("bow", "flute"), ("bow", "organ"), ("bow", "brass"))
_STRUCK = (("strike", "marimba"), ("strike", "glockenspiel"), ("strike", "bell"))


@dataclasses.dataclass(frozen=True)
class _Song:
    """What stays the same through one clip; a step is half a beat."""

    step_frames: float
    offset_steps: float  # of the clip's start in the song
    swing: float  # delay of the odd steps, in steps
    chord_steps: int
    tonic: int  # MIDI note between 43 and 54
    scale: tuple[int, ...]
    progression: tuple[int, ...]
    chord_style: str
    voices: dict[str, tuple[str, str]]
    parts: frozenset[str]
    density: float  # probability of a melody note on a step
    kit: tuple[int, int, int]

    def chord(self, step: int) -> int:
        return self.progression[step // self.chord_steps % len(self.progression)]

    def frequency(self, degree: int, octave: int) -> float:
        octaves, place = divmod(degree, len(self.scale))
        note = self.tonic + 12 * (octaves + octave) + self.scale[place]
        return 440.0 * 2.0 ** ((note - 69) / 12)


class SyntheticMusic:
    """A source of clips for Grain: `len` and `[i]`, each clip float32 [segment_samples, channels].

    The RMS of a clip lies between -30 and -6 dB re full scale, lower where the peak would pass
    0.95.

    Args:
        sample_rate: Hz, 8,000 to 96,000.
        segment_samples: Samples of a clip, at least 1.
        channels: 1, or 2 with the parts spread between left and right.
        seed: From 0 to 2**64 - 1.
    """

    def __init__(self, sample_rate: int, segment_samples: int, channels: int = 1, seed: int = 0):
        self._rate, self._samples, self._channels = sample_rate, segment_samples, channels
        self._seed = seed
        self._counter = np.arange(int(_LONGEST_SECONDS * sample_rate), dtype=np.uint32)
        self._decays = [_decay(seconds, sample_rate) for seconds in _DECAY_SECONDS]
        self._drums = _drum_kit(sample_rate)
        self._noises = _noises()

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int) -> Float[np.ndarray, "s c"]:
        key = np.array([self._seed, index], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        song = _compose(rng, self._rate)
        parts = self._perform(song, rng)
        audio = parts.T @ self._mixing(song, rng)
        if rng.random() < 0.6:
            audio = self._room(audio, rng)
        if rng.random() < 0.4:
            self._add_bed(audio, rng)
        if rng.random() < 0.12:
            self._silence(audio, rng)
        return _set_level(audio, rng.uniform(-30.0, -6.0))

    def _perform(self, song: _Song, rng: np.random.Generator) -> Float[np.ndarray, "part s"]:
        parts = np.zeros((len(_PARTS), self._samples), np.float32)
        chords, bass, melody, drums = parts
        first = int(song.offset_steps - _LONGEST_SECONDS * self._rate / song.step_frames)
        last = int(song.offset_steps + self._samples / song.step_frames) + 1
        degree = int(rng.integers(0, 8))
        for step in range(first, last + 1):
            late = song.swing * (step % 2)
            start = round((step + late - song.offset_steps) * song.step_frames)
            dice = rng.random(6)
            if "chords" in song.parts:
                self._play_chords(chords, song, step, start)
            if "bass" in song.parts and (step % 4 == 0 or dice[0] < 0.3):
                frequency = song.frequency(song.chord(step), -1 if dice[1] < 0.8 else 0)
                self._note(bass, song.voices["bass"], start, 2 * song.step_frames, frequency, 0.5)
            if "melody" in song.parts and dice[2] < song.density:
                degree = _next_degree(degree, song.chord(step), step, dice[3])
                length = song.step_frames * (1 + 2 * dice[4])
                frequency = song.frequency(degree, 1)
                self._note(melody, song.voices["melody"], start, length, frequency, 0.3 + 0.3 * dice[5])
            if "drums" in song.parts:
                self._play_drums(drums, song, step, start, dice)
        return parts

    def _play_chords(self, bus, song: _Song, step: int, start: int) -> None:
        root = song.chord(step)
        if song.chord_style == "arpeggio":
            degree = root + (0, 2, 4, 7, 4, 2)[step % 6]
            voice, length = song.voices["chords"], 2 * song.step_frames
            self._note(bus, voice, start, length, song.frequency(degree, 1), 0.35)
        elif step % song.chord_steps == 0:
            for degree in (root, root + 2, root + 4):
                length = song.chord_steps * song.step_frames
                frequency = song.frequency(degree, 0 if degree > 4 else 1)
                self._note(bus, song.voices["chords"], start, length, frequency, 0.25)

    def _play_drums(self, bus, song: _Song, step: int, start: int, dice) -> None:
        kick, snare, hat = song.kit
        if step % 4 == 0 or dice[0] < 0.12:
            _add(bus, self._drums["kick"][kick], start, 0.9)
        if step % 4 == 2 or dice[1] < 0.06:
            _add(bus, self._drums["snare"][snare], start, 0.5)
        if dice[3] < 0.8:
            _add(bus, self._drums["hat"][hat], start, 0.1 + 0.2 * dice[4])

    def _note(self, bus, voice, start: int, length: float, frequency: float, level: float) -> None:
        """Add one note to a part; `length` in samples, `level` about its RMS at the start."""
        length = min(int(length), len(self._counter))
        if start < len(bus) and start + len(self._counter) > 0:
            getattr(self, f"_{voice[0]}")(bus, voice[1], start, length, frequency, level)

    def _pluck(self, bus, timbre, start, length, frequency, level) -> None:
        """A string: the bright part dies first, high notes sooner; the next note damps it."""
        ring = self._decays[4 if frequency < 150 else 3 if frequency < 600 else 2]
        strike = self._decays[1 if frequency < 600 else 0]
        length = min(length + int(0.15 * self._rate), len(ring))
        first, last = _overlap(bus, start, length)
        if first >= last:
            return
        phase = self._phase(frequency, first - start, last - start)
        tone = self._wave(timbre, "dark", frequency).take(phase)
        tone *= ring[first - start : last - start]
        bright = min(last, start + len(strike)) - first
        if bright > 0:
            strike = strike[first - start : first - start + bright]
            tone[:bright] += strike * self._wave(timbre, "bright", frequency).take(phase[:bright])
        self._shape(tone, first - start, length, 0.002, 0.06)
        bus[first:last] += np.float32(level) * tone

    def _bow(self, bus, timbre, start, length, frequency, level) -> None:
        """A sustained tone with a soft attack and vibrato of 12 cents at 5.3 Hz."""
        length = min(length + int(0.08 * self._rate), len(self._counter))
        first, last = _overlap(bus, start, length)
        if first >= last:
            return
        sway = _wavetable("sine", "bright", 1).take(self._phase(5.3, first - start, last - start))
        # Phase modulation by 2**32 (12 cents) f / (2 pi 5.3 Hz), below half a turn.
        depth = 2.0**32 * min(0.4, 0.007 * frequency / (2 * np.pi * 5.3)) / np.sqrt(2)
        phase = self._phase(frequency, first - start, last - start, np.float32(depth) * sway)
        tone = self._wave(timbre, "bright", frequency).take(phase)
        self._shape(tone, first - start, length, 0.05, 0.08)
        bus[first:last] += np.float32(0.7 * level) * tone

    def _strike(self, bus, name, start, length, frequency, level) -> None:
        """A bar or bell: a sum of inharmonic modes that ring out whatever the note's length."""
        sine = _wavetable("sine", "bright", 1)
        for ratio, amplitude, decay in _MODES[name]:
            ring = self._decays[decay]
            first, last = _overlap(bus, start, len(ring))
            if first >= last or ratio * frequency > _NYQUIST * self._rate:
                continue
            tone = sine.take(self._phase(ratio * frequency, first - start, last - start))
            tone *= ring[first - start : last - start]
            self._shape(tone, first - start, len(ring), 0.001, 0.01)
            bus[first:last] += np.float32(amplitude * level) * tone

    def _phase(self, frequency: float, first: int, last: int, sway=None):
        """Indices into a wavetable for samples first to last of a note."""
        phase = self._counter[first:last] * np.uint32(2.0**32 * frequency / self._rate)
        if sway is not None:
            phase += sway.astype(np.int32).view(np.uint32)
        phase >>= np.uint32(32 - _TABLE_BITS)
        return phase

    def _wave(self, timbre: str, shade: str, frequency: float) -> Float[np.ndarray, "table"]:
        room = int(_NYQUIST * self._rate / frequency)
        level = max(i for i, count in enumerate(_HARMONICS) if count <= max(room, 1))
        return _wavetable(timbre, shade, _HARMONICS[level])

    def _shape(self, tone, offset: int, length: int, attack: float, release: float) -> None:
        """Fade a note, of which `tone` is the part from `offset`, in and out (seconds)."""
        rise, fall = _fade(int(attack * self._rate) + 1), _fade(int(release * self._rate) + 1)[::-1]
        if offset < len(rise):
            count = min(len(rise) - offset, len(tone))
            tone[:count] *= rise[offset : offset + count]
        begin = max(length - len(fall) - offset, 0)
        if begin < len(tone):
            skip = offset + begin - (length - len(fall))
            tone[begin:] *= fall[skip : skip + len(tone) - begin]

    def _mixing(self, song: _Song, rng: np.random.Generator) -> Float[np.ndarray, "part c"]:
        """Gain of each part in each channel: constant power, bass and drums near the middle."""
        gains = 10.0 ** (rng.uniform(-5.0, 3.0, len(_PARTS)) / 20.0)
        if self._channels == 1:
            return gains[:, None].astype(np.float32)
        angle = np.pi / 4 * (1 + rng.uniform(-1.0, 1.0, len(_PARTS)) * (0.8, 0.15, 0.8, 0.25))
        return (gains[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32)

    def _room(self, audio, rng: np.random.Generator):
        """A few early echoes of 7 to 90 ms, other ones in each channel."""
        wet = audio.copy()
        for channel in range(self._channels):
            for gain in (0.4, -0.28, 0.2):
                delay = int(rng.uniform(0.007, 0.09) * self._rate)
                wet[delay:, channel] += np.float32(gain) * audio[: max(0, self._samples - delay), channel]
        return wet

    def _add_bed(self, audio, rng: np.random.Generator) -> None:
        """Steady noise 20 to 50 dB below the band."""
        noise = self._noises[rng.integers(len(self._noises))]
        rms = np.sqrt(np.mean(np.square(audio)))
        level = rms * np.float32(10.0 ** (rng.uniform(-50.0, -20.0) / 20.0))
        for channel in range(self._channels):
            start = int(rng.integers(len(noise)))
            stretch = np.arange(start, start + self._samples)
            audio[:, channel] += level * noise.take(stretch, mode="wrap")

    def _silence(self, audio, rng: np.random.Generator) -> None:
        """Zeros over 10 to 60 % of the clip, anywhere, with fades of 5 ms."""
        length = int(rng.uniform(0.1, 0.6) * self._samples)
        start = int(rng.integers(-length // 2, self._samples))
        first, last = max(0, start), max(0, start + length)
        fade = _fade(int(0.005 * self._rate))
        audio[first:last] = 0.0
        head = audio[max(0, first - len(fade)) : first]
        head *= fade[::-1][len(fade) - len(head) :, None]
        tail = audio[last : last + len(fade)]
        tail *= fade[: len(tail), None]


def _compose(rng: np.random.Generator, sample_rate: int) -> _Song:
    parts = [part for part in _PARTS if rng.random() < 0.6] or ["chords", "melody"]
    # A soloist keeps playing, lest the clip fall between two notes.
    style = ("block", "arpeggio", "pad")[rng.integers(1 if parts == ["chords"] else 0, 3)]
    density = 0.95 if parts == ["melody"] else rng.uniform(0.3, 0.9)
    return _Song(
        step_frames=sample_rate * 30.0 / (60.0 * 2.8 ** rng.random()),  # 60 to 168 beats a minute
        offset_steps=64.0 * rng.random() + 64.0,
        swing=float(rng.choice((0.0, 0.0, 0.25))),
        chord_steps=int(rng.choice((4, 8))),
        tonic=int(rng.integers(43, 55)),
        scale=_SCALES[rng.integers(len(_SCALES))],
        progression=_PROGRESSIONS[rng.integers(len(_PROGRESSIONS))],
        chord_style=style,
        voices={
            "chords": _pick(rng, _BOWED if style == "pad" else _PLUCKED + _STRUCK[:1]),
            "bass": _pick(rng, (("pluck", "round"), ("pluck", "steel"), ("bow", "round"))),
            "melody": _pick(rng, _PLUCKED + _BOWED + _STRUCK),
        },
        parts=frozenset(parts),
        density=density,
        kit=tuple(int(choice) for choice in rng.integers(4, size=3)),
    )


def _pick(rng: np.random.Generator, voices: tuple) -> tuple[str, str]:
    return voices[rng.integers(len(voices))]


def _next_degree(degree: int, root: int, step: int, dice: float) -> int:
    """A melody by steps and small leaps between degrees 0 and 11, on a chord tone at each beat."""
    degree = min(max(degree + (-2, -1, -1, 0, 1, 1, 2, 3)[int(8 * dice)], 0), 11)
    if step % 2 == 0 and (degree - root) % 7 not in (0, 2, 4):
        degree += 1 if (degree + 1 - root) % 7 in (0, 2, 4) else -1
    return degree


def _set_level(audio: Float[np.ndarray, "s c"], level_db: float) -> Float[np.ndarray, "s c"]:
    """Scale to the RMS wanted, in dB re full scale, or to a peak of 0.95 if that is less."""
    rms, peak = np.sqrt(np.mean(np.square(audio))), np.abs(audio).max()
    if peak == 0.0:
        return audio
    return audio * np.float32(min(10.0 ** (level_db / 20.0) / rms, 0.95 / peak))


def _overlap(bus, start: int, length: int) -> tuple[int, int]:
    return max(start, 0), min(start + length, len(bus))


def _add(bus, sound, start: int, level: float) -> None:
    first, last = _overlap(bus, start, len(sound))
    if first < last:
        bus[first:last] += np.float32(level) * sound[first - start : last - start]


@functools.cache
def _wavetable(timbre: str, shade: str, harmonics: int) -> Float[np.ndarray, "table"]:
    """One period of the timbre with harmonics 1..`harmonics`; RMS 1 were all of them there."""
    k = np.arange(1, _HARMONICS[-1] + 1)
    amplitudes = (k == 1) * 1.0 if timbre == "sine" else _TIMBRES[timbre](k)
    amplitudes = amplitudes / np.sqrt(np.mean(amplitudes**2) * len(k) / 2)
    if shade == "dark":
        amplitudes = amplitudes * np.exp(-0.4 * (k - 1))
    # Fixed random phases keep the crest of bright tables low.
    phases = np.random.Generator(np.random.Philox(key=1)).uniform(0, 2 * np.pi, len(k))
    spectrum = np.zeros(2 ** (_TABLE_BITS - 1) + 1, complex)
    spectrum[1 : harmonics + 1] = (amplitudes * np.exp(1j * phases))[:harmonics]
    return (np.fft.irfft(spectrum) * 2 ** (_TABLE_BITS - 1)).astype(np.float32)


@functools.cache
def _decay(seconds: float, sample_rate: int) -> Float[np.ndarray, "s"]:
    time = np.arange(int(seconds * sample_rate)) / sample_rate
    return np.exp(-np.log(1000.0) * time / seconds).astype(np.float32)


@functools.cache
def _fade(length: int) -> Float[np.ndarray, "s"]:
    """A raised cosine from 0 to 1."""
    return (0.5 - 0.5 * np.cos(np.pi * (np.arange(length) + 0.5) / length)).astype(np.float32)


@functools.cache
def _noises() -> list[Float[np.ndarray, "s"]]:
    """Periodic noise of RMS 1 whose power falls as f**0, f**-1 and f**-2."""
    rng = np.random.Generator(np.random.Philox(key=2))
    frequency = np.arange(2 ** (_NOISE_BITS - 1) + 1)
    noises = []
    for slope in (0.0, 0.5, 1.0):
        gains = np.where(frequency < 64, 0.0, 1 / np.maximum(frequency, 1.0) ** slope)
        spectrum = gains * np.exp(2j * np.pi * rng.random(len(frequency)))
        noise = np.fft.irfft(spectrum)
        noises.append((noise / noise.std()).astype(np.float32))
    return noises


@functools.cache
def _drum_kit(sample_rate: int) -> dict[str, list[Float[np.ndarray, "s"]]]:
    """Four each of kick (a falling sine), snare (sine and noise) and hat (bright noise)."""
    rng = np.random.Generator(np.random.Philox(key=3))
    kit = {"kick": [], "snare": [], "hat": []}
    time = np.arange(int(0.35 * sample_rate)) / sample_rate
    onset = np.minimum(1.0, time / 0.001)
    for _ in range(4):
        low, fall = rng.uniform(42.0, 60.0), rng.uniform(0.02, 0.05)
        # The integral of low + 4 low exp(-t / fall).
        cycles = low * time + 4 * low * fall * (1 - np.exp(-time / fall))
        kit["kick"].append(onset * np.sin(2 * np.pi * cycles) * np.exp(-time / rng.uniform(0.06, 0.12)))
        noise = rng.standard_normal(len(time))
        rattle = noise * np.exp(-time / rng.uniform(0.03, 0.08))
        skin = np.sin(2 * np.pi * rng.uniform(160.0, 240.0) * time) * np.exp(-time / 0.05)
        kit["snare"].append(onset * (0.35 * rattle + skin))
        bright = np.diff(np.diff(noise, prepend=0.0), prepend=0.0)  # 12 dB an octave up
        kit["hat"].append(0.25 * onset * bright * np.exp(-time / rng.uniform(0.008, 0.06)))
    return {name: [sound.astype(np.float32) for sound in sounds] for name, sounds in kit.items()}
