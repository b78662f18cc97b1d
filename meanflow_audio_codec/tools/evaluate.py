"""Score a codec and other people's: python -m meanflow_audio_codec.tools.evaluate --model M --data_dir D -o OUT

Clips. Of every audio file below D one stretch from its middle (several, evenly spaced, by --clips_per_file) of at most
--seconds; mono by averaging, resampled to the codec's rate, brought to -16 LUFS (ITU-R BS.1770) unless its peak would
pass 0.99, rounded to 16 bits. Its group is `music` or `speech` where a folder below D or the file's name up to the
first `_` says so, else `all`. Speech recorded below the codec's rate is `speechnb`, of which only measures that see
8 kHz and no more are taken; other clips recorded below it are left out.

Decoded clips are shifted by the whole number of samples (at most 50 ms) of best cross-correlation, cut or padded to the
reference's length, and rounded to 16 bits without dither. No gain is fitted.

kbps are those of the payload: packets without container, for our own files the blocks without header and framing; the
size of the whole file stands beside it. Intervals are 95 %, from 10,000 bootstrap resamples of clips with a fixed seed;
differences are paired by clip.

OUT receives table.md, results.csv (a row a clip and coder), results.json, rate_distortion.png and listening.html.
rows.jsonl keeps each clip as soon as it is scored: the same command continues after an interruption, and further kbps,
nfe or baselines add to what is there.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from tqdm import tqdm

from meanflow_audio_codec.datasets.audio import FORMATS, AudioFile, find_audio, load_crop, scan_folder
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators import baselines, metrics, perceptual
from meanflow_audio_codec.evaluators.baselines import Coded, Coder
from meanflow_audio_codec.tools import evaluate_report
from meanflow_audio_codec.tools.evaluate_report import Row

KBPS = (3.0, 6.0, 8.0, 12.0, 16.0, 24.0)
NFE = (1, 2, 4)
LOUDNESS_LUFS = -16.0
PEAK = 0.99
MIN_SECONDS = 0.5
MAX_LAG_SECONDS = 0.05
LISTENING_KBPS = (6.0, 12.0)
LISTENING_FAMILIES = ("opus_auto", "opus_music")
LISTENING_CLIPS = 5
_WARM_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Clip:
    """A reference: `audio` [s] in 16 bits, and `checksum` of it; `name` tells clips of one file apart."""

    name: str
    file: str
    group: str
    audio: Float32[np.ndarray, " s"]
    sample_rate: int
    checksum: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.audio) / self.sample_rate


def main(argv: list[str] | None = None) -> None:
    """Evaluate what the command line names."""
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", metavar="M", help="name of a codec that comes with the package, bundle or workdir")
    parser.add_argument("--baselines-only", "--baselines_only", action="store_true", help="score no model")
    parser.add_argument("--data_dir", metavar="D", required=True, help=f"folder with {', '.join(FORMATS)} files")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder of the results, new or continued")
    parser.add_argument("--kbps", type=float, nargs="+", default=KBPS, help="bitrates to ask for")
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="network evaluations of the model's decoder")
    parser.add_argument(
        "--baselines", nargs="*", default=baselines.FAMILIES, help="of " + ", ".join(baselines.FAMILIES)
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of a clip, at most")
    parser.add_argument("--clips_per_file", type=int, default=1)
    parser.add_argument("--sample_rate", type=int, default=44100, help="Hz, with --baselines-only")
    parser.add_argument("--reuse", metavar="DIR", help="an earlier OUT, whose scores of the same clips are taken over")
    arguments = parser.parse_args(argv)
    try:
        print(_run(arguments))
    except InputError as error:
        sys.exit(f"evaluate: {error}")
    except OSError as error:
        sys.exit(f"evaluate: {error.filename or arguments.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("evaluate: interrupted; the same command continues")


def _run(arguments: argparse.Namespace) -> str:
    _check(arguments)
    codec = None
    if arguments.model is not None:
        from meanflow_audio_codec.codec import Codec  # seconds

        codec = Codec.load(arguments.model)
    sample_rate = arguments.sample_rate if codec is None else codec.sample_rate
    others, missing = baselines.find_baselines(arguments.kbps, arguments.baselines)
    measures, more = perceptual.find_metrics()
    clips = load_clips(arguments.data_dir, sample_rate, arguments.seconds, arguments.clips_per_file, _say)
    if not set(measures) & set(perceptual.SPEECH_METRICS):
        clips, narrow = [c for c in clips if c.group != "speechnb"], [c for c in clips if c.group == "speechnb"]
        more += [f"{len(narrow)} clips of speechnb are left out: there is no measure of speech"] if narrow else []
    for line in missing + more:
        _say(line)
    own = [] if codec is None else own_coders(codec, arguments.kbps, arguments.nfe)
    if not own + others or not clips:
        raise InputError("nothing to score: no " + ("coder" if clips else "clip") + " is left, see above")

    output = Path(arguments.output).expanduser()
    settings = {
        "format": 1,
        "model": codec and {"name": codec.name, "fingerprint": codec.fingerprint},
        "sample_rate": sample_rate,
        "clips": {clip.name: clip.checksum for clip in clips},
    }
    _open_output(output, settings)
    known = read_rows(output / "rows.jsonl")
    if arguments.reuse is not None:
        known = _read_reused(Path(arguments.reuse).expanduser()) | known
    rows = score_all(own + others, clips, measures, known, output / "rows.jsonl")
    speed = None
    if codec is not None:
        longest = max(clips, key=lambda clip: clip.seconds)
        speed = _on_one_core(measure_speed, arguments.model, longest.audio, longest.sample_rate, tuple(arguments.nfe))
    table = evaluate_report.write(output, settings, rows, [coder.family for coder in own], speed)
    _write_listening(output / "listening.html", own + others, clips)
    return f"{table}\n{output / 'table.md'}, results.csv, results.json, rate_distortion.png, listening.html"


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) != arguments.baselines_only:
        raise InputError("give either --model M or --baselines-only")
    folder = Path(arguments.data_dir).expanduser()
    if not (folder.is_dir() and find_audio(folder)):
        raise InputError(f"--data_dir {folder} is no folder with {', '.join(FORMATS)} files")
    for name, lowest in (("seconds", MIN_SECONDS), ("clips_per_file", 1), ("sample_rate", 16000)):
        if not getattr(arguments, name) >= lowest:
            raise InputError(f"--{name} {getattr(arguments, name)} must be at least {lowest}")
    for name in ("kbps", "nfe"):
        if not all(value > 0 for value in getattr(arguments, name)):
            raise InputError(f"--{name} {' '.join(map(str, getattr(arguments, name)))}: must be above 0")


def _say(line: str) -> None:
    tqdm.write(f"evaluate: {line}", file=sys.stderr)


################################################ Clips


def load_clips(
    data_dir: str | os.PathLike, sample_rate: int, seconds: float, clips_per_file: int, say: Callable[[str], None]
) -> list[Clip]:
    """Return the clips of the module's docstring; `say` takes a line for each that is left out.

    Raises:
        InputError: No audio, or no pyloudnorm.
    """
    clips = []
    for file in scan_folder(data_dir, bad_files="skip"):
        group = group_of(file.name)
        if file.sample_rate < sample_rate:
            if group != "speech":
                say(f"{file.name} is left out: it was recorded at {file.sample_rate} Hz, below {sample_rate} Hz")
                continue
            group = "speechnb"
        if file.duration < MIN_SECONDS:
            say(f"{file.name} is left out: it is shorter than {MIN_SECONDS} s")
            continue
        for number, audio in enumerate(_stretches(file, sample_rate, seconds, clips_per_file)):
            name = file.name if clips_per_file == 1 else f"{file.name}#{number + 1}"
            loudness = measure_loudness(audio, sample_rate)
            if loudness == -np.inf:
                say(f"{name} is left out: it is silent")
                continue
            gain = min(10 ** ((LOUDNESS_LUFS - loudness) / 20), PEAK / float(np.abs(audio).max()))
            audio = to_16_bits(audio * gain)
            clips.append(Clip(name, file.name, group, audio, sample_rate, zlib.crc32(audio.tobytes())))
    return clips


def group_of(name: str) -> str:
    """Return "music" or "speech" where a folder or the name's first word is that, else "all"."""
    *folders, file = name.lower().split("/")
    return next((word for word in (*folders, file.split("_")[0]) if word in ("music", "speech")), "all")


