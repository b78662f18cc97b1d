"""A small music site behind a hub of its own, and download_wavegen run against it."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's import mode has no other way to modules beside the tests

from hub_server import Hub  # noqa: E402
from music_site import COLUMNS, REPO, SHARDS, TRACKS, Launcher, Site, encode, music, parquet, place_url  # noqa: E402


@pytest.fixture(scope="session")
def ffmpeg():
    """Run ffmpeg with these arguments, return its standard output."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="the extra download is not installed")

    def run(*arguments, **kwargs):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, **kwargs).stdout

    return run


@pytest.fixture(scope="session")
def media(tmp_path_factory, ffmpeg):
    """The site's files by name."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "x.wav").write_bytes(encode(music(3, 48000, 2, 4), 48000, "WAV", "PCM_16"))
    exact = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags", "+bitexact")
    ffmpeg("-i", folder / "x.wav", "-c:a", "libopus", "-b:a", "64k", *exact, folder / "d.webm")
    ffmpeg("-i", folder / "x.wav", "-t", "2.5", "-c:a", "aac", "-b:a", "96k", *exact, folder / "e.m4a")
    return {
        "a.wav": encode(music(2, 44100, 1, 1), 44100, "WAV", "PCM_16"),
        "b.flac": encode(music(1.5, 48000, 2, 2), 48000, "FLAC", "PCM_16"),
        "c.ogg": encode(music(2, 44100, 2, 3), 44100, "OGG", "VORBIS"),
        "d.webm": (folder / "d.webm").read_bytes(),
        "e.m4a": (folder / "e.m4a").read_bytes(),
        "f.mp3": encode(music(3, 44100, 2, 6), 44100, "MP3", "MPEG_LAYER_III"),
        "g.ogg": encode(music(4, 22050, 1, 7), 22050, "OGG", "VORBIS"),
        "h.opus": encode(music(1.5, 48000, 1, 8), 48000, "OGG", "OPUS"),
    }


@pytest.fixture(scope="session")
def server():
    """The running server of this session, whatever it serves."""
    with Hub(REPO) as hub:
        yield hub


@pytest.fixture(scope="session")
def site(server, media):
    rows = []
    for rank, name, title, author, genre, album, tags in TRACKS:
        values = (place_url(server, name, rank), title, author, "no matter", genre, album, tags)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    odd = [{"url": "ftp://127.0.0.1/x.ogg", "title": "no web"}, {"url": "https:///x.ogg", "title": "no host"}]
    first = rows[:3] + [rows[1]] + odd
    second = rows[3:] + [rows[7] | {"tags": "calm"}]
    files = dict(zip(SHARDS, (parquet(first), parquet(second)), strict=True))
    return Site(rows, files | {"README.md": b"# Music"}, media)


@pytest.fixture
def hub(server, site):
    """The server with the data set and no fault planned."""
    server.reset()
    server.commit(site.shards)
    server.media = dict(site.media)
    yield server
    server.released.set()


@pytest.fixture(scope="session")
def launcher(server, tmp_path_factory):
    """See `Launcher`; `launcher(folder, *arguments)` runs the tool."""
    pytest.importorskip("yt_dlp", reason="the extra download is not installed")
    launcher = Launcher(server.url, tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.process.stdin.close()
    launcher.process.wait()
