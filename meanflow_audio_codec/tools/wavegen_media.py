"""One WaveGen track: fetch it, keep its audio unharmed in a file that libsndfile reads, verify, describe.

The best audio that the site has comes by yt-dlp. What libsndfile decodes stays byte for byte. Opus, FLAC and MP3 in
other containers are remuxed, bit-exactly. The rest, such as AAC, becomes 16-bit FLAC; nothing is coded with loss
again. Then the whole file is decoded.

A definite answer ("gone", "unsuitable") is told apart from what another day may mend: a sign-in page, a proxy's HTML
or a busy site never marks a track as gone.
"""

import errno
import logging
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from meanflow_audio_codec.datasets.measure import measure_file
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools.wavegen_catalogue import (
    ATTEMPTS,
    Track,
    backoff_seconds,
    plain,
    refuse_long_wait,
    retry_after_seconds,
    sha256_of,
)

_LICENCE = "CC BY (as stated by the data set)"
_MAX_SECONDS = 30 * 60
_MAX_BYTES = 1e9
_KEPT = {"ogg": ".ogg", "flac": ".flac", "mp3": ".mp3", "wav": ".wav"}  # container -> suffix
_READABLE = re.compile("opus|vorbis|flac|mp3|pcm_.*")  # codecs
# Not Vorbis: WebM counts in ms, and a Vorbis stream's ends in Ogg must be right to the sample.
_REMUXED = {"opus": ".ogg", "flac": ".flac", "mp3": ".mp3"}  # codec -> suffix
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_GONE = re.compile(
    r"Unable to download webpage: HTTP Error 4(04|10)"
    r"|\[youtube\] .*(video unavailable|private|removed|terminated|copyright|members[- ]only|join this channel"
    r"|no longer available|(video|recording) is not available|in your country|confirm your age)",
    re.IGNORECASE,
)
_BUSY = re.compile(r"try again later|not a bot|rate.limit|captcha", re.IGNORECASE)