def measure_loudness(audio: Float[np.ndarray, " s"], sample_rate: int) -> float:
    """Return the gated loudness in LUFS (ITU-R BS.1770-4), -inf for silence.

    Raises:
        InputError: pyloudnorm is not installed.
    """
    try:
        import pyloudnorm
    except ImportError as error:
        raise InputError(f"pyloudnorm is not installed, which sets the clips' level: {perceptual.EXTRA}") from error
    with np.errstate(divide="ignore"):  # silence
        return float(pyloudnorm.Meter(sample_rate).integrated_loudness(audio.astype(np.float64)))


def to_16_bits(audio: Float[np.ndarray, " s"]) -> Float32[np.ndarray, " s"]:
    """Round to 16 bits without dither; what exceeds full scale is clipped."""
    return (np.clip(np.round(audio * 32768.0), -32768, 32767) / 32768).astype(np.float32)


def align(
    reference: Float[np.ndarray, " s"], decoded: Float[np.ndarray, " n"], max_lag: int
) -> tuple[Float[np.ndarray, " s"], int]:
    """Shift `decoded` to where it correlates best with `reference`, and cut or pad it to its length.

    Returns:
        The shifted audio, and the samples by which it was late, in [-max_lag, max_lag].
    """
    length = len(reference) + len(decoded) + max_lag
    spectrum = np.fft.rfft(decoded, length) * np.conj(np.fft.rfft(reference, length))
    correlation = np.fft.irfft(spectrum, length)
    late, early = correlation[: max_lag + 1], correlation[length - max_lag :]
    lag = int(np.argmax(late)) if late.max() >= early.max(initial=-np.inf) else int(np.argmax(early)) - max_lag
    shifted = decoded[lag:] if lag >= 0 else np.pad(decoded, (-lag, 0))
    return np.pad(shifted[: len(reference)], (0, max(0, len(reference) - len(shifted)))), lag


