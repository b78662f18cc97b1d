"""A data set of small tracks, and download_wavegen run against the server that has them."""

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

HERE = Path(__file__).parent

REPO = "WaveGenAI/youtube-cc-by-music"
SHARDS = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
COLUMNS = ("url", "title", "author", "description", "genre", "album", "tags")
TOKEN = "hf_" + "SecretTokenOfTheTests"

# Rank in the order of seed 0, file, title, author, genre, album, tags. "" is no author; Ada has the first track with
# one, and a twin; the hash of "Boulanger 11" puts it in the validation set.
TRACKS = (
    (0, "a.wav", "-rf --no-preserve-root", None, "Jazz", None, ["Piano", "calm"]),
    (1, "b.flac", "../../etc/passwd", "Ada Lovelace", "jazz", "Notes", ["piano"]),
    (5, "c.ogg", "two\nlines\0and \x1b[31mred\x1b[0m\x07", "Nadia \x1b[2J", None, None, None),
    (2, "d.webm", "🎵" * 300, "Clara", "Classical", "Lieder", "['piano', 'rain']"),
    (3, "e.m4a", None, "", None, "calm PIANO", None),
    (4, "f.mp3", "Étude № 5 / “Ünïcode”", "ADA  lovelace - Topic", "Étude", None, "solo, piano"),
    (6, "g.ogg", ".hidden", "Boulanger 11", None, None, None),
    (7, "h.opus", "CON", None, None, None, "calm"),
)


def encode(audio, rate, container, subtype):
    """Bytes of an audio file by libsndfile."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def music(seconds, rate, channels, seed):
    """A tone and noise, float64 [samples, channels]."""
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * (220 + 110 * seed) * time)
    return tone[:, None] + 0.05 * np.random.default_rng(seed).standard_normal((len(time), channels))


def place_url(hub, name, rank, seed=0):
    """A link to a track, with a query that puts it at this rank (0 to 15) whatever the server's port."""
    urls = (f"{hub.url}/media/{name}?n={n}" for n in range(10_000))
    return next(url for url in urls if hashlib.sha256(f"{seed}:{url}".encode()).hexdigest()[0] == f"{rank:x}")


def parquet(rows, columns=COLUMNS):
    """Bytes of a shard."""
    import pyarrow.parquet

    table = pyarrow.table({column: [row.get(column) for row in rows] for column in columns})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


@dataclasses.dataclass(repr=False)
class Site:
    """The data set: its rows in shards, and what the hub shows of them."""

    rows: list[dict]
    shards: dict[str, bytes]
    media: dict[str, bytes]

    def row(self, name):
        return next(row for row in self.rows if f"/media/{name}?" in row["url"])


@dataclasses.dataclass
class Run:
    """One run of the tool; `status`, `out` and `err` are known after `wait`."""

    pid: int
    folder: Path
    launcher: "Launcher"
    name: str
    status: int | None = None

    def wait(self, seconds=60):
        self.status = self.launcher.ask({"wait": self.pid, "seconds": seconds})
        if self.status is None:
            self.kill(signal.SIGKILL)
            pytest.fail(f"still at work after {seconds} s; it had said:\n{self.err[-2000:]}")
        return self

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    @property
    def out(self):
        return (self.launcher.folder / f"{self.name}.out").read_text()

    @property
    def err(self):
        return (self.launcher.folder / f"{self.name}.err").read_text()

    @property
    def line(self):
        """The error's line; fails unless it is the only one, without a traceback."""
        assert self.status not in (0, None), self.err
        return error_line(self.err)


def error_line(err):
    """The last line of stderr, which must be the tool's error, and no traceback before it."""
    assert "Traceback" not in err, err
    line = err.rstrip("\n").rpartition("\n")[2]
    assert line.startswith("download_wavegen: "), err
    return line


class Launcher:
    """download_wavegen in forks of a process that has imported it; see launcher.py."""

    def __init__(self, endpoint, folder):
        self.folder, self.runs = folder, 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(HERE.parents[1])}
        environment["NO_PROXY"] = "127.0.0.1"
        self.process = subprocess.Popen(
            [sys.executable, HERE / "launcher.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE.parents[1],
        )
        assert json.loads(self.process.stdout.readline()) == "ready"

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder, *arguments, patch=""):
        self.runs += 1
        name = f"run{self.runs}"
        outputs = {kind: str(self.folder / f"{name}.{kind}") for kind in ("out", "err")}
        argv = ["--output-dir", str(folder), "--max-hours", "0.01", *map(str, arguments)]
        pid = self.ask({"argv": argv, "cwd": str(self.folder), "patch": patch} | outputs)
        return Run(pid, Path(folder), self, name)

    def __call__(self, folder, *arguments, patch=""):
        """Run to the end."""
        return self.start(folder, *arguments, patch=patch).wait()