class Settled(Exception):
    """A track that will never come; `status` is "gone" or "unsuitable"."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


class FailedForNow(Exception):
    """A track that did not come this time."""


class Damaged(FailedForNow):
    """Bytes that came but are no whole piece of music."""


class Stopped(Exception):
    """The run is stopping."""


class Traffic:
    """What the downloads of a run share: the order to stop, a pause that the site wants, the bytes received."""

    def __init__(self):
        self.stopping = threading.Event()
        self.received = 0
        self._resume_at = 0.0

    def check(self) -> None:
        """Raise Stopped if the run is stopping."""
        if self.stopping.is_set():
            raise Stopped

    def hold(self, seconds: float) -> None:
        """Let no attempt begin for so long."""
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    def wait(self, seconds: float = 0.0) -> None:
        """Wait for so long and until the pause is over; InputError if that is too long."""
        seconds = max(seconds, self._resume_at - time.monotonic())
        refuse_long_wait(seconds, "the site")
        self.stopping.wait(max(0.0, seconds))
        self.check()


def start_fetching(track: Track, folder: Path, traffic: Traffic, results: queue.Queue) -> threading.Thread:
    """Call `fetch_track` in a thread, which puts (track, what it returns or raises) into `results`."""

    def fetch():
        try:
            outcome = fetch_track(track, folder, traffic)
        except BaseException as error:  # whoever takes it raises it
            outcome = error
        results.put((track, outcome))

    thread = threading.Thread(target=fetch, daemon=True)  # a silent site does not hold up the end of the process
    thread.start()
    return thread


def fetch_track(track: Track, folder: Path, traffic: Traffic) -> tuple[Path, dict]:
    """Download a track to `folder`, going on from what lies there.

    Returns:
        The finished file, still under a working name, and what the manifest says of it: file (name with suffix),
        licence, duration_seconds, sample_rate (Hz), channels, frames, bytes, sha256, bandwidth_hz.

    Raises:
        Settled: The track is gone or unsuitable.
        FailedForNow: It did not come in `ATTEMPTS` attempts.
        Stopped: The run is stopping.
        InputError: The site asks for a long pause.
        OSError: The disk is full, or the like.
    """
    source = folder / track.key
    for attempt in range(ATTEMPTS):
        traffic.wait()
        try:
            info = _download(track.url, source, traffic)
            path, suffix = _make_readable(source, traffic)
            about = {"file": track.name + suffix, "licence": info.get("license") or _LICENCE}
            return path, about | _describe(path, info.get("duration"))
        except FailedForNow as error:
            if isinstance(error, Damaged):
                discard(track, folder)
            if attempt == ATTEMPTS - 1:
                raise
            traffic.wait(backoff_seconds(attempt))


def discard(track: Track, folder: Path) -> None:
    """Remove what a download left in `folder`."""
    for path in folder.glob(f"{track.key}*"):
        path.unlink()


def _download(url: str, source: Path, traffic: Traffic) -> dict:
    """Complete the file `source`; returns what the site says of it."""
    import yt_dlp
    from yt_dlp.networking.exceptions import HTTPError

    options = {
        "format": "bestaudio[acodec=opus]/bestaudio/best",
        "noplaylist": True,
        "extract_flat": "in_playlist",
        "playlist_items": "1",
        "js_runtimes": {"deno": {}, "node": {}, "bun": {}},
        "cachedir": False,
        "logger": logging.getLogger(__name__),
        "quiet": True,
        "noprogress": True,
        "color": "never",
        "progress_hooks": [_make_hook(traffic)],
        "socket_timeout": 20,
        # fetch_track tries again, whatever fails
        "retries": 0,
        "extractor_retries": 0,
        "fragment_retries": 0,
        "file_access_retries": 0,
        "skip_unavailable_fragments": False,
    }
    info = {}
    with yt_dlp.YoutubeDL(options) as site:
        request_without_manners = site.urlopen

        def request(*args):
            traffic.check()
            try:
                return request_without_manners(*args)
            except HTTPError as error:
                traffic.hold(retry_after_seconds(error.response.headers))
                raise

        site.urlopen = request
        try:
            info = site.extract_info(url, download=False)
            _refuse_unsuitable(info)
            complete, _ = site.dl(str(source), info)
        except (yt_dlp.utils.YoutubeDLError, OSError) as error:
            raise _judge(error, info.get("direct", False)) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A site that changed makes its extractor raise almost anything.
            raise FailedForNow(f"yt-dlp: {plain(repr(error))}") from error
    if not complete:
        raise FailedForNow("no data came")
    return info


def _make_hook(traffic: Traffic) -> Callable[[dict], None]:
    """A progress hook of yt-dlp that counts bytes, and ends a download that is stopped or too large."""
    counted = None

    def hook(progress: dict) -> None:
        nonlocal counted
        traffic.check()
        there = progress.get("downloaded_bytes") or 0
        if max(there, progress.get("total_bytes") or 0) > _MAX_BYTES:
            raise Settled("unsuitable", f"larger than {_MAX_BYTES / 1e9:g} GB")
        traffic.received += 0 if counted is None else max(0, there - counted)
        counted = there

    return hook


def _refuse_unsuitable(info: dict) -> None:
    if info.get("extractor") == "generic" and not info.get("direct"):  # a sign-in or proxy page, say
        raise FailedForNow("a web page came in place of media")
    if info.get("_type", "video") != "video":
        raise Settled("unsuitable", "a playlist")
    if info.get("is_live"):
        raise Settled("unsuitable", "a live stream")
    _refuse_long(info.get("duration") or 0.0)


def _refuse_long(seconds: float) -> None:
    if seconds > _MAX_SECONDS:
        raise Settled("unsuitable", f"longer than {_MAX_SECONDS // 60} minutes")


def _judge(error: Exception, direct: bool) -> Exception:
    """What an error of yt-dlp means; `direct`: the media has the track's own url, not one made for this visit."""
    cause = (getattr(error, "exc_info", None) or (None, error))[1]
    if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
        return cause
    message = plain(str(error).replace("\r", ""))
    reason = re.sub(r"^ERROR: |\[[\w:]+\] ([\w-]+: )?| \(caused by .*|; please report .*", "", message)
    status = getattr(cause, "status", None)
    if direct and status in (404, 410) or _GONE.search(message) and not _BUSY.search(message):
        return Settled("gone", reason)
    if status == 416:  # a kill left all of it here, not yet renamed, and yt-dlp would ask for more again and again
        return Damaged(reason)
    return FailedForNow(reason or type(error).__name__)


