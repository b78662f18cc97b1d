"""The tool against a hub and a site that fail: whatever happens, the undisturbed run's bytes come out, or one line.

Each test of a fault ends as `identical` to the run without any: manifest and audio, byte for byte.
"""

import email.utils
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hub_server import HTML, Fault
from music_site import COLUMNS, REPO, SHARDS, TOKEN, TRACKS, encode, error_line, music, parquet, place_url

from meanflow_audio_codec.datasets.audio import scan_folder

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("yt_dlp", "imageio_ffmpeg", "pyarrow")),
    reason="the extra download is not installed",
)
ROOT = Path(__file__).parents[2]
NAMES = [name for _, name, *_ in sorted(TRACKS)]  # in the order of seed 0
SECONDS = {"a.wav": 2, "b.flac": 1.5, "c.ogg": 2, "d.webm": 3, "e.m4a": 2.5, "f.mp3": 3, "g.ogg": 4, "h.opus": 1.5}
INFO = f"/api/datasets/{REPO}"
MODULES = "from meanflow_audio_codec.tools import download_wavegen, wavegen_catalogue"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def manifest(folder):
    return read_lines(folder / "manifest.jsonl")


def archive(folder):
    return read_lines(folder / ".wavegen" / "archive.jsonl")


def published(folder):
    """Every file that the loader sees, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for split in ("train", "valid")
        for path in sorted((folder / split).rglob("*"))
        if path.is_file()
    }


def left_over(folder):
    return [p for name in ("partial", "ready") for p in (folder / ".wavegen" / name).rglob("*") if p.is_file()]


def oracle_author_key(author):
    key = " ".join(unicodedata.normalize("NFKC", author or "").casefold().split())
    return key.removesuffix(" - topic")


def oracle_order(rows, seed=0):
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row['url']}".encode()).hexdigest())


class Clean:
    """The undisturbed run, by `python -m` with a token, and empty folders for HOME, TMPDIR and cwd."""

    def __init__(self, hub, site, root):
        hub.reset()
        self.revision = hub.commit(site.shards)
        hub.media = dict(site.media)
        self.folder, self.outside = root / "clean", {name: root / name for name in ("home", "tmp", "cwd", "cache")}
        for path in self.outside.values():
            path.mkdir()
        kept = ("PATH", "LANG", "SYSTEMROOT", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ} | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HOME": str(self.outside["home"]),
            "TMPDIR": str(self.outside["tmp"]),
            "XDG_CACHE_HOME": str(self.outside["cache"]),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "meanflow_audio_codec.tools.download_wavegen"]
        self.done = subprocess.run(
            [*command, "--output-dir", self.folder, "--max-hours", "0.01"],
            env=environment,
            cwd=self.outside["cwd"],
            capture_output=True,
            text=True,
        )
        self.requests = list(hub.requests)
        if self.done.returncode:
            pytest.fail(f"the undisturbed run fails: {self.done.stderr}")
        self.manifest = (self.folder / "manifest.jsonl").read_bytes()
        self.files = published(self.folder)
        self.rows = {row["url"].partition("?")[0].rpartition("/")[2]: row for row in manifest(self.folder)}

    def copy(self, folder, without=(), source=True):
        """Another folder as if its run had ended before these tracks came; or a finished one that forgot its source."""
        shutil.copytree(self.folder, folder)
        journal = folder / ".wavegen" / "archive.jsonl"
        lines = journal.read_text().splitlines(keepends=True)
        urls = [self.rows[name]["url"] for name in without]
        journal.write_text("".join(line for line in lines if json.loads(line)["url"] not in urls))
        for name in without:
            (folder / self.rows[name]["name"]).unlink()
        if not source:
            (folder / ".wavegen" / "source.json").unlink()
            shutil.rmtree(folder / ".wavegen" / "metadata")
        return folder

    def check(self, run):
        """The run ended well, in the same bytes, with nothing left over."""
        assert run.status == 0, run.err
        self.check_folder(run.folder)

    def check_folder(self, folder):
        assert (folder / "manifest.jsonl").read_bytes() == self.manifest
        assert published(folder) == self.files
        assert not left_over(folder)

    def hours(self, count, share=0.5):
        """A limit that the track before the last of the first `count` does not reach."""
        seconds = [self.rows[name]["frames"] / self.rows[name]["sample_rate"] for name in NAMES[:count]]
        return (sum(seconds) - share * seconds[-1]) / 3600


@pytest.fixture(scope="session")
def clean(server, site, tmp_path_factory):
    return Clean(server, site, tmp_path_factory.mktemp("wavegen"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "wavegen"


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


# ---------------------------------------------------------------- the undisturbed run


def test_layout_and_files_decode(clean):
    inside = sorted(path.name for path in clean.folder.iterdir())
    assert inside == [".wavegen", "manifest.jsonl", "report.txt", "train", "valid"]
    rows = manifest(clean.folder)
    assert sorted(clean.files) == [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    for row in rows:
        path = clean.folder / row["name"]
        audio, rate = soundfile.read(path, always_2d=True)
        assert (len(audio), audio.shape[1], rate) == (row["frames"], row["channels"], row["sample_rate"])
        assert np.isfinite(audio).all() and np.abs(audio).max() > 0.3
        assert row["duration_seconds"] == pytest.approx(row["frames"] / rate, abs=1e-3)
        assert (row["bytes"], row["sha256"]) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        assert 0 < row["bandwidth_hz"] <= rate / 2
    assert not left_over(clean.folder)


def test_names_are_harmless_and_titles_stand_as_they_are(clean, site):
    assert len(clean.rows) == len(TRACKS)  # the duplicates and the two that are no web links are none
    for name, row in clean.rows.items():
        source = site.row(name)
        digest = hashlib.sha256(source["url"].encode()).hexdigest()[:10]
        assert re.fullmatch(rf"(train|valid)/([a-z0-9]+-)*{digest}\.(wav|flac|ogg|opus|mp3)", row["name"])
        for key in ("url", "title", "author", "genre", "album"):
            assert (row[key] or "") == (source[key] or "")
        assert row["licence"] == "CC BY (as stated by the data set)"
        assert row["revision"] == clean.revision
    slug = lambda name: clean.rows[name]["name"].partition("/")[2].rpartition("-")[0]
    assert slug("b.flac") == "ada-lovelace-etc-passwd"
    assert slug("c.ogg") == "nadia-2j-two-lines-and-31mred-0m"
    assert slug("d.webm") == "clara"  # the title has no letters
    assert slug("e.m4a") == ""  # neither author nor title: the hash alone
    assert slug("f.mp3") == "ada-lovelace-topic-etude-no-5-unicode"  # NFKD of the numero sign is No


def test_validation_set_is_by_author(clean, site):
    order = oracle_order(site.rows)
    assert [site.row(name)["url"] for name in NAMES] == [row["url"] for row in order]
    first = next(key for key in (oracle_author_key(row["author"]) for row in order) if key)
    for name, row in clean.rows.items():
        key = oracle_author_key(row["author"])
        fraction = int(hashlib.sha256(key.encode()).hexdigest(), 16) / 2**256
        valid = bool(key) and (key == first or fraction < 0.05)
        assert row["split"] == row["name"].split("/")[0] == ("valid" if valid else "train"), name
    valid = {name for name, row in clean.rows.items() if row["split"] == "valid"}
    assert valid == {"b.flac", "f.mp3", "g.ogg"}  # Ada, her twin, and Boulanger by the hash


@pytest.mark.parametrize("name", ["a.wav", "b.flac", "c.ogg", "f.mp3", "g.ogg", "h.opus"])
def test_what_libsndfile_decodes_is_kept_byte_for_byte(clean, site, name):
    assert clean.files[clean.rows[name]["name"]] == site.media[name]


def packets(ffmpeg, path):
    """The MD5 of each packet, whatever the container."""
    lines = ffmpeg("-i", path, "-map", "0:a:0", "-c", "copy", "-f", "framemd5", "-").decode().splitlines()
    return [line.split(",")[5].strip() for line in lines if not line.startswith("#")]  # after it: side data


def test_opus_packets_and_samples_are_unchanged(clean, site, ffmpeg, tmp_path):
    (tmp_path / "d.webm").write_bytes(site.media["d.webm"])
    kept = clean.folder / clean.rows["d.webm"]["name"]
    assert packets(ffmpeg, kept) == packets(ffmpeg, tmp_path / "d.webm")
    decoded = np.frombuffer(ffmpeg("-i", tmp_path / "d.webm", "-f", "f32le", "-"), np.float32).reshape(-1, 2)
    audio = soundfile.read(kept, dtype="float32")[0]
    # libopus against ffmpeg's decoder; WebM may not say where the padding of the last packet begins
    assert abs(len(audio) - 3 * 48000) <= 960 and abs(len(audio) - len(decoded)) <= 960
    shortest = min(len(audio), len(decoded))
    np.testing.assert_allclose(audio[:shortest], decoded[:shortest], atol=2e-3)


def test_aac_became_flac_of_the_same_samples(clean, site, ffmpeg, tmp_path):
    (tmp_path / "e.m4a").write_bytes(site.media["e.m4a"])
    kept = clean.folder / clean.rows["e.m4a"]["name"]
    assert kept.suffix == ".flac" and soundfile.info(kept).subtype == "PCM_16"
    decoded = np.frombuffer(ffmpeg("-i", tmp_path / "e.m4a", "-f", "s16le", "-"), np.int16).reshape(-1, 2)
    audio = soundfile.read(kept, dtype="int16")[0]
    assert len(audio) == len(decoded)
    assert np.abs(audio.astype(int) - decoded).max() <= 1


def test_folder_loads_as_it_is(clean):
    from meanflow_audio_codec.datasets.pipeline import build_audio_pipeline

    files = scan_folder(clean.folder / "train")
    assert {f"train/{file.name}" for file in files} == {n for n in clean.files if n.startswith("train/")}
    assert len(scan_folder(clean.folder)) == len(TRACKS)  # .wavegen is passed over
    stream = build_audio_pipeline(
        data_dir=clean.folder / "train", sample_rate=16000, segment_samples=8000, batch_size=4, seed=0
    )
    assert next(iter(stream))["audio"].shape == (4, 8000, 1)


def test_nothing_outside_the_folder_is_touched(clean):
    for name, path in clean.outside.items():
        assert list(path.iterdir()) == [], name


def test_token_goes_to_the_hub_alone(clean):
    assert TOKEN not in clean.done.stdout + clean.done.stderr
    for path in clean.folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for request in clean.requests:
        if request.path.startswith("/media/"):
            assert TOKEN not in json.dumps(request.headers)
    assert any(TOKEN in r.headers.get("authorization", "") for r in clean.requests if "/resolve/" in r.path)


def test_output_is_printable_and_reports(clean):
    report = (clean.folder / "report.txt").read_text()
    for text in (clean.done.stdout, clean.done.stderr, report, (clean.folder / ".wavegen/download.log").read_text()):
        controls = {c for c in text if unicodedata.category(c) == "Cc"} - set("\n\t\r")
        assert not controls
    assert report.strip() in clean.done.stdout
    assert f"data_dir={clean.folder}" in report and "CC BY" in report and "manifest.jsonl" in report
    assert str(len(TRACKS)) in report


def test_finished_folder_asks_nobody(hub, clean, folder, launcher):
    clean.copy(folder)
    hub.gated = hub.missing = True
    clean.check(launcher(folder))
    assert hub.requests == []


def test_main_is_importable(hub, clean, folder, capfd):
    from meanflow_audio_codec.tools import download_wavegen

    assert download_wavegen.main(["--output-dir", str(clean.copy(folder)), "--max-hours", "0.01"]) is None
    clean.check_folder(folder)
    assert "manifest.jsonl" in capfd.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--max-hours", "-1"], ["--max-hours", "nan"], ["--max-gb", "0"], ["--workers", "0"], ["--seed", "x"]]
)
def test_wrong_arguments_are_refused(hub, folder, launcher, arguments):
    run = launcher(folder, *arguments)
    assert run.status in (1, 2) and "Traceback" not in run.err
    assert arguments[0] in run.err.rstrip().rpartition("\n")[2]
    assert hub.requests == [] and not folder.exists()


# ---------------------------------------------------------------- limits, choice, later runs


def test_larger_limit_extends_and_smaller_publishes_fewer(hub, clean, folder, launcher):
    first = launcher(folder, "--max-hours", clean.hours(3))
    assert first.status == 0, first.err
    assert {row["url"] for row in manifest(folder)} == {clean.rows[name]["url"] for name in NAMES[:3]}
    fetched = {request.path for request in hub.asked("/media/")}
    assert {f"/media/{name}" for name in NAMES[:3]} <= fetched
    hub.requests.clear()
    clean.check(launcher(folder))
    assert not {f"/media/{name}" for name in NAMES[:3]} & {request.path for request in hub.requests}
    hub.requests.clear()
    fewer = launcher(folder, "--max-hours", clean.hours(2))
    assert fewer.status == 0, fewer.err
    assert {row["url"] for row in manifest(folder)} == {clean.rows[name]["url"] for name in NAMES[:2]}
    assert sorted(published(folder)) == [row["name"] for row in manifest(folder)]
    clean.check(launcher(folder))
    assert hub.requests == []  # what the smaller run left out had been kept


def test_published_bytes_never_exceed_the_limit(hub, clean, folder, launcher):
    sizes = [clean.rows[name]["bytes"] for name in NAMES]
    limit = sum(sizes[:3]) - 1
    run = launcher(folder, "--max-gb", limit / 1e9)
    assert run.status == 0, run.err
    assert sum(row["bytes"] for row in manifest(folder)) <= limit
    assert {row["url"] for row in manifest(folder)} == {clean.rows[name]["url"] for name in NAMES[:2]}


def matches(row, words):
    text = " ".join(str(row[key] or "") for key in ("title", "author", "genre", "album", "tags")).casefold()
    return all(word.casefold() in text for word in words.split())


def test_match_and_seed_choose_and_are_pinned(hub, site, folder, launcher):
    words = "PIANO calm"
    expected = {row["url"] for row in site.rows if matches(row, words)}
    assert 0 < len(expected) < len(site.rows)
    run = launcher(folder, "--match", words, "--seed", "7")
    assert run.status == 0, run.err
    assert {row["url"] for row in manifest(folder)} == expected
    before = published(folder)
    for other in (["--match", "jazz", "--seed", "7"], ["--match", words, "--seed", "8"]):
        assert other[0] in (line := launcher(folder, *other).line) or other[2] in line
        assert "--output-dir" in line
    assert published(folder) == before


def test_seed_decides_the_order(hub, site, folder, launcher):
    order = oracle_order(site.rows, seed=3)
    run = launcher(folder, "--seed", "3", "--max-hours", "0.0000001", "--workers", "1")
    assert run.status == 0, run.err
    assert [row["url"] for row in manifest(folder)] == [order[0]["url"]]


def test_no_row_matches_is_one_line(hub, folder, launcher):
    line = launcher(folder, "--match", "nosuchword").line
    assert "--match" in line and "nosuchword" in line
    assert not hub.asked("/media/")


# ---------------------------------------------------------------- faults of the hub


def tree_paths(hub):
    """Where the API is asked: about main, about the revision, for the files."""
    sha = hub.refs["main"]
    return [INFO, f"{INFO}/revision/main", f"{INFO}/revision/{sha}", f"{INFO}/tree/{sha}", f"{INFO}/tree/{sha}/data"]


def plan_api(fault):
    def plan(hub, rng):
        hub.plan |= {path: [fault] for path in tree_paths(hub)}

    return plan


def plan_shards(*faults):
    def plan(hub, rng):
        hub.plan |= {hub.resolve_path(shard): list(faults) for shard in SHARDS}

    return plan


def drop_shards(hub, rng):
    for shard in SHARDS:
        size = len(hub.commits[hub.refs["main"]][shard])
        hub.plan[hub.resolve_path(shard)] = [Fault(drop=rng.randrange(size)) for _ in range(2)]


def corrupt_shards(hub, rng):
    for shard in SHARDS:
        data = bytearray(hub.commits[hub.refs["main"]][shard])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        hub.plan[hub.resolve_path(shard)] = [Fault(body=bytes(data))]


HUB_FAULTS = {
    "shards dropped": drop_shards,
    "shards dropped before the headers": plan_shards(Fault(drop=-1)),
    "shards corrupt once": corrupt_shards,
    "shards 503": plan_shards(Fault(503)),
    "shards 503 at HEAD": plan_shards(Fault(503, head=True)),
    "shards 429 with seconds": plan_shards(Fault(429, retry_after="1", head=True)),
    "shards are a page": plan_shards(Fault(body=HTML, content_type="text/html")),
    "API 500": plan_api(Fault(500)),
    "API 503 with seconds": plan_api(Fault(503, retry_after="1")),
    "API 429 with seconds": plan_api(Fault(429, retry_after="1")),
    "API dropped": plan_api(Fault(drop=-1)),
    "API dropped midway": plan_api(Fault(drop=50)),
    "API is a page": plan_api(Fault(body=HTML, content_type="text/html")),
}


@pytest.mark.parametrize("plan", HUB_FAULTS.values(), ids=HUB_FAULTS)
def test_hub_recovers(hub, clean, folder, launcher, rng, plan):
    plan(hub, rng)
    clean.check(launcher(clean.copy(folder, source=False)))


def test_retry_after_as_a_date_is_honoured(hub, clean, folder, launcher):
    until = int(time.time()) + 3
    hub.plan |= {path: [Fault(429, retry_after=email.utils.formatdate(until, usegmt=True))] for path in tree_paths(hub)}
    clean.check(launcher(clean.copy(folder, source=False)))
    refused, again = hub.asked(INFO)[:2]
    assert refused.time < until <= again.time


def test_retry_after_an_hour_gives_up(hub, clean, folder, launcher):
    plan_api(Fault(429, retry_after="3600"))(hub, None)
    line = launcher(clean.copy(folder, source=False)).line
    assert "again" in line and len(hub.asked(INFO)) == 1
    hub.plan.clear()
    clean.check(launcher(folder))


@pytest.mark.parametrize("name", ["shards 503", "shards always corrupt", "API 500", "API dropped"])
def test_hub_that_stays_broken_is_one_line(hub, clean, folder, launcher, name):
    fault = {"shards 503": Fault(503, head=True), "API 500": Fault(500), "API dropped": Fault(drop=-1)}
    paths = tree_paths(hub) if name.startswith("API") else [hub.resolve_path(SHARDS[1])]
    corrupt = Fault(body=bytes(len(hub.commits[hub.refs["main"]][SHARDS[1]])))
    hub.always |= {path: fault.get(name, corrupt) for path in paths}
    line = launcher(clean.copy(folder, source=False)).line
    assert REPO in line or SHARDS[1] in line or hub.url in line
    assert not hub.asked("/media/")
    hub.always.clear()
    clean.check(launcher(folder))


@pytest.mark.parametrize("what", ["gated", "missing"])
@pytest.mark.parametrize("token", ["", TOKEN])
def test_closed_repository_says_what_to_do(hub, clean, folder, launcher, what, token):
    setattr(hub, what, True)
    run = launcher(clean.copy(folder, source=False), patch=f"os.environ['HF_TOKEN'] = {token!r}" if token else "")
    assert REPO in run.line and (not token or token not in run.err)
    if what == "gated":
        assert "terms" in run.line and "hf auth login" in run.line and "HF_TOKEN" in run.line
    assert not hub.asked("/media/")
    setattr(hub, what, False)
    clean.check(launcher(folder))


def test_unknown_revision_is_one_line(hub, clean, folder, launcher):
    line = launcher(clean.copy(folder, source=False), "--revision", "nowhere").line
    assert "nowhere" in line and "--revision" in line
    clean.check(launcher(folder))


def other_commit(hub, site):
    """main moves on, and its tracks are called otherwise."""
    renamed = [row | {"title": "another name", "tags": None} for row in site.rows]
    return hub.commit({SHARDS[0]: parquet(renamed[:5]), SHARDS[1]: parquet(renamed[5:])})


def test_folder_stays_at_its_revision(hub, site, clean, folder, launcher):
    old = hub.refs["main"]
    first = launcher(folder, "--max-hours", clean.hours(3))
    assert first.status == 0, first.err
    new = other_commit(hub, site)
    hub.requests.clear()
    clean.check(launcher(folder))  # goes on with the old one
    assert not hub.asked("/api/") and not hub.asked("/datasets/")
    for revision in ("main", new):
        line = launcher(folder, "--revision", revision).line
        assert old in line and new in line and "--output-dir" in line
    clean.check(launcher(folder, "--revision", old))


def test_explicit_revision_is_used(hub, site, clean, folder, launcher):
    old = hub.refs["main"]
    other_commit(hub, site)
    clean.check(launcher(clean.copy(folder, source=False), "--revision", old))


def test_revision_moved_between_two_shards(hub, site, clean, folder, launcher):
    """Killed after the first shard: the next run must not join shards of two revisions."""
    old, titles = hub.refs["main"], {row["title"] for row in site.rows}
    hub.plan[hub.resolve_path(SHARDS[1])] = [Fault(stall=100)]
    run = launcher.start(folder)
    assert hub.stalled.wait(60)
    run.kill()
    run.wait()
    hub.released.set()
    new = other_commit(hub, site)
    again = launcher(folder)
    assert again.status == 0, again.err
    found = {(row["revision"], row["title"]) for row in manifest(folder)}
    assert found in ({(old, title) for title in titles}, {(new, "another name")})


def damage_parquet(site):
    return site.shards | {SHARDS[1]: site.shards[SHARDS[1]][:-40]}


def drop_columns(site):
    columns = [column for column in COLUMNS if column not in ("author", "url")]
    return site.shards | {SHARDS[1]: parquet(site.rows[3:], columns)}


@pytest.mark.parametrize(
    "files, words",
    [
        (damage_parquet, ["train-00001-of-00002.parquet"]),
        (drop_columns, ["train-00001-of-00002.parquet", "author", "url"]),
        (lambda site: {"README.md": b"moved"}, [REPO, "parquet"]),
    ],
    ids=["truncated", "columns", "no shards"],
)
def test_useless_shards_are_one_line(hub, site, folder, launcher, files, words):
    hub.commit(files(site))
    line = launcher(folder).line
    assert all(word in line for word in words), line
    assert not hub.asked("/media/")


def test_no_network_is_one_line(hub, clean, folder, launcher):
    clean.copy(folder, source=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen: connections are refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        code = f"{MODULES}\nwavegen_catalogue._BACKOFF_SECONDS = 0.01\n"
        code += f"download_wavegen.main(['--output-dir', {str(folder)!r}, '--max-hours', '0.01'])"
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder.parent / "hf")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "network" in error_line(done.stderr) or "reach" in error_line(done.stderr)
    clean.check(launcher(folder))


# ---------------------------------------------------------------- faults of the site


def tracks(make, count=3):
    """Plan faults for so many tracks; yt-dlp asks first for the type, then for the bytes."""

    def plan(hub, rng):
        names = rng.sample(NAMES, count)
        hub.plan |= {f"/media/{name}": make(len(hub.media[name]), rng) for name in names}
        return names

    return plan


MEDIA_FAULTS = {
    "dropped": tracks(lambda size, rng: [None, Fault(drop=rng.randrange(size))], 8),
    "dropped twice": tracks(lambda size, rng: [None, Fault(drop=size // 2), None, Fault(drop=size // 4)]),
    "dropped before the headers": tracks(lambda size, rng: [Fault(drop=-1), None, Fault(drop=-1)]),
    "503": tracks(lambda size, rng: [Fault(503), None, Fault(503)]),
    "500": tracks(lambda size, rng: [None, Fault(500)]),
    "429 with seconds": tracks(lambda size, rng: [Fault(429, retry_after="1")], 1),
    "429 for the bytes": tracks(lambda size, rng: [None, Fault(429, retry_after="1")], 1),
    "page for the type": tracks(lambda size, rng: [Fault(body=HTML, content_type="text/html")]),
    "page for the bytes": tracks(lambda size, rng: [None, Fault(body=HTML, content_type="text/html")]),
    "page for both": tracks(lambda size, rng: [Fault(body=HTML, content_type="text/html; charset=utf-8")] * 2),
    "page called audio": tracks(lambda size, rng: [None, Fault(body=HTML)]),
    "cut": tracks(lambda size, rng: [None, Fault(cut=int(size * rng.uniform(0.2, 0.9)))], 8),
    "empty": tracks(lambda size, rng: [None, Fault(cut=0)]),
    "wrong bytes": tracks(lambda size, rng: [None, Fault(body=rng.randbytes(size))]),
}


@pytest.mark.parametrize("plan", MEDIA_FAULTS.values(), ids=MEDIA_FAULTS)
def test_site_recovers(hub, clean, folder, launcher, rng, plan):
    clean.copy(folder, without=plan(hub, rng))
    clean.check(launcher(folder))
    assert {line["status"] for line in archive(folder)} == {"done"}
    assert not any(hub.plan.values())  # each fault was met


def test_dropped_download_resumes(hub, clean, folder, launcher):
    hub.plan["/media/a.wav"] = [None, Fault(drop=100_000)]
    clean.check(launcher(clean.copy(folder, without=["a.wav"])))
    ranges = [request.headers.get("range", "bytes=0-") for request in hub.asked("/media/a.wav")]
    assert int(ranges[-1].removeprefix("bytes=").rstrip("-")) > 50_000


def test_site_retry_after_is_honoured(hub, clean, folder, launcher):
    until = int(time.time()) + 3
    fault = Fault(429, retry_after=email.utils.formatdate(until, usegmt=True))
    hub.plan[f"/media/{NAMES[0]}"] = [fault]
    clean.check(launcher(clean.copy(folder, without=NAMES[:3]), "--workers", "1"))
    refused, *others = hub.asked("/media/")
    assert refused.time < until <= min(request.time for request in others)


def test_site_that_asks_for_an_hour(hub, clean, folder, launcher):
    hub.always["/media/c.ogg"] = Fault(429, retry_after="3600")
    assert "again" in launcher(clean.copy(folder, without=["c.ogg", "d.webm"])).line
    assert [line for line in archive(folder) if line["status"] != "done"] == []
    hub.always.clear()
    clean.check(launcher(folder))


PERMANENT = {
    "503": lambda data: Fault(503),
    "403": lambda data: Fault(403),
    "page": lambda data: Fault(body=HTML, content_type="text/html; charset=utf-8"),
    "page called audio": lambda data: Fault(body=HTML),
    "wrong bytes": lambda data: Fault(body=random.Random(0).randbytes(len(data))),
    "cut": lambda data: Fault(cut=len(data) * 2 // 3),
}
EACH_CONTAINER = ["a.wav", "b.flac", "c.ogg", "d.webm", "e.m4a", "f.mp3", "h.opus"]


@pytest.mark.parametrize("kind", PERMANENT)
def test_failed_for_now_is_tried_by_the_next_run(hub, clean, folder, launcher, kind):
    """A cut is tried on every container, anything else on two tracks."""
    broken = EACH_CONTAINER if kind == "cut" else ["c.ogg", "d.webm"]
    hub.always |= {f"/media/{name}": PERMANENT[kind](hub.media[name]) for name in broken}
    run = launcher(clean.copy(folder, without=broken))
    assert f"{len(broken)} tracks failed for now; the same command tries them again" in run.line
    assert {row["url"] for row in manifest(folder)} == {clean.rows[n]["url"] for n in NAMES if n not in broken}
    assert {line["status"] for line in archive(folder)} == {"done"}  # a page is never gone
    assert len(scan_folder(folder)) == len(NAMES) - len(broken)
    hub.always.clear()
    clean.check(launcher(folder))


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("when", ["type", "bytes"])
def test_vanished_track_is_gone_for_good(hub, clean, folder, launcher, status, when):
    hub.plan["/media/c.ogg"] = [Fault(status)] if when == "type" else [None, Fault(status)]
    run = launcher(clean.copy(folder, without=["c.ogg", "g.ogg"]))
    assert run.status == 0, run.err
    kept = [row for name, row in clean.rows.items() if name != "c.ogg"]
    assert manifest(folder) == sorted(kept, key=lambda row: row["name"])
    gone = [line for line in archive(folder) if line["status"] == "gone"]
    assert [line["url"] for line in gone] == [clean.rows["c.ogg"]["url"]]
    hub.requests.clear()
    assert launcher(folder).status == 0
    assert hub.requests == []


def serve_rows(hub, tracks):
    """Another data set: files by name, without titles, in their order; returns the rows."""
    urls = {name: place_url(hub, name, min(i, 15)) for i, name in enumerate(tracks)}
    rows = [{"url": url, "title": name, "author": "A"} for name, url in urls.items()]
    hub.media |= {name: data for name, data in tracks.items() if data is not None}
    hub.commit({SHARDS[0]: parquet(rows)})
    return rows


def test_half_an_hour_is_unsuitable(hub, folder, launcher):
    long = encode(np.zeros(8000 * 1860), 8000, "FLAC", "PCM_16")
    serve_rows(hub, {"long.flac": long, "b.flac": hub.media["b.flac"]})
    run = launcher(folder)
    assert run.status == 0, run.err
    assert [row["title"] for row in manifest(folder)] == ["b.flac"]
    assert {line["url"].partition("?")[0].rpartition("/")[2]: line["status"] for line in archive(folder)} == {
        "long.flac": "unsuitable",
        "b.flac": "done",
    }
    hub.requests.clear()
    assert launcher(folder).status == 0
    assert hub.requests == [] and not left_over(folder)


def test_every_container_is_kept_unharmed(hub, folder, launcher, ffmpeg, tmp_path):
    exact = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags", "+bitexact")
    wav = tmp_path / "x.wav"
    wav.write_bytes(encode(music(2, 48000, 2, 1), 48000, "WAV", "PCM_16"))
    kinds = {
        "vorbis.webm": "libvorbis",
        "opus.mp4": "libopus",
        "opus.mkv": "libopus",
        "flac.mkv": "flac",
        "flac.mp4": "flac",
        "mp3.mkv": "libmp3lame",
        "alac.m4a": "alac",
    }
    for name, codec in kinds.items():
        ffmpeg("-i", wav, "-c:a", codec, *exact, tmp_path / name)
    serve_rows(hub, {name: (tmp_path / name).read_bytes() for name in kinds})
    run = launcher(folder)
    assert run.status == 0, run.err
    kept = {row["title"]: folder / row["name"] for row in manifest(folder)}
    original = soundfile.read(wav, dtype="int16")[0]
    assert len(kept) == len(kinds)
    for name, path in kept.items():
        if name[:4] in ("flac", "alac"):
            assert path.suffix == ".flac"
            np.testing.assert_array_equal(soundfile.read(path, dtype="int16")[0], original)
        elif name == "vorbis.webm":  # whose length in ms does not survive in Ogg
            decoded = np.frombuffer(ffmpeg("-i", tmp_path / name, "-f", "s16le", "-"), np.int16).reshape(-1, 2)
            assert path.suffix == ".flac"
            assert np.abs(soundfile.read(path, dtype="int16")[0].astype(int) - decoded).max() <= 1
        else:
            assert packets(ffmpeg, path) == packets(ffmpeg, tmp_path / name)
            assert path.suffix in (".mp3", ".ogg", ".opus") and abs(soundfile.info(path).frames - 96000) < 3000


def test_many_failures_in_a_row_stop_the_run(hub, folder, launcher):
    names = [f"{i:02}.ogg" for i in range(60)]
    rows = [{"url": f"{hub.url}/media/{name}", "title": name} for name in names]
    hub.commit({SHARDS[0]: parquet(rows)})
    hub.always |= {f"/media/{name}": Fault(503) for name in names}
    line = launcher(folder, "--workers", "2").line
    assert "503" in line
    assert 10 <= len({request.path for request in hub.asked("/media/")}) <= 14  # and those under way


def test_secrets_of_a_link_stay_out_of_the_log(hub, folder, launcher):
    base = hub.url.replace("http://", "http://user:pa55word@")
    urls = [f"{base}/media/gone.ogg?signature=s1gned", f"{base}/media/busy.ogg?token=t0ken", f"{hub.url}/media/b.flac"]
    hub.commit({SHARDS[0]: parquet([{"url": url, "title": "x"} for url in urls])})
    hub.always["/media/busy.ogg"] = Fault(503)
    run = launcher(folder)
    text = run.out + run.err + (folder / ".wavegen" / "download.log").read_text() + (folder / "report.txt").read_text()
    assert not [secret for secret in ("pa55word", "s1gned", "t0ken") if secret in text]


# ---------------------------------------------------------------- disk


LIE = """
import shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, {free})
class Statvfs:
    f_frsize = f_bsize = 4096
    f_blocks = f_bfree = f_bavail = {free} // 4096
