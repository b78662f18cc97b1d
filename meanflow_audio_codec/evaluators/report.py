"""A run as one page: `report.html` shows what a workdir holds, offline, pictures and sound inside.

Read from the workdir, each optional: `config.json` (nested); `metrics.jsonl`, a line an object of
`step` and `group/name_unit` scalars; `timings.jsonl`, a line an object of `step`, `time` (seconds),
`steps_per_s`, `examples_per_s`; the newest `samples/<step>/` with `<clip:02d>_reference.wav`,
`<clip:02d>_nfe<k:02d>.wav`, `<clip:02d>.png`. A key that names an `nfe<k>` is drawn as one curve of
the metric without it, so that few and many decoding steps share a chart and a table row.

The page is written beside its place and moved there, so a browser never sees half of one.
"""

import base64
import html
import io
import json
import math
import os
import re
from string import Template

import numpy as np
from etils import epath
from jaxtyping import Float
from scipy.ndimage import gaussian_filter1d

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators.metrics import FLOOR_DBFS, spectrogram_dbfs

# Shown above the fold; the whole configuration is one click away.
KEY_FIELDS = (
    *("seed", "total_steps", "name", "data_dir", "sample_rate", "num_tokens", "batch_size"),
    *("hop_length", "variant", "backbone", "output", "quantizer", "lr"),
)
NONE_YET = "<p class=quiet>none yet</p>"

Points = list[tuple[int, float]]
Curves = dict[str, dict[str, dict[str, Points]]]  # group, metric, nfe or "", points


def draw_spectrograms(
    path: str | os.PathLike, title: str, clips: list[tuple[str, Float[np.ndarray, " s"]]], sample_rate: int
) -> None:
    """Draw titled spectrograms side by side on one colour scale, -100 to 0 dB of a full-scale sine.

    Args:
        path: The PNG to write. Its background is transparent, for light and dark pages.
        title: Of the picture.
        clips: Title and audio of each panel, the reference first.
        sample_rate: Hz.
    """
    from matplotlib.figure import Figure  # a second to import: only when drawn; no pyplot state

    grey = "#808790"  # legible on white and on black
    figure = Figure(figsize=(3.1 * len(clips) + 0.9, 2.9), layout="constrained")
    panels = figure.subplots(1, len(clips), sharex=True, sharey=True, squeeze=False)[0]
    figure.suptitle(title, color=grey, fontsize=9, parse_math=False)
    for panel, (label, audio) in zip(panels, clips, strict=True):
        image = panel.imshow(
            spectrogram_dbfs(audio, window_length=1024, hop_length=256).T,
            origin="lower",
            aspect="auto",
            extent=(0, len(audio) / sample_rate, 0, sample_rate / 2000),
            cmap="magma",
            vmin=FLOOR_DBFS,
            vmax=0,
        )
        panel.set_title(label, color=grey, fontsize=9, parse_math=False)
        panel.set_xlabel("s", color=grey, fontsize=8)
        panel.tick_params(colors=grey, labelsize=8)
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("kHz", color=grey, fontsize=8)
    colorbar = figure.colorbar(image, ax=panels, aspect=30, pad=0.01)
    colorbar.set_label("dBFS", color=grey, fontsize=8)
    colorbar.ax.tick_params(colors=grey, labelsize=8)
    colorbar.outline.set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=144, transparent=True)
    epath.Path(path).write_bytes(png.getvalue())


def write_report(workdir: str | os.PathLike) -> None:
    """Write `workdir/report.html` from what is there now; a part without data says so.

    Raises:
        InputError: A JSON file of the workdir is damaged.
    """
    workdir = epath.Path(workdir)
    (config,) = _json_lines(workdir / "config.json", whole=True) or [{}]
    lines = _json_lines(workdir / "metrics.jsonl")
    curves = _curves(lines)
    last_step = max((line["step"] for line in lines), default=0)
    total = config.get("total_steps")
    progress = f"step {last_step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
    page = TEMPLATE.substitute(
        title=html.escape(workdir.name),
        progress=html.escape(progress),
        summary=_summary(config),
        listening=_listening(workdir / "samples"),
        results=_results(curves),
        charts=_charts(curves, last_step),
        clock=_clock(_json_lines(workdir / "timings.jsonl")),
        config=html.escape(json.dumps(config, indent=2, ensure_ascii=False)),
    )
    partial = workdir / "report.html.tmp"
    partial.write_text(page, encoding="utf-8")
    partial.replace(workdir / "report.html")


