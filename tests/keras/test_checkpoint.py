"""A checkpoint of `BackupAndRestore` in a stream that carries micro-batches: killed anywhere, and damaged.

What a kill leaves is what lies in the folder between two file operations. So one training's folder is copied at each of
them, and each copy that differs from the others is resumed from.
"""

import shutil
import sys
import warnings

import h5py
import keras
import numpy as np
import pytest

import bigbatch.keras as bb
from bigbatch.keras import checkpoint
from conformance.keras_driver import array
from conformance.keras_parity import data, float64, mlp

EPOCHS = 3
LISTENING = []


def _heard(event, args):
    # Rename, remove, copy, mkdir, open: what Python does to files.
    if LISTENING and (event == "open" or event.startswith(("os.", "shutil."))):
        LISTENING[0]()


sys.addaudithook(_heard)


@pytest.fixture(autouse=True)
def _float64():
    float64()


def made(every=4):
    return bb.accumulate(mlp(), every=every, partial="carry")


def arguments():
    """11 micro-batches of 2 in windows of 4: the epochs make 2, 3 and 3 updates, and leave 3, 2 and 1 over."""
    x, y = data(22)
    return {"x": x, "y": y, "batch_size": 2, "epochs": EPOCHS, "shuffle": False, "verbose": 0}


def values(model):
    return [array(v) for v in [*model.variables, *model.optimizer.variables] if "seed" not in v.path]


@pytest.fixture
def straight():
    model = made()
    model.fit(**arguments())
    return values(model)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} if folder.exists() else {}


