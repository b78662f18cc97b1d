"""Muon or AdamW, with global-norm clipping under a warm-up and cosine schedule.

Muon (K. Jordan et al., 2024) takes of a matrix's momentum the direction only: Newton-Schulz iterations set all singular
values to about 1, so that every direction of a layer learns at one pace. Scaled to the RMS of Adam's updates, 0.2 of
the learning rate (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982), one rate serves both. It takes
the kernels of maps into, within and out of the network's width. Adam's are vectors, tables of entries, and maps wider
than that on both sides, on which the iterations would cost more than the rest of a step. Mean flows need with it less
than half of the steps of AdamW (documentation/experiments.md, 2026-11-28).
"""

import functools
from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib

from meanflow_audio_codec.configuration import duration_steps
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.models.codec import VARIANTS

ADAM_RMS = 0.2
TABLES = ("codebook", "embedding")


def make_optimizer(
    config: ConfigDict, total_steps: int, steps_per_epoch: int | None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer of `config.optimizer` and its learning-rate schedule by step.

    The rate climbs linearly for `warmup_*`, then falls along a cosine to `final_lr_share` of its peak.

    Raises:
        InputError: `optimizer.name` is neither muon nor adamw, or muon for a classifier.
    """
    spec = config.optimizer
    warmup = duration_steps(spec, "warmup", config.input.batch_size, steps_per_epoch, total_steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, spec.lr, min(warmup, total_steps - 1), total_steps, spec.lr * spec.final_lr_share
    )
    match spec.get("name"):
        case "adamw":
            update = optax.adamw(schedule, b1=spec.b1, b2=spec.b2, weight_decay=spec.wd)
        case "muon" if "variant" not in config.model:
            raise InputError("optimizer.name is 'muon', which serves codecs; for a classifier choose adamw")
        case "muon":
            update = contrib.muon(
                schedule,
                adam_b1=spec.b1,
                adam_b2=spec.b2,
                weight_decay=spec.wd,
                adam_weight_decay=spec.wd,
                muon_weight_dimension_numbers=functools.partial(_kernels, config.model.variant),
                consistent_rms=ADAM_RMS,
            )
        case name:
            raise InputError(f"optimizer.name is {name!r}; choose muon or adamw")
    return optax.chain(optax.clip_by_global_norm(spec.grad_clip_norm), update), schedule


def _kernels(variant: str, params: Any) -> Any:
    """Return what Muon takes, None for all else."""
    width = VARIANTS[variant]["width"]

    def choose(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        takes = leaf.ndim == 2 and min(leaf.shape) <= width and path[-1].key not in TABLES
        return contrib.MuonDimensionNumbers() if takes else None

    return jax.tree_util.tree_map_with_path(choose, params)
