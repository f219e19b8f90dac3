"""tf.train.Checkpoint and SavedModel, inside a window; a kill between any two file operations of a checkpoint."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.lib.io import file_io
from tensorflow.python.ops import gen_io_ops

import bigbatch.tensorflow as bb


class Training(tf.Module):
    """A dense and a sparse parameter, and the step that trains them."""

    def __init__(self, every=3):
        super().__init__()
        self.w = tf.Variable(tf.ones([4]))
        self.table = tf.Variable(tf.ones([9, 4]))
        self.acc = bb.Accumulator(tf.keras.optimizers.SGD(0.5, momentum=0.9), every=every)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)])
    def step(self, ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.linalg.matvec(tf.gather(self.table, ids), self.w) ** 2)
        variables = [self.w, self.table]
        gradients = tape.gradient(loss, variables)
        update = self.acc.apply_gradients(zip(gradients, variables, strict=True), items=tf.shape(ids)[0], loss=loss)
        return update.loss


IDS = [[1, 1, 2], [3, 1], [4, 5, 6, 6], [1, 2], [7], [8, 1, 1]]


def straight(upto=6):
    run = Training()
    return run, [float(run.step(ids)) for ids in IDS[:upto]]


@pytest.mark.parametrize("place", [0, 2, 5])  # at a window's edge, and inside of two
def test_a_checkpoint_goes_on_bit_for_bit(place, tmp_path):
    whole, losses = straight()
    before, _ = straight(place)
    path = tf.train.Checkpoint(run=before).write(str(tmp_path / "checkpoint"))
    after = Training()
    status = tf.train.Checkpoint(run=after).read(path)
    assert int(after.acc.pending) == place % 3
    assert [float(after.step(ids)) for ids in IDS[place:]] == losses[place:]
    np.testing.assert_array_equal(after.w, whole.w)
    np.testing.assert_array_equal(after.table, whole.table)
    if place:  # at 0 there are no sums to read
        status.assert_consumed()


def test_an_old_checkpoint_without_sums_over_a_run_that_has_some(tmp_path):
    path = tf.train.Checkpoint(run=Training()).write(str(tmp_path / "checkpoint"))
    run, _ = straight(5)
    tf.train.Checkpoint(run=run).read(path)
    run.acc.optimizer.variables[0].assign(0)
    for slot in run.acc.optimizer.variables[2:]:
        slot.assign(tf.zeros_like(slot))
    for ids in IDS[:3]:
        run.step(ids)
    np.testing.assert_array_equal(run.w, straight(3)[0].w)


def test_flushing_a_restored_window_needs_its_variables(tmp_path):
    path = tf.train.Checkpoint(acc=straight(2)[0].acc).write(str(tmp_path / "checkpoint"))
    run = Training()
    tf.train.Checkpoint(acc=run.acc).read(path)
    with pytest.raises(ValueError, match=r"The window was restored, but its sums wait"):
        run.acc.flush()
    assert int(run.acc.pending) == 2
    wanted, _ = straight(2)
    wanted.acc.flush()
    whole, after = straight(2)[0], Training()
    path = tf.train.Checkpoint(run=whole).write(str(tmp_path / "whole"))
    status = tf.train.Checkpoint(run=after).read(path)
    after.acc.build([after.w], sparse=[after.table])
    assert bool(after.acc.flush().made)
    status.assert_consumed()
    np.testing.assert_array_equal(after.w, wanted.w)
    np.testing.assert_array_equal(after.table, wanted.table)


def test_a_saved_model_goes_on_inside_a_window(tmp_path):
    whole, losses = straight()
    run, _ = straight(2)
    tf.saved_model.save(run, str(tmp_path / "model"))
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    assert [float(loaded.step(ids)) for ids in IDS[2:]] == losses[2:]
    np.testing.assert_array_equal(loaded.w, whole.w)
    np.testing.assert_array_equal(loaded.table, whole.table)


FILE_OPERATIONS = [
    (gen_io_ops, "save_v2"), (gen_io_ops, "merge_v2_checkpoints"), (file_io, "atomic_write_string_to_file"),
    (file_io, "write_string_to_file"), (file_io, "rename"), (file_io, "rename_v2"), (file_io, "delete_file"),
    (file_io, "delete_file_v2"), (file_io, "recursive_create_dir_v2"),
]  # fmt: skip


@pytest.mark.parametrize("kept", [1, 3])
def test_a_kill_between_any_two_file_operations_goes_on_bit_for_bit(kept, tmp_path, monkeypatch):
    """What a kill would leave is a copy of the folder as it is before and after each operation."""
    folder, killed = tmp_path / "run", []

    def watched(real):
        def operation(*args, **kwargs):
            for moment in ("before", "after"):
                copy = tmp_path / f"killed {len(killed)}"
                if folder.exists():
                    shutil.copytree(folder, copy)
                    killed.append(copy)
                if moment == "before":
                    result = real(*args, **kwargs)
            return result

        return operation

    run = Training()
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(run=run), str(folder), max_to_keep=kept)
    whole, losses = straight()
    saved = {}

    def step_and_save(place):
        run.step(IDS[place])
        reader = tf.train.load_checkpoint(manager.save())
        saved[place + 1] = {key: reader.get_tensor(key) for key in window_of(reader)}

    step_and_save(0)
    for owner, name in FILE_OPERATIONS:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    for place in (1, 2, 3):
        step_and_save(place)
    monkeypatch.undo()
    assert len(killed) >= 18, "at least three operations for each of three checkpoints"
    places = []
    for copy in killed:
        reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(copy)))
        # The checkpoint says where it is: updates of 3 micro-batches, and the open window's.
        index, pending = (reader.get_tensor(f"run/acc/{name}/{VALUE}") for name in ("_index", "_micro_batches"))
        place = 3 * int(index) + int(pending)
        for key, value in saved[place].items():
            np.testing.assert_array_equal(reader.get_tensor(key), value, err_msg=f"{copy}: {key}")
        if place not in places:
            again = Training()
            tf.train.Checkpoint(run=again).read(tf.train.latest_checkpoint(str(copy))).expect_partial()
            assert [float(again.step(ids)) for ids in IDS[place:]] == losses[place:]
            np.testing.assert_array_equal(again.w, whole.w)
            np.testing.assert_array_equal(again.table, whole.table)
        places.append(place)
    assert places == sorted(places)
    assert set(places) == {1, 2, 3, 4}


VALUE = ".ATTRIBUTES/VARIABLE_VALUE"


def window_of(reader):
    """The entries of the weights, of the optimizer and of the open window."""
    return [key for key in reader.get_variable_to_shape_map() if key.startswith("run/") and key.endswith(VALUE)]
