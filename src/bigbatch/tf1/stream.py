"""The stream API: a `session.run` a micro-batch, and bigbatch stands where a v1 optimizer applies a gradient."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_ordering import in_turn
from bigbatch.every import Every, Items, as_every
from bigbatch.tf1 import checks
from bigbatch.tf1.accumulators import SparseSum, make_sum
from bigbatch.tf1.control_flow import only_if
from bigbatch.tf1.fingerprint import fingerprint, require_unchanged
from bigbatch.tf1.step import Step, one_train_op
from bigbatch.tf1.window import (
    APPLIED,
    CARRIED,
    DROPPED,
    NOT_FINITE,
    Lock,
    Scalars,
    Window,
    not_finite,
    require_usable,
)
from bigbatch.tf1.window import Update as Update

v1 = tf.compat.v1


class Accumulator(v1.train.Optimizer):
    """Makes one update of `optimizer` from the gradients of many micro-batches.

    It wraps any `tf.compat.v1.train.Optimizer` and is used as one::

        acc = bb.Accumulator(tf.compat.v1.train.AdamOptimizer(1e-3), every=64)
        train_op = acc.minimize(loss, global_step, items=tf.shape(x)[0])
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.global_variables_initializer())
            for batch in loader:
                session.run(train_op, {x: batch})  # the 64th makes the update
            session.run(acc.flush)

    The update is the big batch's: the mean over all items, clipped, decayed and counted once. `global_step` counts
    updates, so a learning rate that depends on it decays at the right speed. The graph may be any, with TensorFlow 2
    behavior on or off.

    Fetch the op with whatever else, such as the loss, summaries, `pending` and `last`, which tell what the run found.
    A run is one micro-batch, counted once. The parts by name are `accumulate`, `apply`, `flush` and `zero`; any of
    them may be in one run, and are done in that order. What is not fetched does not run.

    All micro-batches of a window must see the same variables. Where something else changed them inside the window (the
    wrapped optimizer's own `minimize`, an assign, another Accumulator), the run that closes it raises
    InvalidArgumentError and makes no update; the next window is exact.

    Args:
        optimizer: any optimizer of `tf.compat.v1.train`, or a subclass of `tf.compat.v1.train.Optimizer`.
        every: when a window closes. A number of micro-batches; a callable that takes the update's index, an int64
            scalar tensor, and returns one, a number or a tensor (batch-size warm-up); or `bb.items(4096)`.
        clip_norm: clips the mean gradient to this 2-norm, as `tf.clip_by_global_norm` would the big batch's.
        reduction: "mean" over items, or "sum" for losses that are sums.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 variables add up in float32
            and are rounded once, for the optimizer. None adds up in the variables' own dtype.
        partial: what `flush` does with a window that is not full: "apply" makes the update from what is there,
            "carry" keeps it open, "drop" forgets it.
        nonfinite: what becomes of a window whose loss or gradient is inf or NaN: "skip" makes no update, "raise"
            raises InvalidArgumentError, "apply" applies it. The next window is clean in any case but the last.
        name: of the ops and the variables.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was touched.
    """

    # Made by `minimize` or `apply_gradients`.
    accumulate: tf.Operation
    apply: tf.Operation
    flush: tf.Operation
    zero: tf.Operation
    pending: tf.Tensor
    pending_items: tf.Tensor
    updates: tf.Tensor
    last: Update

    def __init__(
        self,
        optimizer: Any,
        every: Every,
        *,
        clip_norm: float | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        dtype: tf.DType | None = tf.float32,
        partial: Literal["apply", "carry", "drop"] = "apply",
        nonfinite: Literal["skip", "raise", "apply"] = "skip",
        name: str = "Accumulator",
    ):
        self.optimizer = checks.check_optimizer(optimizer, nonfinite, Accumulator)
        self.every: Any = as_every(every)
        self.clip_norm = errors.check_clip_norm(clip_norm)
        self.reduction = errors.check_choice("reduction", reduction, ("mean", "sum"))
        self.dtype = checks.check_dtype(dtype)
        self.partial = errors.check_choice("partial", partial, ("apply", "carry", "drop"))
        self.nonfinite = errors.check_choice("nonfinite", nonfinite, ("skip", "raise", "apply"))
        super().__init__(use_locking=False, name=name)
        self._built = self._has_loss = False

    if not TYPE_CHECKING:  # which would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            if name in Accumulator.__annotations__:
                raise ValueError(
                    f"This Accumulator has no `{name}` yet: minimize or apply_gradients makes it. Call it first."
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def minimize(
        self,
        loss: tf.Tensor,
        global_step: Any = None,
        var_list: Any = None,
        gate_gradients: int = v1.train.Optimizer.GATE_OP,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: bool = False,
        name: str | None = None,
        grad_loss: Any = None,
        *,
        items: Any,
    ) -> tf.Operation:
        """`compute_gradients`, then `apply_gradients`: the signature of every v1 optimizer, and `items`.

        Args:
            loss: the micro-batch's mean loss, a real scalar (its sum, for `reduction="sum"`).
            global_step: a variable to increment by one after each update.
            var_list: as any v1 optimizer takes it.
            gate_gradients: likewise.
            aggregation_method: likewise.
            colocate_gradients_with_ops: likewise.
            name: for the op.
            grad_loss: as any v1 optimizer takes it.
            items: what the mean is over: a number of examples or tokens above zero, or a tensor of one, such as
                `tf.shape(x)[0]`.

        Returns:
            The op to run once a micro-batch.

        Raises:
            TypeError, ValueError: the loss or `items` is not as described; nothing was added to the graph.
        """
        self._check_new()
        loss, items = checks.check_loss(loss), checks.check_items(items)
        checks.check_step(global_step)
        pairs = self.compute_gradients(
            loss, var_list, gate_gradients, aggregation_method, colocate_gradients_with_ops, grad_loss
        )
        return self.apply_gradients(pairs, global_step, name, items=items, loss=loss)

    def compute_gradients(self, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        """The wrapped optimizer's own: one micro-batch's gradients, which nothing has scaled yet."""
        return self.optimizer.compute_gradients(*args, **kwargs)

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Any]],
        global_step: Any = None,
        name: str | None = None,
        *,
        items: Any,
        loss: Any = None,
    ) -> tf.Operation:
        """Adds the ops that accumulate these gradients and make the update.

        Gradients that were computed elsewhere, in another graph or another process, go in as placeholders.

        Args:
            grads_and_vars: pairs as `compute_gradients` returns them: of a tensor, IndexedSlices or None, and a
                variable. Embeddings' IndexedSlices stay sparse.
            global_step: a variable to increment by one after each update.
            name: for the op.
            items: what the gradients are the mean over, as for `minimize`. Zero or less in a tensor raises
                InvalidArgumentError in the run, and leaves the window and the variables as they were.
            loss: the micro-batch's mean loss, for `last`; a NaN in it makes the window non-finite.

        Returns:
            The op to run once a micro-batch.

        Raises:
            TypeError, ValueError: an argument is not as described; nothing was added to the graph.
        """
        self._check_new()
        items = checks.check_items(items)
        loss = None if loss is None else checks.check_loss(loss)
        checks.check_step(global_step)
        pairs = checks.check_gradients(grads_and_vars)
        self._has_loss, self._step = loss is not None, Step(self.optimizer, global_step)
        with v1.name_scope(name, self.get_name()) as scope, one_train_op() as train_ops:
            loss = None if loss is None else tf.ensure_shape(loss, ())  # where the graph cannot tell
            items = checks.positive(items)
            # What the caller waits for, such as UPDATE_OPS, takes feeds; only the micro-batch's ops wait for it.
            with tf.control_dependencies(None):
                self._window = window = Window()
                self._sums = [(make_sum(grad, v, self.dtype), v) for grad, v in pairs if grad is not None]
                self.pending, self.pending_items = window.pending, window.pending_items
                self.updates, self.last = window.updates, window.last

            # The lock is taken, and the window read, while the forward pass goes on. Once the loss is known, the input
            # pipeline has had its end and the forward pass its errors, and the window may be changed: the sums take
            # each gradient as the backward pass comes to it. Without a loss, all gradients have to be there.
            known = [s.grad for s, _ in self._sums] if loss is None else [loss]
            lock = window.lock([items])
            plan = self._planned(lock)
            held, added = self._accumulate(window.read(lock), items, loss, plan, known)
            full = self._is_full(held, plan)
            self.accumulate = window.release(lock, [added], "accumulate")
            # A run that fetches both has one micro-batch and one lock, which is held until the update is made.
            closed = only_if(full, lambda: self._close(held, same_run=True), after=[added])
            train_op = window.release(lock, [added, closed], scope)
            with tf.control_dependencies(None):
                self.apply = self.flush = window.exclusively(lambda held: self._close(held), "apply", 1)
                if self.partial == "carry":
                    self.flush = window.exclusively(lambda held: self._report(held, CARRIED), "flush", 2)
                if self.partial == "drop":
                    self.flush = window.exclusively(self._drop, "flush", 2)
                self.zero = window.exclusively(lambda _: window.empty(), "zero", 3)
            train_ops.append(train_op)
        self._built = True
        return train_op

    def _check_new(self) -> None:
        checks.check_place()
        if self._built:
            raise ValueError("This Accumulator has its op already. Make another one for another loss or graph.")

    def get_slot(self, var: Any, name: str) -> Any:
        """The wrapped optimizer's slot."""
        return self.optimizer.get_slot(var, name)

    def get_slot_names(self) -> list[str]:
        """The wrapped optimizer's slots."""
        return self.optimizer.get_slot_names()

    def variables(self) -> list[Any]:
        """The window's variables, which a checkpoint from before bigbatch has not.

        Those of the wrapped optimizer have the names that they have without bigbatch: `acc.optimizer.variables()`.
        """
        return [*self._window.variables, *(v for s, _ in self._sums for v in s.variables)] if self._built else []

    def _accumulate(
        self, before: Scalars, items: tf.Tensor, loss: tf.Tensor | None, plan: tf.Tensor, known: list[Any]
    ) -> tuple[Scalars, tf.Operation]:
        """Adds one micro-batch to the open window. Returns its scalars, and an op that comes after all of it."""
        # Also where a damaged checkpoint brought a negative number or NaN, which `start` refuses.
        first = tf.logical_not(tf.logical_and(before.micro_batches > 0, before.items > 0))
        mean = self.reduction == "mean"
        unit = v1.where(first, items * plan if mean else tf.zeros_like(items), before.unit)
        weight = items / unit if mean else tf.ones_like(items)
        part = 0 if loss is None else weight * tf.cast(loss, tf.float64)
        sums = [s for s, _ in self._sums]

        def start() -> tf.Tensor:
            with tf.control_dependencies([self._window.require_none(before)]):
                begun, mark = [s.start(weight) for s in sums], self._fingerprint()
            with tf.control_dependencies(begun):
                return tf.identity(mark)

        def add() -> tf.Tensor:
            with tf.control_dependencies([s.add(weight) for s in sums]):
                return tf.identity(before.mark)

        with tf.control_dependencies([before.micro_batches, *known]):
            emptied = self._window.empty()  # if some of the sums fail, the next micro-batch starts anew
        with tf.control_dependencies([emptied]):
            mark = tf.cond(first, start, add)
        after = Scalars(before.micro_batches + 1, before.items + items, unit, before.loss + part, mark)
        return after, self._window.write(after, [mark])

    def _fingerprint(self) -> tf.Tensor:
        return fingerprint([(v, isinstance(s, SparseSum)) for s, v in self._sums])

    def _planned(self, lock: Lock) -> tf.Tensor:
        """How many micro-batches the open window is planned to hold, as far as that is known: 1 for `items(n)`."""
        if isinstance(self.every, Items):
            return tf.constant(1, tf.float64)
        plan = checks.check_plan(self.every(self._window.count(lock))) if callable(self.every) else self.every
        return tf.cast(plan, tf.float64)

    def _is_full(self, window: Scalars, plan: tf.Tensor) -> tf.Tensor:
        return window.items >= self.every.count if isinstance(self.every, Items) else window.micro_batches >= plan

    def _factor(self, window: Scalars) -> tf.Tensor:
        """What turns the sums into means: exactly 1 where the plan came true."""
        return window.unit / window.items if self.reduction == "mean" else tf.ones_like(window.items)

    def _mean_loss(self, window: Scalars) -> tf.Tensor:
        return window.loss * self._factor(window) if self._has_loss else tf.constant(float("nan"), tf.float64)

    def _gradients(self, factor: tf.Tensor) -> list[Any]:
        """The window's, in one pass over the sums, or in none."""

        def read(*factor: tf.Tensor) -> list[Any]:
            return in_turn(lambda pair: pair[0].read(*factor), self._sums)

        return tf.cond(tf.equal(factor, 1), read, lambda: read(factor))

    def _close(self, window: Scalars, same_run: bool = False) -> tf.Operation:
        """One update from the window's sums; whatever becomes of it, the window is no more."""
        with tf.control_dependencies([self._window.empty()]):
            usable = require_usable(window, self.reduction)
        with tf.control_dependencies([usable]):
            compare = functools.partial(require_unchanged, window.mark, self._fingerprint)
            # Nobody comes between a window's only micro-batch and its close in the same run.
            unchanged = only_if(window.micro_batches > 1, compare) if same_run else compare()
        with tf.control_dependencies([unchanged]):
            factor, loss = self._factor(window), self._mean_loss(window)
            gradients = self._gradients(factor)
        widest = max((s.dtype for s, _ in self._sums), key=lambda dtype: dtype.size)
        norm = tf.linalg.global_norm([tf.cast(g, widest) for g in gradients])
        if self.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm, norm)
        pairs = [(tf.cast(g, v.dtype.base_dtype), v) for g, (_, v) in zip(gradients, self._sums, strict=True)]
        finite = tf.math.is_finite(norm)
        if self._has_loss:
            finite = tf.logical_and(finite, tf.math.is_finite(loss))
        if self.nonfinite == "apply":
            finite = tf.ones_like(finite)
        if self.nonfinite == "raise":
            words = tf.strings.join([not_finite(loss, norm), ". The variables and the optimizer are as they were."])
            with tf.control_dependencies([checks.require(finite, words)]):
                finite = tf.identity(finite)
        with tf.control_dependencies([self._step.only_if(finite, pairs)]):
            return self._report(window, tf.where(finite, APPLIED, NOT_FINITE), norm)

    def _drop(self, window: Scalars) -> tf.Operation:
        with tf.control_dependencies([self._report(window, DROPPED)]):
            return self._window.empty()

    def _report(self, window: Scalars, code: tf.Tensor | int, norm: tf.Tensor | float = float("nan")) -> tf.Operation:
        return self._window.report(window, self._mean_loss(window), norm, code)
