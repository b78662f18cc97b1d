"""Download music for training: tracks of WaveGenAI/youtube-cc-by-music, which are under CC BY.

    python -m meanflow_audio_codec.tools.download_wavegen --output-dir ~/datasets/wavegen --max-hours 10

Killed anywhere and run again, it goes on; with a larger limit, it continues the same choice. In the folder:

    train/, valid/          audio as the site has it, at most in another container; no artist is in both
    manifest.jsonl          name, title, author, url, licence, length, SHA-256, ... of each track
    report.txt              what came and what did not
    .wavegen/source.json    what the folder is made from: the data set's revision, --match, --seed
    .wavegen/archive.jsonl  journal of the tracks that are done, gone for good or unsuitable
    .wavegen/ready/         done tracks beyond the limits, kept for a larger run
    .wavegen/               also metadata/, partial/ (downloads under way), download.log and lock

What is published in train/, valid/ and the manifest is a pure function of the tracks' order, the journal and the
limits: neither the clock nor the order in which downloads end leaves a trace.
"""

import argparse
import collections
import contextlib
import errno
import fcntl
import importlib
import json
import logging
import math
import os
import queue
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools import wavegen_catalogue as catalogue
from meanflow_audio_codec.tools import wavegen_media as media
from meanflow_audio_codec.tools.wavegen_catalogue import Track, plain, write_atomically

_EXTRA = {"yt_dlp": "yt-dlp", "imageio_ffmpeg": "imageio-ffmpeg", "pyarrow": "pyarrow"}
_GB_AN_HOUR = 0.1
_SPARE_GB = 0.5
_PUBLISH_SECONDS = 60.0
_LINE_SECONDS = 30.0  # between lines of progress where there is no terminal
_MEASURED = ("licence", "duration_seconds", "sample_rate", "channels", "frames", "bytes", "sha256", "bandwidth_hz")

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and download; what goes wrong ends in one line on stderr and exit status 1."""
    options = _parse(argv)
    folder = Path(options.output_dir).expanduser().absolute()
    try:
        _require_extra()
        with _locked(folder), _logged(folder), _interruptible():
            failed = _run(folder, options)
    except InputError as error:
        sys.exit(f"download_wavegen: {plain(str(error))}")
    except OSError as error:
        remedy = "; what came is kept: make room and run it again" if error.errno == errno.ENOSPC else ""
        sys.exit(f"download_wavegen: {error.filename or folder}: {error.strerror or error}{remedy}")
    except KeyboardInterrupt:
        sys.exit("download_wavegen: interrupted; the same command goes on")
    if failed:
        sys.exit(f"download_wavegen: {failed} tracks failed for now; the same command tries them again")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download_wavegen", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--output-dir", default="~/datasets/wavegen", help="folder for everything; %(default)s")
    parser.add_argument("--max-hours", type=_positive, default=10.0, help="music to publish; %(default)s")
    parser.add_argument("--max-gb", type=_positive, default=20.0, help="its size at most, in 1e9 bytes; %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit of the data set; main for a new folder")
    parser.add_argument("--workers", type=int, choices=range(1, 9), default=2, help="downloads at once; %(default)s")
    parser.add_argument("--match", default="", help="words that the title, author, genre, album or tags contain")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the tracks; %(default)s")
    return parser.parse_args(argv)


def _run(folder: Path, options: argparse.Namespace) -> int:
    """The order of events; returns how many tracks failed for now, 0 where a limit is reached without them."""
    home = folder / ".wavegen"
    if not (home / "archive.jsonl").exists():
        _require_space(folder, min(options.max_gb, options.max_hours * _GB_AN_HOUR))
    pin = catalogue.pin_source(home, options.revision, options.match, options.seed)
    shards = catalogue.fetch_shards(home / "metadata", pin)
    tracks, unusable = catalogue.read_tracks(shards, options.match, options.seed)
    collection = Collection(folder, tracks, pin["revision"], options.max_hours, options.max_gb)
    failures = []
    try:
        _download(collection, options.workers, failures)
    finally:
        report = _report(collection, failures, unusable)
        write_atomically(folder / "report.txt", report)
        collection.publish()
    print(report, end="")
    return 0 if collection.is_full else len(failures)


class Collection:
    """The output folder: its journal, where each done track lies, what is published.

    Attributes:
        folder: The output folder.
        partial: Its place for downloads under way.
        tracks: The catalogue, in order.
        max_hours: Limit of the published music.
        max_gb: Limit of its size, 1e9 bytes.
        events: Track.key -> the journal's last word on a track.
        chosen: The tracks to publish.
        hours: Their length.
        gb: Their size.
        is_full: Whether a limit is reached.
    """

    def __init__(self, folder: Path, tracks: list[Track], revision: str, max_hours: float, max_gb: float):
        self.folder, self.tracks, self.max_hours, self.max_gb = folder, tracks, max_hours, max_gb
        self.partial, self._ready = folder / ".wavegen" / "partial", folder / ".wavegen" / "ready"
        self._places = (self._ready, folder / "train", folder / "valid")
        for place in (self.partial, *self._places):
            place.mkdir(exist_ok=True)
        self._journal, self._revision = folder / ".wavegen" / "archive.jsonl", revision
        self.events = _read_journal(self._journal)
        self._files = self._find_files()
        self._choose()

    def record(self, track: Track, status: str, details: dict, path: Path | None = None) -> None:
        """Write the journal's last word on a track; a done one lies at `path`."""
        if path is not None:
            self._files[track.key] = path.rename(self._ready / details["file"])
        event = {"key": track.key, "url": track.url, "status": status} | details
        with open(self._journal, "ab") as journal:
            journal.write(json.dumps(event).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.events[track.key] = event
        media.discard(track, self.partial)
        self._choose()

    def publish(self) -> None:
        """Move every done track to where it belongs, then rewrite the manifest."""
        places = {track.key: self.folder / track.split for track in self.chosen}
        for key, path in self._files.items():
            place = places.get(key, self._ready)
            if path.parent != place:
                self._files[key] = path.rename(place / path.name)
        rows = sorted(map(self._make_row, self.chosen), key=lambda row: row["name"])
        write_atomically(self.folder / "manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _choose(self) -> None:
        """Walk the tracks in order and take the done ones up to the limits; the last may run over the hours."""
        self.chosen, self.is_full, seconds, size = [], False, 0.0, 0
        for track in self.tracks:
            if track.key not in self._files:
                continue
            event = self.events[track.key]
            if size + event["bytes"] > self.max_gb * 1e9:
                self.is_full = True
                break
            self.chosen.append(track)
            seconds += event["duration_seconds"]
            size += event["bytes"]
            if seconds >= self.max_hours * 3600:
                self.is_full = True
                break
        self.hours, self.gb = seconds / 3600, size / 1e9

    def _make_row(self, track: Track) -> dict:
        event = self.events[track.key]
        about = {"split": track.split, "title": track.title, "author": track.author, "url": track.url}
        origin = {"genre": track.genre, "album": track.album, "revision": self._revision}
        return {"name": f"{track.split}/{event['file']}"} | about | {key: event[key] for key in _MEASURED} | origin

    def _find_files(self) -> dict[str, Path]:
        """Find the done tracks; forget the missing and the changed, remove what a kill left unrecorded."""
        keys = {track.name: track.key for track in self.tracks}
        files = {}
        for path in [path for place in self._places for path in place.iterdir() if path.stem in keys]:
            key = keys[path.stem]
            event = self.events.get(key, {})
            if event.get("file") == path.name and event["bytes"] == path.stat().st_size and key not in files:
                files[key] = path
            else:
                path.unlink()
        self.events = {key: event for key, event in self.events.items() if event["status"] != "done" or key in files}
        pending = keys.values() - self.events.keys()
        for path in self.partial.iterdir():
            if path.name[:64] not in pending:  # downloads are called by their key, 64 hex digits
                path.unlink()
        return files


def _read_journal(path: Path) -> dict[str, dict]:
    """The last event of each track; a torn last line, which a kill may leave, is cut off."""
    path.touch()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    try:
        return {event["key"]: event for event in map(json.loads, whole.splitlines())}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error!r}): remove that line, and its track comes again") from error