def _json_lines(path: epath.Path, whole: bool = False) -> list[dict]:
    """Read the complete lines of a JSON Lines file, or a whole JSON file as one; [] if absent."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = [text] if whole else text.split("\n")[:-1]  # what follows the last newline is half a line
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number} is not JSON: mend or remove it") from error
    return objects


def _curves(lines: list[dict]) -> Curves:
    """Sort finite scalars named `group/name` into curves; an `nfe<k>` in the key is a variant."""
    curves: Curves = {}
    for line in lines:
        for key, value in line.items():
            if "/" not in key or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            nfe = re.search(r"(?:^|(?<=/)|_)nfe_?(\d+)(?=[_/]|$)", key)
            variant = f"nfe {int(nfe[1])}" if nfe else ""
            group, _, name = (key.replace(nfe[0], "", 1) if nfe else key).partition("/")
            metric = curves.setdefault(group, {}).setdefault(name.strip("_"), {})
            metric.setdefault(variant, []).append((line["step"], float(value)))
    return curves


def _summary(config: dict) -> str:
    rows = [[path, str(value)] for path, value in _leaves(config) if path.rpartition(".")[2] in KEY_FIELDS]
    return _table(["field", "value"], rows)


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _results(curves: Curves) -> str:
    tables = []
    for group, metrics in curves.items():
        variants = list(dict.fromkeys(v for found in metrics.values() for v in found))
        rows = []
        for metric, found in metrics.items():
            latest = [_number(found[v][-1][1]) if v in found else "" for v in variants]
            rows.append([metric, *latest, f"{max(p[-1][0] for p in found.values()):,}"])
        tables.append(_table([group, *(v or "latest" for v in variants), "step"], rows))
    return "<div class=tables>" + "".join(tables) + "</div>" if tables else NONE_YET


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return NONE_YET

    def line(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, body = line("th", head), "".join(line("td", row) for row in rows)
    return f"<div class=wide><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def _listening(samples: epath.Path) -> str:
    """Show the newest folder that holds something: a row of players a clip, its picture below."""
    folders = [d for d in samples.iterdir() if d.name.isdigit()] if samples.exists() else []
    folders = [d for d in sorted(folders, key=lambda d: int(d.name)) if any(d.iterdir())]
    if not folders:
        return NONE_YET
    clips: dict[str, dict[int, epath.Path]] = {}  # reference is nfe 0
    for path in sorted(folders[-1].glob("*.wav")):
        if match := re.fullmatch(r"(\d+)_(?:reference|nfe(\d+))\.wav", path.name):
            clips.setdefault(match[1], {})[int(match[2] or 0)] = path
    columns = sorted({nfe for players in clips.values() for nfe in players})
    head = "".join(f"<th>{f'nfe {nfe}' if nfe else 'reference'}" for nfe in columns)
    rows = []
    for clip, players in clips.items():
        cells = "".join(f"<td>{_audio(players[n]) if n in players else ''}</td>" for n in columns)
        rows.append(f"<tr><th>{clip}</th>{cells}</tr>")
        if (picture := folders[-1] / f"{clip}.png").exists():
            rows.append(f"<tr class=picture><td><td colspan={len(columns)}>{_image(picture)}</tr>")
    others = [p for p in sorted(folders[-1].glob("*.png")) if p.stem not in clips]
    table = f"<div class=wide><table class=players><thead><tr><th>clip{head}<tbody>{''.join(rows)}"
    return (
        f"<p class=quiet>after step {int(folders[-1].name):,}</p>"
        + (table + "</table></div>" if clips else "")
        + "".join(_image(path) for path in others)
    )


def _audio(path: epath.Path) -> str:
    return f'<audio controls preload=metadata src="data:audio/wav;base64,{_base64(path)}"></audio>'


def _image(path: epath.Path) -> str:
    alt = html.escape(f"picture {path.stem}")
    return f'<img alt="{alt}" src="data:image/png;base64,{_base64(path)}">'


def _base64(path: epath.Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _clock(timings: list[dict]) -> str:
    if not timings:
        return NONE_YET
    hours, seconds = divmod(round(timings[-1]["time"] - timings[0]["time"]), 3600)
    rows = [["first to last entry", f"{hours} h {seconds // 60:02} min {seconds % 60:02} s", ""]]
    for key in ("steps_per_s", "examples_per_s"):
        values = [line[key] for line in timings if key in line]
        if values:
            rows.append([key, _number(float(np.median(values))), _number(values[-1])])
    return _table(["", "median", "latest"], rows)


def _charts(curves: Curves, last_step: int) -> str:
    groups = []
    for group, metrics in curves.items():
        charts = "".join(_chart(metric, found, last_step) for metric, found in metrics.items())
        groups.append(f"<h3>{html.escape(group)}</h3><div class=charts>{charts}</div>")
    return "".join(groups) or NONE_YET


def _chart(metric: str, variants: dict[str, Points], last_step: int) -> str:
    """Draw one metric: thin raw lines under smoothed ones; log y if the values span a factor 30."""
    width, height, left, bottom = 320, 170, 44, 20
    values = np.array([value for points in variants.values() for _, value in points], np.float64)
    log = not metric.endswith("_db") and values.min() > 0 and values.max() > 30 * values.min()
    scaled = np.log10(values) if log else values
    # One outlier in 200 values may leave the picture: it must not flatten the rest.
    low, high = np.quantile(scaled, [0.005, 0.995], method="inverted_cdf")
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def to_x(step):
        return left + np.asarray(step) / max(last_step, 1) * (width - left - 8)

    def to_y(y):
        return (height - bottom) - (np.asarray(y) - low) / (high - low) * (height - bottom - 6)

    marks = []
    for tick in _log_ticks(low, high) if log else _ticks(low, high):
        label = _number(10**tick if log else tick)
        marks.append(
            f'<line x1="{left}" x2="{width - 8}" y1="{to_y(tick):.1f}" y2="{to_y(tick):.1f}"/>'
            f'<text x="{left - 6}" y="{to_y(tick) + 3:.1f}" text-anchor="end">{label}</text>'
        )
    for tick in _ticks(0.0, float(max(last_step, 1))):
        marks.append(f'<text x="{to_x(tick):.1f}" y="{height - 5}" text-anchor="middle">{_step(tick)}</text>')
    lines, legend = [], []
    for index, (variant, points) in enumerate(variants.items()):
        steps, y = np.array(points, np.float64).T
        y = np.log10(y) if log else y
        color = f"c{index % 5}"
        legend.append(f"<i class={color}>{html.escape(variant)} {_number(points[-1][1])}</i>")
        if len(y) > 20:
            smooth = gaussian_filter1d(y, len(y) / 50, mode="nearest")
            lines.append(_line(to_x, to_y, *_extremes(steps, y), f"raw {color}"))
            lines.append(_line(to_x, to_y, *_extremes(steps, smooth), color))
        else:
            lines.append(_line(to_x, to_y, steps, y, color))
            lines += [
                f'<circle class="{color}" cx="{a:.1f}" cy="{b:.1f}" r="2"/>'
                for a, b in zip(to_x(steps), to_y(y), strict=True)
            ]
    name = html.escape(metric)
    clip = f'<svg x="{left}" width="{width - left}" height="{height - bottom}" viewBox="{left} 0 '
    clip += f'{width - left} {height - bottom}">{"".join(lines)}</svg>'
    return (
        f"<figure><figcaption><b>{name}</b>{''.join(legend)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name} over steps">'
        f"{''.join(marks)}{clip}</svg></figure>"
    )


def _line(to_x, to_y, steps: np.ndarray, y: np.ndarray, css: str) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(to_x(steps), to_y(y), strict=True))
    return f'<polyline class="{css}" points="{points}"/>'


def _extremes(steps: np.ndarray, y: np.ndarray, bins: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Keep the least and the greatest of each bin: a long curve looks the same in fewer points."""
    chunks = np.array_split(np.arange(len(y)), min(bins, len(y)))
    keep = np.unique([c[pick(y[c])] for c in chunks for pick in (np.argmin, np.argmax)])
    return steps[keep], y[keep]


