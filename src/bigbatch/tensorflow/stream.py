"""The stream door: your loader yields micro-batches, and bigbatch stands where TensorFlow applies a gradient."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_ordering import after, done, in_turn
from bigbatch.engines.tensorflow_sparse import Gradient, cast
from bigbatch.every import Every, Items, as_every
from bigbatch.fused.tensorflow_transposes import with_fast_products
from bigbatch.noise import NoiseScale, UntilNoise, one_in
from bigbatch.tensorflow import distributed
from bigbatch.tensorflow.accumulators import LOCAL, DenseSum, SparseSum, kind, widened
from bigbatch.tensorflow.checks import (
    COUNT,
    as_items,
    check_dtype,
    check_loss,
    check_optimizer,
    check_pairs,
    check_steps,
    checked,
    not_items,
    require,
    scales_losses,
    under_xla,
    words,
)
from bigbatch.tensorflow.guard import Guard
from bigbatch.tensorflow.noise import Meter, WindowNoise, looked_at, nothing
from bigbatch.tensorflow.seal import Seal, check_sum
from bigbatch.tensorflow.update import CARRIED, CUT_SHORT, DROPPED, EMPTY, MADE, MOVED, NOT_FINITE, NOT_ITEMS, OPEN
from bigbatch.tensorflow.update import Update as Update


class Accumulator(tf.Module):
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
        super().__init__(name=name)
        self.nonfinite = errors.check_choice("nonfinite", nonfinite, ("skip", "apply"))
        check_optimizer(optimizer, nonfinite)
        self.optimizer = optimizer
        self.every = every if isinstance(every, UntilNoise) else as_every(every)
        self.dtype = check_dtype(dtype)
        self.partial = errors.check_choice("partial", partial, ("apply", "carry", "drop"))
        self._distributed = tf.distribute.has_strategy()
        self._strategy = tf.distribute.get_strategy()
        once = {"trainable": False, "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA}
        self._index = tf.Variable(tf.zeros((), tf.int64), **once)
        self._micro_batches = tf.Variable(tf.zeros((), tf.int64), **once)
        self._unit = tf.Variable(tf.ones((), COUNT), trainable=False)
        self._items = tf.Variable(tf.zeros((), COUNT), **LOCAL)
        self._loss = tf.Variable(tf.zeros((), COUNT), **LOCAL)
        self._sums = []
        self._meter = Meter(every, noise) if isinstance(every, UntilNoise) or one_in(noise) else None
        if self._meter is not None and self._distributed:
            raise ValueError(
                "The noise scale is not measured under a tf.distribute strategy: only the optimizer sees the gradient "
                "of all replicas. Leave noise and until_noise out, or measure on one device."
            )
        self._guard = Guard(**once)
        self._seal = Seal(self._state)
        self._host = _Host()
        self._trace_again()

    @property
    def pending(self) -> tf.Tensor:
        """How many micro-batches the open window holds, an int64 scalar."""
        return tf.maximum(tf.convert_to_tensor(self._micro_batches), 0)

    @property
    def index(self) -> tf.Tensor:
        """How many updates have been made, and so the index of the next, an int64 scalar."""
        return tf.convert_to_tensor(self._index)

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
            loss: the micro-batch's mean loss, if the window's is wanted.

        Returns:
            An Update; its `closed` says whether this micro-batch filled the window.

        Raises:
            TypeError, ValueError: an argument is not as described.
            tf.errors.InvalidArgumentError: a tensor of `items` is not above zero and finite; the window and all
                variables are as they were. XLA makes no such check; a window without items is skipped there.

        Outside a `tf.function` this runs in one of its own, traced once. The host never waits for the device.
        In a graph on a CPU, what has read products of large matrices turned over, as gradients of dense layers' inputs
        are, reads them computed the other way round from here on: the same numbers but for the order of their sums.
        """
        pairs = check_pairs(grads_and_vars)
        items = as_items(items)
        loss = None if loss is None else check_loss(loss)
        self._check_strategy()
        check_steps(self.optimizer)
        self._check_every()
        self._build_optimizer([v for _, v in pairs])
        pairs = [(g, v) for g, v in pairs if g is not None]
        made, traced = len(self._sums), self._host.traced
        try:
            self._grow([(v, isinstance(g, tf.IndexedSlices)) for g, v in pairs])
            places = tuple(self._host.places[id(v)] for _, v in pairs)
            gradients = [g for g, _ in pairs]
            if tf.executing_eagerly() and not self._distributed:
                with tf.init_scope():  # a tape that is open would record it
                    return self._host.take(gradients, places, items, loss)
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
        return self._host.flush()

    def reset(self) -> None:
        """Forgets the open window. Its sums are set to zero when the next one opens."""
        self._micro_batches.assign(0)

    def _check_strategy(self) -> None:
        if tf.distribute.has_strategy() and not self._distributed:
            raise ValueError(
                "The Accumulator was made outside the strategy it is used under. "
                f"Received: {type(tf.distribute.get_strategy()).__name__}. Make it inside strategy.scope()."
            )

    def _build_optimizer(self, variables: list[Any]) -> None:
        """Keras optimizers make their slots here: inside the conditional would be too late."""
        if getattr(self.optimizer, "built", True):
            return
        self._lifted(lambda: self.optimizer.build(variables))

    def _check_every(self) -> None:
        """A function's answer has a shape and a dtype before it has a value; a wrong one would abort the process."""
        if not callable(self.every) or self._host.planned is not None:
            return
        with tf.init_scope():
            planned = tf.function(self.every).get_concrete_function(tf.TensorSpec((), tf.int64))
        answer = planned.structured_outputs
        if not tf.is_tensor(answer) or not answer.dtype.is_integer or answer.shape.rank not in (0, None):
            errors.check_every(answer)  # says what it may be
        self._host.planned = planned

    def _forget(self, made: int, traced: bool) -> None:
        """After an error: the sums that the call made are gone, and with them the graphs that know them."""
        if len(self._sums) > made:
            for v in self._host.variables[made:]:
                del self._host.places[id(v)]
            del self._host.variables[made:]
            self._sums = self._sums[:made]  # a list that shrinks in place could not be saved any more
            self._host.traced = traced
            self._trace_again()

    def _grow(self, kinds: list[tuple[Any, bool]]) -> None:
        """Makes sums for the variables that have none yet; with each comes whether its gradient is sparse."""
        new = [(v, sparse) for v, sparse in kinds if id(v) not in self._host.places]
        if not new:
            return
        if self._host.traced:
            raise ValueError(
                f"{new[0][0].name} had no gradient when apply_gradients was first traced, and has one now. "
                "Graphs traced before would leave it out. Call build(variables) before the first apply_gradients."
            )
        xla = under_xla()

        def make() -> None:
            for v, sparse in new:
                made = DenseSum if self._distributed else kind(v, sparse and not xla)
                with contextlib.nullcontext() if self._distributed else tf.device(v.handle.device):
                    one = made(tf.TensorShape(v.shape), widened(v.dtype, self.dtype))
                if len(self._sums) < len(self._seal.sums):
                    check_sum(len(self._sums), self._seal.sums[len(self._sums)], _described(one))
                self._host.places[id(v)] = len(self._sums)
                self._host.variables.append(v)
                self._sums.append(one)
            self._trace_again()

        self._lifted(make)

    def _lifted(self, make: Callable[[], None]) -> None:
        """Makes variables outside the graph that is being traced, and across replicas."""

        def lifted(strategy: tf.distribute.Strategy | None = None) -> None:
            with tf.init_scope(), strategy.scope() if strategy else contextlib.nullcontext():
                make()

        if self._distributed and not tf.distribute.in_cross_replica_context():
            tf.distribute.get_replica_context().merge_call(lifted)
        else:
            lifted()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of itself. The host waits."""
        counts = {
            name: int(tf.convert_to_tensor(v))
            for name, v in (("index", self._index), ("micro_batches", self._micro_batches))
        }
        values = {"items": self._items, "unit": self._unit, "loss": self._loss}
        counts |= {name: float(tf.convert_to_tensor(v)) for name, v in values.items()}
        return counts | {"sums": [_described(one) for one in self._sums]}

    def _take(self, gradients: list[Gradient], places: tuple[int, ...], items: tf.Tensor, loss: Any) -> Update:
        # Free of what the call may stand under: a step that waits for a gradient cannot come before that gradient.
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
        if self.every != 1 and not self._distributed and not under_xla():
            with tf.control_dependencies(None):
                # A window's first micro-batch stays as it is, so that a flushed window of one is the plain step.
                with_fast_products(tf.compat.v1.get_default_graph(), several, [])
        if self._distributed:
            return tf.distribute.get_replica_context().merge_call(self._advance_all, args=(items,))
        with after(*taken):
            return self._advance(held + 1)

    def _admitted(self, items: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The micro-batch's items, and how many micro-batches the window holds before it.

        Nothing that is computed from either runs where the items are no count, or where the last call was cut short:
        its micro-batch may be half in the sums. A call marks the window with a negative number until it has ended.
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
        with tf.control_dependencies(strategy.experimental_local_results(items)):
            held = self._micro_batches + 1
        # Not in `_open`: no replica may write what all share inside a conditional.
        noted = tf.cond(tf.equal(held, 1), self._note, lambda: tf.constant(True))
        with after(noted):
            return self._advance(held)

    def _advance(self, held: tf.Tensor) -> Update:
        """Closes the window if the micro-batch filled it: across replicas, where a cond may merge."""
        if under_xla() and not self._distributed:
            update = self._close_in_place(held)
        else:
            close = functools.partial(self._close if self._distributed else self._close_elsewhere, held)
            update = tf.cond(self._full(held), close, lambda: self._report(OPEN, held))
        return self._ended(update, held)

    def _ended(self, update: Update, held: tf.Tensor) -> Update:
        """The last that a call does: the window holds so many micro-batches, or none if that closed it."""
        with tf.control_dependencies([update.outcome]):
            left = (update.outcome == OPEN) | (update.outcome == CARRIED)
            counted = self._micro_batches.assign(tf.where(left, held, tf.zeros_like(held)), read_value=False)
        with after(counted):
            return update._replace(outcome=tf.identity(update.outcome))

    def _close_in_place(self, held: tf.Tensor) -> Update:
        """`_close`, if the window is full. XLA copies what a conditional's branch leaves as it is, and no loop's."""
        still_open = self._report(OPEN, held)
        parts = {name: part for name, part in still_open._asdict().items() if part is not None}

        def close(full: tf.Tensor, parts: dict[str, Any]) -> tuple[tf.Tensor, dict[str, Any]]:
            update = self._close(held)._asdict()
            return tf.zeros_like(full), {name: update[name] for name in parts}

        _, parts = tf.while_loop(lambda full, _: full, close, (self._full(held), parts))
        return still_open._replace(**parts)

    def _close_elsewhere(self, held: tf.Tensor) -> Update:
        """`_close` as one operation. TensorFlow visits every operation of a conditional's branch that is not taken."""
        return tf.function(self._close, experimental_attributes={"_noinline": True})(held)

    def _open(self) -> tf.Tensor:
        """Zeros are assigned when a window opens: whatever stood there, a NaN or an old checkpoint's, is gone."""
        cleared = [one.clear() for one in self._sums]
        counts = [self._items.assign(0, read_value=False), self._loss.assign(0, read_value=False)]
        noted = None
        if self._may_be_disturbed() and not self._distributed:
            note: Any = self._note
            noted = note() if under_xla() else tf.function(note, experimental_attributes={"_noinline": True})()
        return done(cleared, counts, noted)

    def _note(self) -> tf.Tensor:
        return done(self._guard.open(self.optimizer, self._host.variables, self._dense()))

    def _may_be_disturbed(self) -> bool:
        """A window of one opens and closes in one call."""
        return self.every != 1

    def _dense(self) -> list[bool]:
        return [isinstance(one, DenseSum) for one in self._sums]

    def _full(self, held: tf.Tensor) -> tf.Tensor:
        if isinstance(self.every, UntilNoise):
            full = held >= self.every.at_most
            look = tf.logical_and(looked_at(self.every, held), tf.logical_not(full))
            every = self.every
            return tf.logical_or(full, tf.cond(look, lambda: self._is_enough(every, held), lambda: tf.constant(False)))
        if isinstance(self.every, Items):
            return tf.convert_to_tensor(self._items) >= tf.constant(self.every.count, COUNT)
        if not callable(self.every):
            return held >= self.every
        plan: Any = self._host.planned
        planned = plan(self.index)

        def wrong() -> tf.Tensor:
            text = words(
                lambda: errors.check_every(-1), {"-1": tf.reshape(planned, [-1])[0], "(int)": f"({planned.dtype.name})"}
            )
            # The window keeps what it holds: the schedule can be put right.
            with after(self._micro_batches.assign(held, read_value=False)):
                return tf.identity(text)

        with tf.control_dependencies([require(tf.reduce_all(planned > 0), wrong)]):
            return held >= tf.cast(tf.reshape(planned, ()), tf.int64)

    def _is_enough(self, every: UntilNoise, held: tf.Tensor) -> tf.Tensor:
        means = self._means(self._unit / self._items)
        meter: Any = self._meter  # which there is, to tell whether it is enough
        now = self._noise(meter, held, tf.convert_to_tensor(self._items), tf.cast(tf.linalg.global_norm(means), COUNT))
        return every.is_enough(now.items, now.trace, now.squared_norm)

    def _noise(self, meter: Meter, held: tf.Tensor, items: tf.Tensor, norm: tf.Tensor) -> WindowNoise:
        """What the window says so far, from the norm of its mean gradient."""
        scale = self.optimizer.dynamic_scale if scales_losses(self.optimizer) else 1.0
        return meter.window(held, items, norm, tf.cast(scale, COUNT))

    def _close(self, held: tf.Tensor) -> Update:
        """One update from the window's sums, or none and a reason."""
        moved = self._undisturbed()
        with tf.control_dependencies([moved]):
            return self._closed(held, moved)

    def _undisturbed(self) -> tf.Tensor:
        """False, or an error that empties the window, where others changed what it is about. XLA raises none: true."""
        if not self._may_be_disturbed():
            return tf.constant(False)
        moved, text = self._guard.moved(self.optimizer, self._host.variables, self._dense())

        def wrong() -> tf.Tensor:
            with after(self._micro_batches.assign(0, read_value=False)):
                return tf.identity(text())

        with tf.control_dependencies([require(tf.logical_not(moved), wrong)]):
            return tf.identity(moved)

    def _closed(self, held: tf.Tensor, moved: tf.Tensor) -> Update:
        if self._distributed:
            whole = distributed.clips(self.optimizer)
            items, loss, factor, norm, finite, share = distributed.reduced(self._sums, self._items, self._loss, whole)
            apply = functools.partial(share, self._apply_means)
        else:
            items, loss, factor = tf.identity(self._items), tf.identity(self._loss), self._unit / self._items
            means = self._means(factor)
            norm = tf.cast(tf.linalg.global_norm(means), COUNT) if means else tf.zeros((), COUNT)
            finite, apply = tf.math.is_finite(norm), functools.partial(self._apply_means, means)
        meter = self._meter
        noise = None if meter is None else self._noise(meter, held, items, norm)
        outcome = self._apply(apply, finite, items, moved)
        if meter is not None and noise is not None:
            noise = meter.close(noise, self.index, tf.equal(outcome, MADE))
        update = Update(self.index, held, items, loss * factor, norm, outcome, noise)
        with tf.control_dependencies([update.index, update.micro_batches]):
            self._index.assign_add(tf.cast(update.made, tf.int64))
        return update

    def _apply(self, apply: Callable[[], None], finite: tf.Tensor, items: tf.Tensor, moved: tf.Tensor) -> tf.Tensor:
        """Makes the update if there is to be one, and returns the outcome."""
        if not self._sums:
            return tf.constant(EMPTY)
        always = self.nonfinite == "apply" or scales_losses(self.optimizer)
        made = tf.where(finite | (self.nonfinite == "apply"), MADE, NOT_FINITE)
        if not under_xla():
            # What is wrong with the items, or was done by others, is an error here.
            apply() if always else tf.cond(finite, apply, lambda: None)
            return made
        counted = tf.math.is_finite(items)
        tf.cond(counted & tf.logical_not(moved) & (finite | always), apply, lambda: None)
        return tf.where(moved, MOVED, tf.where(counted, made, NOT_ITEMS))

    def _means(self, factor: tf.Tensor) -> list[Gradient]:
        return in_turn(lambda one: one.mean(factor), self._sums)

    def _apply_means(self, means: list[Gradient]) -> None:
        variables = self._host.variables
        self.optimizer.apply_gradients(
            [(cast(g, tf.as_dtype(v.dtype)), v) for g, v in zip(means, variables, strict=True)]
        )

    def _flush(self) -> Update:
        if self._distributed and not tf.distribute.in_cross_replica_context() and tf.distribute.has_strategy():
            return tf.distribute.get_replica_context().merge_call(lambda _: self._flush())
        with self._strategy.scope() if self._distributed else contextlib.nullcontext():
            held = tf.identity(self._micro_batches)
            return tf.cond(tf.equal(held, 0), lambda: self._report(OPEN, held), lambda: self._flush_some(held))

    def _flush_some(self, held: tf.Tensor) -> Update:
        def wrong() -> tf.Tensor:
            with after(self._micro_batches.assign(0, read_value=False)):
                return tf.constant(CUT_SHORT)

        with tf.control_dependencies([require(held > 0, wrong)]):
            marked = None if self._distributed else self._micro_batches.assign(-held, read_value=False)
        with after(marked):
            if self.partial == "apply":
                return self._ended(self._close(held), held)
            return self._ended(self._report(CARRIED if self.partial == "carry" else DROPPED, held), held)

    def _report(self, outcome: int, held: tf.Tensor) -> Update:
        """Of a window that stays as it is. Adding up the replicas' items would cost a reduction: NaN there."""
        nan = tf.constant(math.nan, COUNT)
        if self._distributed:
            items, loss = nan, nan
        else:
            items = tf.where(held > 0, self._items, 0)
            loss = self._loss * self._unit / self._items
        noise = None if self._meter is None else nothing()
        return Update(self.index, held, items, loss, nan, tf.constant(outcome), noise)

    def _trace_again(self) -> None:
        """The graphs of calls from outside a tf.function: they know the sums that there were when they were traced."""
        self._host.take, self._host.flush = tf.function(self._take), tf.function(self._flush)


def _described(one: Any) -> tuple[str, list[Any], str]:
    """The kind, the shape and the dtype of a sum."""
    total = one.values if isinstance(one, SparseSum) else one.total
    return type(one).__name__, total.shape.as_list(), total.dtype.name


class _Host:
    """What checkpoints and SavedModels are not to find: Python's own side of an Accumulator."""

    def __init__(self):
        self.variables: list[Any] = []  # keeps them alive, so that an id stays theirs
        self.places: dict[int, int] = {}
        self.traced = False
        self.planned: Any = None  # `every`, where that is a function
        self.take: Callable[..., Update]
        self.flush: Callable[[], Update]
