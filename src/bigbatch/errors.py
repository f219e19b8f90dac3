"""What users are told, and the checks that tell them.

One wording for every framework: what is wrong, what was received (value and type), the likely fix. A check
returns what it accepted; a function named after a mistake returns the exception for its caller to raise.
Nothing here knows a framework: a package checks before it moves anything.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any


def received(name: str, value: Any) -> str:
    """`Received: items=-1 (int).`, with the shape and dtype of an array in place of its numbers."""
    shown = repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        shown = f"shape {tuple(value.shape)}, dtype {value.dtype}"
    elif len(shown) > 80:
        shown = shown[:77] + "..."
    return f"Received: {name}={shown} ({type(value).__name__})."


def check_items(items: Any) -> Any:
    """Accepts a finite number above zero: how many examples or tokens a mean loss is the mean of."""
    fix = "Pass the number of examples or tokens the loss is the mean of."
    if isinstance(items, bool) or not isinstance(items, numbers.Real):
        raise TypeError(f"items must be a number. {received('items', items)} {fix}")
    if not math.isfinite(items):
        raise ValueError(f"items must be finite. {received('items', items)} {fix}")
    if items <= 0:
        raise ValueError(f"items must be positive. {received('items', items)} {fix}")
    return items


def _check_count(name: str, value: Any, kinds: str, fix: str) -> int:
    """Accepts an integer of at least 1, NumPy's too, and never a bool."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None:
        raise TypeError(f"{name} must be {kinds}. {received(name, value)} {fix}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1. {received(name, value)} {fix}")
    return count


def check_every(every: Any) -> int:
    """Accepts the number of micro-batches in a window."""
    return _check_count(
        "every",
        every,
        "an integer, a callable of the update's index, or items(n)",
        "Pass the number of micro-batches that make one update.",
    )


def check_micro_batch(micro_batch: Any, *, auto: bool = True) -> int:
    """Accepts the number of examples that fit in memory at once; `auto` is whether the caller also takes "auto"."""
    kinds = 'an integer or "auto"' if auto else "an integer"
    return _check_count("micro_batch", micro_batch, kinds, "Pass the number of examples that fit in memory at once.")


def check_keep(keep: Any, *, auto: bool) -> Any:
    """Accepts how many pieces keep their activations; `auto` is whether the caller also takes "auto"."""
    if auto and isinstance(keep, str) and keep == "auto":
        return keep
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        kinds = 'a number of pieces or "auto"' if auto else "a number of pieces, 0 or more"
        raise ValueError(f"keep must be {kinds}. {received('keep', keep)}")
    return keep


def check_tokens(most: Any) -> int:
    """Accepts the number of tokens, padding included, that fit in memory at once."""
    return _check_count(
        "most", most, 'an integer or "auto"', "Pass the most tokens of a micro-batch, padding included."
    )


def items_with_tokens() -> Exception:
    """For a loss without items whose micro-batches hold sequences of different lengths."""
    return TypeError(
        "With bb.tokens loss_fn must return (loss, items): micro-batches of different lengths hold different numbers "
        "of examples and of tokens, and the loss alone does not say which it is the mean of. Return the number of "
        "tokens that count, such as (labels != -100).sum(), or of examples, such as len(labels)."
    )


def check_multiple_of(multiple_of: Any) -> int:
    """Accepts what trimmed lengths are multiples of."""
    return _check_count("multiple_of", multiple_of, "an integer", "Pass 1 to trim to the longest example itself.")


def check_batch_size(batch_size: Any) -> int:
    """Accepts the number of examples that one update is to see."""
    return _check_count("batch_size", batch_size, "an integer", "Pass the number of examples that make one update.")


def check_at_most(at_most: Any) -> int:
    """Accepts the micro-batches after which a window closes in any case."""
    return _check_count("at_most", at_most, "an integer", "Pass the number of micro-batches that a window may hold.")


