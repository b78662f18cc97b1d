"""Train a codec: python train.py --config CONFIG --workdir DIR [--config.FIELD=VALUE ...]

A mistake in the command, the config, the data or the workdir ends in one line on stderr and exit status 1.
"""

import argparse
import logging
import sys

from meanflow_audio_codec import configuration
from meanflow_audio_codec.errors import InputError


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train; a rerun of the same command resumes."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a .py config with :arguments, or a .json or .yaml one")
    parser.add_argument("--workdir", required=True, help="folder for everything that the run makes")
    arguments, overrides = parser.parse_known_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails there is raised here
    logging.getLogger("meanflow_audio_codec").setLevel(logging.INFO)
    try:
        config = configuration.override_from_flags(configuration.load_config(arguments.config), overrides)
        from meanflow_audio_codec.trainers.train import train  # after the config, whose mistakes show at once

        train(config, arguments.workdir)
    except (InputError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except OSError as error:
        sys.exit(f"train.py: {error.filename or arguments.workdir}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command resumes from the last checkpoint")


if __name__ == "__main__":
    main()
