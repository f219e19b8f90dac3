"""What bigbatch.keras uses of Keras and its backends that is not public: each is there, and does what is relied on."""

import inspect
import json
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.backend.common import global_state
from keras.src.losses.loss import apply_mask
from keras.src.models import cloning
from keras.src.random import seed_generator
from keras.src.trainers.data_adapters import get_data_adapter

from bigbatch.keras import checkpoint, losses, randomness, stream, windows
from conformance.keras_driver import array
from conformance.keras_parity import BACKEND, data, float64, mlp


@pytest.fixture(autouse=True)
def _float64():
    float64()


def trained(**options):
    model = mlp(**options)
    model.train_on_batch(*data(8))
    return model


def masked(shape=(2, 3)):
    """Ones, with a mask that leaves out one step."""
    x = np.ones(shape)
    x[0, 2] = 0
    return keras.layers.Masking()(ops.convert_to_tensor(x[..., None])), x


def test_a_mask_is_read_from_its_tensor():
    y, x = masked()
    assert get_keras_mask(ops.ones((2,))) is None
    np.testing.assert_array_equal(array(get_keras_mask(y)), x == 1)


def test_a_mask_is_put_on_a_tensor():
    y = ops.ones((2,))
    set_keras_mask(y, ops.array([True, False]))
    np.testing.assert_array_equal(array(get_keras_mask(y)), [True, False])


def test_in_a_stateless_scope_a_regularizer_needs_the_variables_value():
    dense = keras.layers.Dense(2, kernel_regularizer="l2")
    dense.build((None, 2))
    with keras.StatelessScope([(dense.kernel, ops.ones((2, 2)))], collect_losses=True):
        assert len(dense.losses) == 1
        dense._clear_losses()


def test_ignore_class_leaves_a_mask_on_the_losses_values():
    ours = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    values = ours.call(ops.convert_to_tensor([0, -1]), ops.zeros((2, 3), "float64"))
    np.testing.assert_array_equal(array(get_keras_mask(values)), [True, False])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mask_becomes_weights_whose_sum_a_mean_divides_by(weighted):
    y, x = masked()
    mask = get_keras_mask(y)
    weight = np.array([[2.0] * 3, [3.0] * 3]) if weighted else np.ones((2, 3))
    reduction = "mean_with_sample_weight" if weighted else "sum_over_batch_size"
    given = ops.convert_to_tensor(weight) if weighted else None
    counted = array(apply_mask(given, mask, dtype="float64", reduction="sum"))
    np.testing.assert_allclose(counted, x * weight)
    target = np.arange(6.0).reshape(2, 3, 1)
    mean = keras.losses.MeanAbsoluteError(reduction=reduction)(ops.convert_to_tensor(target), y, sample_weight=given)
    values = np.abs(target[..., 0] - x)
    np.testing.assert_allclose(array(mean), (values * counted).sum() / counted.sum(), rtol=1e-12)


def test_a_compiled_loss_keeps_its_losses_and_calls_copies_of_them():
    model = trained(loss_weights=2.0)
    compiled = model._compile_loss
    assert [flat._fields for flat in compiled._flat_losses] == [("path", "loss", "loss_weights", "name")]
    assert compiled._flat_losses[0].loss_weights == 2.0
    assert isinstance(compiled._metrics, list)
    assert compiled.metrics is compiled._metrics
    called = []

    class Noting:
        name = "noting"

        def __call__(self, y, y_pred, sample_weight=None):
            called.append(y_pred)
            return ops.sum(y_pred)

    twin = losses._twin(compiled)
    twin._flat_losses = [compiled._flat_losses[0]._replace(loss=Noting())]
    one = ops.ones((1, 3))
    assert array(twin(one, one)) == 6
    assert len(called) == 1
    assert compiled._flat_losses[0].loss is not twin._flat_losses[0].loss


def test_a_loss_calls_the_call_of_its_own_dictionary():
    twin = losses._twin(keras.losses.MeanSquaredError())
    twin.call = lambda y, y_pred: y_pred * 7
    assert array(twin(ops.zeros((2,)), ops.ones((2,)))) == 7
    assert keras.losses.MeanSquaredError(reduction="mean").reduction == "mean"