def check_clip_norm(clip_norm: Any) -> float | None:
    """Accepts a finite number above zero, or None for no clipping."""
    if clip_norm is None:
        return None
    if isinstance(clip_norm, bool) or not isinstance(clip_norm, numbers.Real):
        raise TypeError(f"clip_norm must be a number or None. {received('clip_norm', clip_norm)}")
    if not (math.isfinite(clip_norm) and float(clip_norm) > 0):
        raise ValueError(
            f"clip_norm must be positive and finite. {received('clip_norm', clip_norm)} "
            "Pass the largest 2-norm the mean gradient may have, or None for no clipping."
        )
    return float(clip_norm)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Accepts one of a few words."""
    if not isinstance(value, str) or value not in choices:  # an array or a tensor makes of `in` what it likes
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listed}. {received(name, value)}")
    return value


def check_lengths(lengths: Sequence[tuple[str, int]]) -> int:
    """Accepts a batch whose leaves share one leading dimension, and returns its length.

    Args:
        lengths: for each leaf, where it stands in the batch (`batch['x']`) and its length in examples.
    """
    if not lengths:
        raise ValueError("The batch holds no arrays. Pass a nesting of arrays that share their leading dimension.")
    first = lengths[0][1]
    odd = next(((where, length) for where, length in lengths if length != first), None)
    if odd is not None:
        raise ValueError(
            "The leaves of a batch must have the same length. "
            f"Received: {lengths[0][0]} of length {first}, {odd[0]} of length {odd[1]}. "
            "Give every leaf one entry an example along its leading dimension."
        )
    if first == 0:
        raise ValueError(f"The batch is empty. Received: {lengths[0][0]} of length 0. Pass at least one example.")
    return first


def check_cut(cut: Any, length: Any) -> None:
    """Accepts a function that cuts the batch together with how many examples there are to index, or neither."""
    if cut is None and length is None:
        return
    if cut is None or length is None:
        given, missing = ("cut", "length") if length is None else ("length", "cut")
        raise ValueError(
            f"cut and length belong together. Received: {given} without {missing}. "
            "Pass cut=a function (batch, indices) -> micro-batch, and length=how many examples there are to index."
        )
    if not callable(cut):
        raise TypeError(f"cut must be a function (batch, indices) -> micro-batch. {received('cut', cut)}")
    _check_count("length", length, "an integer", "Pass how many examples there are to index.")


def one_micro_batch(micro_batch: int, length: int) -> Exception:
    """For an audit of a batch that one micro-batch holds."""
    return ValueError(
        f"An audit needs more than one micro-batch. Received: micro_batch={micro_batch} for a batch of {length}. "
        "Pass a smaller micro_batch."
    )


def leaf_without_length(where: str, value: Any) -> Exception:
    """For a leaf of a batch that cannot be cut: a scalar, a number, a string."""
    fix = "Bind what is the same for every micro-batch in loss_fn instead, with a closure or functools.partial."
    return TypeError(f"A leaf of a batch must be an array with a leading dimension. {received(where, value)} {fix}")


def loss_and_items(result: Any) -> tuple[Any, Any]:
    """Unpacks what a loss_fn returned: the mean loss, or `(loss, items)`. Items are None where it returned none.

    A model's output that has the loss as its `.loss` may stand in the loss's place.
    """
    output, items = result, None
    if isinstance(result, tuple) and not hasattr(result, "loss"):
        if len(result) != 2:
            raise _not_a_loss(result)
        output, items = result
    return getattr(output, "loss", output), items


def _not_a_loss(result: Any) -> Exception:
    return TypeError(
        f"loss_fn must return the mean loss or (loss, items). Received: a tuple of {len(result)}. "
        "Bind other outputs outside, or return them through a variable of your own."
    )


def output_without_length(where: str, value: Any, examples: int) -> Exception:
    """For an output of a chunked function that cannot be joined with those of the other pieces."""
    return ValueError(
        "An output must have one entry an example along its leading dimension. "
        f"{received(where, value)} The piece had {examples} examples."
    )


def loss_not_scalar(loss: Any) -> Exception:
    """For a loss that is not one real number."""
    return ValueError(
        f"The loss must be a scalar of a floating type. {received('loss', loss)} "
        "Return the mean over the micro-batch's items, as loss.mean() does."
    )


def loss_without_gradient(loss: Any) -> Exception:
    """For a loss that no parameter has a part in."""
    return ValueError(
        f"The loss needs no gradient. {received('loss', loss)} "
        "Compute it from the parameters, with nothing that stops gradients (no_grad, detach, stop_gradient) between."
    )


def loss_not_finite(value: float, micro_batches: str) -> Exception:
    """For a NaN, or an infinite loss, found once the whole batch has been seen."""
    return ValueError(
        f"The loss is {'not a number' if math.isnan(value) else 'infinite'}. "
        f"Received: loss={value} over {micro_batches}. "
        "The gradients are as they were before the call; look for a division by zero, or a learning rate too high."
    )


def items_not_counts(total: float, micro_batches: str) -> Exception:
    """For items on a device, found to be no counts once the whole batch has been seen."""
    wrong = "The batch holds no items" if total == 0 else "A micro-batch's items are negative, NaN or infinite"
    return ValueError(
        f"{wrong}. Received: items={total} over {micro_batches}. "
        "The gradients are as they were before the call; "
        "return the number of examples or tokens the loss is the mean of."
    )


def check_accumulates_once(optimizer: Any) -> None:
    """Refuses a Keras optimizer that accumulates by itself, also inside of loss scaling or of a MultiOptimizer."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    for one in (inner, *getattr(inner, "optimizers", ())):
        steps = getattr(one, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                f"The optimizer accumulates too. Received: gradient_accumulation_steps={steps}. "
                "Leave it out: with bigbatch as well it would accumulate twice."
            )


def ranks_disagree(name: str, values: Sequence[str]) -> Exception:
    """For processes that train one model and were not given the same; every one of them gets this text."""
    odd = next(rank for rank, value in enumerate(values) if value != values[0])
    return ValueError(
        f"The ranks disagree on {name}. Received: {values[0]} (rank 0), {values[odd]} (rank {odd}). "
        "Every rank must build the same model and pass the same options."
    )


def rank_failed(rank: int, said: str) -> Exception:
    """For a rank that meets others of which one has failed."""
    return RuntimeError(
        f"Rank {rank} could not take part. It raised {said.rstrip('.')}. "
        "No rank has touched a parameter, and an open window is dropped on every rank."
    )


def ranks_apart(calls: Sequence[str]) -> Exception:
    """For ranks that meet at different calls; every one of them gets this text."""
    odd = next(rank for rank, call in enumerate(calls) if call != calls[0])
    return RuntimeError(
        f"The ranks are at different calls. Received: {calls[0]} (rank 0), {calls[odd]} (rank {odd}). "
        "No rank has touched a parameter, and an open window is dropped on every rank. "
        "Every rank must make the same calls in the same order."
    )


def rank_lost(error: Exception) -> Exception:
    """For a rank whose partner died, or waits somewhere else."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RuntimeError(
        f"The ranks could not meet: {reason} "
        "A rank has died, or does something else; its own output says what. The others cannot go on without it: let "
        "them end, and start again from the last checkpoint, as torchrun --max-restarts does."
    )


def not_installed(package: str, extra: str, error: ModuleNotFoundError) -> ImportError:
    """For a framework's package without the framework."""
    return ImportError(
        f"bigbatch.{package} needs {error.name}, which is not installed. Run: pip install 'bigbatch[{extra}]'",
        name=error.name,
    )
