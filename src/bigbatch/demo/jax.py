"""The demo in JAX: the loops are what a user would write."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bigbatch.jax as bb
from bigbatch.demo import Job, Result, Way


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """The mean cross-entropy of a batch."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def logits(params: Any, x: Any) -> jax.Array:
    """The job's network."""
    for kernel, bias in params[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = params[-1]
    return x @ kernel + bias


def train(way: Way, job: Job, advance: Callable[[int], None]) -> Result:
    """Trains one way. See `bigbatch.demo.Train`."""
    with jax.enable_x64(job.dtype == "float64"):
        return _train(way, job, advance)


def _train(way: Way, job: Job, advance: Callable[[int], None]) -> Result:
    x, y, x_test, y_test = job.data
    updates = job.updates(job.micro_batch if way == "micro" else job.batch)
    schedule = optax.cosine_decay_schedule(job.rate, updates)
    tx = optax.chain(optax.clip_by_global_norm(job.clip_norm), optax.adamw(schedule, weight_decay=job.weight_decay))
    if way == "stream":
        tx = bb.accumulate(tx, every=job.batch // job.micro_batch)
    params = jax.tree.map(jnp.asarray, job.layers)
    opt_state: Any = tx.init(params)

    value_and_grad = (
        bb.value_and_grad(loss_fn, micro_batch=job.micro_batch) if way == "split" else jax.value_and_grad(loss_fn)
    )

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads = value_and_grad(params, batch)
        extra = {"items": len(batch[0]), "value": loss} if way == "stream" else {}
        changes, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, changes), opt_state, loss

    def flush(params: Any, opt_state: Any) -> Any:
        changes, opt_state = bb.flush(tx, opt_state, params)
        return optax.apply_updates(params, changes), opt_state

    step, flush = jax.jit(step, donate_argnums=(0, 1)), jax.jit(flush, donate_argnums=(0, 1))
    seen, seconds, losses, peak_bytes = 0, 0.0, [], None
    loss: Any = None
    for rows in job.batches(job.micro_batch if way == "micro" else job.batch):
        started = time.perf_counter()
        size = job.micro_batch if way == "stream" else len(rows)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        for part in parts:
            params, opt_state, loss = step(params, opt_state, (x[part], y[part]))
        if way == "stream":
            if len(rows) < job.batch:  # the last window of an epoch is not full
                params, opt_state = flush(params, opt_state)
            loss = opt_state.last.loss
        losses.append((seen + len(rows), float(loss)))  # here the host waits
        seconds += time.perf_counter() - started
        if len(losses) == 3:
            memory: Any = step.lower(params, opt_state, (x[parts[0]], y[parts[0]])).compile().memory_analysis()
            peak_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        seen += len(rows)
        advance(len(rows))
    accuracy = float((np.argmax(logits(params, x_test), 1) == y_test).mean())
    return Result(losses, accuracy, [(np.asarray(k), np.asarray(b)) for k, b in params], peak_bytes, seconds)
