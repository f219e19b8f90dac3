"""Micro-batches by tokens: which examples share one, and what of each leaf they need."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbatch import errors
from bigbatch.lengths import Cut, Tokens, check_lengths, cuts
from bigbatch.torch.batch import leaves, mapped


def micro_batches(
    batch: Any, tokens: Tokens, *, collate: Callable[[Sequence[Any]], Any] | None = None
) -> Iterator[Any]:
    """The micro-batches that `tokens` cuts a batch into, trimmed, for a loop of your own.

    They are those that `backward(…, micro_batch=bb.tokens(…))` makes::

        for part in bb.micro_batches(batch, bb.tokens(16_384, mask="attention_mask")):
            acc.backward(loss_fn(part), items=part["attention_mask"].sum())
        acc.flush()

    With `collate` the batch is a list of examples that are not padded yet, and each micro-batch is padded alone::

        for part in bb.micro_batches(documents, bb.tokens(16_384, lengths="input_ids"), collate=collator): ...

    Args:
        batch: a nesting of tensors and lists of text that share their leading dimension; or a list of examples.
        tokens: made by `bb.tokens`, with a number.
        collate: makes a micro-batch of a list of examples. `tokens` then has `lengths`: the name of an entry of each
            example, whose length counts; or a function of an example, which returns its number of tokens.

    Yields:
        Each micro-batch, nested as the batch is; the tensors are copies.

    Raises:
        TypeError, ValueError: the batch or its lengths are not as described. Nothing was yielded.

    The host waits for the device once, to read the lengths.
    """
    if not isinstance(tokens, Tokens):
        raise TypeError(f"tokens must be made by bb.tokens. {errors.received('tokens', tokens)}")
    if tokens.most == "auto":
        raise ValueError(
            'bb.tokens("auto") needs the loss to plan for. Pass it to bb.backward, or a number to bb.micro_batches.'
        )
    if collate is not None:
        found = _of_examples(batch, tokens, tokens.most)
        return (collate([batch[i] for i in cut.indices]) for cut in found)
    layout = Layout.of(batch, tokens)
    return (layout.part(cut) for cut in layout.cuts(tokens.most))


class Layout(NamedTuple):
    """Where the tokens of a padded batch stand."""

    batch: Any
    tokens: Tokens
    lengths: list[int]  # of each example
    longest: int  # the padded batch's own length
    on_the_left: bool  # whether padding is
    trimmed: frozenset[str]  # the leaves that are as long as the mask, by where they stand

    @classmethod
    def of(cls, batch: Any, tokens: Tokens) -> "Layout":
        """Reads it from the batch. The host waits for the device here.

        Raises:
            TypeError, ValueError: the mask or the lengths do not fit the batch.
        """
        placed = list(leaves(batch, "batch"))
        length = errors.check_lengths([(where, len(leaf)) for where, leaf in placed])
        if tokens.mask is not None:
            mask = _named(batch, tokens.mask, "mask")
            counts, on_the_left, longest = _spans(mask, tokens.dim, length)
        else:
            given = _named(batch, tokens.lengths, "lengths")
            counts, on_the_left = _listed(given, length), False
            longest = max((leaf.shape[tokens.dim] for _, leaf in placed if _reaches(leaf, tokens.dim)), default=0)
            if max(counts) > longest:
                raise ValueError(
                    f"An example is longer than the batch. Received: lengths of up to {max(counts)}, and tensors of "
                    f"{longest} along dimension {tokens.dim}."
                )
        trimmed = _trimmed(placed, tokens, longest)
        return cls(batch, tokens, counts, longest, on_the_left, trimmed)

    def cuts(self, most: int) -> list[Cut]:
        """The micro-batches; each has at most `most` tokens, padding included."""
        how = self.tokens
        found = cuts(self.lengths, most, multiple_of=how.multiple_of, order=how.order, longest=self.longest)
        return _within(found, self.lengths, most)

    def part(self, cut: Cut) -> Any:
        """A micro-batch: the examples' rows of every leaf, trimmed where they hold tokens."""
        dim, start = self.tokens.dim, self.longest - cut.length if self.on_the_left else 0
        places = iter([where for where, _ in leaves(self.batch, "batch")])

        def rows(leaf: Any) -> Any:
            where = next(places)
            if not isinstance(leaf, Tensor):
                return [leaf[i] for i in cut.indices]
            if where in self.trimmed:
                leaf = leaf.narrow(dim, start, cut.length)
            return leaf.index_select(0, torch.tensor(cut.indices, device=leaf.device))

        return mapped(self.batch, rows)