def test_several_losses_have_one_metric_each_and_they_come_first_in_order():
    x = keras.Input((4,))
    model = keras.Model(x, [keras.layers.Dense(1, name=name)(x) for name in "ab"])
    model.compile("sgd", ["mse", "mae"])
    model.train_on_batch(data(8)[0], [np.ones((8, 1))] * 2)
    names = [metric.name for metric in model._compile_loss.metrics]
    assert names == ["a_loss", "b_loss"]
    assert [flat.name for flat in model._compile_loss._flat_losses] == ["a", "b"]


def test_the_models_own():
    model = trained(metrics=["mae"])
    assert isinstance(model._loss_tracker, keras.metrics.Mean)
    assert model._loss_tracker is model.metrics[0]
    assert keras.backend.is_float_dtype(model._loss_tracker.dtype)
    model._compile_metrics.update_state(ops.ones((2, 3)), ops.zeros((2, 3)))
    assert "mae" in model.get_metrics_result()
    assert set(model.layers) <= set(model._flatten_layers())
    assert model._call_has_training_arg is True
    assert array(model._aggregate_additional_loss(ops.ones((3,), "float64"))) == 3
    model._losses_override = [ops.ones(()) * 7]
    assert [array(value) for value in model.losses] == [7]
    model._losses_override = []
    assert model.losses == []


def test_a_metric_that_is_put_on_a_built_model_is_one_of_its_metrics():
    model = mlp()
    metric = keras.metrics.Mean(name="mine")
    model._metrics.append(metric)
    assert metric in model.metrics
    assert {id(v) for v in metric.variables} <= {id(v) for v in model.metrics_variables}
    assert "mine" in model.train_on_batch(*data(8), return_dict=True)


def test_what_a_layer_calls_is_found_on_the_instance():
    model = trained()
    called = []
    plain = model.layers[0].call
    model.layers[0].__dict__["call"] = lambda *args, **kwargs: called.append(kwargs) or plain(*args, **kwargs)
    model(data(2)[0], training=True)
    assert len(called) == 1
    assert keras.layers.Dropout(0.1)._call_has_training_arg is True


def test_losses_that_were_added_are_in_a_list_that_is_cleared():
    layer = keras.layers.ActivityRegularization(l2=1.0)
    layer(ops.ones((2, 2)))
    assert len(layer._losses) == 1
    layer._clear_losses()
    assert layer._losses == []


def test_the_generator_that_draws_without_a_seed_and_the_names_of_seeds():
    keras.utils.set_random_seed(3)
    assert global_state.get_global_attribute(randomness._GENERATOR) is None
    keras.random.normal((2,))
    generator = global_state.get_global_attribute(randomness._GENERATOR)
    assert generator is seed_generator.global_seed_generator()
    dropout = keras.layers.Dropout(0.1)
    assert [v.name for v in (generator.state, *dropout.variables)] == ["seed_generator_state"] * 2
    assert dropout.variables[0].shape == (2,)


def test_a_model_without_a_training_argument_says_so():
    class Plain(keras.Model):
        def call(self, x):
            return x

    assert Plain()._call_has_training_arg is False


def test_building_from_a_batch_makes_all_that_training_needs():
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("sgd", "mse", metrics=["mae"])
    model._symbolic_build(data_batch=tuple(map(ops.convert_to_tensor, data(2))))
    assert model.built
    assert model._compile_loss.built
    assert model._compile_metrics.built
    assert model.optimizer.built


def test_what_fit_builds_around_train_step_is_found_on_the_instance():
    model = trained()
    assert callable(model.train_function)
    made = []
    model.make_train_function = lambda force=False: made.append(force) or type(model).make_train_function(model, True)
    model.fit(*data(8), verbose=0)
    assert made
    assert "force" in inspect.signature(type(model).make_train_function).parameters
    assert model.steps_per_execution == 1