def _stretches(file: AudioFile, sample_rate: int, seconds: float, count: int) -> list[Float[np.ndarray, " s"]]:
    """`count` stretches with equal gaps before, between and after them, all of the file where it is shorter."""
    samples = int(min(seconds, file.duration) * sample_rate)
    frames = samples * file.sample_rate / sample_rate
    starts = [int((2 * i + 1) / (2 * count) * (file.frames - frames)) for i in range(count)]
    crop = lambda start: load_crop(file, start, sample_rate=sample_rate, segment_samples=samples, channels=1)
    return [crop(start)[:, 0] for start in starts]


################################################ Scores


def own_coders(codec: Any, kbps: Sequence[float], nfe: Sequence[int]) -> list[Coder]:
    """Return the codec at each bitrate, or its most where that is less, and each `nfe`."""
    rates = sorted({min(codec.bitrate, rate) for rate in kbps if rate >= codec.min_bitrate})
    return [
        Coder(
            f"{codec.name} {rate:.3g} nfe {n}",
            f"{codec.name} nfe {n}",
            rate,
            codec.fingerprint,
            functools.partial(_code, codec, rate, n),
        )
        for n in nfe
        for rate in rates
    ]


def _code(codec: Any, kbps: float, nfe: int, audio: Float[np.ndarray, " s"], sample_rate: int) -> Coded:
    from meanflow_audio_codec import bitstream

    start = time.perf_counter()
    data = codec.compress(audio, sample_rate, kbps=kbps)
    encoded = time.perf_counter()
    decoded, _ = codec.decompress(data, nfe=nfe)
    done = time.perf_counter()
    payload_bytes = bitstream.info(io.BytesIO(data))["payload_bytes"]
    return Coded(decoded[0], payload_bytes, encoded - start, done - encoded, file_bytes=len(data))


