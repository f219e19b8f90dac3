"""An open window as plain numbers and tensors, and back."""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigbatch import errors
from bigbatch.engines.torch_dtypes import gradient_dtype, widened
from bigbatch.engines.torch_fsdp import local, spread_like
from bigbatch.noise import NoiseScale
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.window import Window


def window_state(window: Window, parameters: list[Tensor], ranks: Ranks | None) -> dict[str, Any]:
    """What a window holds, of several ranks this rank's part, by each parameter's place.

    The gradients are no copies. Deferred products come as their factors, under the key "waiting".
    """
    if ranks is not None and ranks.shards is not None:
        ranks.shards.check()
    deferred = window.factors()
    gradients = {i: window.sums.get(p, p.grad) for i, p in enumerate(parameters)}
    gradients = {i: local(grad) for i, grad in gradients.items() if grad is not None}
    factors = {i: deferred[p] for i, p in enumerate(parameters) if p in deferred}
    return {
        "ranks": ranks.size if ranks else 1,
        "rank": ranks.meetings.rank if ranks else 0,
        "micro_batches": window.micro_batches,
        "repeats": window.repeats,
        "items": window.items,
        "unit": window.unit,
        "loss": window.loss,
        "shards": ranks.shards.unreduced() if ranks and ranks.shards else {},
        "places": [sorted(gradients), sorted(factors)],  # so that a lost one is found missing
        "gradients": gradients,
        "waiting": factors,
    }


def restore_window(window: Window, saved: Mapping[str, Any], parameters: list[Tensor], ranks: Ranks | None) -> None:
    """Fills a window that was just opened from what `window_state` returned, with copies of the tensors."""
    window.micro_batches, window.items, window.unit = saved["micro_batches"], saved["items"], saved["unit"]
    window.repeats, window.loss = saved["repeats"], saved["loss"].to(parameters[0].device, copy=True)
    for i, grad in saved["gradients"].items():
        p = parameters[i]
        if window.dtype is None:
            p.grad = spread_like(p, grad, gradient_dtype(p))
        else:
            window.sums[p] = spread_like(p, grad, grad.dtype)
    for i, (left, right) in saved["waiting"].items():
        window.restore_factors(parameters[i], left, right)
    if ranks is not None and ranks.shards is not None:
        ranks.shards.restore(saved["shards"])


def check_state(state: Any, parameters: list[Tensor], ranks: Ranks | None, dtype: torch.dtype | None) -> None:
    """Accepts an Accumulator's state of these parameters, and of as many ranks where a window is open in it.

    Args:
        state: looked at whole, before anything is touched.
        parameters: the optimizer's.
        ranks: those that train one model, or None.
        dtype: the narrowest of wide sums, or None where gradients add up in `.grad`.

    Raises:
        ValueError: it names the entry that is wrong.
    """
    keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
    lacks = sorted({"index", "shapes", "window"} - set(state if isinstance(state, Mapping) else ()))
    if lacks:
        raise ValueError(f"The state is not an Accumulator's. Received: keys {keys}, without {', '.join(lacks)}.")
    _keys("state", state, ("index", "shapes", "window"), optional=("pending", "noise"))  # older ones have neither
    _whole("state['index']", state["index"])
    shapes = [tuple(p.shape) for p in parameters]
    try:
        same = [tuple(map(operator.index, shape)) for shape in state["shapes"]] == shapes
    except TypeError:
        same = False
    if not same:
        raise ValueError(
            "The state is of other parameters. "
            f"Received: shapes {state['shapes']}, but the optimizer holds {shapes}. "
            "Build the same model and parameter groups before loading."
        )
    if "noise" in state:
        _check_noise(state["noise"])
    if state["window"] is not None:
        _check_window(state["window"], parameters, ranks, dtype)
    pending = 0 if state["window"] is None else state["window"]["micro_batches"]
    if _whole("state['pending']", state.get("pending", pending)) != pending:
        raise _wrong("state['pending']", state["pending"], f"the {pending} micro-batches of the window")


