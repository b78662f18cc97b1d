"""Measure this package beside its peers: python -m meanflow_audio_codec.tools.benchmark --suite loader --peers -o DIR

Suite `loader`: batches of random crops from 100 files of each format, generated once into DIR/data or
found in --data-dir. DIR/loader.md, which is also printed, and DIR/loader.json hold the results; what
is counted, and how, stands in `_METHOD`, which is printed with them.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

import meanflow_audio_codec
from meanflow_audio_codec.datasets.audio import AudioFile, scan_folder
from meanflow_audio_codec.datasets.synthetic import SyntheticMusic
from meanflow_audio_codec.errors import InputError

_METHOD = """\
Batches of 16 random crops, float32, drawn as fast as they come. A file is drawn by the number of whole crops in it,
the start uniformly; past the end of a file are zeros. The loaders take turns (rounds: {rounds}), each in a fresh
process, each crop length for {seconds:g} s after its first batch. A round's crops/s and audio s/s are all crops
over all seconds of its crop lengths; the table has the median over the rounds. "Ours / it" is the median of the
ratios of crops/s within a round: above 1, ours is faster. "First batch" is from the constructor's call, imports
done, to the first batch in hand, the median over all runs; every loader is handed the files' lengths, so no scan is
in it. "Peak memory" is the largest over all runs: resident MB of the process, imports included, and what its
workers do not share with it (Linux only). All files were read once before, so nothing waits for the disk. A cold
decoded cache is empty when a run starts; a warm one was filled by reading one sample of every second of every file."""

_CROP_SECONDS = (1.0, 2.5, 4.5)
_TRAINING_SECONDS, _TRAINING_RATE = 1.36, 24000
_BATCH_SIZE = 16
_FILES = 100
_PIECE_SECONDS = (30, 45, 60, 75, 90, 180, 180, 180, 180, 240)
_PIECE_RATE = 44100
_ENCODINGS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}


@dataclasses.dataclass(frozen=True)
class _Task:
    """Crops of `seconds` at `sample_rate` (Hz) from any of the files."""

    files: list[AudioFile]
    seconds: float
    sample_rate: int
    channels: int
    cache_dir: str = ""

    @property
    def samples(self) -> int:
        return round(self.seconds * self.sample_rate)

    def items(self) -> list[AudioFile]:
        """Every file as often as whole crops fit into it, at least once."""
        return [file for file in self.files for _ in range(max(1, int(file.duration / self.seconds)))]

    def place(self, file: AudioFile, rng: np.random.Generator) -> tuple[int, int]:
        """First frame and number of frames of a crop, at the file's own rate."""
        frames = -(-self.samples * file.sample_rate // self.sample_rate)
        return int(rng.integers(max(1, file.frames - frames + 1))), frames


def _read(task: _Task, file: AudioFile, rng: np.random.Generator) -> np.ndarray:
    start, frames = task.place(file, rng)
    audio, _ = soundfile.read(file.path, frames, start, dtype="float32", always_2d=True, fill_value=0.0)
    if task.channels < file.channels:
        audio = audio.mean(axis=1, keepdims=True)
    if task.sample_rate != file.sample_rate:
        audio = soxr.resample(audio, file.sample_rate, task.sample_rate, "HQ")[: task.samples]
    return audio


def _read_by_librosa(task: _Task, file: AudioFile, rng: np.random.Generator) -> np.ndarray:
    import librosa

    start, frames = task.place(file, rng)
    stretch = dict(offset=start / file.sample_rate, duration=frames / file.sample_rate)
    rate = None if task.sample_rate == file.sample_rate else task.sample_rate
    audio, _ = librosa.load(file.path, sr=rate, mono=task.channels == 1, **stretch)
    return librosa.util.fix_length(np.atleast_2d(audio).T, size=task.samples, axis=0)


def _loop(task: _Task, read: Callable) -> Iterator[np.ndarray]:
    items, rng = task.items(), np.random.default_rng(0)
    while True:
        yield np.stack([read(task, items[i], rng) for i in rng.integers(len(items), size=_BATCH_SIZE)])


def _ours(task: _Task) -> Iterator[np.ndarray]:
    from meanflow_audio_codec.datasets.pipeline import build_audio_pipeline

    stream = build_audio_pipeline(
        data_dir=[task.files],
        sample_rate=task.sample_rate,
        segment_samples=task.samples,
        batch_size=_BATCH_SIZE,
        seed=0,
        channels=task.channels,
        polarity=False,
        silence_db=-200.0,
        short_files="pad",
        cache_dir=task.cache_dir,
    )
    return (batch["audio"] for batch in stream)


class _TorchDataset:
    """Crops for a DataLoader, whose workers want an object that pickles."""

    def __init__(self, task: _Task):
        self._task, self._items = task, task.items()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> np.ndarray:
        return _read(self._task, self._items[index], np.random.default_rng())


def _torch_loader(task: _Task, workers: int) -> Iterator[np.ndarray]:
    from torch.utils.data import DataLoader

    options = dict(shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    loader = DataLoader(_TorchDataset(task), _BATCH_SIZE, **options)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _grain_chain(task: _Task, threads: int) -> Iterator[np.ndarray]:
    import grain

    files = grain.MapDataset.source(task.items()).seed(0).shuffle().repeat()
    crops = files.random_map(functools.partial(_read, task))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(crops.batch(_BATCH_SIZE).to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _Loader:
    name: str
    batches: Callable[[_Task], Iterator[np.ndarray]]  # endless
    modules: str  # imported before the clock starts; pip installs the first
    cache: str = ""  # or "cold" or "warm"


_PIPELINE = "meanflow_audio_codec.datasets.pipeline"
_OURS = (
    _Loader("ours", _ours, _PIPELINE),
    _Loader("ours, cache cold", _ours, _PIPELINE, "cold"),
    _Loader("ours, cache warm", _ours, _PIPELINE, "warm"),
)
_PEERS = (
    _Loader("soundfile loop", functools.partial(_loop, read=_read), "soundfile"),
    _Loader("torch DataLoader, 0 workers", functools.partial(_torch_loader, workers=0), "torch torch.utils.data"),
    _Loader("torch DataLoader, 1 worker", functools.partial(_torch_loader, workers=1), "torch torch.utils.data"),
    _Loader("torch DataLoader, 2 workers", functools.partial(_torch_loader, workers=2), "torch torch.utils.data"),
    _Loader("librosa.load", functools.partial(_loop, read=_read_by_librosa), "librosa librosa.core.audio librosa.util"),
    _Loader("Grain, 0 read threads", functools.partial(_grain_chain, threads=0), "grain"),
    _Loader("Grain, 2 read threads", functools.partial(_grain_chain, threads=2), "grain"),
)
_RESAMPLED = ("ours", "ours, cache warm", "librosa.load", "Grain, 2 read threads")


def _in_fresh_process(function: Callable, *arguments):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _run_all(loader: _Loader, tasks: list[_Task], seconds: float) -> list[dict]:
    # A spawned process spawns its children too; the loader's are to start as they would for its user.
    multiprocessing.set_start_method(None, force=True)
    for module in loader.modules.split():
        importlib.import_module(module)
    return [_run(loader, task, seconds) for task in tasks]


def _run(loader: _Loader, task: _Task, seconds: float) -> dict:
    begin = time.perf_counter()
    batches = loader.batches(task)
    shape = tuple(next(batches).shape)
    first = now = time.perf_counter()
    assert shape == (_BATCH_SIZE, task.samples, task.channels), (loader.name, shape)
    crops = 0
    while now < first + seconds:
        next(batches)
        crops += _BATCH_SIZE
        now = time.perf_counter()
    return {
        "crop_seconds": task.seconds,
        "crops": crops,
        "audio_s": crops * task.seconds,
        "seconds": now - first,
        "first_batch_s": first - begin,
        "peak_memory_mb": _peak_memory_mb(),
    }


def _peak_memory_mb() -> float | None:
    """None where the system does not tell."""
    # Not getrusage: after a fork and exec it may tell the parent's peak.
    if not os.path.exists("/proc/self/smaps_rollup"):
        return None
    kb = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    for worker in multiprocessing.active_children():
        kb += re.findall(r"Private_\w+:\s+(\d+)", Path(f"/proc/{worker.pid}/smaps_rollup").read_text())
    return sum(map(int, kb)) * 1024 / 1e6


def _fill_cache(task: _Task) -> None:
    from meanflow_audio_codec.datasets.decoded_cache import DecodedCache

    cache = DecodedCache(task.cache_dir, task.sample_rate, task.channels)
    for file in task.files:
        for start in range(0, cache.num_samples(file), task.sample_rate):
            cache.read(file, start, np.empty((1, task.channels), np.float32))


def _measure_table(
    title: str, tasks: list[_Task], loaders: list[_Loader], given: argparse.Namespace, scratch: str
) -> dict:
    """Every loader on every task in turn; `tasks` differ in the length of crops alone."""
    runs = []
    with tempfile.TemporaryDirectory(dir=scratch) as warm:
        _in_fresh_process(_fill_cache, dataclasses.replace(tasks[0], cache_dir=warm))
        turns = list(itertools.product(range(given.pairs), loaders))
        for number, loader in tqdm(turns, title, disable=None, leave=False):
            with tempfile.TemporaryDirectory(dir=scratch) as cold:
                caches = {"": "", "cold": f"{cold}/{{}}", "warm": warm}
                placed = [
                    dataclasses.replace(task, cache_dir=caches[loader.cache].format(i)) for i, task in enumerate(tasks)
                ]
                for run in _in_fresh_process(_run_all, loader, placed, given.seconds):
                    runs.append({"loader": loader.name, "round": number} | run)
    rows = [_row(loader.name, runs) for loader in loaders]
    return {"title": title, "rows": rows, "runs": runs}


def _row(loader: str, runs: list[dict]) -> dict:
    mine = [run for run in runs if run["loader"] == loader]
    crops, audio = _rates(loader, runs, "crops"), _rates(loader, runs, "audio_s")
    return {
        "loader": loader,
        "crops_per_s": float(np.median(crops)),
        "audio_s_per_s": float(np.median(audio)),
        "ours_over_it": float(np.median(_rates("ours", runs, "crops") / crops)),
        "first_batch_s": float(np.median([run["first_batch_s"] for run in mine])),
        "peak_memory_mb": max((run["peak_memory_mb"] for run in mine if run["peak_memory_mb"]), default=None),
    }


def _rates(loader: str, runs: list[dict], quantity: str) -> np.ndarray:
    """A quantity a second in each round, over all crop lengths."""
    totals = collections.defaultdict(lambda: np.zeros(2))
    for run in runs:
        if run["loader"] == loader:
            totals[run["round"]] += (run[quantity], run["seconds"])
    return np.array([amount / seconds for amount, seconds in totals.values()])


def _generate(data: Path) -> None:
    """Write pieces of music in every format, each as several files; `data` is there when all are."""
    partial = data.with_name(data.name + ".partial")
    partial.mkdir(exist_ok=True)
    for number, seconds in enumerate(tqdm(_PIECE_SECONDS, "generate music", disable=None, leave=False)):
        audio = _piece(seconds, first_seed=100 * number)
        for suffix, encoding in _ENCODINGS.items():
            path = partial / f"{number}_00.{suffix}"
            with soundfile.SoundFile(path, "w", _PIECE_RATE, 2, encoding) as out:
                for start in range(0, len(audio), _PIECE_RATE):  # one long write of Vorbis overflows a stack
                    out.write(audio[start : start + _PIECE_RATE])
            for copy in range(1, _FILES // len(_PIECE_SECONDS)):
                path.with_name(f"{number}_{copy:02}.{suffix}").write_bytes(path.read_bytes())
    partial.rename(data)


def _piece(seconds: int, first_seed: int) -> np.ndarray:
    """Music without a silent half second, for ours draws again where all is zero and peers do not."""
    for seed in itertools.count(first_seed):
        audio = SyntheticMusic(_PIECE_RATE, seconds * _PIECE_RATE, 2, seed)[0]
        if np.abs(audio).reshape(2 * seconds, -1).max(axis=1).min() > 1e-3:
            return audio


def _groups(files: list[AudioFile]) -> dict[tuple[str, int, int], list[AudioFile]]:
    """Of each format the commonest (format, Hz, channels), and of that at most 100 files, evenly spread."""
    groups = collections.defaultdict(list)
    for file in files:
        if file.channels <= 2:
            groups[Path(file.name).suffix.lower()[1:], file.sample_rate, file.channels].append(file)
    by_size = sorted(groups.items(), key=lambda item: (item[0][0], len(item[1])))
    kept = {kind[0]: (kind, group[:: -(-len(group) // _FILES)]) for kind, group in by_size}
    return dict(kept.values())


def _loader_suite(given: argparse.Namespace) -> dict:
    """Both tables of every format."""
    loaders, missing = list(_OURS), {}
    for peer in _PEERS if given.peers else ():
        package = peer.modules.split()[0]
        if importlib.util.find_spec(package):
            loaders.append(peer)
        else:
            missing[package] = f"Left out, for it is not installed: {package} (pip install {package})."
    notes = list(missing.values())
    data = Path(given.data_dir or given.output / "data")
    if not given.data_dir and not data.exists():
        _generate(data)
    begin = time.perf_counter()
    files = scan_folder(data, bad_files="skip")
    notes.append(f"Our scan of {len(files)} files, not in the first batch: {time.perf_counter() - begin:.2f} s.")
    tables = []
    with tempfile.TemporaryDirectory(dir=given.output, prefix="cache-") as scratch:
        for (suffix, rate, channels), group in sorted(_groups(files).items()):
            for file in group:
                Path(file.path).read_bytes()
            title = f"{suffix.upper()}, {len(group)} files: crops of"
            tasks = [_Task(group, seconds, rate, channels) for seconds in _CROP_SECONDS]
            whole = (
                f"{title} {', '.join(map(str, _CROP_SECONDS))} s at {rate} Hz {'mono' if channels == 1 else 'stereo'}"
            )
            tables.append(_measure_table(whole, tasks, loaders, given, scratch))
            task = _Task(group, _TRAINING_SECONDS, _TRAINING_RATE, 1)
            resampled = f"{title} {_TRAINING_SECONDS} s, resampled to {_TRAINING_RATE} Hz mono"
            some = [loader for loader in loaders if loader.name in _RESAMPLED]
            tables.append(_measure_table(resampled, [task], some, given, scratch))
    method = _METHOD.format(rounds=given.pairs, seconds=given.seconds)
    return {"title": "Loading random crops", "method": method, "notes": notes, "tables": tables}


def _machine() -> dict:
    names = ("grain", "librosa", "numpy", "soundfile", "soxr", "torch")
    versions = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    versions |= {"libsndfile": soundfile.__libsndfile_version__, "this package": meanflow_audio_codec.__version__}
    return {"cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def _markdown(report: dict) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = f"{report['date']}, {machine['cores']} cores, Python {machine['python']}, {versions}."
    parts = [f"# {report['title']}", f"`{report['command']}`", facts, report["method"], *report["notes"]]
    for table in report["tables"]:
        lines = ["| | crops/s | audio s/s | ours / it | first batch, s | peak memory, MB |", "|---" * 6 + "|"]
        for row in table["rows"]:
            cells = f"{row['crops_per_s']:,.0f} | {row['audio_s_per_s']:,.0f} | {row['ours_over_it']:.2f}"
            memory = "?" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:,.0f}"
            lines.append(f"| {row['loader']} | {cells} | {row['first_batch_s']:.2f} | {memory} |")
        parts += [f"## {table['title']}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


_SUITES = {"loader": _loader_suite}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, write and print the report."""
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__.partition(":")[0], allow_abbrev=False)
    parser.add_argument("--suite", choices=_SUITES, required=True)
    parser.add_argument("--peers", action="store_true", help="measure other loaders too, those that are installed")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", default="benchmark", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of a run after its first batch; default: %(default)s"
    )
    parser.add_argument("--pairs", type=int, default=3, help="rounds; default: %(default)s")
    parser.add_argument("--data-dir", metavar="FOLDER", help="your audio, in place of generated files")
    given = parser.parse_args(argv)
    try:
        if not given.seconds > 0 or given.pairs < 1:
            raise InputError(f"--seconds={given.seconds:g}, --pairs={given.pairs}: choose above 0 s and 1 or more")
        given.output.mkdir(parents=True, exist_ok=True)
        flags = " --peers" * given.peers + " --data-dir FOLDER" * bool(given.data_dir)
        command = f"python -m meanflow_audio_codec.tools.benchmark --suite {given.suite}{flags} -o DIR"
        report = {
            "command": f"{command} --seconds {given.seconds:g} --pairs {given.pairs}",
            "date": datetime.date.today().isoformat(),
            "machine": _machine(),
        } | _SUITES[given.suite](given)
        (given.output / f"{given.suite}.json").write_text(json.dumps(report, indent=1) + "\n")
        (given.output / f"{given.suite}.md").write_text(_markdown(report))
        print(_markdown(report), end="")
    except InputError as error:
        sys.exit(f"benchmark: {error}")
    except OSError as error:
        sys.exit(f"benchmark: {error.filename or given.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("benchmark: interrupted; the generated files stay in DIR/data")


if __name__ == "__main__":
    main()
