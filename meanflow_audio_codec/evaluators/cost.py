"""What a run costs: parameters, FLOPs, memory and seconds, in workdir/cost.json.

Its numbers; those marked * depend on the config alone and are also yielded, as `cost/<name>`:

    parameters*, decoder_parameters*
    train_flops_per_step*             of a whole batch, all devices together
    condition_flops_per_sample*       tokenize, encode, quantize, upsample: once per example
    flow_flops_per_evaluation*        of one example
    flops_per_sample_nfe<k>*          condition + k flow; the way back from tokens to samples is not in it
    train_bytes_accessed_per_step     of memory, on one device; XLA's estimate
    train_peak_bytes                  arguments + temporaries + outputs - donated of the compiled step, on one device
    train_seconds                     by timings.jsonl, all resumptions together; no compiling, evaluating, saving
    sample_seconds_nfe<k>             per example of a batch of `num_examples`, encoding included; best of 5
    audio_seconds                     of an example, where it is audio
    peak_rss_bytes                    of this process so far: data, evaluators and compiler included
    step, num_examples, device_count; and as text device, jax_version

FLOPs are XLA's count for the program before compiling: 2 b n m for a matmul, one for an elementwise operation. After it
XLA counts what the compiler chose for one device: an operation repeated in every fusion that needs its result counts
every time, and a matmul handed to a library has been seen to count nothing on GPUs. Bytes are the other way round: only
fusion decides what goes through memory. XLA counts a loop's body once, whatever the number of turns, so the cost of
`reconstruct` is added up from its parts; in the training step only the random bits loop. What a backend does not tell
is left out and logged: JAX counts no FLOPs before compiling on GPU and TPU plugins.
"""

import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.evaluators.common import Context

log = logging.getLogger(__name__)

REPEATS, REPEAT_SECONDS = 5, 2.0  # no further repetition once this has passed


class Evaluator:
    """Measure, once at the end of a run, `num_examples` at a time for each `nfe`; audio has `seconds`.

    Raises:
        InputError: `num_examples` is not positive.
    """

    def __init__(self, context: Context, num_examples: int, nfe: tuple[int, ...], seconds: float | None = None):
        if num_examples < 1:
            raise InputError(f"evals of type cost: num_examples={num_examples} must be at least 1")
        self._context, self._nfe = context, nfe
        self._batch, _ = context.examples(num_examples, seconds)
        self._seeds = np.arange(num_examples, dtype=np.uint32)

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Write cost.json and yield its part that does not depend on the clock or the machine."""
        train_step = self._context.lower_train_step(state)
        fixed = {"parameters": _size(state.params), "decoder_parameters": _size(state.params["decoder"])}
        fixed |= _flops("train_flops_per_step", train_step) | self._sample_flops(state)
        measured = _train_memory(train_step) | self._sample_seconds(state)
        workdir = epath.Path(self._context.workdir)
        measured["train_seconds"] = _train_seconds(workdir / "timings.jsonl")
        measured["peak_rss_bytes"] = _peak_rss_bytes()
        where = {
            "step": int(state.step),
            "num_examples": len(self._seeds),
            "device_count": jax.device_count(),
            "device": jax.devices()[0].device_kind,
            "jax_version": jax.__version__,
        }
        partial = workdir / "cost.json.tmp"
        partial.write_text(json.dumps(fixed | measured | where, indent=1) + "\n")
        partial.replace(workdir / "cost.json")
        for name, value in fixed.items():
            yield f"cost/{name}", float(value)

    def _sample_flops(self, state: Any) -> dict[str, float]:
        """Count the parts of a sample and add them up."""
        condition, flow = (self._context.predict_fns[name] for name in ("condition", "flow"))
        cond = jax.eval_shape(condition, state, self._batch)
        b, l, _ = cond.shape
        z, t = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, l, len(state.scale)), (b,)))
        flops = _flops("condition_flops_per_sample", condition.lower(state, self._batch), b)
        flops |= _flops("flow_flops_per_evaluation", flow.lower(state, z, t, t, cond), b)
        if len(flops) == 2:
            once, each = flops.values()
            flops |= {f"flops_per_sample_nfe{nfe}": once + nfe * each for nfe in self._nfe}
        return flops

    def _sample_seconds(self, state: Any) -> dict[str, float]:
        reconstruct, count = self._context.predict_fns["reconstruct"], len(self._seeds)
        found = {}
        for nfe in self._nfe:
            seconds = _best_seconds(lambda nfe=nfe: reconstruct(state, self._batch, self._seeds, nfe))
            found[f"sample_seconds_nfe{nfe}"] = seconds / count
        if "audio" in self._batch:
            found["audio_seconds"] = self._batch["audio"].shape[1] / self._context.sample_rate
        return found


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _flops(name: str, lowered: jax.stages.Lowered, samples: int = 1) -> dict[str, float]:
    """Return {name: FLOPs per sample}, or nothing where the backend does not count them."""
    analysis = lowered.cost_analysis() or {}
    if "flops" not in analysis:
        log.info("cost: %s is left out, %s does not count FLOPs", name, jax.default_backend())
        return {}
    return {name: analysis["flops"] / samples}


def _train_memory(lowered: jax.stages.Lowered) -> dict[str, float]:
    """Return what the compiled step reads, writes and holds; it is compiled already if it was lowered as it runs."""
    compiled, found = lowered.compile(), {}
    traffic, held = compiled.cost_analysis() or {}, compiled.memory_analysis()
    if "bytes accessed" in traffic:
        found["train_bytes_accessed_per_step"] = traffic["bytes accessed"]
    else:
        log.info("cost: train_bytes_accessed_per_step is left out, %s does not tell", jax.default_backend())
    if held is not None:
        parts = held.argument_size_in_bytes, held.temp_size_in_bytes, held.output_size_in_bytes
        found["train_peak_bytes"] = sum(parts) - held.alias_size_in_bytes
    else:
        log.info("cost: train_peak_bytes is left out, %s does not tell", jax.default_backend())
    return found


def _best_seconds(run: Callable[[], Any]) -> float:
    """Return the shortest of a few runs, after one that compiles."""
    jax.block_until_ready(run())
    begin, best = time.perf_counter(), float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > REPEAT_SECONDS:
            break
    return best


def _train_seconds(timings: epath.Path) -> float:
    """Add up the steps between lines over their speed; steps without a speed, the first alone, go to the next line."""
    seconds, last = 0.0, 0
    for line in timings.read_text().splitlines():
        row = json.loads(line)
        if row["steps_per_s"] > 0:
            seconds += (row["step"] - last) / row["steps_per_s"]
            last = row["step"]
    return seconds


def _peak_rss_bytes() -> int:
    """Return the largest resident set of this process."""
    status = Path("/proc/self/status")  # on Linux getrusage may tell the peak of the parent, before exec
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