def _check_window(saved: Any, parameters: list[Tensor], ranks: Ranks | None, dtype: torch.dtype | None) -> None:
    where = "state['window']"
    numbers = "ranks", "rank", "micro_batches", "repeats", "items", "unit", "loss"
    _keys(where, saved, (*numbers, "shards", "places", "gradients", "waiting"))
    size = ranks.size if ranks else 1
    if _whole(f"{where}['ranks']", saved["ranks"], 1) != size:
        raise ValueError(
            f"The state was saved inside a window on {saved['ranks']} ranks, each with its own part of it. "
            f"Received: {size} ranks. Load it on as many, or save where no window is open."
        )
    rank = ranks.meetings.rank if ranks else 0
    if _whole(f"{where}['rank']", saved["rank"]) != rank:
        raise ValueError(
            f"The state was saved inside a window by rank {saved['rank']}, which held another part of it. "
            f"Received: rank {rank}. Every rank saves and loads its own, or save where no window is open."
        )
    micro_batches = _whole(f"{where}['micro_batches']", saved["micro_batches"], 1)
    if _whole(f"{where}['repeats']", saved["repeats"]) > micro_batches:
        raise _wrong(f"{where}['repeats']", saved["repeats"], "at most micro_batches")
    _number(f"{where}['items']", saved["items"])
    _number(f"{where}['unit']", saved["unit"], above=True)
    _tensor(f"{where}['loss']", saved["loss"], (), (torch.float32, torch.float64))
    for i, grad in _by_place(f"{where}['gradients']", saved["gradients"], parameters):
        p = parameters[i]
        _tensor(
            f"{where}['gradients'][{i}]", grad, local(p).shape, (widened(p, dtype) if dtype else gradient_dtype(p),)
        )
    for i, pair in _by_place(f"{where}['waiting']", saved["waiting"], parameters):
        _check_factors(f"{where}['waiting'][{i}]", pair, parameters[i], dtype)
    places = [sorted(saved["gradients"]), sorted(saved["waiting"])]
    if repr(saved["places"]) != repr(places):  # a tensor in it would not compare
        raise _wrong(f"{where}['places']", saved["places"], f"the places of its gradients and factors, {places}")
    _check_shards(f"{where}['shards']", saved["shards"], ranks)


def _check_factors(where: str, pair: Any, p: Tensor, dtype: torch.dtype | None) -> None:
    """Of a deferred product: as many rows for the weight's rows and for its columns."""
    if dtype is not None or p.ndim != 2 or not isinstance(pair, tuple | list) or len(pair) != 2:
        raise _wrong(where, pair, "a pair of matrices, for a matrix that adds up in .grad")
    rows = len(pair[0]) if isinstance(pair[0], Tensor) and pair[0].ndim == 2 else 0
    for part, columns in zip(pair, p.shape, strict=True):
        _tensor(where, part, (rows, columns), (p.dtype,), sparse=False)


def _check_shards(where: str, saved: Any, ranks: Ranks | None) -> None:
    shards = ranks.shards if ranks else None
    _keys(where, saved, ("unsharded", "partial") if shards else ())
    if shards:
        for i, grad in _by_place(f"{where}['unsharded']", saved["unsharded"], shards.parameters):
            kinds = torch.float32, torch.float64, torch.bfloat16, torch.float16
            _tensor(f"{where}['unsharded'][{i}]", grad, shards.parameters[i].shape, kinds, sparse=False)
        for i, part in _by_place(f"{where}['partial']", saved["partial"], shards.modules):
            if not isinstance(part, Tensor) or not part.is_floating_point():
                raise _wrong(f"{where}['partial'][{i}]", part, "a floating tensor")


def _check_noise(saved: Any) -> None:
    _keys("state['noise']", saved, ("scale", "window"))
    NoiseScale().load_state_dict(saved["scale"])
    if saved["window"] is not None:
        _keys("state['noise']['window']", saved["window"], ("squares", "counted"))
        _number("state['noise']['window']['squares']", saved["window"]["squares"], finite=False)
        _number("state['noise']['window']['counted']", saved["window"]["counted"])


def _wrong(where: str, value: Any, kind: str) -> ValueError:
    received = errors.received(where, value)
    return ValueError(f"{where} must be {kind}. {received} The state is damaged, or of another version or options.")


def _keys(where: str, value: Any, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(value, Mapping) or set(keys) - set(value) or set(value) - {*keys, *optional}:
        received = f"one with {sorted(map(str, value))}" if isinstance(value, Mapping) else value
        raise _wrong(where, received, f"a mapping with {', '.join(keys) or 'no entries'}")


def _whole(where: str, value: Any, least: int = 0) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < least:
        raise _wrong(where, value, f"a whole number of at least {least}")
    return number


def _number(where: str, value: Any, above: bool = False, finite: bool = True) -> None:
    """A real number, or a tensor of one; reading that makes the host wait."""
    plain = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(value, Tensor):
        plain = value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool
    number = float(value) if plain else math.nan
    if not plain or (finite and not (math.isfinite(number) and number >= 0)) or (above and number == 0):
        raise _wrong(where, value, "a number" if not finite else f"finite and {'above' if above else 'at least'} 0")


def _tensor(where: str, value: Any, shape: Any, dtypes: tuple[torch.dtype, ...], sparse: bool = True) -> None:
    layouts = (torch.strided, torch.sparse_coo) if sparse else (torch.strided,)
    if (
        not isinstance(value, Tensor)
        or tuple(value.shape) != tuple(shape)
        or value.dtype not in dtypes
        or value.layout not in layouts
    ):
        kinds = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise _wrong(where, value, f"a tensor of shape {tuple(shape)} and dtype {kinds}")


def _by_place(where: str, value: Any, of: Sequence[Any]) -> list[tuple[int, Any]]:
    """A mapping's items, whose keys are places in a list."""
    if not isinstance(value, Mapping) or any(type(i) is not int or not 0 <= i < len(of) for i in value):
        received = f"one with {list(value)[:5]}" if isinstance(value, Mapping) else value
        raise _wrong(where, received, f"a mapping from places below {len(of)}")
    return list(value.items())