def _download(collection: Collection, workers: int, failures: list[str]) -> None:
    """Fetch tracks in their order, each in a thread, until a limit is reached; this thread decides and records."""
    pending = collections.deque(track for track in collection.tracks if track.key not in collection.events)
    if pending and not collection.is_full:
        hours, gb = collection.max_hours - collection.hours, collection.max_gb - collection.gb
        _require_space(collection.folder, min(gb, hours * _GB_AN_HOUR))
        _warn_without_javascript(pending[0].url)
    traffic, results, threads, failed_in_a_row = media.Traffic(), queue.Queue(), {}, 0
    next_publish = time.monotonic() + _PUBLISH_SECONDS
    try:
        with _progress(collection, traffic, failures) as show:
            while True:
                while pending and not collection.is_full and len(threads) < workers:
                    _require_space(collection.folder, 0.0)
                    track = pending.popleft()
                    threads[track] = media.start_fetching(track, collection.partial, traffic, results)
                show()
                if not threads:
                    return
                try:
                    track, outcome = results.get(timeout=0.5)
                except queue.Empty:
                    continue
                del threads[track]
                _record(collection, track, outcome, failures)
                failed_in_a_row = failed_in_a_row + 1 if isinstance(outcome, media.FailedForNow) else 0
                if failed_in_a_row == max(10, 4 * workers):
                    raise InputError(
                        f"{failed_in_a_row} tracks failed in a row, the last by: {outcome}; "
                        "no network, or the site limits this address: try again later"
                    )
                if time.monotonic() > next_publish:
                    collection.publish()
                    next_publish = time.monotonic() + _PUBLISH_SECONDS
    finally:
        traffic.stopping.set()
        deadline = time.monotonic() + 1.0
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))


