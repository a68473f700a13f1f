"""Alternation, stopping rules and statistics of the timing, with a clock that the test winds."""

from collections.abc import Callable

import pytest

from coterie.bench.timing import Settings, Timing, alternate, quartiles, ratios


class Clock:
    """Time passes only in the contenders' calls, by the seconds of a list that is repeated."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, *seconds: float) -> Callable[[], None]:
        calls = 0

        def call() -> None:
            nonlocal calls
            self.now += seconds[calls % len(seconds)]
            self.log.append(name)
            calls += 1

        return call


def settings(**changes: float) -> Settings:
    return Settings(**{"warmup_seconds": 0.0, "sample_seconds": 0.0, "most_rounds": 50, "time_limit": 1e9} | changes)


def test_contenders_alternate_in_the_order_given() -> None:
    clock = Clock()
    calls = {"a": clock.contender("a", 1.0), "b": clock.contender("b", 2.0), "c": clock.contender("c", 3.0)}
    found = alternate(calls, settings(), clock=clock)
    assert clock.log == ["a", "b", "c"] * (found.rounds + 1)  # the first three are the warm-up
    assert found.order == ["a", "b", "c"] * found.rounds
    assert {name: timing.median for name, timing in found.timings.items()} == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_stops_as_soon_as_all_medians_are_precise() -> None:
    clock = Clock()
    found = alternate({"a": clock.contender("a", 1.0), "b": clock.contender("b", 2.0)}, settings(), clock=clock)
    assert (found.rounds, found.stopped_by) == (6, "precision")


def test_one_unsteady_contender_keeps_all_running() -> None:
    clock = Clock()
    calls = {"steady": clock.contender("steady", 1.0), "unsteady": clock.contender("unsteady", 1.0, 2.0, 3.0)}
    found = alternate(calls, settings(most_rounds=20), clock=clock)
    assert (found.rounds, found.stopped_by) == (20, "most rounds")
    assert len(found.timings["steady"].samples) == 20


def test_time_limit_ends_after_the_round_but_not_before_three() -> None:
    clock = Clock()
    found = alternate({"a": clock.contender("a", 10.0, 20.0)}, settings(time_limit=1.0), clock=clock)
    assert (found.rounds, found.stopped_by) == (3, "time limit")
    clock = Clock()
    found = alternate({"a": clock.contender("a", 10.0, 20.0)}, settings(time_limit=70.0), clock=clock)
    assert (found.rounds, found.stopped_by) == (5, "time limit")


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    calls = {"short": clock.contender("short", 0.25), "long": clock.contender("long", 4.0)}
    found = alternate(calls, settings(sample_seconds=1.0), clock=clock)
    assert found.timings["short"].calls_per_sample == 4
    assert found.timings["long"].calls_per_sample == 1
    assert found.timings["short"].median == pytest.approx(0.25)


def test_warm_up_lasts_as_long_as_asked() -> None:
    clock = Clock()
    found = alternate({"a": clock.contender("a", 1.0)}, settings(warmup_seconds=5.0), clock=clock)
    assert len(clock.log) - found.rounds == 5


def test_the_device_is_waited_for_before_and_after_each_sample() -> None:
    clock = Clock()
    found = alternate(
        {"a": clock.contender("a", 1.0)}, settings(), clock=clock, synchronize=lambda: clock.log.append("|")
    )
    assert clock.log == ["|", "a", "|"] * (found.rounds + 1)


def test_rounds_are_told() -> None:
    clock, told = Clock(), []
    alternate({"a": clock.contender("a", 1.0)}, settings(), clock=clock, on_round=lambda done, _: told.append(done))
    assert told == [1, 2, 3, 4, 5, 6]


def test_a_clock_that_stands_still_ends_all_the_same() -> None:
    found = alternate({"a": lambda: None}, settings(warmup_seconds=0.0001), clock=lambda: 0.0)
    assert found.timings["a"].median > 0


def test_quartiles_of_one_and_of_many() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_precision_shrinks_with_more_samples_while_the_spread_stays() -> None:
    few, many = Timing([1.0, 2.0, 3.0] * 3), Timing([1.0, 2.0, 3.0] * 100)
    assert few.quartiles == many.quartiles
    assert many.precision < few.precision
    assert Timing([1.0, 1.0, 1.0]).precision == 0.0


def test_precision_is_the_interval_of_order_statistics() -> None:
    # n = 25: ranks 25/2 -+ 1.96 * 5/2 = 7.6 and 17.4, so the 8th and the 18th of the sorted samples enclose the median.
    timing = Timing([float(value) for value in range(1, 26)])
    assert timing.precision == pytest.approx((18 - 8) / 2 / 13)


def test_ratio_is_of_medians_and_its_quartiles_are_within_rounds() -> None:
    drifting = ratios(Timing([2.0, 4.0, 8.0]), Timing([1.0, 2.0, 4.0]))
    assert drifting == {"ratio": 2.0, "ratio_quartiles": [2.0, 2.0]}  # the drift hits both, the ratio does not see it


def test_as_dict_holds_what_the_figures_rest_on() -> None:
    found = Timing([1.0, 2.0, 3.0], calls_per_sample=2).as_dict()
    assert found["median"] == 2.0
    assert (found["quartile_1"], found["quartile_3"]) == (1.5, 2.5)
    assert found["relative_spread"] == 0.5
    assert found["samples"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": 0.0}, "precision must be between 0 and 1"),
        ({"time_limit": 0.0}, "time_limit must be a positive"),
        ({"time_limit": float("inf")}, "time_limit must be a positive"),
        ({"most_rounds": 0}, "most_rounds must be at least 1"),
    ],
)
def test_wrong_settings(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="nothing to time"):
        alternate({})
