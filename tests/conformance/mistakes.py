"""The mistakes that every door is shown, by the names under which `laws.MESSAGES` keeps their words (law 15)."""

from collections.abc import Callable
from typing import Any

Mistakes = dict[str, Callable[[], Any]]


def at_the_split_door(split: Callable[..., Any], x: Any, y: Any) -> Mistakes:
    """Of `split(batch, micro_batch)`, which has a right `micro_batch` of its own; `x` and `y` differ in length."""
    return {
        "micro_batch=0": lambda: split({"x": x}, 0),
        "micro_batch=2.5": lambda: split({"x": x}, 2.5),
        "micro_batch='Auto'": lambda: split({"x": x}, "Auto"),
        "lengths": lambda: split({"x": x, "y": y}),
        "empty": lambda: split({"x": x[:0], "y": y[:0]}),
    }


def at_the_stream_door(stream: Callable[[Any], Any], window: Callable[[Any], Any]) -> Mistakes:
    """Of `stream(items)`, which takes a micro-batch in, and `window(every)`, which makes an accumulator."""
    return {
        "items=-1": lambda: stream(-1),
        "items=0": lambda: stream(0),
        "items=nan": lambda: stream(float("nan")),
        "items='4'": lambda: stream("4"),
        "every=0": lambda: window(0),
        "every=-2": lambda: window(-2),
        "every=2.5": lambda: window(2.5),
        "every=True": lambda: window(True),
    }