def _record(collection: Collection, track: Track, outcome, failures: list[str]) -> None:
    """Keep what became of a track, `outcome` being what `media.fetch_track` returned or raised."""
    if isinstance(outcome, media.FailedForNow):
        log.warning("failed for now: %s: %s", track.url, outcome)
        failures.append(str(outcome))
    elif isinstance(outcome, media.Settled):
        log.info("%s: %s: %s", outcome.status, track.url, outcome)
        collection.record(track, outcome.status, {"reason": str(outcome)})
    elif isinstance(outcome, BaseException):
        raise outcome
    else:
        path, details = outcome
        log.info("done: %s: %s", track.url, details["file"])
        collection.record(track, "done", details, path)


@contextlib.contextmanager
def _progress(collection: Collection, traffic: media.Traffic, failures: list[str]) -> Iterator[Callable[[], None]]:
    """A function that shows how far the run is: a bar on a terminal, elsewhere a line now and then."""
    live, begun, next_line = sys.stderr.isatty(), time.monotonic(), 0.0
    layout = "{n:.2f} of {total:g} h |{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=collection.max_hours, initial=collection.hours, bar_format=layout, disable=not live) as bar:

        def show():
            nonlocal next_line
            now = time.monotonic()
            gone = sum(event["status"] != "done" for event in collection.events.values())
            rate = traffic.received / 1e6 / max(1.0, now - begun)
            counts = f"{len(collection.chosen)} tracks, {gone} gone, {len(failures)} failed, {rate:.1f} MB/s"
            if live:
                bar.set_postfix_str(counts, refresh=False)
                bar.update(collection.hours - bar.n)
                bar.refresh()
            elif now >= next_line:
                next_line = now + _LINE_SECONDS
                print(f"{collection.hours:.2f} of {collection.max_hours:g} h, {counts}", file=sys.stderr, flush=True)

        yield show


def _report(collection: Collection, failures: list[str], unusable: int) -> str:
    events = [collection.events[track.key] for track in collection.chosen]
    lines = [
        f"{collection.folder}: {len(events)} tracks, {collection.hours:.2f} h, {collection.gb:.3f} GB, "
        + ("a limit is reached" if collection.is_full else "below the limits")
    ]
    for split in ("train", "valid"):
        tracks = [track for track in collection.chosen if track.split == split]
        hours = sum(collection.events[track.key]["duration_seconds"] for track in tracks) / 3600
        lines.append(f"{split}: {len(tracks)} tracks, {hours:.2f} h, {len({track.author for track in tracks})} authors")
    if events:
        low = sum(event["bandwidth_hz"] < 16500 for event in events) / len(events)
        high = sum(event["bandwidth_hz"] > 20000 for event in events) / len(events)
        lines.append(f"bandwidth: {low:.0%} below 16.5 kHz, {1 - low - high:.0%} to 20 kHz, {high:.0%} above")
    reasons = {"gone": [], "unsuitable": ["no url"] * unusable, "failed for now": failures}
    for event in collection.events.values():
        if event["status"] in reasons:
            reasons[event["status"]].append(event["reason"])
    for status, given in reasons.items():
        common = [f"{count} by: {reason}" for reason, count in collections.Counter(given).most_common(3)]
        lines += [f"{status}: {len(given)}", *(f"    {line}" for line in common)]
    config = shlex.quote(f"configs/meanflow_mdct.py:data_dir={collection.folder}")
    lines.append(f"next: python train.py --config {config} --workdir runs/wavegen")
    lines.append("CC BY asks you to name the title, author and url of what you share: manifest.jsonl has them")
    return "".join(line + "\n" for line in lines)


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def _require_extra() -> None:
    for module, package in _EXTRA.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(f'{package} is not installed: pip install "meanflow_audio_codec[download]"') from error


def _require_space(folder: Path, wanted_gb: float) -> None:
    free_gb, needed_gb = shutil.disk_usage(folder).free / 1e9, wanted_gb + _SPARE_GB
    if free_gb < needed_gb:
        raise InputError(
            f"{folder} has {free_gb:.1f} GB of space, of {needed_gb:.1f} needed: make room, or lower --max-gb"
        )


def _warn_without_javascript(url: str) -> None:
    if "youtu" in url and not any(map(shutil.which, ("deno", "node", "bun"))):
        print(
            "download_wavegen: YouTube may refuse without a JavaScript runtime: install deno, node or bun",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; a kill lets go of it."""
    home = folder / ".wavegen"
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise InputError(f"another download_wavegen is at work in {folder} (pid {lock.read()})") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Write what these tools and yt-dlp log to the folder, and nowhere else."""

    class PlainFormatter(logging.Formatter):
        def format(self, record):
            return plain(super().format(record))

    handler = logging.FileHandler(folder / ".wavegen" / "download.log", encoding="utf-8")
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s"))
    handler.handleError = lambda record: None  # a full disk has a message of its own
    tools = logging.getLogger("meanflow_audio_codec.tools")
    before = tools.level, tools.propagate
    tools.addHandler(handler)
    tools.setLevel(logging.DEBUG)
    tools.propagate = False
    try:
        yield
    finally:
        tools.setLevel(before[0])
        tools.propagate = before[1]
        tools.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGINT and SIGTERM a KeyboardInterrupt, once: the publishing after it is short and not to be cut."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_):
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
