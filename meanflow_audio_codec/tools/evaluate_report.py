"""What an evaluation says: means with intervals, paired differences, the bars, and the rate-distortion figure.

A row is one clip by one coder, as `evaluate.score` makes it. Intervals are 95 % by bootstrap (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, percentile method): clips drawn with replacement 10,000 times, with a fixed seed;
differences are paired by clip. Clips of one file are not independent, and a single clip has no interval.

kbps of a coder in a group are all its payload bits over all its seconds. Our setting is compared with that of another
family whose measured kbps are nearest by ratio.

The bars (BARS) are what it takes to be better than Opus at about the same bitrate: the best of Opus' modes, of Opus
with noise filled in above its band and, at 6 kbps, of Lyra 2, on 18 music and 8 speech clips of 44.1 kHz mono, of at
most 10 s at -16 LUFS, measured with libopus 1.6.1 and the definitions used here. For other clips they are landmarks.
"""

import csv
import functools
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from meanflow_audio_codec.evaluators.baselines import FAMILIES, OPUS_MODES

Row = dict[str, Any]

RESAMPLES = 10_000
GROUPS = ("music", "speech", "speechnb", "all")
SHORT = {
    "si_sdr_db": "SI-SDR dB",
    "mel_distance": "mel",
    "mel16_distance": "mel16",
    "stft_distance": "STFT",
    "lsd_db": "LSD dB",
    "visqol_audio_48k": "ViSQOL audio 48k",
    "zimtohrli_mos_48k": "Zimtohrli MOS 48k",
    "pesq_wb_16k": "PESQ-wb 16k",
    "stoi_16k": "STOI 16k",
    "estoi_16k": "ESTOI 16k",
    "visqol_speech_16k": "ViSQOL speech 16k",
}
LOWER_IS_BETTER = ("mel_distance", "mel16_distance", "stft_distance", "lsd_db")
_DIGITS = {"si_sdr_db": 1, "stoi_16k": 3, "estoi_16k": 3}
_MATCH_TOLERANCE = 1.1  # of our kbps
_BAR_TOLERANCE = 1.02  # of the bar's kbps
_BAR_RATE = 44100
_ANY_RATE = ("mel16_distance", "pesq_wb_16k", "stoi_16k", "estoi_16k", "visqol_speech_16k")
BARS: dict[tuple[int, str], dict[str, float]] = {
    (6, "music"): {
        **{"mel_distance": 1.9, "mel16_distance": 1.8, "stft_distance": 2.6},
        **{"visqol_audio_48k": 3.6, "zimtohrli_mos_48k": 2.9, "si_sdr_db": 3.7},
    },
    (6, "speech"): {
        **{"pesq_wb_16k": 3.1, "stoi_16k": 0.933, "estoi_16k": 0.870, "visqol_speech_16k": 3.3},
        **{"zimtohrli_mos_48k": 3.1, "mel_distance": 1.57, "mel16_distance": 1.25},
    },
    (12, "music"): {
        **{"mel_distance": 1.18, "mel16_distance": 1.24, "stft_distance": 2.18},
        **{"visqol_audio_48k": 4.02, "zimtohrli_mos_48k": 3.86, "si_sdr_db": 9.5},
    },
    (12, "speech"): {
        **{"pesq_wb_16k": 3.96, "stoi_16k": 0.968, "estoi_16k": 0.935},
        **{"zimtohrli_mos_48k": 4.02, "mel_distance": 1.11, "mel16_distance": 0.91},
    },
    (24, "music"): {
        **{"mel_distance": 0.86, "mel16_distance": 0.82, "stft_distance": 1.91},
        **{"visqol_audio_48k": 4.15, "zimtohrli_mos_48k": 4.36, "si_sdr_db": 14.0},
    },
    (24, "speech"): {
        **{"pesq_wb_16k": 4.37, "stoi_16k": 0.987, "estoi_16k": 0.971, "visqol_audio_48k": 4.26},
        **{"zimtohrli_mos_48k": 4.49, "mel_distance": 0.81, "mel16_distance": 0.72, "stft_distance": 1.61},
        **{"si_sdr_db": 13.4},
    },
}
_POINTS = (
    "kbps are measured, of the payload (in brackets: of the whole file). Means over clips with 95 % bootstrap "
    "intervals. Lower is better in mel, mel16, STFT and LSD, higher in all others."
)
_DIFFERENCES = (
    "Better with 95 % confidence: **bold**; worse: *slanted*. The last line of each takes, by measure, the strongest "
    "of Opus' modes that spend at most 10 % more, noise filled in included. Other nfe are in results.json."
)
_BARS = (
    "The bars were measured on other clips. Met: the mean passes the bar, at a measured bitrate of at most 2 % more. "
    "The last column is the difference from the strongest mode of Opus on these clips, as above."
)
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f", "#bcbd22", "#393b79")
_ACROSS = 4
_TICKS_KBPS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MARKERS = "osD^vP*Xph"


