"""The micro-batches that `partial="carry"` holds between two epochs, in the checkpoint of a `BackupAndRestore`.

Keras writes two files, one after the other and in place: the weights, and the epoch. The carried micro-batches go into
the file of the weights, with the epoch and the number of updates. That file is written under another name and renamed,
so that it is always one whole checkpoint. Where the epoch's own file is damaged, it is restored from the weights' file.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np

from bigbatch import errors
from bigbatch.keras import batch
from bigbatch.keras.methods import replaced

logger = logging.getLogger("bigbatch.keras")
GROUP = "bigbatch_window"  # beside Keras's own groups, which it looks up by name
COUNTS = ("epoch", "updates", "window", "micro_batches")


class Saved(NamedTuple):
    """The contents of a checkpoint beside the weights.

    Attributes:
        epoch: the epoch that comes next.
        updates: how many updates the optimizer had made.
        window: the index of the next window, which counts the skipped ones too.
        micro_batches: the arrays of each carried micro-batch.
    """

    epoch: int
    updates: int
    window: int
    micro_batches: list[list[np.ndarray]]


def updates_of(model: Any) -> int:
    """How many updates the model's optimizer has made."""
    iterations: Any = keras.ops.convert_to_numpy(model.optimizer.iterations.value)
    return int(iterations)


def write(path: Path, saved: Saved) -> None:
    """Adds `saved` to a file of weights."""
    with h5py.File(path, "a") as file:
        group = file.create_group(GROUP)
        for name, count in zip(COUNTS, (*saved[:3], len(saved.micro_batches)), strict=True):
            group.attrs[name] = count
        for i, leaves in enumerate(saved.micro_batches):
            one = group.create_group(str(i))
            for j, leaf in enumerate(leaves):
                if leaf.dtype.kind in "OSU":
                    one.create_dataset(str(j), data=leaf.astype(object), dtype=h5py.string_dtype())
                else:
                    # HDF5 has no bfloat16: the bytes, with their dtype and shape.
                    one.create_dataset(str(j), data=np.frombuffer(leaf.tobytes(), np.uint8))
                    one[str(j)].attrs["dtype"], one[str(j)].attrs["shape"] = leaf.dtype.name, leaf.shape


def read(path: Path) -> Saved | None:
    """What `write` added, checked whole; None where it added nothing.

    Raises:
        OSError: the file is damaged. `BackupAndRestore` goes back to an older checkpoint after an OSError.
    """
    try:
        with h5py.File(path, "r") as file:
            if GROUP not in file:
                return None
            group: Any = file[GROUP]
            epoch, updates, window, carried = (_count(name, group.attrs[name]) for name in COUNTS)
            micro_batches = [_leaves(group[str(i)]) for i in range(carried)]
            if len({len(leaves) for leaves in micro_batches}) > 1:
                raise ValueError(f"micro-batches with {sorted(map(len, micro_batches))} arrays")
            return Saved(epoch, updates, window, micro_batches)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OSError(f"The checkpoint {path.name} cannot be read: {error}.") from error


def _count(name: str, value: Any) -> int:
    if not isinstance(value, np.integer) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0. {errors.received(name, value)}")
    return int(value)


def _leaves(group: Any) -> list[np.ndarray]:
    leaves = []
    for j in range(len(group)):
        data = group[str(j)]
        array: Any = data[()]
        if "dtype" in data.attrs:
            array = np.frombuffer(array.tobytes(), np.dtype(data.attrs["dtype"])).reshape(data.attrs["shape"])
        leaves.append(array)
    if len({leaf.shape[:1] for leaf in leaves}) != 1:
        raise ValueError(f"a micro-batch with arrays of shapes {[leaf.shape for leaf in leaves]}")
    return leaves


