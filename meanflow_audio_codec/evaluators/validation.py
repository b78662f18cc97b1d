"""The objective's raw errors on held-out clips, with the same noise at every step."""

from collections.abc import Iterator
from typing import Any

import jax

from meanflow_audio_codec.evaluators.common import Context


class Evaluator:
    """Average the training metrics over `batches` fixed batches of validation clips of `seconds`."""

    def __init__(self, context: Context, batches: int, seconds: float):
        self._context = context
        size = context.batch_size
        audio, _ = context.clips(batches * size, seconds)
        self._batches = [audio[i : i + size] for i in range(0, len(audio), size)]

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yield the mean of every metric of the objective."""
        loss, totals = self._context.predict_fns["loss"], {}
        for i, audio in enumerate(self._batches):
            for name, value in jax.device_get(loss(state, audio, jax.random.key(i))).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        for name, total in totals.items():
            yield f"val/{name}", total / len(self._batches)
