"""AdamW with global-norm clipping under a warm-up and cosine schedule."""

import optax
from ml_collections import ConfigDict

from meanflow_audio_codec.configuration import duration_steps


def make_optimizer(
    config: ConfigDict, total_steps: int, steps_per_epoch: int | None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer of `config.optimizer` and its learning-rate schedule by step.

    The rate climbs linearly for `warmup_*`, then falls along a cosine to `final_lr_share` of its peak.
    """
    spec = config.optimizer
    warmup = duration_steps(spec, "warmup", config.input.batch_size, steps_per_epoch, total_steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, spec.lr, min(warmup, total_steps - 1), total_steps, spec.lr * spec.final_lr_share
    )
    tx = optax.chain(
        optax.clip_by_global_norm(spec.grad_clip_norm),
        optax.adamw(schedule, b1=spec.b1, b2=spec.b2, weight_decay=spec.wd),
    )
    return tx, schedule
