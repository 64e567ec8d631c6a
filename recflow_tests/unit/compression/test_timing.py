from collections.abc import Callable, Sequence

import numpy as np
import pytest

from recflow.compression.timing import time_in_turns

TURNS = [[["cold"], ["x"], ["x"], ["x"]]] * 6


class Machine:
    """A clock, and functions that take longer the later they are called.

    Attributes:
        now: Seconds since the start.
        calls: Who was called with what, in order.
    """

    def __init__(self, slowdown: Callable[[int], float]) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, str]] = []
        self._slowdown = slowdown

    def function(self, name: str, seconds: float) -> Callable[[Sequence[str]], None]:
        def call(batch: Sequence[str]) -> None:
            self.now += seconds * self._slowdown(len(self.calls))
            self.calls.append((name, batch[0]))

        return call

    def functions(self, **seconds: float) -> dict[str, Callable[[Sequence[str]], None]]:
        return {name: self.function(name, taken) for name, taken in seconds.items()}

    def clock(self) -> float:
        return self.now


def test_a_linear_slowdown_cancels_out() -> None:
    machine = Machine(lambda call: 1 + 0.05 * call)
    functions = machine.functions(a=1.0, b=1.0, c=1.0, d=2.0)
    taken = {
        name: timings.seconds
        for name, timings in time_in_turns(functions, TURNS, clock=machine.clock).items()
    }
    assert len(taken["a"]) == 18
    assert max(taken["a"]) > 3 * min(taken["a"])  # the machine did slow down
    for summary in (np.mean, np.median):
        values = {name: float(summary(seconds)) for name, seconds in taken.items()}
        assert values["b"] == pytest.approx(values["a"])
        assert values["c"] == pytest.approx(values["a"])
        assert values["d"] == pytest.approx(2 * values["a"])


def test_measured_in_one_piece_the_last_would_look_slower() -> None:
    """What the test above would find without the turns."""
    machine = Machine(lambda call: 1 + 0.05 * call)
    alone = [
        time_in_turns({name: function}, TURNS, clock=machine.clock)[name].seconds
        for name, function in machine.functions(a=1.0, b=1.0).items()
    ]
    assert np.median(alone[1]) > 1.5 * np.median(alone[0])


def test_everybody_sees_the_same_batches_and_the_first_of_a_turn_is_not_timed() -> None:
    machine = Machine(lambda _: 1.0)
    turns = [[["cold 1"], ["p"], ["q"]], [["cold 2"], ["r"], ["s"]]]
    taken = time_in_turns(machine.functions(a=1.0, b=3.0), turns, clock=machine.clock)
    assert machine.calls == [
        *(("a", batch) for batch in ("cold 1", "p", "q")),
        *(("b", batch) for batch in ("cold 1", "p", "q")),
        *(("b", batch) for batch in ("cold 2", "r", "s")),
        *(("a", batch) for batch in ("cold 2", "r", "s")),
    ]
    assert taken["a"].seconds == [1.0] * 4
    assert taken["b"].seconds == [3.0] * 4
    assert taken["a"].joules == []


def test_energy_is_that_of_the_timed_calls() -> None:
    machine = Machine(lambda _: 1.0)
    taken = time_in_turns(
        machine.functions(a=1.0, b=3.0),
        TURNS[:2],
        clock=machine.clock,
        meter=lambda: 10 * machine.now,
    )
    assert taken["a"].joules == [30.0, 30.0]  # three timed calls of a second, at 10 watts
    assert taken["b"].joules == [90.0, 90.0]