os.statvfs = os.fstatvfs = lambda path: Statvfs
"""


def test_full_disk_is_said_before_anything_is_downloaded(hub, clean, folder, launcher):
    line = launcher(folder, "--max-hours", "20", patch=LIE.format(free=1_300_000_000)).line
    assert "1.3" in line and "2.5" in line  # free; 20 hours at 0.1 GB and 0.5 GB
    assert not hub.asked("/media/")
    clean.check(launcher(folder, patch=LIE.format(free=600_000_000)))


@pytest.mark.parametrize("kilobytes", [40, 300, 700])
def test_disk_full_midway_keeps_what_is_written(hub, clean, tmp_path, launcher, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        line = launcher(disk / "wavegen", patch=LIE.format(free=10**10)).line
        assert "space" in line
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        kept = len(archive(disk / "wavegen"))
        hub.requests.clear()
        clean.check(launcher(disk / "wavegen", patch=LIE.format(free=10**10)))
        assert len({request.path for request in hub.asked("/media/")}) <= len(NAMES) - kept
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------- kills


def test_kill_at_random_bytes_of_one_download(hub, site, clean, folder, launcher, rng):
    key = hashlib.sha256(site.row("a.wav")["url"].encode()).hexdigest()
    part = folder / ".wavegen" / "partial" / f"{key}.part"
    size = lambda: part.stat().st_size if part.exists() else 0
    for i in range(6):
        hub.plan["/media/a.wav"] = [None, Fault(stall=rng.randrange(18_000, 28_000))]  # from where it goes on
        hub.stalled.clear()
        hub.released.clear()
        before, deadline = size(), time.monotonic() + 30
        run = launcher.start(folder)
        assert hub.stalled.wait(60)
        while i % 2 and size() <= before and time.monotonic() < deadline:
            time.sleep(0.005)  # until some of it is on the disk; the other kills are as early as can be
        run.kill()
        assert run.wait().status == -signal.SIGKILL
        hub.released.set()
    clean.check(launcher(folder))
    ranges = [request.headers.get("range", "bytes=0-") for request in hub.asked("/media/a.wav")]
    begins = [int(text.removeprefix("bytes=").rstrip("-")) for text in ranges[1::2]]  # each second asks for the type
    assert begins == sorted(begins) and len(set(begins)) >= 4  # goes on from the last byte


def test_kill_at_random_requests(hub, clean, folder, launcher, rng):
    """While the site is asked for one track, the other worker may be anywhere."""
    for _ in range(8):
        left, victim = [rng.randrange(1, 12)], []

        def kill(request, left=left, victim=victim):
            left[0] -= 1
            if left[0] == 0 and victim:
                victim[0].kill()

        hub.on_request = kill
        run = launcher.start(folder)
        victim.append(run)
        run.wait()
        assert run.status in (0, -signal.SIGKILL), run.err
    hub.on_request = lambda request: None
    clean.check(launcher(folder))


# Ends the process at its n-th change of the disk, before or after that change.
KILL_AT = """
import shutil, signal
left = [{count}]
def dying(change):
    def changed(*args, **kwargs):
        left[0] -= 1
        if left[0] <= 0 and {before}: os.kill(os.getpid(), signal.SIGKILL)
        result = change(*args, **kwargs)
        if left[0] <= 0: os.kill(os.getpid(), signal.SIGKILL)
        return result
    return changed