class Mean(NamedTuple):
    """A mean over `count` clips and its interval, None where one clip has none."""

    mean: float
    low: float | None
    high: float | None
    count: int


class Point(NamedTuple):
    """A coder in a group: `kbps` of the payload, `file_kbps` of whole files where it writes its own."""

    group: str
    coder: str
    family: str
    kbps: float
    file_kbps: float | None
    encode_speed: float
    decode_speed: float
    clips: int
    means: dict[str, Mean]


class Difference(NamedTuple):
    """Ours minus theirs by measure; `better` is +1, -1 or 0 where the interval holds zero."""

    group: str
    ours: str
    theirs: str
    family: str
    kbps: tuple[float, float]
    means: dict[str, Mean]
    better: dict[str, int]


class Bar(NamedTuple):
    """A bar, and how our best setting within its bitrate stands to it; None where there is no such setting."""

    kbps: int
    group: str
    measure: str
    bar: float
    family: str
    ours: str | None
    ours_kbps: float | None
    value: Mean | None
    met: bool | None


def write(
    output: Path, settings: dict, rows: Sequence[Row], own_families: Sequence[str], speed: dict[str, float] | None
) -> str:
    """Write results.csv, results.json, table.md and rate_distortion.png; return the table.

    Args:
        output: Folder.
        settings: Of the evaluation.
        rows: All of its rows.
        own_families: Families whose settings are ours.
        speed: Of the model, see `evaluate.measure_speed`; None without a model.
    """
    points = summarize(rows)
    own = tuple(dict.fromkeys(own_families))
    differences = compare(rows, points, own)
    bars = judge(points, own, settings["sample_rate"])
    results = {
        "settings": settings,
        "versions": {row["family"]: row["version"] for row in rows},
        "points": [_plain(point) for point in points],
        "differences": [_plain(difference) for difference in differences],
        "bars": [_plain(bar) for bar in bars],
        "speed": speed,
    }
    table = _markdown(settings, rows, points, differences, bars, own, speed)
    _replace(output / "results.csv", _csv(rows))
    _replace(output / "results.json", json.dumps(results, indent=1))
    _replace(output / "table.md", table + "\n")
    _draw(output / "rate_distortion.png", points, own)
    return table


################################################ Statistics


def bootstrap(values: Float[np.ndarray, " n"]) -> Mean:
    """Return the mean with its 95 % percentile interval over resampled clips; the same every time."""
    mean = float(values.mean())
    if len(values) == 1:
        return Mean(mean, None, None, 1)
    low, high = np.quantile(values[_resampled(len(values))].mean(axis=1), (0.025, 0.975))
    return Mean(mean, float(low), float(high), len(values))


@functools.lru_cache(maxsize=8)
def _resampled(count: int) -> Int[np.ndarray, "r n"]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def summarize(rows: Sequence[Row]) -> list[Point]:
    """Return a point for each group and coder, by group and measured kbps."""
    points = []
    for (group, coder), part in _grouped(rows, "group", "coder").items():
        seconds = sum(row["seconds"] for row in part)
        over = lambda name, part=part, seconds=seconds: sum(row[name] * row["seconds"] for row in part) / seconds
        spent = lambda name, part=part: max(sum(row[name] for row in part), 1e-9)
        scores = {name: _present(row["scores"][name] for row in part) for name in part[0]["scores"]}
        points.append(
            Point(
                group,
                coder,
                part[0]["family"],
                over("kbps"),
                None if part[0]["file_kbps"] is None else over("file_kbps"),
                seconds / spent("encode_seconds"),
                seconds / spent("decode_seconds"),
                len(part),
                {name: bootstrap(values) for name, values in scores.items() if len(values)},
            )
        )
    return sorted(points, key=lambda point: (GROUPS.index(point.group), point.kbps, point.coder))


