"""Numbers that change with the optimizer step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping


class Schedule(ABC):
    """A number for each optimizer step; every argument of ``__init__`` is kept under its own name."""

    @abstractmethod
    def __call__(self, step: int) -> int | float:
        """The value after ``step`` optimizer steps."""


AnySchedule = Schedule | Callable[[int], int | float]
"""A function will do as well."""


class LinearSchedule(Schedule):
    """Goes from ``start`` to ``end`` in a straight line.

    Args:
        start: value until step ``begin``.
        end: value from step ``begin + num_steps`` on.
        num_steps: optimizer steps between them, 1 or more.
        begin: the step at which it starts to move.

    Raises:
        ValueError: if ``num_steps`` is below 1 or ``begin`` negative.

    Example:
        >>> schedule = LinearSchedule(1.0, 0.0, num_steps=10)
        >>> schedule(0), schedule(5), schedule(100)
        (1.0, 0.5, 0.0)
    """

    def __init__(self, start: int | float, end: int | float, num_steps: int, begin: int = 0) -> None:
        if num_steps < 1 or begin < 0:
            raise ValueError(f"num_steps={num_steps}, begin={begin}: wanted 1 step or more, from step 0 or later.")
        self.start = start
        self.end = end
        self.num_steps = num_steps
        self.begin = begin

    def __call__(self, step: int) -> int | float:
        """The value after ``step`` optimizer steps."""
        return self.start + (self.end - self.start) * self.progress(step)

    def progress(self, step: int) -> float:
        """How much of the way is done, from 0 to 1."""
        return min(max(step - self.begin, 0) / self.num_steps, 1.0)


class CosineSchedule(LinearSchedule):
    """Goes from ``start`` to ``end`` along half a cosine: slowly, fast, slowly.

    Args:
        start: value until step ``begin``.
        end: value from step ``begin + num_steps`` on.
        num_steps: optimizer steps between them, 1 or more.
        begin: the step at which it starts to move.

    Raises:
        ValueError: if ``num_steps`` is below 1 or ``begin`` negative.

    Example:
        >>> schedule = CosineSchedule(1.0, 0.0, num_steps=10)
        >>> round(schedule(0), 3), round(schedule(5), 3), round(schedule(10), 3)
        (1.0, 0.5, 0.0)
    """

    def progress(self, step: int) -> float:
        """How much of the way is done, from 0 to 1."""
        return (1 - math.cos(math.pi * super().progress(step))) / 2


class StepSchedule(Schedule):
    """Holds each value from its step on.

    Args:
        values: step to value, the first at step 0.

    Raises:
        ValueError: if there is no value for step 0.

    Example:
        >>> schedule = StepSchedule({0: 4, 1000: 2})
        >>> schedule(999), schedule(1000)
        (4, 2)
    """

    def __init__(self, values: Mapping[int, int | float]) -> None:
        if 0 not in values or min(values) < 0:
            raise ValueError(f"values={dict(values)}: wanted steps from 0 on, as {{0: 4, 1000: 2}}.")
        self.values = values

    def __call__(self, step: int) -> int | float:
        """The value after ``step`` optimizer steps."""
        return self.values[max(begin for begin in self.values if begin <= step)]