def test_fit_shows_its_iterator_to_a_method_and_counts_its_steps_afterwards():
    model, seen = trained(), []
    plain = getattr(model, stream.BUILD)

    def build(iterator=None, data_batch=None):
        plain(iterator=iterator, data_batch=data_batch)
        if iterator is not None:
            seen.append(iterator)
            assert iterator.data_adapter.num_batches == 3
            assert iterator.steps_per_epoch is None
            iterator.data_adapter = windows.InWindows(iterator.data_adapter, windows.Windows(2, "apply"), None)

    setattr(model, stream.BUILD, build)
    x, y = data(10)

    class Steps(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append(self.params["steps"])
            raise StopAsyncIteration  # before the first one

    with pytest.raises(StopAsyncIteration):
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[Steps()])
    assert seen[1:] == [2]


def test_where_the_backup_callback_keeps_what_and_its_epoch(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path, double_checkpoint=True, delete_checkpoint=False)
    trained().fit(*data(8), epochs=3, verbose=0, callbacks=[backup])
    paths = [Path(p) for p in (backup._weights_path, backup._training_metadata_path, backup._prev_weights_path)]
    names = ["latest.weights.h5", "training_metadata.json", "latest.weights.h5.bkp"]
    assert [path.relative_to(tmp_path).name for path in paths] == names
    assert all(path.exists() for path in paths)
    assert backup._current_epoch == json.loads(paths[1].read_text())["epoch"] == 3


def test_a_group_beside_keras_own_is_not_read_with_the_weights(tmp_path):
    model = trained()
    path = tmp_path / "some.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "a") as file:
        file.create_group(checkpoint.GROUP).attrs["epoch"] = 1
    model.load_weights(path)


def test_a_method_of_the_instances_own_dictionary_comes_first():
    model = trained()
    owners = [(model, "evaluate"), (model.optimizer, "apply"), (model.trainable_variables[0], "assign")]
    if BACKEND == "tensorflow":
        owners.append((model.trainable_variables[0].value, "assign_add"))
    for owner, method in owners:
        owner.__dict__[method] = lambda: 7
        assert getattr(owner, method)() == 7
        del owner.__dict__[method]
        assert callable(getattr(owner, method))


def test_arrays_have_a_data_adapter():
    adapter = get_data_adapter(
        *data(10), None, batch_size=4, steps_per_epoch=None, shuffle=False, class_weight=None
    )  # fmt: skip
    assert adapter.num_batches == 3


def test_a_model_is_cloned_by_one_module_that_asks_for_its_compile_config():
    model, seen = mlp(), []

    def get_compile_config():
        frame = sys._getframe(1)
        while frame is not None:
            seen.append(frame.f_globals)
            frame = frame.f_back
        return type(model).get_compile_config(model)

    model.get_compile_config = get_compile_config
    keras.models.clone_model(model)
    assert any(names is vars(cloning) for names in seen)


def test_what_a_layer_adds_is_added_by_the_method_of_its_own_dictionary():
    layer, added = keras.layers.ActivityRegularization(l2=1.0), []
    layer.__dict__["add_loss"] = added.append
    layer(ops.ones((2, 2)))
    assert len(added) == 1
    assert layer.losses == []


def test_a_variable_knows_its_regularizer():
    layer = keras.layers.Dense(2, kernel_regularizer="l2")
    layer.build((None, 3))
    assert [v.regularizer is not None for v in layer.trainable_weights] == [True, False]


if BACKEND == "jax":

    def test_a_variable_whose_value_is_taken_out_says_none():
        v = keras.Variable(np.ones(2))
        assert v._value is v.value
        v._value = None
        v.assign(np.zeros(2))
        np.testing.assert_array_equal(array(v), 0)


if BACKEND == "torch":

    def test_a_tensors_version_counts_the_writes_to_it():
        import torch

        p = torch.zeros(2)
        before = p._version
        p.add_(1)
        assert p._version == before + 1

    def test_the_foreach_functions_that_the_update_uses():
        import torch

        tensors = [torch.full((2,), 3.0), torch.full((2, 2), 2.0)]
        torch._foreach_mul_(tensors, torch.tensor(0.5))
        assert [t.max().item() for t in tensors] == [1.5, 1.0]
        assert [round(n.item(), 4) for n in torch._foreach_norm(tensors)] == [2.1213, 2.0]