def _make_readable(source: Path, traffic: Traffic) -> tuple[Path, str]:
    """A file that libsndfile reads, `source` itself if it does, and the suffix that it should have."""
    _, header = _run_ffmpeg(["-i", f"file:{source}"], traffic)
    container = re.search(r"^Input #0, (\S+), from", header, re.MULTILINE)
    codec = re.search(r"^ *Stream #0:\d.*?: Audio: (\w+)", header, re.MULTILINE)
    if container is None or codec is None:
        raise Damaged("no audio in what came")
    # Not with a film beside the music, nor an MP3 that does not tell its length, which libsndfile would guess.
    flawed = re.search(r": Video: (?!.*attached pic)|Estimating duration from bitrate", header)
    if container[1] in _KEPT and _READABLE.fullmatch(codec[1]) and not flawed:
        return source, _KEPT[container[1]]
    suffix = _REMUXED.get(codec[1], ".flac")
    coding = ["-c", "copy"] if codec[1] in _REMUXED else ["-c", "flac", "-sample_fmt", "s16"]
    exact = ["-map_metadata", "-1", "-map_chapters", "-1", "-fflags", "+bitexact", "-flags", "+bitexact"]
    target = source.with_suffix(suffix)
    target.unlink(missing_ok=True)  # an ffmpeg that a kill left behind may still write to the old one
    status, errors = _run_ffmpeg(
        ["-v", "error", "-xerror", "-i", f"file:{source}", "-map", "0:a:0", *exact, *coding, f"file:{target}"], traffic
    )
    if "No space left" in errors:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))
    if status or errors:
        raise Damaged(f"ffmpeg: {plain(re.sub(r' @ 0x[0-9a-f]+', '', errors).strip())[:200] or status}")
    return target, suffix


def _run_ffmpeg(arguments: list[str], traffic: Traffic) -> tuple[int, str]:
    """Exit status and stderr of ffmpeg, in a session of its own: a Ctrl-C is not to look like a damaged file."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        while True:
            try:
                _, errors = process.communicate(timeout=0.1)
                return process.returncode, errors.decode(errors="replace")
            except subprocess.TimeoutExpired:
                if traffic.stopping.is_set():
                    process.kill()
                    raise Stopped from None


def _describe(path: Path, stated_seconds: float | None) -> dict:
    """Decode the whole file and say what it holds; Damaged if it is not whole."""
    try:
        measured = measure_file(path)
    except InputError as error:
        logging.getLogger(__name__).debug("%s", error)
        raise Damaged("does not decode to its end") from error
    if measured.not_finite:
        raise Damaged("samples that are not finite")
    if measured.duration < 1.0:
        raise Damaged("shorter than a second")
    if stated_seconds and abs(measured.duration - stated_seconds) > 1.0 + 0.01 * stated_seconds:
        raise Damaged("not as long as the site says")
    if not _has_its_end(path):
        raise Damaged("cut short")
    _refuse_long(measured.duration)
    return {
        "duration_seconds": round(measured.duration, 6),
        "sample_rate": measured.sample_rate,
        "channels": measured.channels,
        "frames": measured.frames,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "bandwidth_hz": round(measured.bandwidth_hz, 1),
    }


def _has_its_end(path: Path) -> bool:
    """Whether a WAV or Ogg file is as long as it says, which libsndfile overlooks; True for others."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(max(0, size - (1 << 17)))  # a page has at most 65307 bytes
        tail = file.read()
    if head[:4] == b"RIFF":
        return size >= int.from_bytes(head[4:], "little") + 8
    if head[:4] == b"OggS":
        page = tail[tail.rfind(b"OggS") :].ljust(27, b"\0")
        return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return True
