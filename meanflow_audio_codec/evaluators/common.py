"""Evaluators: small objects whose `run(train_state)` yields (name, value).

They see the model through `predict_fns`, which the trainer supplies, and the data as fixed clips. What they draw or
decode goes to `workdir/samples/<step>/`.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from meanflow_audio_codec.errors import InputError

TYPES = ("validation", "reconstruction", "sampling", "tones", "cost", "images")


class Context(NamedTuple):
    """What an evaluator may use.

    Attributes:
        predict_fns: The model's functions, as trainers/training_steps.py lists them.
        examples: `examples(num, seconds) -> (batch, names)`, fixed held-out examples, {"audio": [n, s, c]}; of images
            {"image": [n, 28, 28, 1], "label": [n]}, without `seconds`; all images for `num` None.
        sample_rate: Hz.
        batch_size: Examples of a training batch.
        workdir: The run's.
        lower_train_step: `lower_train_step(state)`, the training step as `jax.stages.Lowered`.
        load_classifier: `load_classifier(workdir)(image [b, 28, 28, 1]) -> (logits, features)`.
    """

    predict_fns: dict[str, Callable]
    examples: Callable[..., tuple[dict[str, np.ndarray], list[str]]]
    sample_rate: int
    batch_size: int
    workdir: Any
    lower_train_step: Callable
    load_classifier: Callable[[str], Callable]


def batches_of(batch: dict[str, np.ndarray], size: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Cut examples into batches of `size`, each with the numbers of its rows, which seed their noise."""
    count = len(next(iter(batch.values())))
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count), dtype=np.uint32)
        yield rows, {name: values[start : start + size] for name, values in batch.items()}


def decode(
    context: Context, state: Any, batch: dict[str, np.ndarray], nfe: int, kept: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the decoded signals [n, s, c] of all examples, and the squared error of each one's tokens [n].

    `kept` is how much of the code is decoded, all if None.
    """
    reconstruct = context.predict_fns["reconstruct"]
    kept = () if kept is None else (kept,)  # None would be a second program
    parts = [
        jax.device_get(reconstruct(state, rows, seeds, nfe, *kept))
        for seeds, rows in batches_of(batch, context.batch_size)
    ]
    signals, x_mse = zip(*parts, strict=True)
    return np.concatenate(signals), np.concatenate(x_mse)


def from_config(evals: ConfigDict, context: Context) -> Iterator[tuple[ConfigDict, Any]]:
    """Yield (spec, evaluator) for each of `config.evals`: its `type` names the module, the rest but for the schedule
    (`first_*`, `every_*`) are the evaluator's arguments.
    """
    for name, spec in evals.items():
        if spec.type not in TYPES:
            raise InputError(f"evals.{name}.type is {spec.type!r}; choose one of {', '.join(TYPES)}")
        module = importlib.import_module(f"meanflow_audio_codec.evaluators.{spec.type}")
        arguments = {k: v for k, v in spec.items() if not k.startswith(("type", "first_", "every_"))}
        try:
            inspect.signature(module.Evaluator).bind(context, **arguments)
        except TypeError as error:
            raise InputError(f"evals.{name}: {error} for type {spec.type}") from None
        yield spec, module.Evaluator(context, **arguments)
