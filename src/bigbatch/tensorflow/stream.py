"""The stream API: your loader yields micro-batches, and bigbatch takes the place of the optimizer."""

import contextlib
import math
from collections.abc import Iterable
from typing import Any, Literal

import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_ordering import after
from bigbatch.engines.tensorflow_sparse import Gradient
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.every import Every, as_every
from bigbatch.noise import NoiseScale, UntilNoise
from bigbatch.tensorflow.checks import (
    COUNT,
    as_items,
    check_dtype,
    check_loss,
    check_optimizer,
    check_pairs,
    check_planned,
    check_steps,
    checked,
    not_items,
    require,
)
from bigbatch.tensorflow.closing import close, close_if_full, report
from bigbatch.tensorflow.noise import Meter
from bigbatch.tensorflow.state import State
from bigbatch.tensorflow.update import CARRIED, CUT_SHORT, DROPPED, OPEN
from bigbatch.tensorflow.update import Update as Update
from bigbatch.tensorflow.window import fused


class Accumulator(State):
    """Makes one update of `optimizer` from the gradients of many micro-batches.

    It takes the optimizer's place in a training step, inside a `tf.function` or outside::

        acc = bb.Accumulator(optimizer, every=64)

        @tf.function
        def train_step(x, y):
            with tf.GradientTape() as tape:
                loss = loss_fn(y, model(x, training=True))
            grads = tape.gradient(loss, model.trainable_variables)
            return acc.apply_gradients(zip(grads, model.trainable_variables), items=tf.shape(x)[0], loss=loss)

        for x, y in dataset:
            update = train_step(x, y)
        acc.flush()

    The update is the big batch's: the mean over all items, and clipping, weight decay, schedule and EMA, which are
    the optimizer's own, once. Its state is `tf.Variable`s, made at the first call: `tf.train.Checkpoint(acc=acc, …)`
    and SavedModel keep it, inside a window too.

    Under a `tf.distribute` strategy, make it inside `strategy.scope()` and call `apply_gradients` in `strategy.run`.
    The mean is over the items of all replicas, which may be unequal, and clipping is of the mean. The optimizer must
    sum gradients over replicas, as Keras's do; it does so once a window.

    Args:
        optimizer: a Keras optimizer, or anything with `apply_gradients`.
        every: when a window closes. A number of micro-batches; a callable that takes the update's index, an int64
            scalar tensor, and returns one (batch-size warm-up); `bb.items(4096)`; or `bb.until_noise(at_most=256)`.
            Replicas run side by side: each call of `strategy.run` is one micro-batch.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 variables add up in float32
            and are rounded once, for the optimizer. None adds up in the variables' own dtype.
        partial: what `flush` does with a window that is not full: "apply" makes the update from what is there,
            "carry" keeps it open, "drop" forgets it.
        nonfinite: what becomes of a window whose gradient is inf or NaN: "skip" makes no update, "apply" applies it.
            A `LossScaleOptimizer` is always shown it, for it lowers its scale and skips the update itself.
        noise: measures the gradient noise scale, for `noise_scale` and the `noise` of an Update. True measures one
            window in twenty, an integer n one in n; `until_noise` measures every window. Not under a strategy.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        optimizer: Any,
        every: Every | UntilNoise,
        *,
        dtype: Any = tf.float32,
        partial: Literal["apply", "carry", "drop"] = "apply",
        nonfinite: Literal["skip", "apply"] = "skip",
        noise: bool | int = False,
        name: str | None = None,
    ):
        errors.check_choice("nonfinite", nonfinite, ("skip", "apply"))
        check_optimizer(optimizer, nonfinite)
        every = every if isinstance(every, UntilNoise) else as_every(every)
        dtype, meter = check_dtype(dtype), Meter.where_asked(every, noise)
        errors.check_choice("partial", partial, ("apply", "carry", "drop"))
        super().__init__(optimizer, every, dtype, nonfinite, meter, name)
        self.partial = partial

    @property
    def noise_scale(self) -> NoiseScale:
        """The running gradient noise scale, of the windows that were measured. The host waits for the device.

        Raises:
            ValueError: the Accumulator measures none.
        """
        if self._meter is None:
            raise ValueError("The Accumulator measures no noise. Pass noise=True when it is made.")
        return self._meter.scale()

    def build(self, variables: Iterable[Any], sparse: Iterable[Any] = ()) -> None:
        """Makes the sums for these variables, and the optimizer's own state, before the first call makes them.

        Needed to `flush` a window that was restored before anything was fed, and where a variable's gradient is
        missing in the first micro-batch that is traced and not in others. A variable that is built and gets no
        gradient counts as having had a gradient of zero.

        Args:
            variables: those that will get dense gradients.
            sparse: those that will get `tf.IndexedSlices`, such as embeddings.
        """
        kinds = [(v, False) for v in variables] + [(v, True) for v in sparse]
        self._build_optimizer([v for v, _ in kinds])
        self._grow(kinds)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], *, items: Any, loss: Any = None) -> Update:
        """Takes one micro-batch in, and makes the update if that fills the window.

        Args:
            grads_and_vars: pairs of a micro-batch's mean gradient and its variable, as for the optimizer. A gradient
                that is None counts as zero, unless it is None in every micro-batch: then the optimizer never sees it.
            items: what the mean is over: a number of examples or tokens above zero, or a tensor of one element.
            loss: the micro-batch's mean loss, for the window's in the Update.

        Returns:
            An Update; its `closed` says whether this micro-batch filled the window.

        Raises:
            TypeError, ValueError: an argument is not as described.
            tf.errors.InvalidArgumentError: a tensor of `items` is not above zero and finite; the window and all
                variables are as they were. XLA makes no such check; a window without items is skipped there.

        Outside a `tf.function` this runs in one of its own, traced once. The host never waits for the device.
        In a graph on a CPU, operations that have read a product with a large transposed matrix, such as the gradient of
        a dense layer's inputs, then read it computed without the transposition: the same but for the order of sums.
        """
        pairs = check_pairs(grads_and_vars)
        items = as_items(items)
        loss = None if loss is None else check_loss(loss)
        self._check_strategy()
        check_steps(self.optimizer)
        if callable(self.every) and self._host.planned is None:
            self._host.planned = check_planned(self.every)
        self._build_optimizer([v for _, v in pairs])
        pairs = [(g, v) for g, v in pairs if g is not None]
        made, traced = len(self._sums), self._host.traced
        try:
            self._grow([(v, isinstance(g, tf.IndexedSlices)) for g, v in pairs])
            places = tuple(self._host.places[id(v)] for _, v in pairs)
            gradients = [g for g, _ in pairs]
            if tf.executing_eagerly() and not self._distributed:
                with tf.init_scope():  # a tape that is open would record it
                    return self._host.graph(self._take)(gradients, places, items, loss)
            self._host.traced |= not tf.executing_eagerly()
            return self._take(gradients, places, items, loss)
        except Exception:
            self._forget(made, traced)
            raise

    def flush(self) -> Update | None:
        """Ends a window that is not full, as `partial` says: at the end of an epoch, or of the data.

        Returns:
            None where nothing was pending; inside a `tf.function`, an Update of no micro-batches. Otherwise the
            Update; with `partial` "carry" or "drop", one that was skipped and says so.
        """
        if not tf.executing_eagerly():
            return self._flush()
        held = int(tf.convert_to_tensor(self._micro_batches))
        if held == 0:
            return None
        if held < 0:
            self.reset()
            raise RuntimeError(CUT_SHORT)
        if not self._sums:
            raise ValueError(
                "The window was restored, but its sums wait for the variables that they belong to. "
                "Call build(variables) before flush."
            )
        return self._host.graph(self._flush)()

    def _check_strategy(self) -> None:
        if tf.distribute.has_strategy() and not self._distributed:
            raise ValueError(
                "The Accumulator was made outside the strategy it is used under. "
                f"Received: {type(tf.distribute.get_strategy()).__name__}. Make it inside strategy.scope()."
            )

    def _take(self, gradients: list[Gradient], places: tuple[int, ...], items: tf.Tensor, loss: Any) -> Update:
        # Without the control dependencies of the caller: a step that waits for a gradient cannot come before it.
        with tf.control_dependencies(None):
            several = self._micro_batches > 0
        items, held = self._admitted(items)
        with tf.control_dependencies([items]):
            first = tf.equal(held, 0)
            opened = tf.cond(first, self._open, lambda: tf.constant(True))
        # The replicas' sums are added up, so all have the same unit.
        unit = tf.ones((), COUNT) if self._distributed else tf.where(first, items, self._unit)
        weight = items / unit
        loss = math.nan if loss is None else tf.cast(tf.reshape(loss, ()), COUNT)
        with after(opened):
            taken = [] if self._distributed else [self._unit.assign(unit, read_value=False)]
            taken += [self._sums[p].add(g, weight) for g, p in zip(gradients, places, strict=True)]
            taken.append(self._items.assign_add(items, read_value=False))
            if self._meter is not None:
                taken.append(self._meter.take(gradients, items, first, self._index))
            taken.append(self._loss.assign_add(weight * loss, read_value=False))
        if fused is not None and self.every != 1 and not self._distributed and not under_xla():
            with tf.control_dependencies(None):
                # Not in a window's first micro-batch, so that a flushed window of one is the plain step bit for bit.
                fused.with_fast_products(tf.compat.v1.get_default_graph(), several, [])
        if self._distributed:
            return tf.distribute.get_replica_context().merge_call(self._advance_all, args=(items,))
        with after(*taken):
            return self._ended(close_if_full(self, held + 1), held + 1)

    def _admitted(self, items: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The micro-batch's items, and how many micro-batches the window holds before it.

        Nothing that is computed from either runs where the items are no count, or where the last call was cut short:
        its micro-batch may be half in the sums. A call makes the number of micro-batches negative until it has ended.
        """
        held = tf.identity(self._micro_batches)
        if self._distributed or under_xla():
            return checked(items), held
        count = tf.cast(tf.reshape(items, ()), COUNT)
        good = tf.math.is_finite(count) & (count > 0) & (held >= 0)

        def wrong() -> tf.Tensor:
            text = tf.cond(held < 0, lambda: tf.constant(CUT_SHORT), lambda: not_items(items))
            with after(self._micro_batches.assign(tf.maximum(held, 0), read_value=False)):
                return tf.identity(text)

        with tf.control_dependencies([require(good, wrong)]):
            mark = self._micro_batches.assign(-1 - held, read_value=False)
        with after(mark):
            return tf.identity(count), tf.identity(held)

    def _advance_all(self, strategy: tf.distribute.Strategy, items: Any) -> Update:
        """Counts the micro-batch once for all replicas, and closes the window if that filled it."""
        with tf.control_dependencies(strategy.experimental_local_results(items)):
            held = self._micro_batches + 1
        # Not in `_open`: no replica may write to a shared variable inside a conditional.
        noted = tf.cond(tf.equal(held, 1), self._note, lambda: tf.constant(True))
        with after(noted):
            return self._ended(close_if_full(self, held), held)

    def _ended(self, update: Update, held: tf.Tensor) -> Update:
        """The last step of a call: notes that the window holds so many micro-batches, or none if it is closed."""
        with tf.control_dependencies([update.outcome]):
            left = (update.outcome == OPEN) | (update.outcome == CARRIED)
            counted = self._micro_batches.assign(tf.where(left, held, tf.zeros_like(held)), read_value=False)
        with after(counted):
            return update._replace(outcome=tf.identity(update.outcome))

    def _flush(self) -> Update:
        if self._distributed and not tf.distribute.in_cross_replica_context() and tf.distribute.has_strategy():
            return tf.distribute.get_replica_context().merge_call(lambda _: self._flush())
        with self._strategy.scope() if self._distributed else contextlib.nullcontext():
            held = tf.identity(self._micro_batches)
            return tf.cond(tf.equal(held, 0), lambda: report(self, OPEN, held), lambda: self._flush_some(held))

    def _flush_some(self, held: tf.Tensor) -> Update:
        def wrong() -> tf.Tensor:
            with after(self._micro_batches.assign(0, read_value=False)):
                return tf.constant(CUT_SHORT)

        with tf.control_dependencies([require(held > 0, wrong)]):
            marked = None if self._distributed else self._micro_batches.assign(-held, read_value=False)
        with after(marked):
            if self.partial == "apply":
                return self._ended(close(self, held), held)
            return self._ended(report(self, CARRIED if self.partial == "carry" else DROPPED, held), held)
