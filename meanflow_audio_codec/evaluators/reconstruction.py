"""Distances between held-out clips and their decoding, for each number of network evaluations."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators.common import Context, decode
from meanflow_audio_codec.evaluators.metrics import audio_metrics


class Evaluator:
    """Decode `num_clips` clips of `seconds` at each `nfe` and score them by `metrics.audio_metrics`.

    `autoencoder`, unless empty, is the workdir of the autoencoder rung on the same data and codes: its newest error is
    the denominator of `mse_ratio`, 2 for a perfect sampler of the posterior, below 2 for one that is too sure.
    `kept` are lower bitrates to decode at besides the most: codebooks, or with gain_shape bits a latent.
    """

    def __init__(
        self,
        context: Context,
        num_clips: int,
        seconds: float,
        nfe: tuple[int, ...],
        autoencoder: str,
        kept: tuple[int, ...] = (),
    ):
        self._context, self._nfe, self._kept = context, nfe, (None, *kept)
        self._clips, _ = context.examples(num_clips, seconds)
        self._autoencoder_mse = _newest_mse(autoencoder) if autoencoder else None

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yield reconstruction/<metric>_nfe<k>, the mean over clips and channels; reconstruction_n/ where n is kept."""
        for nfe, kept in itertools.product(self._nfe, self._kept):
            group = "reconstruction" if kept is None else f"reconstruction_{kept}"
            decoded, errors = decode(self._context, state, self._clips, nfe, kept)
            x_mse = float(errors.mean())
            yield f"{group}/x_mse_nfe{nfe}", x_mse
            if self._autoencoder_mse is not None and kept is None:
                yield f"{group}/mse_ratio_nfe{nfe}", x_mse / self._autoencoder_mse
            scores = audio_metrics(
                np.moveaxis(self._clips["audio"], 1, 2),
                np.moveaxis(decoded, 1, 2),
                self._context.sample_rate,
            )
            for name, values in scores.items():
                yield f"{group}/{name}_nfe{nfe}", float(np.mean(values))


def _newest_mse(workdir: str) -> float:
    path = epath.Path(workdir).expanduser() / "metrics.jsonl"
    key = "reconstruction/x_mse_nfe1"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a running one may be writing its last
    values = [row[key] for row in rows if key in row]
    if not values:
        raise InputError(f"evals.reconstruction.autoencoder: {path} holds no {key}; give an autoencoder's workdir")
    return values[-1]
