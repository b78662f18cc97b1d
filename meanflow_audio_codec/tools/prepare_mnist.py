"""Build MNIST for training: python -m meanflow_audio_codec.tools.prepare_mnist --output-dir DIR [--idx-dir IDX]

TensorFlow Datasets downloads the four original files, or takes them from IDX, checks them against the sizes and SHA-256
that it has registered, and writes DIR/mnist/3.0.1 as ArrayRecord, which datasets/mnist.py reads without TensorFlow.
All unfinished work lies in DIR/mnist/.prepare, which is removed at the end; after a kill the next build starts over.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from meanflow_audio_codec.datasets.mnist import open_mnist
from meanflow_audio_codec.errors import InputError

_TIMEOUT_SECONDS = 20.0


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and build; what goes wrong ends in one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(prog="prepare_mnist", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="input.data_dir of a training run")
    parser.add_argument("--idx-dir", metavar="IDX", help="folder of the four files, gzipped; nothing is downloaded")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output_dir).expanduser().absolute()
    idx_dir = Path(arguments.idx_dir).expanduser().absolute() if arguments.idx_dir else None
    try:
        print(_run(folder, idx_dir))
    except InputError as error:
        sys.exit(f"prepare_mnist: {error}")
    except OSError as error:
        sys.exit(f"prepare_mnist: {error.filename or folder}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("prepare_mnist: interrupted; the same command starts over")


def _run(folder: Path, idx_dir: Path | None) -> str:
    import tensorflow_datasets as tfds  # a second, as long as TensorFlow is not needed

    mnist = tfds.builder_cls("mnist")
    target = folder / "mnist" / str(mnist.VERSION)
    if not _is_finished(target):
        if idx_dir:
            _require_files(mnist, idx_dir)
        else:
            _require_network(mnist)
        with _workspace(target.parent) as work:
            if not _is_finished(target):
                print(f"prepare_mnist: building {target}, a minute's work", file=sys.stderr)
                with _output_silenced():
                    _build(mnist, work, idx_dir)
                (work / "mnist" / target.name).rename(target)
                return _counts(folder)
    return f"{_counts(folder)}, there already"


def _is_finished(target: Path) -> bool:
    if target.exists() and not (target / "dataset_info.json").exists():
        raise InputError(f"{target} is in the way and not of this tool: remove it")
    return target.exists()


def _counts(folder: Path) -> str:
    info = open_mnist(folder).info
    splits = " and ".join(f"{split.num_examples:,} {name}" for name, split in info.splits.items())
    return f"{info.data_dir}: {splits} images"


def _require_files(mnist, idx_dir: Path) -> None:
    """Refuse a missing file, for which TFDS would turn to the network."""
    for url_info in mnist.url_infos.values():
        path = idx_dir / url_info.filename
        if not path.is_file():
            raise InputError(f"{path} is missing: {_original(url_info)}")


def _require_network(mnist) -> None:
    """Find out at once what TFDS says after ten attempts, minutes later."""
    import requests

    url = next(iter(mnist.url_infos))
    try:
        requests.head(url, timeout=_TIMEOUT_SECONDS).raise_for_status()
    except requests.RequestException as error:
        raise InputError(_unreachable(url, error)) from error


@contextlib.contextmanager
def _workspace(home: Path) -> Iterator[Path]:
    """An empty folder for this process alone; a kill lets go of it."""
    work = home / ".prepare"
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another prepare_mnist is at work in {work}") from error
        try:
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)  # after an error TFDS' threads may still be writing


@contextlib.contextmanager
def _output_silenced():
    """Close stderr to TensorFlow, which heeds no log level while it is imported, and stdout to TFDS."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _build(mnist, work: Path, idx_dir: Path | None) -> None:
    import requests
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.extractor import ExtractError
    from tensorflow_datasets.core.download.util import DownloadError

    tf.config.set_visible_devices([], "GPU")  # of which it would take all the memory
    tfds.disable_progress_bar()
    # TFDS takes a file from the manual folder if it is there by its registered name.
    config = tfds.download.DownloadConfig(manual_dir=idx_dir, force_checksums_validation=True, try_download_gcs=False)
    try:
        mnist(data_dir=work).download_and_prepare(
            download_dir=work / "downloads", download_config=config, file_format="array_record"
        )
    except NonMatchingChecksumError as error:
        url, url_info = next(item for item in mnist.url_infos.items() if item[0] in str(error))
        place = idx_dir / url_info.filename if idx_dir else url
        raise InputError(f"{place} is another file: {_original(url_info)}") from error
    except (requests.RequestException, DownloadError) as error:
        raise InputError(_unreachable(mnist.URL, error)) from error
    except (ExtractError, RuntimeError) as error:  # a RuntimeError is ArrayRecord's
        raise InputError(f"{work} cannot be written: {str(error).splitlines()[0]}") from error


def _original(url_info) -> str:
    return f"the original has {int(url_info.size)} bytes and the SHA-256 {url_info.checksum}"


def _unreachable(url: str, error: Exception) -> str:
    return f"{url} cannot be downloaded ({type(error).__name__}): with the four files at hand, name their --idx-dir"


if __name__ == "__main__":
    main()