def _ticks(low: float, high: float) -> np.ndarray:
    """Choose round values, 3 to 6 of them."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    spacing = unit * next(m for m in (1, 2, 5, 10) if m * unit >= 0.99 * rough)
    return np.arange(math.ceil(low / spacing), math.floor(high / spacing) + 1) * spacing


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose decades, or 1, 2, 5 within fewer than two, as powers of ten."""
    stride = math.ceil((high - low) / 5)
    digits = (1,) if high - low > 2 else (1, 2, 5)
    decades = range(math.floor(low / stride) * stride, math.ceil(high) + 1, stride)
    ticks = [k + math.log10(digit) for k in decades for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def _number(value: float) -> str:
    whole = value == round(value) and abs(value) < 1e7
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", "\u2212")


def _step(step: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if step >= size:
            return f"{step / size:g}{suffix}"
    return f"{step:g}"


TEMPLATE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d2126; --quiet: #6a717b;
  --rule: #e3e4e1; --c0: #2f62b5; --c1: #c4532d; --c2: #1b8a6b; --c3: #8e4aa8; --c4: #a67c00 }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e4e6e9; --quiet: #949ba6;
  --rule: #2b2f36; --c0: #7aa7f0; --c1: #f0906a; --c2: #5cc9a7; --c3: #c792dc; --c4: #dcb64a } }
body { max-width: 68rem; margin: 0 auto; padding: 3rem 1.5rem 6rem; background: var(--paper);
  color: var(--ink); font: 15px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1, h2 { font-family: ui-serif, "Iowan Old Style", Palatino, Georgia, serif; font-weight: 500;
  letter-spacing: -.01em; line-height: 1.15 }
h1 { font-size: 2.4rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.5rem; margin: 3.2rem 0 .8rem; padding-top: 1rem;
  border-top: 1px solid var(--rule) }
h3 { font-size: .95rem; font-weight: 600; margin: 1.6rem 0 .6rem }
.quiet { color: var(--quiet); margin: .3rem 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th { font-weight: 600; text-align: left; white-space: nowrap }
thead th { color: var(--quiet); border-bottom: 1px solid var(--rule) }
th, td { padding: .3rem 1.4rem .3rem 0; vertical-align: middle }
.tables { display: flex; flex-wrap: wrap; gap: 1.6rem 4rem; align-items: flex-start }
.tables td + td, .tables th + th { text-align: right; padding-right: .6rem }
.players { width: 100% } .players tr + tr th { padding-top: .8rem }
audio { width: 100%; min-width: 11rem; height: 2.2rem; display: block }
img { max-width: 100%; display: block } .picture td { padding: .2rem 0 1.2rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1.4rem }
figure { margin: 0 } figure > svg { width: 100%; display: block }
figcaption { display: flex; flex-wrap: wrap; gap: 0 .6rem; font-size: .85rem; margin-bottom: .3rem }
figcaption b { font-weight: 600; flex: 1 } i { font-style: normal; font-size: .75rem }
svg line { stroke: var(--rule) } svg text { fill: var(--quiet); font-size: 9.5px }
polyline { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round }
polyline.raw { stroke-width: .7; opacity: .35 } circle { fill: currentColor }
.c0 { color: var(--c0) } .c1 { color: var(--c1) } .c2 { color: var(--c2) } .c3 { color: var(--c3) }
.c4 { color: var(--c4) }
pre { font: .8rem/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto }
summary { cursor: pointer; color: var(--quiet); margin-top: 1rem }
</style></head><body>
<h1>$title</h1><p class=quiet>$progress</p>
<h2>Run</h2>$summary
<details><summary>whole configuration</summary><pre>$config</pre></details>
<h2>Listening</h2>$listening
<h2>Results</h2>$results
<h2>Curves</h2>$charts
<h2>Wall clock</h2>$clock
</body></html>
""")
