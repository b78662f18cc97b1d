"""The objective's raw errors on held-out clips, with the same noise at every step."""

from collections.abc import Iterator
from typing import Any

import jax

from meanflow_audio_codec.evaluators.common import Context, batches_of


class Evaluator:
    """Average the training metrics over `batches` fixed batches of validation clips of `seconds`, or of images."""

    def __init__(self, context: Context, batches: int, seconds: float | None = None):
        self._context = context
        examples, _ = context.examples(batches * context.batch_size, seconds)
        self._batches = [batch for _, batch in batches_of(examples, context.batch_size)]

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yield the mean of every metric of the objective; errors of a quarter of t by their share of the rows."""
        loss = self._context.predict_fns["loss"]
        rows = [jax.device_get(loss(state, batch, jax.random.key(i))) for i, batch in enumerate(self._batches)]
        for name in rows[0]:
            share = name.replace("v_mse_t", "v_share_t")
            weights = [row[share] if share != name else 1.0 for row in rows]
            total = sum(float(row[name]) * weight for row, weight in zip(rows, weights, strict=True))
            yield f"val/{name}", float(total / max(sum(weights), 1e-9))