class Checkpoints:
    """Replaces `model.save_weights` and `model.load_weights`, which `fit`'s callbacks call, while `fit` runs.

    Args:
        model: the model, which has Keras's own two methods.
        windows: of its stream.
        callbacks: that `fit` was given.
    """

    def __init__(self, model: Any, windows: Any, callbacks: Any):
        self.model, self.windows = model, windows
        callbacks = getattr(callbacks, "callbacks", None) or keras.tree.flatten(callbacks)
        # Not public: the callback's paths and its epoch. tests/keras/test_private.py fails when they move.
        self.backups = {str(c._weights_path): c for c in callbacks if isinstance(c, keras.callbacks.BackupAndRestore)}
        self.went_back = self.loaded = False
        for path in self.backups:
            if windows.partial == "carry" and "://" in path:
                raise ValueError(
                    'partial="carry" needs a local backup_dir, where a file can be renamed. '
                    f"{errors.received('backup_dir', self.backups[path].backup_dir)} "
                    'Pass a local one, or partial="apply".'
                )

    def count(self) -> None:
        """Sets the next window's index from the updates so far, which a callback may have restored."""
        if not self.loaded:
            self.windows.index = updates_of(self.model)

    def in_use(self) -> AbstractContextManager[None]:
        """Replaces the model's two methods while `fit` runs."""

        def through(ours: Callable[..., None], plain: Callable[..., None]) -> Callable[..., None]:
            def method(filepath: Any, *args: Any, **kwargs: Any) -> None:
                backup = self.backups.get(str(filepath))
                if backup is None or "://" in str(filepath):
                    plain(filepath, *args, **kwargs)
                else:
                    ours(backup, Path(filepath), *args, **kwargs)

            return method

        for backup in self.backups.values():
            _find_weights(backup)
        own = {"save_weights": self._save, "load_weights": self._load}
        return replaced([(self.model, name, through(f, getattr(self.model, name))) for name, f in own.items()])

    def _save(self, backup: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        part = path.with_name("part.weights.h5")
        type(self.model).save_weights(self.model, part)
        write(part, self._saved(backup))
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)

    def _load(self, backup: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        try:
            saved = read(path)
            type(self.model).load_weights(self.model, path, *args, **kwargs)
        except OSError as error:
            raise self._damaged(backup, error) from error
        self._restore(backup, saved)

    def _saved(self, backup: Any) -> Saved:
        arrays = [
            [np.asarray(keras.ops.convert_to_numpy(leaf)) for leaf in batch.leaves(data)]
            for data in self.windows.carried
        ]
        return Saved(backup._current_epoch, updates_of(self.model), self.windows.index, arrays)

    def _damaged(self, backup: Any, error: OSError) -> OSError:
        older = Path(backup._prev_weights_path)
        if older.exists() and not self.went_back:
            self.went_back = True
            logger.warning("%s BackupAndRestore goes back to the older one, %s.", error, older.name)
            return error
        return OSError(
            f"{error} There is no older one to go back to, which BackupAndRestore(double_checkpoint=True) keeps. "
            f"Remove {backup.backup_dir} to train from the beginning."
        )

    def _restore(self, backup: Any, saved: Saved | None) -> None:
        windows = self.windows
        windows.carried, windows.saved = [], []
        if saved is None:
            if windows.partial == "carry":
                logger.warning("The checkpoint was written without bigbatch: it holds no carried micro-batches.")
            return
        self.loaded = True
        windows.index, windows.saved = saved.window, saved.micro_batches
        place = f"update {saved.updates}, before epoch {saved.epoch + 1}"
        if self.went_back:
            logger.warning("Went back to %s.", place)
        metadata = Path(backup._training_metadata_path)
        epoch = _epoch(metadata)
        if epoch != saved.epoch:
            logger.warning("%s has epoch %s; the weights are of %s, where fit goes on.", metadata.name, epoch, place)
            _write_epoch(metadata, saved.epoch)


def _find_weights(backup: Any) -> None:
    """Restores the weights' file where a kill came between the removal of two files, as `fit` ends with it."""
    weights, older, metadata = map(
        Path, (backup._weights_path, backup._prev_weights_path, backup._training_metadata_path)
    )
    if weights.exists() or "://" in str(backup.backup_dir):
        return
    if older.exists():
        logger.warning("The checkpoint %s is gone; fit goes back to the older one, %s.", weights.name, older.name)
        part = weights.with_name("part.weights.h5")
        shutil.copyfile(older, part)
        part.replace(weights)
    elif metadata.exists():
        logger.warning("The checkpoint %s is gone; fit goes back to update 0.", weights.name)
        metadata.unlink()


def _epoch(metadata: Path) -> int | None:
    try:
        return json.loads(metadata.read_text())["epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_epoch(metadata: Path, epoch: int) -> None:
    part = metadata.with_name("part.json")
    part.write_text(json.dumps({"epoch": epoch, "batch": 0}))
    part.replace(metadata)
