"""Tell what a folder of audio holds: python -m meanflow_audio_codec.tools.inspect_data DIR [-o FILE.png]

Every file is decoded to its end, in parallel. Printed are sizes, formats, durations, levels, silence and bandwidth
(see datasets/measure.py), copies, and the files that do not decode with the reason of each; a PNG shows the same.
Files that do not decode are part of the report and leave the exit status at 0.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent import futures
from pathlib import Path

import numpy as np
from tqdm import tqdm

from meanflow_audio_codec.datasets.audio import FORMATS, find_audio
from meanflow_audio_codec.datasets.measure import Measurement, measure_file
from meanflow_audio_codec.errors import InputError

_BATCH = 1024  # files handed to the threads at a time
_NAMED = 20  # files or groups that a list in the report names
_NAMED_ALIKE = 5  # files of one content
_BAR = 40  # characters
_PEAK_EDGES = (0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
_CLIPPED_SHARE = 0.001  # less is what limiters and lossy codecs leave

_KINDS: dict[str, Callable[[Measurement], str]] = {
    "sample rate": lambda found: f"{found.sample_rate:,} Hz",
    "channels": lambda found: {1: "mono", 2: "stereo"}.get(found.channels, f"{found.channels} channels"),
    "format": lambda found: found.format if found.format == "MP3" else f"{found.format} {found.subtype}",
}

# The picture: beyond these values files share the outermost bar.
_LOWEST_DB = -80.0
_HIGHEST_PEAK = 2.0
_DRAWN_KINDS = 6
_PAPER, _INK, _GREY, _RULE, _BLUE, _RED = "#fdfdfb", "#1d2126", "#6a717b", "#e3e4e1", "#2f62b5", "#c4532d"
_STYLE = {
    **{"figure.facecolor": _PAPER, "axes.facecolor": _PAPER, "text.color": _INK, "axes.labelcolor": _GREY},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.edgecolor": _GREY},
    **{"xtick.color": _GREY, "ytick.color": _GREY, "xtick.labelsize": 8, "ytick.labelsize": 8, "ytick.left": False},
    **{"axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 9},
    **{"grid.color": _RULE, "grid.linewidth": 0.8, "axes.axisbelow": True, "figure.titlesize": 14},
}


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """A file below the folder: what it measures, or why it does not."""

    name: str
    size: int
    measurement: Measurement | None
    reason: str = ""
    digest: bytes | None = None  # of its bytes, where another file has as many


def main(argv: list[str] | None = None) -> None:
    """Inspect the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="inspect_data", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help=f"folder with {', '.join(FORMATS)} files, also in subfolders")
    parser.add_argument(
        "-o", "--output", metavar="FILE.png", help="the picture; by default inspect_DIR.png in the current folder"
    )
    arguments = parser.parse_args(argv)
    try:
        _run(Path(arguments.folder).expanduser(), arguments.output)
    except InputError as error:
        sys.exit(f"inspect_data: {_escape(str(error))}")
    except OSError as error:
        sys.exit(f"inspect_data: {_escape(str(error.filename or arguments.folder))}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("inspect_data: interrupted")


def _run(folder: Path, output: str | None) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name one with {', '.join(FORMATS)} files")
    picture = _picture_path(folder, output)
    names = find_audio(folder)
    if not names:
        raise InputError(f"{folder} holds no audio; put {', '.join(FORMATS)} files in it")
    files = _inspect(folder, names)
    report = _report(folder, files)
    if any(file.measurement for file in files):
        picture.write_bytes(_draw(folder, files))
        report += f"\n\npicture: {_escape(str(picture))}"
    print(_encodable(report))


def _picture_path(folder: Path, output: str | None) -> Path:
    """Where the picture goes, refused before the work begins; by default never into the data."""
    if output is None:
        folder, current = folder.resolve(), Path.cwd().resolve()
        if current.is_relative_to(folder):
            raise InputError("the current folder lies in the data: say where the picture goes with -o FILE.png")
        return Path("_".join(["inspect", *filter(None, [_escape(folder.name).replace("\\", "_")])])[:60] + ".png")
    path = Path(output).expanduser()
    if path.suffix.lower() != ".png":
        raise InputError(f"-o {output}: the picture is a PNG, so name a .png file")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise InputError(f"-o {output}: {path.parent} is no folder that can be written to")
    return path


def _inspect(folder: Path, names: list[str]) -> list[_File]:
    sizes = collections.Counter(_size(folder / name) for name in names)
    inspect = functools.partial(_inspect_file, folder, sizes)
    files = []
    with _decoders_silenced() as stderr:
        pool = futures.ThreadPoolExecutor(os.cpu_count())
        try:
            with tqdm(total=len(names), desc="decode", unit="file", file=stderr, disable=None) as bar:
                for start in range(0, len(names), _BATCH):
                    for file in pool.map(inspect, names[start : start + _BATCH]):
                        files.append(file)
                        bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return files


@contextlib.contextmanager
def _decoders_silenced():
    """Close stderr to libsndfile, whose MP3 decoder writes there what the report says; yields it for the bar."""
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "w") as stderr, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield stderr
        finally:
            os.dup2(stderr.fileno(), 2)