for name in ("replace", "rename", "unlink", "remove", "link", "fsync", "mkdir"):
    setattr(os, name, dying(getattr(os, name)))
"""


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_kill_at_changes_of_the_disk(hub, clean, folder, launcher, before):
    """From an empty folder to a finished one, killed at every third change or so, each run a bit further."""
    kills = 0
    for count in (1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 25, 31, 38, 46):
        run = launcher(folder, patch=KILL_AT.format(count=count, before=before))
        if run.status == 0:
            break
        assert run.status == -signal.SIGKILL, run.err
        kills += 1
    assert kills >= 5
    clean.check(launcher(folder))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_kill_during_publish(hub, clean, folder, launcher, before):
    """A finished folder publishes fewer and then all again, killed at each change of the disk."""
    clean.copy(folder)
    kills = 0
    for arguments in (["--max-hours", clean.hours(2)], []):
        for count in range(1, 40):
            run = launcher(folder, *arguments, patch=KILL_AT.format(count=count, before=before))
            if run.status == 0:
                break
            assert run.status == -signal.SIGKILL, run.err
            kills += 1
    assert kills >= 4
    clean.check(launcher(folder))
    assert hub.requests == []


@pytest.mark.parametrize(
    "number, name",
    [(signal.SIGINT, "a.wav"), (signal.SIGINT, "d.webm"), (signal.SIGINT, "h.opus"), (signal.SIGTERM, "f.mp3")],
)
def test_interrupt_stops_at_once_and_publishes(hub, clean, folder, launcher, rng, number, name):
    hub.plan[f"/media/{name}"] = [None, Fault(stall=rng.randrange(len(hub.media[name])))]
    run = launcher.start(clean.copy(folder, without={name, "c.ogg", "e.m4a"}))
    assert hub.stalled.wait(60)
    run.kill(number)
    run.wait(10)  # the site still says nothing
    assert run.status in (1, 130)
    assert "interrupted; the same command goes on" in run.line
    done = {line["url"] for line in archive(folder) if line["status"] == "done"}
    assert {row["url"] for row in manifest(folder)} == done
    hub.released.set()
    clean.check(launcher(folder))


def test_interrupt_in_stage_one(hub, clean, folder, launcher):
    hub.plan[hub.resolve_path(SHARDS[0])] = [Fault(stall=100)]
    run = launcher.start(clean.copy(folder, source=False))
    assert hub.stalled.wait(60)
    run.kill(signal.SIGINT)
    run.wait(10)
    assert run.status in (1, 130) and "interrupted; the same command goes on" in run.line
    hub.released.set()
    clean.check(launcher(folder))


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_torn_line_of_the_journal(hub, clean, folder, launcher, cut):
    journal = clean.copy(folder) / ".wavegen" / "archive.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    run = launcher(folder)
    clean.check(run)
    assert len({request.path for request in hub.asked("/media/")}) <= 1
    assert len(read_lines(journal)) >= len(NAMES)  # every line whole again


@pytest.mark.parametrize("harm", ["manifest", "file", "size", "report", "partial"])
def test_damaged_folder_is_repaired(hub, clean, folder, launcher, harm):
    path = clean.copy(folder) / clean.rows["c.ogg"]["name"]
    if harm == "manifest":
        (folder / "manifest.jsonl").write_text('{"name": "tr')
    elif harm == "file":
        path.unlink()
    elif harm == "size":
        path.write_bytes(path.read_bytes()[:-100])
    elif harm == "report":
        (folder / "report.txt").unlink()
    else:
        partial = folder / ".wavegen" / "partial"
        partial.mkdir(exist_ok=True)
        (partial / "stale.part").write_bytes(b"x" * 1000)
    run = launcher(folder)
    assert run.status == 0, run.err
    assert (folder / "manifest.jsonl").read_bytes() == clean.manifest and published(folder) == clean.files
    assert {r.path for r in hub.requests} == ({"/media/c.ogg"} if harm in ("file", "size") else set())


def test_second_run_at_once_is_refused(hub, clean, folder, launcher):
    hub.plan["/media/c.ogg"] = [None, Fault(stall=5000)]
    first = launcher.start(clean.copy(folder, without=["c.ogg", "g.ogg"]))
    assert hub.stalled.wait(60)
    before = len(hub.requests)
    second = launcher(folder)
    assert "another download_wavegen is at work" in second.line
    assert str(first.pid) in second.line and str(folder) in second.line
    assert len(hub.requests) - before <= 2 * len(NAMES)
    hub.released.set()
    clean.check(first.wait())


@pytest.mark.parametrize(
    "module, name", [("yt_dlp", "yt-dlp"), ("imageio_ffmpeg", "imageio-ffmpeg"), ("pyarrow", "pyarrow")]
)
def test_missing_extra_is_said_first(hub, folder, launcher, module, name):
    patch = f"for name in [n for n in sys.modules if n.partition('.')[0] == {module!r}]: sys.modules[name] = None"
    line = launcher(folder, patch=patch).line
    assert line == f'download_wavegen: {name} is not installed: pip install "meanflow_audio_codec[download]"'
    assert hub.requests == []