def compare(rows: Sequence[Row], points: Sequence[Point], own: Sequence[str]) -> list[Difference]:
    """Return each of our settings minus each other family at the nearest kbps, clip by clip."""
    scores = {(row["group"], row["coder"], row["clip"]): row["scores"] for row in rows}
    clips = {group: list(dict.fromkeys(r["clip"] for r in part)) for (group,), part in _grouped(rows, "group").items()}
    found = []
    for ours in (point for point in points if point.family in own):
        for family in FAMILIES:
            same = [point for point in points if (point.group, point.family) == (ours.group, family)]
            if not same:
                continue
            theirs = min(same, key=lambda point: abs(math.log(point.kbps / ours.kbps)))
            means, better = {}, {}
            for name in ours.means:
                pairs = [
                    (scores[ours.group, ours.coder, clip][name], scores[ours.group, theirs.coder, clip][name])
                    for clip in clips[ours.group]
                ]
                values = np.array([a - b for a, b in pairs if a is not None and b is not None])
                if len(values):
                    means[name] = bootstrap(values)
                    better[name] = _sign(name, means[name])
            found.append(
                Difference(ours.group, ours.coder, theirs.coder, family, (ours.kbps, theirs.kbps), means, better)
            )
    return found


def best_opus(differences: Sequence[Difference], group: str, ours: str) -> dict[str, Difference]:
    """Return by measure the comparison with the mode of Opus that leaves `ours` the least advantage.

    Modes that spend over 10 % more than ours count only where all do, as below the least that Opus can do.
    """
    modes = [d for d in differences if (d.group, d.ours) == (group, ours) and d.family in OPUS_MODES]
    modes = [d for d in modes if d.kbps[1] <= _MATCH_TOLERANCE * d.kbps[0]] or modes
    names = dict.fromkeys(name for difference in modes for name in difference.means)
    gain = lambda name: lambda d: d.means[name].mean * (-1 if name in LOWER_IS_BETTER else 1)
    return {name: min((d for d in modes if name in d.means), key=gain(name)) for name in names}


def judge(points: Sequence[Point], own: Sequence[str], sample_rate: int) -> list[Bar]:
    """Return the bars with our setting of the most kbps within them; full-band bars hold at 44.1 kHz alone."""
    bars = []
    for (kbps, group), values in BARS.items():
        for here in (group, f"{group}nb"):  # of which only what looks below 8 kHz was measured
            for name, value in values.items():
                if not any(name in point.means for point in points if point.group == here and point.family in own):
                    continue
                if sample_rate == _BAR_RATE or name in _ANY_RATE:
                    bars += [_judge(points, family, kbps, here, name, value) for family in own]
    return bars


def _judge(points: Sequence[Point], family: str, kbps: int, group: str, name: str, bar: float) -> Bar:
    same = [p for p in points if (p.group, p.family) == (group, family) and name in p.means]
    within = [point for point in same if point.kbps <= kbps * _BAR_TOLERANCE]
    if not within:
        return Bar(kbps, group, name, bar, family, None, None, None, None)
    ours = max(within, key=lambda point: point.kbps)
    mean = ours.means[name]
    met = mean.mean < bar if name in LOWER_IS_BETTER else mean.mean > bar
    return Bar(kbps, group, name, bar, family, ours.coder, ours.kbps, mean, met)


def _sign(name: str, mean: Mean) -> int:
    if mean.low is None or mean.low <= 0 <= mean.high:
        return 0
    return 1 if (mean.mean < 0) == (name in LOWER_IS_BETTER) else -1


