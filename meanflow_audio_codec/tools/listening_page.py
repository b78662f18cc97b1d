"""A listening test as one file: a page that plays reference and coded versions, labelled or blind, offline.

The page (listening_page.html, plain JavaScript) compares versions side by side with spectrograms, runs ABX tests, and
collects ratings from 0 to 100 against a hidden reference and a 3.5 kHz low-pass anchor, as in MUSHRA (ITU-R BS.1534-3).
Audio lies in it as base64 of 16-bit FLAC, half of WAV's size, which the page decodes at the clip's own rate: Firefox's
decodeAudioData gives the very samples, Chromium's divides positive ones by 32767 in place of 32768, in all versions
alike. A content security policy admits nothing but the page's own script and style: it can load nothing, and no label
becomes markup or script.
"""

import base64
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import soundfile
from jaxtyping import Float32, Int16

from meanflow_audio_codec.errors import InputError

REFERENCE = "reference"
ANCHOR = "anchor"  # a version of this label takes the place of the anchor that the page makes
FULL_SCALE = 32768


class Clip(TypedDict):
    """One recording: `coded` holds versions of `reference` by label, aligned and as long; 1.0 is full scale."""

    name: str
    group: str
    sample_rate: int
    reference: Float32[np.ndarray, " s"]
    coded: dict[str, Float32[np.ndarray, " s"]]


def write_listening_page(path: str | os.PathLike, title: str, clips: Sequence[Clip]) -> None:
    """Write a self-contained page; the same arguments give the same bytes.

    Levels stay as given, and nothing is clipped: where a version of a clip exceeds full scale, all versions of this
    clip are lowered by one gain, which the page states.

    Args:
        path: The HTML file, replaced at once when it is complete.
        title: Heading of the page.
        clips: `name` is shown and must be unique, `group` (music, speech) heads the lists and summaries,
            `sample_rate` is in Hz, `coded` has at least one label; "anchor" is the low anchor of blind ratings,
            "reference" is taken. The labels may differ from clip to clip.

    Raises:
        InputError: No clips, a name twice, a rate that is not positive, or audio that is empty, not finite or not as
            long as its reference.
    """
    clips = list(clips)
    if not clips:
        raise InputError("no clips: a listening page needs at least one")
    for clip in clips:
        _check(clip)
    names = [clip["name"] for clip in clips]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"clip {twice[0]!r} is there twice: names must be unique")
    path = Path(path)
    head, tail = _template(title)
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8", errors="replace", newline="\n") as page:
        page.write(head)
        described, digest = [], hashlib.sha256(title.encode("utf-8", "replace"))
        for index, clip in enumerate(clips):
            versions = {REFERENCE: clip["reference"], **clip["coded"]}
            gain = _gain(list(versions.values()))
            for position, audio in enumerate(versions.values()):
                flac = _flac(_pcm(audio * gain), clip["sample_rate"])
                digest.update(flac)
                # Not of a type that browsers run: they keep the text and parse nothing.
                text = base64.b64encode(flac).decode("ascii")
                page.write(f'<script type="text/plain" id="audio-{index}-{position}">{text}</script>\n')
            described.append(
                {
                    "name": clip["name"],
                    "group": clip["group"],
                    "sampleRate": int(clip["sample_rate"]),
                    "gainDb": 20 * float(np.log10(gain)),
                    "versions": list(versions),
                }
            )
        digest.update(json.dumps(described).encode())
        data = {"id": digest.hexdigest()[:16], "title": title, "clips": described}
        page.write(f'<script type="application/json" id="page-data">{_json(data)}</script>\n{tail}')
    partial.replace(path)


def _check(clip: Clip) -> None:
    name, reference = clip["name"], clip["reference"]
    if clip["sample_rate"] <= 0:
        raise InputError(f"clip {name!r}: a sample rate of {clip['sample_rate']} Hz must be positive")
    if not clip["coded"] or REFERENCE in clip["coded"]:
        raise InputError(f"clip {name!r}: coded must hold a version, none of them labelled {REFERENCE!r}")
    for label, audio in ((REFERENCE, reference), *clip["coded"].items()):
        if audio.ndim != 1 or audio.size == 0 or audio.shape != reference.shape:
            raise InputError(
                f"clip {name!r}, {label!r}: samples {audio.shape}, reference {reference.shape}: "
                "give mono audio as long as the reference"
            )
        if not np.isfinite(audio).all():
            raise InputError(f"clip {name!r}, {label!r}: the audio holds NaN or infinity")


def _gain(versions: list[np.ndarray]) -> float:
    """1, or what brings the highest peak of all versions to the highest 16-bit sample."""
    peak = max(float(np.abs(audio).max()) for audio in versions)
    return (FULL_SCALE - 1) / FULL_SCALE / peak if peak > 1 else 1.0


def _pcm(audio: np.ndarray) -> Int16[np.ndarray, " s"]:
    return np.clip(np.round(audio * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def _flac(samples: Int16[np.ndarray, " s"], sample_rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return file.getvalue()


def _json(data: dict) -> str:
    """JSON inside <script>: without "<" no text of it ends the element or opens a comment."""
    return json.dumps(data).replace("<", "\\u003c")


def _template(title: str) -> tuple[str, str]:
    """The page before and after its audio, with the title and the policy filled in."""
    template = Path(__file__).with_name("listening_page.html").read_text(encoding="utf-8")
    sources = {tag: re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1] for tag in ("script", "style")}
    rules = [f"{tag}-src 'sha256-{_sha256(text)}'" for tag, text in sources.items()]
    policy = "; ".join(["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'", *rules])
    page = template.replace("{{policy}}", policy, 1).replace("{{title}}", html.escape(title))
    head, _, tail = page.partition("<!-- audio -->\n")
    return head, tail


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
