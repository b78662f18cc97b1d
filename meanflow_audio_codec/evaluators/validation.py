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
        """Yield the mean of every metric of the objective; errors of a quarter of t by their share of the rows."""
        loss = self._context.predict_fns["loss"]
        rows = [jax.device_get(loss(state, audio, jax.random.key(i))) for i, audio in enumerate(self._batches)]
        for name in rows[0]:
            share = name.replace("v_mse_t", "v_share_t")
            weights = [row[share] if share != name else 1.0 for row in rows]
            total = sum(float(row[name]) * weight for row, weight in zip(rows, weights, strict=True))
            yield f"val/{name}", float(total / max(sum(weights), 1e-9))
