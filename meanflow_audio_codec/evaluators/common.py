"""Evaluators: small objects whose `run(train_state)` yields (name, value).

They see the model through `predict_fns`, which the trainer supplies, and the data as fixed clips. What they draw or
decode goes to `workdir/samples/<step>/`.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from meanflow_audio_codec.errors import InputError

TYPES = ("validation", "reconstruction", "sampling")


class Context(NamedTuple):
    """What an evaluator may use: the model's functions, and `clips(num_clips, seconds) -> (audio [n, s, c], names)`."""

    predict_fns: dict[str, Callable]
    clips: Callable[[int, float], tuple[np.ndarray, list[str]]]
    sample_rate: int
    batch_size: int
    workdir: Any


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