def score_all(coders: Sequence[Coder], clips: Sequence[Clip], measures: dict, known: dict, record: Path) -> list[Row]:
    """Score every clip by every coder, but what is known already, and append each to `record` at once."""
    rows = []
    todo = [(clip, coder) for clip in clips for coder in coders]
    progress = tqdm(todo, "score", unit="clip", disable=None)
    with record.open("a") as file:
        file.write("\n" if file.tell() else "")  # ends a line that a kill cut short
        for clip, coder in progress:
            names = _names(clip, measures)
            row = known.get(_key(coder.name, coder.version, clip.checksum))
            if row is None or set(names) - set(row["scores"]):
                row = score(clip, coder, {name: measures.get(name) for name in names})
                file.write(json.dumps(row) + "\n")
                file.flush()
            kept = {name: row["scores"][name] for name in names}
            # What names the clip may differ in an earlier evaluation.
            rows.append(row | {"clip": clip.name, "file": clip.file, "group": clip.group, "scores": kept})
    return rows


def score(clip: Clip, coder: Coder, measures: dict[str, perceptual.Metric | None]) -> Row:
    """Code one clip and measure what comes back; a measure of None is one of `metrics`."""
    coded = coder.code(clip.audio, clip.sample_rate)
    shifted, lag = align(clip.audio, coded.audio, round(MAX_LAG_SECONDS * clip.sample_rate))
    decoded = to_16_bits(shifted)
    scores = {}
    for name, measure in measures.items():
        if measure is None:
            scores[name] = float(_DEFAULT[name](clip.audio, decoded, clip.sample_rate))
        else:
            scores[name] = measure(clip.audio, decoded, clip.sample_rate) if decoded.any() else None
    to_kbps = 8 / 1000 / clip.seconds
    return {
        "coder": coder.name,
        "family": coder.family,
        "version": coder.version,
        "asked_kbps": coder.kbps,
        "clip": clip.name,
        "file": clip.file,
        "group": clip.group,
        "checksum": clip.checksum,
        "seconds": clip.seconds,
        "kbps": coded.payload_bytes * to_kbps,
        "file_kbps": None if coded.file_bytes is None else coded.file_bytes * to_kbps,
        "lag_samples": lag,
        "encode_seconds": coded.encode_seconds,
        "decode_seconds": coded.decode_seconds,
        "scores": scores,
    }


_DEFAULT: dict[str, Callable] = {
    "si_sdr_db": lambda reference, decoded, _: metrics.si_sdr_db(reference, decoded),
    "mel_distance": metrics.mel_distance,
    "mel16_distance": metrics.mel16_distance,
    "stft_distance": lambda reference, decoded, _: metrics.stft_distance(reference, decoded),
    "lsd_db": lambda reference, decoded, _: metrics.lsd_db(reference, decoded),
}


def _names(clip: Clip, measures: dict) -> list[str]:
    """What is measured in clips of its group."""
    names = [] if clip.group == "speechnb" else [*_DEFAULT, *perceptual.AUDIO_METRICS]
    names += perceptual.SPEECH_METRICS if clip.group.startswith("speech") else ()
    return [name for name in names if name in _DEFAULT or name in measures]


################################################ What is on disk


