"""What a zoo of audits is made of: things whose truth is known, each made by a function of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specimen:
    make: Callable[[], Any]
    exact: bool
    causes: dict[str, tuple[str, ...]]  # the kinds of cause, and the layers or modules named

    @property
    def name(self) -> str:
        return self.make.__name__


class Zoo(list[Specimen]):
    def specimen(self, exact: bool, **causes: tuple[str, ...]) -> Callable[[Any], Any]:
        """For the function that makes one, with what an audit must say of it."""

        def add(make: Any) -> Any:
            self.append(Specimen(make, exact, {kind.replace("_", " "): where for kind, where in causes.items()}))
            return make

        return add
