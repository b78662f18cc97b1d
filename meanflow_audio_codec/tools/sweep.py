"""Train every cell of a grid with several seeds, then tabulate: python -m meanflow_audio_codec.tools.sweep

    --config configs/mnist.py:runlocal --grid objective=mean_flow,improved_mean_flow,backbone=mlp,conv --seeds 3 \
        --jobs 2 --workdir W [--config.FIELD=VALUE ...]            four cells, twelve runs, two at a time
    --workdir W --table --ratio objective=autoencoder              the table and the figures of what is there

In a grid an item with "=" starts a key, one without adds a value to it. A plain key is an argument of the config file,
one that begins with "config." a field; flags --config.FIELD=VALUE hold for all cells. With several --grid the cells are
the union of the products: a cell in two of them runs once. A run is the training program in W/<cell>/seed<k> with
--config.seed=k, its output in W/<cell>/seed<k>.log, so runs of the same seed are paired across cells. The sweep may be
killed at any moment: the same command skips finished runs, resumes begun ones, and tries failed ones again.
"""

import argparse
import contextlib
import datetime
import fcntl
import importlib.util
import itertools
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from meanflow_audio_codec import configuration
from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools.sweep_runs import read_json
from meanflow_audio_codec.tools.sweep_table import write_table

log = logging.getLogger("meanflow_audio_codec.tools.sweep")  # __name__ is __main__ under python -m

TRAINER = "meanflow_audio_codec.tools.train"
_LOCK = "sweep.lock"
_POLL_SECONDS, _GRACE_SECONDS = 0.1, 20.0
_NAME_BYTES = 255  # of a folder


class _Run(NamedTuple):
    name: str  # <cell>/seed<k>
    workdir: Path
    flags: list[str]
    config: ConfigDict

    @property
    def log(self) -> Path:
        return self.workdir.with_name(self.workdir.name + ".log")

    @property
    def finished(self) -> bool:
        saved = self.workdir / "config.json"
        if not saved.is_file() or not (self.workdir / "checkpoints" / str(self.config.total_steps)).is_dir():
            return False
        return not configuration.changed_fields(read_json(saved), self.config)


class _Job(NamedTuple):
    run: _Run
    process: subprocess.Popen
    number: int
    start: float


def parse_grid(grids: Sequence[str]) -> list[dict[str, str]]:
    """Return the cells, {key: value} each, of the union of the grids' products in their order; [{}] without a grid.

    Raises:
        InputError: a value without a key, a key twice or without a value, or what cannot be part of a folder's name.
    """
    cells = []
    for grid in grids or [""]:
        values: dict[str, list[str]] = {}
        for item in grid.split(",") if grid else []:
            key, is_key, value = item.partition("=")
            if is_key and _field(key) in map(_field, values):
                raise InputError(f"--grid {grid!r}: {key} comes twice; list its values after one {key}=")
            if not is_key and not values:
                raise InputError(f"--grid {grid!r}: {item!r} has no key; begin with KEY=VALUE")
            if not is_key:
                key, value = next(reversed(values)), item
            if not key or not value:
                raise InputError(f"--grid {grid!r}: {item!r} is not KEY=VALUE or a further VALUE")
            if "/" in item or not item.isprintable():
                raise InputError(f"--grid {grid!r}: {item!r} cannot be in a folder's name; set it for all by --config")
            values.setdefault(key, []).append(value)
        cells += [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    cells = [cell for i, cell in enumerate(cells) if cell not in cells[:i]]
    folders = [{_field(key): value for key, value in cell.items()} for cell in cells]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise InputError(f"--grid: two cells are called {cell_name(folder)}, one by config.; name the keys alike")
    return cells


def cell_name(cell: dict[str, str]) -> str:
    """Return the name of the cell's folder: `key=value,...` without `config.`, or `all` for the only one."""
    return ",".join(f"{_field(key)}={value}" for key, value in cell.items()) or "all"


def _field(key: str) -> str:
    return key.removeprefix("config.")


def run_sweep(
    config: str,
    workdir: str | os.PathLike,
    *,
    grids: Sequence[str] = (),
    overrides: Sequence[str] = (),
    seeds: int = 1,
    jobs: int = 1,
    program: str = TRAINER,
) -> dict[str, str]:
    """Train every cell of `grids` with seeds 0 to `seeds - 1`, all cells with one seed before the next seed.

    Call it from the main thread: it takes SIGINT and SIGTERM over to end the runs with itself. If it is killed, runs
    under way go on and keep `workdir` locked; another sweep waits for them.

    Args:
        config: As for train.py, with `:arguments` or without.
        workdir: Folder of the cells' folders.
        grids: As in the module's docstring.
        overrides: `--config.FIELD=VALUE` flags for all cells.
        seeds: Runs of a cell, at least 1.
        jobs: Runs at a time, at least 1; with more than one, each has its share of this process' cores.
        program: Module that takes `--config`, `--workdir` and overrides as train.py does.

    Returns:
        {"<cell>/seed<k>": what went wrong} of the failed runs.

    Raises:
        InputError: a wrong grid, config, flag or program; nothing has run.
        KeyboardInterrupt: SIGINT or SIGTERM came; the runs have been ended.
    """
    if seeds < 1 or jobs < 1:
        raise InputError(f"--seeds={seeds}, --jobs={jobs}: choose 1 or more")
    folder = Path(workdir).expanduser().absolute()
    runs = _plan(config, folder, grids, overrides, seeds)
    _check_program(program)
    failures = {}
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_locked(folder))
        todo = [run for run in runs if not run.finished]
        log.info("%d runs: %d finished before, %d to do", len(runs), len(runs) - len(todo), len(todo))
        durations, left = [], len(todo)
        ended = stack.enter_context(contextlib.closing(_ended_jobs(todo, jobs, program, lock)))
        for job, status in ended:
            left -= 1
            seconds = time.monotonic() - job.start
            failure = _failure(job.run, status)
            if failure:
                failures[job.run.name] = failure
            else:
                durations.append(seconds)
            log.info(
                "%d/%d %s %s after %s%s%s",
                *(job.number, len(todo), "failed" if failure else "finished", job.run.name, _clock(seconds)),
                f", {_clock(sum(durations) / len(durations) * left / jobs)} left" if durations and left else "",
                f": {failure}" if failure else "",
            )
    return {run.name: failures[run.name] for run in todo if run.name in failures}  # in their order, not as they ended


