"""Evaluators: small objects whose `run(train_state)` yields (name, value).

They see the model through `predict_fns`, which the trainer supplies, and the data as fixed clips. What they draw or
decode goes to `workdir/samples/<step>/`.
"""

import importlib
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


def from_config(evals: ConfigDict, context: Context) -> Iterator[tuple[str, ConfigDict, Any]]:
    """Yield (name, spec, evaluator) for each of `config.evals`: its `type` names the module, the rest its arguments."""
    for name, spec in evals.items():
        if spec.type not in TYPES:
            raise InputError(f"evals.{name}.type is {spec.type!r}; choose one of {', '.join(TYPES)}")
        module = importlib.import_module(f"meanflow_audio_codec.evaluators.{spec.type}")
        arguments = {k: v for k, v in spec.items() if k != "type" and not k.startswith("every_")}
        yield name, spec, module.Evaluator(context, **arguments)
