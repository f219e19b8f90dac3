"""What the loss of a causal language model is the mean of."""

import torch
from torch import Tensor

from bigbatch import errors


def causal_items(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """How many tokens a causal language model's loss is the mean of, given the labels that the model is given.

    Hugging Face's models shift the labels themselves: the score at one place is compared with the label at the next, so
    the first label of each row is compared with nothing. `(labels != -100).sum()` counts it::

        acc.backward(model(**batch), items=bb.causal_items(batch["labels"]))

    Args:
        labels: integers of shape (…, length), not shifted.
        ignore_index: the label of a token that does not count.

    Returns:
        The count as an integer tensor of no dimensions on the labels' device, which needs no synchronisation.

    Raises:
        TypeError, ValueError: the labels are not a tensor of integers with at least one dimension.
    """
    fix = "Pass batch['labels'], before any shift."
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of integers. {errors.received('labels', labels)} {fix}")
    if labels.ndim == 0 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be a tensor of integers. {errors.received('labels', labels)} {fix}")
    return (labels[..., 1:] != ignore_index).sum()
