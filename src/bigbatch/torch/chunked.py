"""`chunked`: a function of a whole batch, run in pieces, and run again when its gradient is needed.

A loss that compares the examples of a batch needs all of their outputs, and no micro-batch has them. So the function
runs piece by piece without a graph, its outputs are joined, and the loss sees the whole batch. When the loss's
gradient arrives, each piece runs again with a graph, as it ran before, and is differentiated alone. In memory are the
inputs, the outputs and one piece. This is GradCache (Gao et al. 2021, arXiv:2101.06983) as one node of a graph.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bigbatch import errors
from bigbatch.engines.torch_estimate import is_out_of_memory, release
from bigbatch.engines.torch_fsdp import shards_in
from bigbatch.plan import fitting
from bigbatch.torch.checks import check_dtype
from bigbatch.torch.chunked_call import Call, Options
from bigbatch.torch.chunked_leaves import leaves_of
from bigbatch.torch.chunked_memory import Given, Planner, logger
from bigbatch.torch.replay import Setting


def chunked(
    function: Callable[..., Any],
    *,
    micro_batch: int | Literal["auto"],
    in_dims: int | Sequence[int | None] = 0,
    keep: int | Literal["auto"] = 0,
    dtype: torch.dtype | None = torch.float32,
) -> Callable[..., Any]:
    """A function with the same values and gradients that holds the activations of `micro_batch` examples at a time.

    An example's output must depend on that example only; the loss that follows may compare them all::

        encode = bb.chunked(model, micro_batch=32)
        loss = info_nce(encode(images), encode(texts))  # 4,096 pairs, 32 in memory
        loss.backward()

    It takes one more forward pass than `function`, which repeats the first: dropout, autocast, training and evaluation
    modes. Buffers that the function writes to change once. Gradients reach the modules' parameters, the inputs and the
    arguments that are given whole. They cannot be differentiated again.

    Args:
        function: a module, or a function that closes over modules, is bound to one or names some. A
            `DistributedDataParallel` model stands for its module: pass the model to `Accumulator`, which reduces its
            gradients once a window. Embeddings of other ranks come from `gathered`.
        micro_batch: examples in memory at once; the last piece may be shorter. "auto" plans the largest that fits what
            is free, by a dry run on shapes, once for each shape of the arguments, and logs what it chose. Should memory
            run out anyway, it is halved: in the forward all pieces run again, in the backward those that drew no random
            numbers and wrote to no buffers. The others run again as they were cut. A batch that fits as a whole is one
            piece, which runs again too unless `keep` keeps it.
        in_dims: the dimension that holds the examples, as for `torch.vmap`: one for all positional arguments, or one
            entry for each, where None gives an argument whole to every piece. Tensors in keyword arguments are cut
            along their first dimension. What is no tensor is given whole, but for lists of text, one for each example.
        keep: how many pieces keep their activations, so that these do not run again: the last ones. "auto" keeps as
            many as fit what is free when the first piece has run, and fewer where memory runs out anyway.
        dtype: the narrowest dtype in which the gradients of parameters and whole arguments add up over the pieces.

    Returns:
        A function with the arguments of `function`. Its outputs are nested as `function`'s are; tensors are joined
        along their first dimension, in the batch's order.

    Raises:
        TypeError, ValueError: an option is not as described; or, when called, an argument, an output, or a tensor that
            needs a gradient and is neither an argument nor a parameter of a module that was found; a
            `DistributedDataParallel` model that no `Accumulator` has, or a `fully_shard` model.
        MemoryError: under "auto", not even one example fits what is free.
        RuntimeError: in the backward, where a parameter or an input was written to since the forward; and where the
            gradient is differentiated again.
    """
    replicas = [function] if isinstance(function, DistributedDataParallel) else []
    for replica in replicas:
        function = replica.module
    if not callable(function):
        raise TypeError(f"function must be a module or a function. {errors.received('function', function)}")
    size = None if isinstance(micro_batch, str) and micro_batch == "auto" else errors.check_micro_batch(micro_batch)
    errors.check_keep(keep, auto=True)
    check_dtype(dtype)
    options = Options(keep, dtype, Planner())

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = leaves_of(args, kwargs, in_dims)
        length = errors.check_lengths([(leaf.where, leaf.length) for leaf in leaves if leaf.dim is not None])
        device = next((leaf.value.device for leaf in leaves if isinstance(leaf.value, Tensor)), torch.device("cpu"))
        given = Given(Setting(function, device), (args, kwargs), leaves, length)
        _check_ranks(replicas, given.setting.holder)
        if size is None:
            return _fitting(given, options)
        return function(*args, **kwargs) if size >= length else Call(given, size, options).outputs()

    return run


def _fitting(given: Given, options: Options) -> Any:
    """The outputs, from pieces of the size that fits; an out-of-memory halves them and begins anew."""
    choice = options.planner.choice(given, options.dtype)

    def save() -> Callable[[], None]:
        restore = given.setting.save()

        def begin_anew() -> None:
            release(given.setting.device)
            restore()

        return begin_anew

    def run(size: int) -> Any:
        return Call(given, size, options._replace(choice=choice)).outputs()

    return fitting(run, choice, given.length, is_out_of_memory, logger, save)


def _check_ranks(replicas: list[DistributedDataParallel], holder: torch.nn.Module) -> None:
    """Refuses models that would not reduce their gradients, or do so for every piece."""
    replicas = replicas + [module for module in holder.modules() if isinstance(module, DistributedDataParallel)]
    if torch.is_grad_enabled() and any(replica.require_backward_grad_sync for replica in replicas):
        raise ValueError(
            "DistributedDataParallel reduces in the backward of its own forward, and a chunked function does not run "
            "that. Pass the model to bb.Accumulator(..., model=model), which reduces once a window."
        )
    if shards_in(holder):
        raise ValueError(
            "A fully_shard model cannot be chunked. Its ranks gather parameters in each forward and reduce gradients "
            "in each backward, so all ranks would have to run as many pieces, and every piece would reduce. Use "
            "DistributedDataParallel, or fewer examples a rank."
        )
