"""What `partial="carry"` holds between two epochs, kept beside the checkpoint of a `BackupAndRestore`."""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from bigbatch.keras import batch


def updates_of(model: Any) -> int:
    """How many updates the model's optimizer has made."""
    made: Any = keras.ops.convert_to_numpy(model.optimizer.iterations.value)
    return int(made)


class Carried(keras.callbacks.Callback):
    """Saves the carried micro-batches when `BackupAndRestore` saves the epoch, and hands them back when it restores.

    A file of plain arrays, and the number of updates: what it belongs to is the checkpoint with as many.
    """

    def __init__(self, windows: Any, callbacks: list[Any]):
        super().__init__()
        self.windows = windows
        self.paths = [
            Path(callback.backup_dir) / "carried_micro_batches.npz"
            for callback in callbacks
            if isinstance(callback, keras.callbacks.BackupAndRestore) and callback.save_freq == "epoch"
        ]

    def on_train_begin(self, logs: Any = None) -> None:
        """Goes on where the checkpoint was, which is restored by now."""
        self.windows.index = updates_of(self.model)
        for path in self.paths:
            if path.exists() and not self.windows.held:
                with np.load(path) as saved:
                    if saved["updates"] == self.windows.index:
                        rows: dict[str, list[np.ndarray]] = {}
                        for name in saved.files[1:]:
                            rows.setdefault(name.split(".")[0], []).append(saved[name])
                        self.windows.saved = list(rows.values())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves, after the checkpoint."""
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = {
                f"{i}.{j}": keras.ops.convert_to_numpy(leaf)
                for i, data in enumerate(self.windows.held)
                for j, leaf in enumerate(batch.leaves(data))
            }
            np.savez(path, updates=updates_of(self.model), **arrays)