def _size(path: Path) -> int | None:
    """Bytes; None where the file cannot be asked."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _inspect_file(folder: Path, sizes: collections.Counter, name: str) -> _File:
    path = folder / name
    size = 0
    try:
        size = path.stat().st_size
        measurement = measure_file(path)
        digest = None
        if sizes[size] > 1:
            with open(path, "rb") as data:
                digest = hashlib.file_digest(data, "sha256").digest()
        return _File(name, size, measurement, digest=digest)
    except InputError as error:
        return _File(name, size, None, str(error).removeprefix(f"{path} ").removesuffix(": replace or remove the file"))
    except OSError as error:
        return _File(name, size, None, error.strerror or str(error))


def _report(folder: Path, files: list[_File]) -> str:
    good = [file for file in files if file.measurement]
    bad = [file for file in files if not file.measurement]
    size = f"{sum(file.size for file in files) / 1e6:,.1f} MB"
    lines = [
        f"{_escape(str(folder))}: {_count(len(files), 'file')}, {_hours(good):,.3f} h, {size}"
        + (f"; {_not_decoded(len(bad))}" if bad else "")
    ]
    if good:
        khz = [file.measurement.bandwidth_hz / 1000 for file in good]
        khz_edges = np.arange(math.ceil(max(khz)) + 1)
        lines += ["", *_kinds(good), "", *_quantiles(good), ""]
        lines += [*_histogram("peak", good, [file.measurement.peak for file in good], np.array(_PEAK_EDGES)), ""]
        lines += [*_histogram("bandwidth, kHz", good, khz, khz_edges), "", *_remarks(good)]
    if bad:
        lines += ["", f"{_not_decoded(len(bad))}:"]
        lines += _first([f"{_escape(file.name)}: {_escape(file.reason)}" for file in bad])
    return "\n".join(lines)


def _kinds(files: list[_File]) -> list[str]:
    lines = [f"{'':22}{'files':>9}{'share':>8}{'hours':>12}{'MB':>12}"]
    for title, kind in _KINDS.items():
        lines.append(title)
        for name, members in _groups(files, kind).items():
            size = sum(file.size for file in members) / 1e6
            share = f"{len(members) / len(files):8.1%}"
            lines.append(f"  {name:20}{len(members):9,}{share}{_hours(members):12,.3f}{size:12,.1f}")
    return lines


def _groups(files: list[_File], kind: Callable[[Measurement], str]) -> dict[str, list[_File]]:
    """Files by kind, the most hours first."""
    groups = collections.defaultdict(list)
    for file in files:
        groups[kind(file.measurement)].append(file)
    return dict(sorted(groups.items(), key=lambda item: (-_hours(item[1]), item[0])))


def _quantiles(files: list[_File]) -> list[str]:
    lines = [f"{'':22}{'least':>9}{'5%':>9}{'median':>9}{'95%':>9}{'most':>9}"]
    for title, digits, value in (
        ("duration, s", 1, lambda found: found.duration),
        ("peak", 3, lambda found: found.peak),
        ("level, dBFS", 1, lambda found: found.rms_db),
        ("silence, %", 1, _silence_percent),
        ("bandwidth, kHz", 1, lambda found: found.bandwidth_hz / 1000),
    ):
        values = [value(file.measurement) for file in files]
        cells = np.quantile(values, (0, 0.05, 0.5, 0.95, 1), method="inverted_cdf")  # a level may be -inf
        lines.append(f"{title:22}" + "".join(f"{cell:9,.{digits}f}" for cell in cells))
    return lines


def _silence_percent(found: Measurement) -> float:
    return 100 * found.silent_seconds / found.duration


def _histogram(title: str, files: list[_File], values: list[float], edges: np.ndarray) -> list[str]:
    """Rows from above one edge up to the next, from the first with files in it to the last; 0 has its own."""
    rows = np.digitize(values, edges, right=True)
    counts = np.bincount(rows)
    hours = np.bincount(rows, weights=[file.measurement.duration / 3600 for file in files])
    lines = [f"{title:22}{'files':>9}{'hours':>12}"]
    for row in range(rows.min(), rows.max() + 1):
        upper = f"{edges[row]:g}" if row < len(edges) else ""
        label = f"{edges[row - 1]:g} to {upper}" if row and upper else upper or f"above {edges[-1]:g}"
        bar = "#" * math.ceil(_BAR * counts[row] / counts.max())
        lines.append(f"  {label:20}{counts[row]:9,}{hours[row]:12,.3f}  {bar}".rstrip())
    return lines


def _remarks(files: list[_File]) -> list[str]:
    found = lambda file: file.measurement
    shortest = min(files, key=lambda file: found(file).duration)
    longest = max(files, key=lambda file: found(file).duration)
    loudest = max(files, key=lambda file: found(file).peak)
    clipped = max(files, key=lambda file: found(file).clipped_share)
    silence = sum(found(file).silent_seconds for file in files)
    silent = [file for file in files if found(file).silent_seconds == found(file).duration]
    above = sum(found(file).peak > 1 for file in files)
    touching = sum(found(file).clipped_share > _CLIPPED_SHARE for file in files)
    not_finite = [file for file in files if found(file).not_finite]
    alike = collections.defaultdict(list)
    for file in files:
        if file.digest:
            alike[file.digest].append(file)
    copies = [group for group in alike.values() if len(group) > 1]

    return [
        f"{'shortest':22}{found(shortest).duration:,.2f} s: {_escape(shortest.name)}",
        f"{'longest':22}{found(longest).duration:,.2f} s: {_escape(longest.name)}",
        f"{'largest peak':22}{found(loudest).peak:.3f}: {_escape(loudest.name)}",
        f"{'peak above 1.0':22}{_count(above, 'file')}",
        f"{'clipped':22}{_count(touching, 'file')} with over {_CLIPPED_SHARE:.1%} of the samples at full scale"
        + (f", most {found(clipped).clipped_share:.2%}: {_escape(clipped.name)}" if touching else ""),
        f"{'silence':22}{silence / 60:,.1f} min below -60 dBFS, {silence / 36 / _hours(files):.1f}% of all",
        f"{'silent throughout':22}{_count(len(silent), 'file')}",
        *_first([_escape(file.name) for file in silent]),
        f"{'not finite':22}{_count(len(not_finite), 'file')}",
        *_first([f"{_escape(file.name)}: {_count(found(file).not_finite, 'sample')}" for file in not_finite]),
        f"{'copies':22}{_count(sum(len(group) - 1 for group in copies), 'file')}",
        *_first([_join(group) for group in copies]),
    ]


def _first(lines: list[str]) -> list[str]:
    shown = [f"  {line}" for line in lines[:_NAMED]]
    return shown + ([f"  and {len(lines) - _NAMED:,} more"] if len(lines) > _NAMED else [])


def _join(copies: list[_File]) -> str:
    more = f" = {len(copies) - _NAMED_ALIKE:,} more" if len(copies) > _NAMED_ALIKE else ""
    return " = ".join(_escape(file.name) for file in copies[:_NAMED_ALIKE]) + more


def _hours(files: Iterable[_File]) -> float:
    return sum(file.measurement.duration for file in files) / 3600


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _not_decoded(number: int) -> str:
    return f"{number:,} {'does' if number == 1 else 'do'} not decode"


def _escape(text: str) -> str:
    """The text with what does not print, such as newlines and terminal codes, as repr writes it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _encodable(text: str) -> str:
    """The text with what stdout cannot encode as backslash escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _draw(folder: Path, files: list[_File]) -> bytes:
    """Eight small charts as a PNG: kinds by hours above, distributions over the files below."""
    import matplotlib  # a second to import: only when drawn; no pyplot state
    from matplotlib.figure import Figure

    good = [file for file in files if file.measurement]
    found = [file.measurement for file in good]
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a folder's name, which the font may lack
        figure = Figure(figsize=(13, 6.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.18, h_pad=0.14, wspace=0.03, hspace=0.06)
        title = f"{_escape(folder.resolve().name)}   {_count(len(files), 'file')}, {_hours(good):,.3f} h"
        if len(good) < len(files):
            title += f", {_not_decoded(len(files) - len(good))}"
        figure.suptitle(title, x=0.014, ha="left", parse_math=False)
        panels = figure.subplots(2, 4, height_ratios=(0.82, 1))
        for panel, (title, kind) in zip(panels[0, :3], _KINDS.items(), strict=True):
            _draw_kinds(panel, title, {name: _hours(members) for name, members in _groups(good, kind).items()})
        durations = [each.duration for each in found]
        edges = np.geomspace(0.9 * min(durations), 1.1 * max(durations), 31)
        _draw_values(panels[0, 3], "duration, s", durations, edges)
        panels[0, 3].set_xscale("log")
        panels[0, 3].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels[0, 3].minorticks_off()

        peaks = [each.peak for each in found]
        top = min(_HIGHEST_PEAK, max(1.2, math.ceil(20 * max(peaks)) / 20))
        _draw_values(panels[1, 0], "peak", peaks, np.arange(round(20 * top) + 1) / 20, alarm=1.0)
        levels = [each.rms_db for each in found]
        lowest = 10 * math.floor(np.clip(min(levels), _LOWEST_DB, -30) / 10)
        _draw_values(panels[1, 1], "level, dBFS", levels, np.arange(lowest, max(1.0, max(levels) + 1), 1.0))
        _draw_values(panels[1, 2], "silence, %", [_silence_percent(each) for each in found], np.arange(0, 101, 2.5))
        widest = max(24.0, max(each.sample_rate for each in found) / 2000)
        khz = [each.bandwidth_hz / 1000 for each in found]
        _draw_values(panels[1, 3], "bandwidth, kHz", khz, np.linspace(0, widest, 49))
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _draw_kinds(panel, title: str, hours: dict[str, float]) -> None:
    names = list(hours)[:_DRAWN_KINDS]
    shown = [hours[name] for name in names]
    if len(hours) > _DRAWN_KINDS:
        names.append(f"{len(hours) - _DRAWN_KINDS} others")
        shown.append(sum(hours.values()) - sum(shown))
    bars = panel.barh(range(len(names)), shown, height=0.66, color=_BLUE)
    panel.bar_label(
        bars,
        [f"{value:#.3g} h" if value < 100 else f"{value:,.0f} h" for value in shown],
        padding=4,
        fontsize=8,
        color=_GREY,
    )
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(_DRAWN_KINDS + 0.4, -0.6)
    panel.set_xlim(0, 1.3 * max(shown))
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.set_title(title)


def _draw_values(panel, title: str, values: list[float], edges: np.ndarray, alarm: float = math.inf) -> None:
    """A histogram whose outer bars take what lies beyond them; bars above `alarm` stand out."""
    median = np.quantile(values, 0.5, method="inverted_cdf")
    # Closed on the right: a peak of 1.0 is not above 1.0.
    rows = np.clip(np.digitize(values, edges, right=True) - 1, 0, len(edges) - 2)
    counts = np.bincount(rows, minlength=len(edges) - 1)
    colors = [_RED if edge >= alarm else _BLUE for edge in edges[:-1]]
    panel.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colors, edgecolor=_PAPER, linewidth=0.6)
    panel.axvline(np.clip(median, edges[0], edges[-1]), color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    panel.set_xlim(edges[0], edges[-1])
    panel.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    panel.grid(axis="y")
    panel.set_title(title)
    panel.set_ylabel("files", fontsize=8)
    label = f"median {median:,.0f}" if abs(median) >= 100 else f"median {median:#.3g}"
    panel.set_title(label, loc="right", fontsize=8, color=_GREY, fontweight="normal")


if __name__ == "__main__":
    main()