def _plan(config: str, folder: Path, grids: Sequence[str], overrides: Sequence[str], seeds: int) -> list[_Run]:
    """Resolve every run's config, so that a mistake shows before anything runs."""
    runs = []
    for seed, cell in itertools.product(range(seeds), parse_grid(grids)):
        name = cell_name(cell)
        try:
            if len(name.encode()) > _NAME_BYTES:
                raise InputError(f"longer than the {_NAME_BYTES} bytes of a folder's name; vary fewer fields")
            spec = _join(config, {key: value for key, value in cell.items() if key == _field(key)})
            fields = {key: value for key, value in cell.items() if key != _field(key)}
            flags = [*overrides, *(f"--{key}={value}" for key, value in fields.items())]
            _check_once(flags)
            flags.append(f"--config.seed={seed}")
            resolved = configuration.override_from_flags(configuration.load_config(spec), flags)
            configuration.check_config(resolved)
            if "total_steps" not in resolved:
                raise InputError("a sweep must know a run's end; pass --config.total_steps=VALUE")
        except InputError as error:
            raise InputError(f"cell {name}: {error}") from None
        workdir = folder / name / f"seed{seed}"
        flags = ["--config", spec, "--workdir", str(workdir), *flags]
        runs.append(_Run(f"{name}/seed{seed}", workdir, flags, resolved))
    return runs


def _join(config: str, arguments: dict[str, str]) -> str:
    """Append the cell's arguments to those of the config file."""
    path, is_python, given = config.partition(".py:")
    if not arguments:
        return config
    if not is_python and not config.endswith(".py"):
        raise InputError(f"--config {config} takes no arguments; begin the grid's keys with config.")
    path = path if is_python else config.removesuffix(".py")
    for item in given.split(","):
        if item.partition("=")[0] in arguments:
            raise InputError(f"{item} of --config is in the grid too; remove one of them")
    items = [given] if given else []
    return f"{path}.py:{','.join([*items, *(f'{key}={value}' for key, value in arguments.items())])}"


def _check_once(flags: Sequence[str]) -> None:
    names = [flag.partition("=")[0] for flag in flags]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} is set twice, by flags or the grid; remove one of them")
        if name == "--config.seed":
            raise InputError("--config.seed is set by --seeds; remove it")


