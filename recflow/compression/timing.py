"""Time several functions beside each other on a machine whose speed changes.

A machine slows down while it is measured: it gets warm, or something else starts. So nobody is
measured in one piece. In every round each function has two turns, in the order A B C and then back
C B A: the middle of its turns is the middle of the round for everybody, and a slow-down that is
linear in time cancels out of medians and means (a balanced order, as ABBA in the design of
experiments).

The first call of a turn is not timed: it finds the caches full of someone else's weights, which is
not how a model is served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Batch = list[str]
Clock = Callable[[], float]


@dataclass(slots=True)
class Timings:
    """What one function took.

    Attributes:
        seconds: Of each timed call, in the order of the calls.
        joules: Of each turn's timed calls together; empty without a meter.
    """

    seconds: list[float] = field(default_factory=lambda: [])
    joules: list[float] = field(default_factory=lambda: [])


def time_in_turns(
    functions: Mapping[str, Callable[[Batch], object]],
    turns: Sequence[Sequence[Batch]],
    *,
    clock: Clock = time.perf_counter,
    meter: Clock | None = None,
) -> dict[str, Timings]:
    """Time functions on the same batches.

    Args:
        functions: What is timed, by name.
        turns: Batches of each turn, the same for every function; an even number of turns, as
            every second one runs backwards. The first batch of a turn is not timed.
        clock: Seconds from some moment on.
        meter: Joules from some moment on.

    Returns:
        The timings of each function.
    """
    timings = {name: Timings() for name in functions}
    names = list(functions)
    for number, (untimed, *timed) in enumerate(turns):
        for name in names if number % 2 == 0 else reversed(names):
            function, taken = functions[name], timings[name]
            function(untimed)
            joules = meter() if meter else 0.0
            for batch in timed:
                started = clock()
                function(batch)
                taken.seconds.append(clock() - started)
            if meter:
                taken.joules.append(meter() - joules)
    return timings
