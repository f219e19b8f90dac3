"""Whether `.grad` and the parameters change inside an open window in any way but by the window's own backward."""

from typing import Any

from bigbatch.keras.guard import DISCARDED


class GradientGuard:
    """Compares `.grad` and the parameters with what the window left there after its last backward.

    Args:
        parameters: those that the window trains.
        adds_up: whether there is more than one micro-batch, as for `guarded`.
    """

    def __init__(self, parameters: list[Any], adds_up: bool):
        self.parameters = parameters
        self.unchanged = parameters if adds_up else []
        # `_version` is not public. tests/keras/test_private.py fails when it moves.
        self.versions = [p._version for p in self.unchanged]
        self.note()

    def note(self) -> None:
        """Takes the gradients as they are now for the window's own."""
        self.own = [(p.grad, None if p.grad is None else p.grad._version) for p in self.parameters]

    def check(self) -> None:
        """Compares, without reading a value.

        Raises:
            RuntimeError: they differ; the text names what can have changed them.
        """
        if [p._version for p in self.unchanged] != self.versions:
            raise RuntimeError(
                "A parameter was moved by an in-place write inside an open window, as an optimizer's step or a copy_ "
                f"makes one. Remove it from the model's call, loss or metrics. {DISCARDED}"
            )
        for p, (own, version) in zip(self.parameters, self.own, strict=True):
            if p.grad is own and (own is None or own._version == version):
                continue
            if p.grad is None:
                seen = "a gradient is gone, as zero_grad() leaves it"
            elif p.grad is not own:
                seen = "there is a gradient that is not the window's, as a backward() leaves it"
            else:
                seen = "a gradient was written to, as backward(), clip_grad_norm_() or zero_grad() do"
            raise RuntimeError(
                f"The gradients of an open window were changed by others: {seen}. Remove it from the model's call, "
                f"loss or metrics; torch.autograd.grad leaves .grad alone. {DISCARDED}"
            )
