"""One Orbax save of two items a step: `state` (the train state) and `data` (the position in the data stream).

Saves run in the background and are atomic: a step's folder appears under its name only when it is complete, so the
newest folder can always be restored, whenever the process was killed.
"""

import shutil
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from meanflow_audio_codec.errors import InputError


class Checkpoints:
    """The checkpoints of one workdir, `workdir/checkpoints/<step>/`."""

    def __init__(self, workdir: epath.PathLike):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True)
        self._folder = epath.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any, data: grain.DatasetIterator) -> None:
        """Start saving; draw the next batch only after this returns, or the data position is one too far.

        Raises:
            InputError: the disk has not the room; nothing was written.
        """
        self.wait()
        self._check_room(step, state)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
        self._manager.save(step, args=items)

    def _check_room(self, step: int, state: Any) -> None:
        """A disk that fills up during a save breaks more than the save: ask before for twice the size."""
        if "://" in str(self._folder):  # remote storage does not run full
            return
        needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise InputError(
                f"--workdir: no space to save step {step} in {self._folder}: {free / 1e6:.0f} MB free, "
                f"{needed / 1e6:.0f} MB needed; free some and run the same command, it resumes from the last checkpoint"
            )

    def wait(self) -> None:
        """Wait for the save under way and raise what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and stop the saving threads."""
        self._manager.close()


def newest_step(workdir: epath.PathLike) -> int | None:
    """Return the step of the newest complete checkpoint in `workdir`, or None. Touches nothing."""
    folder = epath.Path(workdir).expanduser() / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    return max(steps, default=None)


def restore(workdir: epath.PathLike, field: str, template: Any, data: grain.DatasetIterator | None = None) -> Any:
    """Return those parts of the newest train state in `workdir` that `template` has, as host arrays.

    `data`, where given, moves to the position saved with it. `field` is what named `workdir`, for the errors.

    Raises:
        InputError: `workdir` holds no complete checkpoint, or one of another model.
    """
    step = newest_step(workdir)
    if step is None:
        raise InputError(f"{field}: no complete checkpoint in {workdir}; give a finished or running workdir")
    path = epath.Path(workdir).expanduser().absolute() / "checkpoints" / str(step)
    handler = ocp.PyTreeCheckpointHandler()  # a Checkpointer around it would warn that an item has no step's metadata
    as_arrays = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)  # whatever devices they were saved from
    restore_args = jax.tree.map(as_arrays, handler.metadata(path / "state").tree)
    args = ocp.args.PyTreeRestore(restore_args=restore_args)
    saved = dict(_named_leaves(handler.restore(path / "state", args=args)))
    handler.close()
    for name, leaf in _named_leaves(template):
        if name not in saved or saved[name].shape != leaf.shape:
            raise InputError(f"{field}: {workdir} holds another model ({name} differs); give one of this config's")
    if data is not None:
        grain.checkpoint.CheckpointHandler().restore(path / "data", data)
    leaves = [saved[name] for name, _ in _named_leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]