def _check_program(program: str) -> None:
    try:
        spec = importlib.util.find_spec(program)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise InputError(f"--program: no module {program}; name one that python -m can run")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold `folder` alone. The runs inherit the lock: those that outlive a killed sweep still hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holders = " ".join(filter(_is_alive, (folder / _LOCK).read_text().split()))
            log.info("waiting for %s, where processes of another sweep are at work: %s", folder, holders)
            fcntl.flock(lock, fcntl.LOCK_EX)
        _note_holders(lock, [])
        yield lock
    finally:
        os.close(lock)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _note_holders(lock: int, jobs: Sequence[_Job]) -> None:
    """Write down who has the lock, for those who wait."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, " ".join(map(str, [os.getpid(), *(job.process.pid for job in jobs)])).encode(), 0)


def _ended_jobs(todo: Sequence[_Run], jobs: int, program: str, lock: int) -> Iterator[tuple[_Job, int]]:
    """Run all, `jobs` at a time, and yield each with its exit status when it ends; none outlives this."""
    waiting, running = iter(enumerate(todo, start=1)), {}
    with _noting_signals() as signals, contextlib.ExitStack() as stack:
        stack.callback(_end, running)
        while True:
            for slot in sorted(set(range(jobs)) - set(running)):
                if (following := next(waiting, None)) is None or signals:
                    break
                number, run = following
                log.info("%d/%d started %s", number, len(todo), run.name)
                process = _start(run, program, _share(slot, jobs), lock)
                running[slot] = _Job(run, process, number, time.monotonic())
                _note_holders(lock, list(running.values()))
            if signals:
                raise KeyboardInterrupt
            if not running:
                return
            time.sleep(_POLL_SECONDS)
            for slot, job in list(running.items()):
                if (status := job.process.poll()) is not None:
                    del running[slot]
                    yield job, status


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in place of acting on them: an exception amid a start would lose track of the run."""
    received = []
    note = lambda number, frame: received.append(number)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(run: _Run, program: str, cores: set[int], lock: int) -> subprocess.Popen:
    command = [sys.executable, "-m", program, *run.flags]
    run.workdir.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("a") as output, _pinned(cores):
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[lock])


def _share(slot: int, jobs: int) -> set[int]:
    """Return the cores of a slot, at least one; none to leave them all, where there is one job or no way to pin."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return set()
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        return {cores[slot % len(cores)]}
    return set(cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs])


@contextlib.contextmanager
def _pinned(cores: set[int]) -> Iterator[None]:
    """Let what is started inside inherit `cores`, so that it never sees more of them."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _end(running: dict[int, _Job]) -> None:
    """Terminate and wait; kill what does not heed."""
    for job in running.values():
        job.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for job in running.values():
        try:
            job.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def _failure(run: _Run, status: int) -> str:
    """Say in a line what went wrong, '' if nothing."""
    if status == 0:
        return "" if run.finished else f"ended without the checkpoint of step {run.config.total_steps}; see {run.log}"
    lines = run.log.read_text(errors="replace").split("\n")
    last = next(line for line in reversed(lines) if line.strip()).strip()
    return f"{f'signal {-status}' if status < 0 else f'exit status {status}'}: {last}"


def _clock(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=round(seconds))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run what is not finished, write the table; failed runs give exit status 1."""
    parser = argparse.ArgumentParser(
        prog="sweep", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a .py config with :arguments, or a .json or .yaml one")
    parser.add_argument("--workdir", required=True, help="folder of all runs, the table and the figures")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=VALUE,VALUE,KEY=VALUE,...")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each cell; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: %(default)s")
    parser.add_argument("--program", default=TRAINER, metavar="MODULE", help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="run nothing, tabulate what is there")
    parser.add_argument("--columns", default="", metavar="METRIC,...", help="of table.md; default: a choice")
    parser.add_argument("--ratio", default="", metavar="KEY=VALUE", help="x_mse over that of the runs with KEY=VALUE")
    parser.add_argument("--figures", default="", metavar="METRIC,...", help="without _nfe<k>; default: a choice")
    given, overrides = parser.parse_known_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("meanflow_audio_codec").setLevel(logging.INFO)
    failures = []
    try:
        if not given.table:
            failures = [f"{name}: {failure}" for name, failure in _run_given(given, overrides).items()]
        print(write_table(given.workdir, _items(given.columns), given.ratio, _items(given.figures)), end="")
    except InputError as error:
        sys.exit("\n".join([*failures, f"sweep: {error}"]))
    except OSError as error:
        sys.exit("\n".join([*failures, f"sweep: {error.filename or given.workdir}: {error.strerror or error}"]))
    except KeyboardInterrupt:
        sys.exit("sweep: interrupted; the same command goes on")
    if failures:
        sys.exit("\n".join([f"sweep: {len(failures)} runs failed; the same command tries them again", *failures]))


def _run_given(given: argparse.Namespace, overrides: list[str]) -> dict[str, str]:
    for argument in overrides:
        if not argument.startswith("--config."):
            raise InputError(f"unknown argument {argument}; fields are set by --config.FIELD=VALUE")
    if not given.config:
        raise InputError("--config is missing: name a config, or pass --table for what is there")
    return run_sweep(
        given.config,
        given.workdir,
        grids=given.grid,
        overrides=overrides,
        seeds=given.seeds,
        jobs=given.jobs,
        program=given.program,
    )


def _items(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


if __name__ == "__main__":
    main()