def _open_output(output: Path, settings: dict) -> None:
    """Make the folder, or refuse it if it holds anything but the same evaluation."""
    path = output / "evaluation.json"
    if path.is_file():
        found = json.loads(path.read_text())
        changed = [name for name in settings if found.get(name) != settings[name]]
        if changed:
            raise InputError(
                f"{output} holds another evaluation, which differs in {', '.join(changed)}: choose another -o, and"
                " --reuse this one for the scores of baselines"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not empty and no evaluation: choose another -o")
    output.mkdir(parents=True, exist_ok=True)
    partial = output / "evaluation.json.part"
    partial.write_text(json.dumps(settings, indent=1))
    partial.replace(path)


def read_rows(path: Path) -> dict[tuple, Row]:
    """Return the scored rows by coder and clip. A line cut short by a kill is passed over, so its clip scored again."""
    rows = {}
    for line in filter(None, path.read_text().splitlines() if path.is_file() else []):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[_key(row["coder"], row["version"], row["checksum"])] = row
    return rows


def _read_reused(folder: Path) -> dict[tuple, Row]:
    if not (folder / "rows.jsonl").is_file():
        raise InputError(f"--reuse {folder}: it holds no rows.jsonl of an earlier evaluation")
    return read_rows(folder / "rows.jsonl")


def _key(coder: str, version: str, checksum: int) -> tuple:
    return coder, version, checksum


################################################ Speed


def measure_speed(model: str, audio: Float[np.ndarray, " s"], sample_rate: int, nfe: Sequence[int]) -> dict[str, float]:
    """Time the codec with all its codebooks, as times real time; the first calls of a process and the median of later.

    Returns:
        `load_seconds`, `encode_cold`, `encode_warm`, and `decode_nfe<n>_cold` and `_warm`.
    """
    start = time.perf_counter()
    from meanflow_audio_codec.codec import Codec

    codec = Codec.load(model)
    speed, duration = {"load_seconds": time.perf_counter() - start}, len(audio) / sample_rate
    data, cold, warm = _time(lambda: codec.compress(audio, sample_rate))
    speed |= {"encode_cold": duration / cold, "encode_warm": duration / warm}
    for n in nfe:
        _, cold, warm = _time(lambda n=n: codec.decompress(data, nfe=n))
        speed |= {f"decode_nfe{n}_cold": duration / cold, f"decode_nfe{n}_warm": duration / warm}
    return speed


def _time(call: Callable) -> tuple[Any, float, float]:
    """What it returns, the seconds of the first call, and the median of later ones."""
    seconds = []
    for _ in range(1 + _WARM_RUNS):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, seconds[0], statistics.median(seconds[1:])


def _on_one_core(function: Callable, *arguments: Any) -> Any:
    """Call in a process of its own that is bound to one core where the system can, and sees no accelerator."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_bind) as pool:
        return pool.submit(function, *arguments).result()


def _bind() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if hasattr(os, "sched_setaffinity"):  # Linux; inherited by the threads that JAX makes
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


################################################ Listening


def _write_listening(path: Path, coders: Sequence[Coder], clips: Sequence[Clip]) -> None:
    """A page with a few clips, by the coders near `LISTENING_KBPS`."""
    from meanflow_audio_codec.tools.listening_page import write_listening_page

    heard = listened_coders(coders)
    entries = []
    for index in sorted(set(np.linspace(0, len(clips) - 1, LISTENING_CLIPS).round().astype(int))):
        clip = clips[index]
        lag = round(MAX_LAG_SECONDS * clip.sample_rate)
        coded = {
            coder.name: to_16_bits(align(clip.audio, coder.code(clip.audio, clip.sample_rate).audio, lag)[0])
            for coder in heard
        }
        common = {"name": clip.name, "group": clip.group, "sample_rate": clip.sample_rate}
        entries.append(common | {"reference": clip.audio, "coded": coded})
    write_listening_page(path, "Which is the original?", entries)


def listened_coders(coders: Sequence[Coder]) -> list[Coder]:
    """Return of each family to be heard the settings nearest to `LISTENING_KBPS`; of ours the first nfe.

    Where none of these families is there, the first two coders.
    """
    own = next((coder.family for coder in coders if coder.family not in baselines.FAMILIES), None)
    heard = []
    for family in (own, *LISTENING_FAMILIES):
        settings = [coder for coder in coders if coder.family == family]
        if settings:
            heard += [min(settings, key=lambda coder: abs(coder.kbps - kbps)) for kbps in LISTENING_KBPS]
    return list({coder.name: coder for coder in heard or coders[:2]}.values())


if __name__ == "__main__":
    main()