def _within(found: list[Cut], lengths: Sequence[int], most: int) -> list[Cut]:
    """Refuses what is too small for every example, and warns of examples that are too long."""
    if min(lengths) > most:
        raise ValueError(
            f"most is smaller than the shortest example. Received: most={most}, and examples of {min(lengths)} tokens "
            "and more. Pass the most tokens of a micro-batch, padding included."
        )
    alone = [cut for cut in found if cut.tokens > most]
    if alone:
        warnings.warn(
            f"{len(alone)} of {len(lengths)} examples are longer than most={most} tokens, and go alone, the longest "
            f"with {max(cut.length for cut in alone)}.",
            stacklevel=4,
        )
    return found


def _named(batch: Any, which: Any, option: str) -> Any:
    """The leaf that holds the mask or the lengths."""
    if callable(which):
        return which(batch)
    if not isinstance(which, str):
        return which
    found = batch.get(which) if isinstance(batch, Mapping) else getattr(batch, which, None)
    if found is None:
        there = list(batch) if isinstance(batch, Mapping) else [where for where, _ in leaves(batch, "batch")]
        raise ValueError(
            f"The batch holds no {which!r}. Received: {option}={which!r} for a batch of {there}. Pass a name of those, "
            "or a function of the batch."
        )
    return found


def _reaches(leaf: Any, dim: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > dim


def _trimmed(placed: list[tuple[str, Any]], tokens: Tokens, longest: int) -> frozenset[str]:
    """Which leaves hold sequences: those that `trim` names, else those as long as the mask."""
    long = {where for where, leaf in placed if _reaches(leaf, tokens.dim) and leaf.shape[tokens.dim] == longest}
    if tokens.trim is None:
        return frozenset(long)
    chosen = set()
    for name in tokens.trim:
        match = [where for where, _ in placed if where in (f"batch[{name!r}]", f"batch.{name}")]
        if not match or match[0] not in long:
            raise ValueError(
                f"trim names leaves of {longest} along dimension {tokens.dim}. {errors.received('trim', tokens.trim)} "
                f"{name!r} is none of {sorted(long)}."
            )
        chosen.add(match[0])
    return frozenset(chosen)


def _spans(mask: Any, dim: int, length: int) -> tuple[list[int], bool, int]:
    """Each example's length from the padding's edge to its farthest token, on which side padding is, and the whole.

    Holes inside an example stay: the model has positions for them.
    """
    if not _reaches(mask, dim) or len(mask) != length:
        raise ValueError(
            f"The mask must be a tensor with one row an example and tokens along dimension {dim}. "
            f"{errors.received('mask', mask)} The batch has {length} examples."
        )
    there = mask != 0
    for other in reversed(range(1, mask.ndim)):
        if other != dim:
            there = there.any(other)
    width = there.shape[1]
    place = torch.arange(width, device=there.device)
    # One copy to the host for all three.
    read = torch.stack([there.any(1), torch.where(there, place, width).amin(1), torch.where(there, place, -1).amax(1)])
    some, first, last = read.tolist()
    if not all(some):
        check_lengths([int(any_) for any_ in some], "tokens of example ")
    if any(first) and all(end == width - 1 for end in last):
        # With one column of padding where there is some: shifted labels predict the first token from it.
        return [min(width, width - start + 1) for start in first], True, width
    return [end + 1 for end in last], False, width


def _listed(given: Any, length: int) -> list[int]:
    """Lengths that the user gave, as whole numbers."""
    if isinstance(given, Tensor):
        given = given.tolist()
    counts = check_lengths(given, "lengths")
    if len(counts) != length:
        raise ValueError(f"There must be one length an example. Received: {len(counts)} lengths for {length} examples.")
    return counts


def _of_examples(batch: Any, tokens: Tokens, most: int) -> list[Cut]:
    """The cuts of a list of examples that are not padded yet."""
    which = tokens.lengths
    if not isinstance(batch, Sequence) or not batch:
        raise TypeError(f"With collate the batch is a list of examples. {errors.received('batch', batch)}")
    if isinstance(which, str):
        given = [len(example[which]) for example in batch]
    elif callable(which):
        given = [which(example) for example in batch]
    else:
        given = which
    if given is None:
        raise ValueError(
            "With collate there is no mask yet. Pass bb.tokens(n, lengths=…): an entry's name, or a function of an "
            "example."
        )
    lengths = _listed(given, len(batch))
    found = cuts(lengths, most, multiple_of=tokens.multiple_of, order=tokens.order)
    return _within(found, lengths, most)
