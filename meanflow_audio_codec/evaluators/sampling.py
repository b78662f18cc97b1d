"""Decoded clips to hear and see: WAV files beside their references, and their spectrograms, in samples/<step>/."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
from etils import epath

from meanflow_audio_codec.evaluators.common import Context, decode
from meanflow_audio_codec.evaluators.report import draw_spectrograms


class Evaluator:
    """Write `num_clips` clips of `seconds` as <clip>_reference.wav, <clip>_nfe<k>.wav and <clip>.png."""

    def __init__(self, context: Context, num_clips: int, seconds: float, nfe: tuple[int, ...]):
        self._context, self._nfe = context, nfe
        self._clips, self._names = context.examples(num_clips, seconds)

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Write the files of `state.step`; yields nothing."""
        folder = epath.Path(self._context.workdir) / "samples" / str(int(state.step))
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"reference": self._clips["audio"]}
        for nfe in self._nfe:
            versions[f"nfe{nfe:02d}"] = decode(self._context, state, self._clips, nfe)[0]
        for i, name in enumerate(self._names):
            for label, audio in versions.items():
                wav = io.BytesIO()
                soundfile.write(wav, np.clip(audio[i], -1, 1), self._context.sample_rate, "PCM_16", format="WAV")
                (folder / f"{i:02d}_{label}.wav").write_bytes(wav.getvalue())
            clips = [(label, audio[i].mean(axis=-1)) for label, audio in versions.items()]
            draw_spectrograms(folder / f"{i:02d}.png", name, clips, self._context.sample_rate)
        yield from ()