class Snapshots:
    """The folder as it was at each file operation, and with each file cut short that was written in its place."""

    def __init__(self, folder):
        self.folder, self.states = folder, []

    def take(self):
        LISTENING.clear()  # reading is not listened to
        now = contents(self.folder)
        before = self.states[-1] if self.states else now
        for name in now:
            renamed = any(before[other] == now[name] and other not in now for other in before)
            if now[name] != before.get(name) and not renamed:
                self.states += [{**now, name: now[name][:n]} for n in (0, len(now[name]) // 2)]
        if now not in self.states:
            self.states.append(now)
        LISTENING.append(self.take)

    def __enter__(self):
        LISTENING.append(self.take)
        return self

    def __exit__(self, *error):
        self.take()
        LISTENING.clear()


def resumed(folder, state, monkeypatch, model=None, **options):
    """The values after a training that finds this in its folder, and what was said."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in state.items():
        (folder / name).write_bytes(content)
    said = []
    monkeypatch.setattr(checkpoint.logger, "warning", lambda text, *args: said.append(text % args))
    model = model or made()
    model._initial_epoch = None
    model.fit(**arguments(), callbacks=[keras.callbacks.BackupAndRestore(folder, **options)])
    return values(model), said


@pytest.mark.parametrize("options", [{}, {"double_checkpoint": True}])
def test_a_kill_between_any_two_file_operations(tmp_path, monkeypatch, straight, options):
    class Listening(keras.callbacks.Callback):
        """Before the callback in the list, and after it."""

        def __init__(self, begins):
            super().__init__()
            self.begins = begins

        def on_epoch_end(self, epoch, logs=None):
            if epoch >= 1:
                snapshots.__enter__() if self.begins else snapshots.__exit__()

        def on_train_end(self, logs=None):
            snapshots.__enter__() if self.begins else snapshots.__exit__()

    folder = tmp_path / "backup"
    snapshots = Snapshots(folder)
    backup = keras.callbacks.BackupAndRestore(folder, **options)
    model = made()
    model.fit(**arguments(), callbacks=[Listening(True), backup, Listening(False)])
    assert all(np.array_equal(a, b) for a, b in zip(values(model), straight, strict=True))
    states = snapshots.states
    assert len(states) > 8
    assert {} in states  # the end removes everything
    assert any("part.weights.h5" in state for state in states)
    for i, state in enumerate(states):
        # What is restored must not need a new model; compiling one each time would take long.
        restores = any(name.startswith("latest.weights.h5") for name in state)
        ended, said = resumed(folder, state, monkeypatch, model if restores else None, **options)
        for a, b in zip(ended, straight, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{i}: {sorted(state)}, {said}")


def stopped(folder, epochs=2, **options):
    """The folder of a training that was killed after so many epochs."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == epochs:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made().fit(**arguments(), callbacks=[keras.callbacks.BackupAndRestore(folder, **options), Stop()])
    return contents(folder)


def test_a_damaged_checkpoint_goes_back_to_the_older_one_and_says_to_which_update(tmp_path, monkeypatch, straight):
    folder = tmp_path / "backup"
    state = stopped(folder, double_checkpoint=True)
    state["latest.weights.h5"] = state["latest.weights.h5"][:-300]
    ended, said = resumed(folder, state, monkeypatch, double_checkpoint=True)
    assert all(np.array_equal(a, b) for a, b in zip(ended, straight, strict=True))
    assert "cannot be read" in said[0]
    assert "Went back to update 2, before epoch 2." in said[1]


def test_a_damaged_checkpoint_without_an_older_one_says_what_to_do_and_moves_nothing(tmp_path):
    folder = tmp_path / "backup"
    state = stopped(folder)
    state["latest.weights.h5"] = state["latest.weights.h5"][:-300]
    start = values(made())
    (folder / "latest.weights.h5").write_bytes(state["latest.weights.h5"])
    model = made()
    with pytest.raises(OSError, match=r"latest.weights.h5 cannot be read.*double_checkpoint=True.*Remove .*backup"):
        model.fit(**arguments(), callbacks=[keras.callbacks.BackupAndRestore(folder)])
    assert all(np.array_equal(a, b) for a, b in zip(values(model)[: len(start)], start, strict=False))


@pytest.mark.parametrize("damage", ["a count", "an array's length", "an array less", "a negative count", "a shape"])
def test_what_the_file_holds_is_checked_whole_before_anything_is_touched(tmp_path, damage):
    folder = tmp_path / "backup"
    stopped(folder)
    with h5py.File(folder / "latest.weights.h5", "a") as file:
        group = file[checkpoint.GROUP]
        if damage == "a count":
            del group.attrs["updates"]
        elif damage == "a negative count":
            group.attrs["window"] = -1
        elif damage == "an array's length":
            del group["0/1"]
            group["0"].create_dataset("1", data=np.zeros((1, 3)))
        elif damage == "an array less":
            del group["0/0"]
        else:
            group["0/0"].attrs["shape"] = (5, 5)
    model = made()
    start = values(model)
    with pytest.raises(OSError, match="cannot be read"):
        model.fit(**arguments(), callbacks=[keras.callbacks.BackupAndRestore(folder)])
    assert all(np.array_equal(a, b) for a, b in zip(values(model)[: len(start)], start, strict=False))


def test_other_data_than_the_checkpoints(tmp_path):
    stopped(tmp_path)
    other = {**arguments(), "sample_weight": np.ones(22)}
    with pytest.raises(
        ValueError, match=r"come from other data\. Received: arrays of float64 \(2, 4\), float64 \(2, 3\) in"
    ):
        made().fit(**other, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])


def test_a_checkpoint_that_plain_keras_wrote(tmp_path, monkeypatch):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    folder = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        mlp().fit(**arguments(), callbacks=[keras.callbacks.BackupAndRestore(folder), Stop()])
    _, said = resumed(folder, contents(folder), monkeypatch)
    assert said == ["The checkpoint was written without bigbatch: it holds no carried micro-batches."]


def test_arrays_of_every_kind_come_back_as_they_were(tmp_path):
    path = tmp_path / "some.weights.h5"
    with h5py.File(path, "w"):
        pass
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.array([[True], [False]]),
        np.array([3, -4], "int8"),
        np.array([b"one", "zwölf".encode()], object),
        np.ones((2, 2), "bfloat16" if "bfloat16" in np.sctypeDict else "float16"),
    ]
    checkpoint.write(path, checkpoint.Saved(1, 2, 3, [arrays, arrays]))
    saved = checkpoint.read(path)
    assert saved[:3] == (1, 2, 3)
    for back in saved.micro_batches:
        for a, b in zip(arrays, back, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_what_is_saved_otherwise_says_that_it_leaves_the_carried_out(tmp_path):
    model = made()
    epoch = {**arguments(), "epochs": 1}
    with pytest.warns(UserWarning, match=r"model\.save: the micro-batches that partial=\"carry\" holds are not in"):
        model.fit(**epoch, callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "m.keras")])
    with pytest.warns(UserWarning, match=r"model\.save_weights: .* are not in the file"):
        model.save_weights(tmp_path / "m.weights.h5")
    with pytest.warns(UserWarning, match=r"model\.load_weights: .* stay: the next window begins with them"):
        model.load_weights(tmp_path / "m.weights.h5")
    plain = bb.accumulate(mlp(), every=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain.fit(**epoch, callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "m.keras")])
    bb.accumulate(model, None)
    assert {"save", "save_weights", "load_weights"}.isdisjoint(vars(model))


def test_a_checkpoint_far_away_is_refused_where_it_cannot_be_renamed():
    with pytest.raises(ValueError, match="needs a local backup_dir"):
        made().fit(**arguments(), callbacks=[keras.callbacks.BackupAndRestore("gs://bucket/run")])


def test_a_skipped_window_counts_in_every_after_resuming(tmp_path):
    """`every` is asked with the window's index, which a window that is not finite has too."""
    x, y = data(22)
    y[0] = np.inf

    def fit(model, *callbacks):
        model.fit(**{**arguments(), "x": x, "y": y, "epochs": 2}, callbacks=list(callbacks))
        return values(model)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def grow(window):
        return 2 + window

    expected = fit(made(grow))
    with pytest.raises(KeyboardInterrupt):
        fit(made(grow), keras.callbacks.BackupAndRestore(tmp_path), Stop())
    ended = fit(made(grow), keras.callbacks.BackupAndRestore(tmp_path))
    assert all(np.array_equal(a, b) for a, b in zip(ended, expected, strict=True))