def _grouped(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _present(values: Iterable[float | None]) -> Float[np.ndarray, " n"]:
    return np.array([value for value in values if value is not None], np.float64)


################################################ Files


def _csv(rows: Sequence[Row]) -> str:
    columns = [name for name in rows[0] if name != "scores"]
    measures = [name for name in SHORT if any(name in row["scores"] for row in rows)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns + measures)
    for row in rows:
        writer.writerow([row[name] for name in columns] + [row["scores"].get(name) for name in measures])
    return file.getvalue()


def _plain(value: Any) -> Any:
    """Named tuples as objects, for JSON."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, dict) else value


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)


################################################ The table


def _markdown(
    settings: dict,
    rows: Sequence[Row],
    points: Sequence[Point],
    differences: Sequence[Difference],
    bars: Sequence[Bar],
    own: Sequence[str],
    speed: dict[str, float] | None,
) -> str:
    model = settings["model"]
    title = f"# {model['name']} ({model['fingerprint'][:12]})" if model else "# Other people's coders"
    lines = [f"{title}, at {settings['sample_rate']} Hz", ""]
    lines += [_POINTS, ""]
    versions = {}
    for row in rows:
        if row["family"] not in own:
            versions.setdefault(row["version"], []).append(row["family"])
    named = [f"{', '.join(dict.fromkeys(families))}: {version}" for version, families in versions.items()]
    lines += ["; ".join(named) + ".", ""] if named else []
    for group in dict.fromkeys(point.group for point in points):
        here = [point for point in points if point.group == group]
        files = len({row["file"] for row in rows if row["group"] == group})
        count = f"{_counted(here[0].clips, 'clip')} of {_counted(files, 'file')}"
        lines += [f"## {group}: {count}", "", *_points_table(here), ""]
        compared = [d for d in differences if d.group == group and own and _family(points, d.ours) == own[0]]
        if compared:
            lines += [f"### {group}: ours minus theirs at the nearest kbps", ""]
            lines += [_DIFFERENCES, ""]
            lines += [*_differences_table(compared), ""]
    lines += _bars_section(bars, differences)
    if speed is not None:
        lines += ["## Speed on one core, as times real time", "", *_speed_table(speed, points, own), ""]
    return "\n".join(lines).rstrip()


def _points_table(points: Sequence[Point]) -> list[str]:
    measures = [name for name in SHORT if any(name in point.means for point in points)]
    lines = _head(["coder", "kbps", *(SHORT[name] for name in measures)])
    for point in points:
        kbps = f"{point.kbps:.2f}" + (f" ({point.file_kbps:.2f})" if point.file_kbps is not None else "")
        lines.append(_line([point.coder, kbps, *(_text(name, point.means.get(name)) for name in measures)]))
    return lines


def _differences_table(differences: Sequence[Difference]) -> list[str]:
    measures = [name for name in SHORT if any(name in difference.means for difference in differences)]
    lines = _head(["ours", "kbps", "theirs", "kbps", *(SHORT[name] for name in measures)])
    for ours in dict.fromkeys(difference.ours for difference in differences):
        same = [difference for difference in differences if difference.ours == ours]
        for d in same:
            kbps = [f"{value:.2f}" for value in d.kbps]
            lines.append(_line([ours, kbps[0], d.theirs, kbps[1], *(_marked(name, d) for name in measures)]))
        best = best_opus(differences, same[0].group, ours)
        if best:
            cells = [f"{_marked(name, best[name])} {best[name].theirs}" if name in best else "" for name in measures]
            lines.append(_line([ours, f"{same[0].kbps[0]:.2f}", "the best Opus", "", *cells]))
    return lines


def _bars_section(bars: Sequence[Bar], differences: Sequence[Difference]) -> list[str]:
    if not bars:
        return []
    lines = ["## Bars for better than Opus at the same bitrate", ""]
    lines += [_BARS, ""]
    lines += _head(["bar", "ours", "kbps", "value", "", "against the best Opus here"])
    for bar in bars:
        sense = "<" if bar.measure in LOWER_IS_BETTER else ">"
        name = f"{bar.kbps} kbps {bar.group} {SHORT[bar.measure]} {sense} {bar.bar:g}"
        if bar.ours is None:
            lines.append(_line([name, f"{bar.family} has no setting within it", "", "", "not met", ""]))
            continue
        best = best_opus(differences, bar.group, bar.ours).get(bar.measure)
        against = f"{_marked(bar.measure, best)} {best.theirs} ({best.kbps[1]:.2f} kbps)" if best else ""
        value = _text(bar.measure, bar.value)
        lines.append(_line([name, bar.ours, f"{bar.ours_kbps:.2f}", value, "met" if bar.met else "not met", against]))
    return [*lines, ""]


def _speed_table(speed: dict[str, float], points: Sequence[Point], own: Sequence[str]) -> list[str]:
    lines = [f"Loading takes {speed['load_seconds']:.1f} s. Cold: the first call of a process, which compiles.", ""]
    lines += _head(["", "cold", "warm"])
    for name in (name.removesuffix("_warm") for name in speed if name.endswith("_warm")):
        lines.append(_line([name, f"{speed[f'{name}_cold']:.2f}", f"{speed[f'{name}_warm']:.2f}"]))
    for point in points:
        if point.group == points[0].group and point.family not in own:
            lines.append(_line([f"{point.coder}, encode", "", f"{point.encode_speed:.0f}"]))
            lines.append(_line([f"{point.coder}, decode", "", f"{point.decode_speed:.0f}"]))
    return lines


def _family(points: Sequence[Point], coder: str) -> str:
    return next(point.family for point in points if point.coder == coder)


def _marked(name: str, difference: Difference) -> str:
    if name not in difference.means:
        return ""
    mark = {1: "**", -1: "*", 0: ""}[difference.better[name]]
    return f"{mark}{_text(name, difference.means[name], signed=True)}{mark}"


def _text(name: str, mean: Mean | None, signed: bool = False) -> str:
    if mean is None:
        return ""
    form = f"{'+' if signed else ''}.{_DIGITS.get(name, 2)}f"
    interval = "" if mean.low is None else f" [{mean.low:{form}}, {mean.high:{form}}]"
    return f"{mean.mean:{form}}{interval}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


################################################ The figure


def _draw(path: Path, points: Sequence[Point], own: Sequence[str]) -> None:
    """A panel for each measure of each group, against measured kbps; every group begins a line of panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = []
    for group in dict.fromkeys(point.group for point in points):
        here = [point for point in points if point.group == group]
        measures = [name for name in SHORT if any(name in point.means for point in here)]
        lines += [[(name, here) for name in measures[i : i + _ACROSS]] for i in range(0, len(measures), _ACROSS)]
    families = [*own, *(f for f in FAMILIES if any(point.family == f for point in points))]
    figure = Figure(figsize=(3.6 * _ACROSS, 2.9 * len(lines) + 0.6), dpi=120, layout="constrained")
    panels = figure.subplots(len(lines), _ACROSS, squeeze=False)
    for line, drawn in zip(panels, lines, strict=True):
        for panel in line[len(drawn) :]:
            panel.set_axis_off()
        for panel, (name, here) in zip(line, drawn, strict=False):
            for number, family in enumerate(families):
                shown = [point for point in here if point.family == family and name in point.means]
                _draw_curve(panel, shown, name, number, family in own)
            sense = " (lower is better)" if name in LOWER_IS_BETTER else ""
            panel.set_title(f"{here[0].group}: {SHORT[name]}{sense}", fontsize=9)
            panel.set_xscale("log", base=2)
            low, high = panel.get_xlim()
            ticks = [kbps for kbps in _TICKS_KBPS if low <= kbps <= high]
            panel.set_xticks(ticks, [f"{kbps:g}" for kbps in ticks])
            panel.minorticks_off()
            panel.tick_params(labelsize=8)
            panel.grid(color="#e3e4e1", linewidth=0.6)
            panel.set_xlabel("kbps, measured", fontsize=8)
    handles = {h.get_label(): h for panel in panels.flat for h in panel.get_lines() if h.get_label() in families}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    partial = path.with_name(path.name + ".part")
    FigureCanvasAgg(figure).print_png(partial)
    partial.replace(path)


def _draw_curve(panel: Any, points: Sequence[Point], name: str, number: int, own: bool) -> None:
    if not points:
        return
    points = sorted(points, key=lambda point: point.kbps)
    means = [point.means[name] for point in points]
    kbps, color = [point.kbps for point in points], _COLORS[number % len(_COLORS)]
    style = {"marker": _MARKERS[number % len(_MARKERS)], "color": color, "label": points[0].family}
    panel.plot(kbps, [m.mean for m in means], linewidth=2 if own else 1, markersize=5 if own else 3.5, **style)
    low = [m.mean if m.low is None else m.low for m in means]
    high = [m.mean if m.high is None else m.high for m in means]
    panel.vlines(kbps, low, high, color=color, linewidth=0.8, alpha=0.6)
