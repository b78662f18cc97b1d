"""The runs of the research ladder: python -m meanflow_audio_codec.proj.ladder.study --workdir W --mnist-dir D ...

    {autoencoder, flow_matching, mean_flow, improved_mean_flow} x {mlp, mixer, conv} x {mdct, reshape} x {mnist, audio}

and what each default is worth, one field changed at a time. Every part is a sweep in W/<part>, which may be killed and
started again. `python -m meanflow_audio_codec.proj.ladder.report` writes the findings.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import NamedTuple

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools.sweep import run_sweep

log = logging.getLogger(__name__)

PROGRAM = "meanflow_audio_codec.proj.ladder.train"
RUNGS = "objective=autoencoder,flow_matching,mean_flow,improved_mean_flow"
FLOWS = "objective=flow_matching,mean_flow,improved_mean_flow"
CELLS = f"{RUNGS},backbone=mlp,mixer,conv,tokens=mdct,reshape"


class Part(NamedTuple):
    """A sweep: what is trained, on which data, how often."""

    config: str  # with its arguments, but for the data
    grids: tuple[str, ...]
    seeds: int
    overrides: tuple[str, ...] = ()


# The smallest model on a quarter of the main config's batch: what eight hours of two cores have room for.
AUDIO = "configs/meanflow_mdct.py:variant=N"
AUDIO_BUDGET = (
    *("--config.total_steps=2000", "--config.input.num_tokens=64", "--config.input.batch_size=8"),
    *("--config.evals.samples.first_steps=2000", "--config.evals.samples.every_steps=2000"),
    *("--config.evals.reconstruction.first_steps=1000", "--config.evals.reconstruction.every_steps=1000"),
)
# Each changes one field of the config's default, which is the first cell.
ABLATIONS = (
    "objective=improved_mean_flow,mean_flow,swapped_tangent",
    "config.model.velocity_head=True",
    "config.optimizer.name=adamw,config.optimizer.lr=1e-3,3e-3",
    "config.objective.fm_fraction=0.0,0.25,0.75",
    "config.objective.norm_p=0.0,0.5",
    "config.objective.norm_eps=1e-6,100.0",
    "config.objective.time_sampler=official",
    "config.model.time_scale=10.0,1000.0",
    "config.model.times=h",
    "config.model.output=u",
    "config.tokens.exponent=0.5",
    "config.tokens.scale=band",
)
AUDIO_ABLATIONS = (
    "objective=improved_mean_flow",
    "config.tokens.exponent=0.65,1.0",
    "config.tokens.exponent=1.0,config.tokens.scale=none",
    "config.tokens.hop_length=64,config.tokens.group=4",
    "config.tokens.hop_length=256,config.tokens.group=1",
    "config.tokens.window=kbd",
    "config.model.output=u",
    "config.model.times=h",
    "config.model.time_scale=1000.0",
    "config.objective.norm_p=0.5",
)
PARTS = {
    "classifier": Part("configs/mnist_classifier.py", (), seeds=1),
    "mnist": Part("configs/mnist.py", (CELLS,), seeds=3),
    "mnist_ablations": Part("configs/mnist.py", ABLATIONS, seeds=2, overrides=("--config.total_steps=2000",)),
    "mnist_samples": Part("configs/mnist.py", (f"{FLOWS},conditioning=label,none",), seeds=1),
    # 93.75 / 2 latents/s of 16, 32 and 64 values of 2 bits: 1.5, 3 and 6 kbps.
    "audio": Part(
        AUDIO,
        (
            f"{CELLS},config.model.latent_dim=32",
            f"{RUNGS},backbone=conv,tokens=mdct,reshape,config.model.latent_dim=16,64",
        ),
        seeds=1,
        overrides=AUDIO_BUDGET,
    ),
    "audio_ablations": Part(AUDIO, AUDIO_ABLATIONS, seeds=1, overrides=AUDIO_BUDGET),
}


def main(argv: list[str] | None = None) -> None:
    """Run the parts in their order, each to its end; failed runs are listed and give exit status 1."""
    parser = argparse.ArgumentParser(
        prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, type=Path, help="folder of all parts")
    parser.add_argument("--mnist-dir", required=True, help="the folder of prepare_mnist")
    parser.add_argument("--audio-dir", required=True, help="folder of audio, as input.data_dir takes it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: %(default)s")
    parser.add_argument("--runlocal", action="store_true", help="each run in seconds: does it work?")
    given = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("meanflow_audio_codec").setLevel(logging.INFO)
    failures = {}
    try:
        for name in given.parts:
            log.info("%s:", name)
            failures |= {f"{name}/{run}": what for run, what in run_part(name, given).items()}
    except InputError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("study: interrupted; the same command goes on from here")
    if failures:
        sys.exit("study: failed runs:\n" + "\n".join(f"  {run}: {what}" for run, what in failures.items()))


def run_part(name: str, given: argparse.Namespace) -> dict[str, str]:
    """Run what is not finished of a part; return the failures as `run_sweep` does."""
    part = PARTS[name]
    workdir = given.workdir.expanduser().absolute()
    overrides = [] if given.runlocal else list(part.overrides)  # the budget
    if part.config.startswith("configs/mnist"):
        overrides.append(f"--config.input.data_dir={given.mnist_dir}")
    else:
        overrides.append(f"--config.input.data_dir={given.audio_dir}")
        overrides.append(f"--config.input.cache_dir={workdir / 'decoded'}")
    if part.config.startswith("configs/mnist.py"):
        classifier = workdir / "classifier" / "all" / "seed0"
        overrides += [f"--config.evals.{key}.classifier={classifier}" for key in ("images", "images_at_end")]
    config = part.config
    if given.runlocal:
        config += ",runlocal" if ":" in config else ":runlocal"
    return run_sweep(
        config,
        workdir / name,
        grids=part.grids,
        overrides=overrides,
        seeds=1 if given.runlocal else part.seeds,
        jobs=given.jobs,
        program=PROGRAM,
    )


if __name__ == "__main__":
    main()
