"""Timing several contenders so that the machine's moods hit all of them alike.

All contenders run in one process in alternation (A B C A B C ...): a clock that drops, a neighbour that wakes up or a
cache that fills slows every one of them, and the ratio stays. Each sample lasts at least `sample_seconds` (short calls
are repeated inside it), the device is waited for at both ends, and rounds go on until the median of every contender is
known to the stated precision or the time is up. The precision is the half-width of the 95 % confidence interval of the
median, from order statistics (no distribution is assumed); unlike the interquartile spread, which is reported too, it
shrinks with more rounds.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FEWEST_ROUNDS_AT_TIME_LIMIT = 3
_FEWEST_ROUNDS_FOR_PRECISION = (
    6  # below six samples no pair of order statistics encloses the median with 95 % confidence
)


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        precision: relative half-width of the 95 % confidence interval of each median at which to stop.
        time_limit: seconds of timed rounds for one case, after which no round is begun (at least three are run).
        most_rounds: rounds after which to stop in any case.
        warmup_seconds: seconds of warm-up per contender, at least one call.
        sample_seconds: a sample repeats calls shorter than this until it lasts about as long.
    """

    precision: float = 0.02
    time_limit: float = 30.0
    most_rounds: int = 200
    warmup_seconds: float = 0.3
    sample_seconds: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.precision < 1:
            raise ValueError(f"precision must be between 0 and 1 (0.02 is 2 %), got {self.precision}")
        if not 0 < self.time_limit < math.inf:
            raise ValueError(f"time_limit must be a positive number of seconds, got {self.time_limit}")
        if self.most_rounds < 1:
            raise ValueError(f"most_rounds must be at least 1, got {self.most_rounds}")


DEFAULT_SETTINGS = Settings()


@dataclass
class Timing:
    """Seconds per call of one contender, one figure per round."""

    samples: list[float] = field(default_factory=list)
    calls_per_sample: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile."""
        return quartiles(self.samples)

    @property
    def precision(self) -> float:
        """Relative half-width of the 95 % confidence interval of the median (the range, where samples are too few)."""
        ordered, n = sorted(self.samples), len(self.samples)
        reach = 1.96 * math.sqrt(n) / 2
        low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach) - 1)
        return (ordered[high] - ordered[low]) / 2 / self.median

    def as_dict(self) -> dict[str, Any]:
        """The figures of the JSON file, in seconds per call."""
        low, high = self.quartiles
        return {
            "median": self.median,
            "quartile_1": low,
            "quartile_3": high,
            "relative_spread": (high - low) / self.median,
            "precision": self.precision,
            "calls_per_sample": self.calls_per_sample,
            "samples": self.samples,
        }


@dataclass
class Alternation:
    """What `alternate` measured: `order` lists the names in the order in which the samples were taken."""

    timings: dict[str, Timing]
    order: list[str]
    rounds: int
    stopped_by: str


def alternate(
    calls: Mapping[str, Callable[[], object]],
    settings: Settings = DEFAULT_SETTINGS,
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int, dict[str, Timing]], None] = lambda done, timings: None,
) -> Alternation:
    """Time the contenders in alternation, each round one sample of each in the order given.

    Args:
        calls: what to time, by name; each callable is one call.
        settings: when to stop.
        synchronize: waits until the device has done all that was asked of it.
        clock: seconds from any origin; tests pass their own.
        on_round: told the number of finished rounds and the timings so far.

    Raises:
        ValueError: there is nothing to time.
    """
    if not calls:
        raise ValueError("nothing to time: no contender was given")

    def sample(call: Callable[[], object], times: int) -> float:
        synchronize()
        start = clock()
        for _ in range(times):
            call()
        synchronize()
        return (clock() - start) / times

    timings = {name: Timing() for name in calls}
    for name, call in calls.items():
        spent, fastest = 0.0, math.inf
        while spent < settings.warmup_seconds or math.isinf(fastest):
            seconds = sample(call, 1)
            # A clock too coarse for one call would make this loop endless: every call counts as a microsecond at least.
            spent, fastest = spent + max(seconds, 1e-6), min(fastest, seconds)
        timings[name].calls_per_sample = max(1, math.ceil(settings.sample_seconds / max(fastest, 1e-6)))

    order: list[str] = []
    started, rounds, stopped_by = clock(), 0, ""
    with _no_garbage_collection():
        while not stopped_by:
            for name, call in calls.items():
                timings[name].samples.append(max(sample(call, timings[name].calls_per_sample), 1e-12))
                order.append(name)
            rounds += 1
            on_round(rounds, timings)
            if rounds >= _FEWEST_ROUNDS_FOR_PRECISION and all(
                timing.precision <= settings.precision for timing in timings.values()
            ):
                stopped_by = "precision"
            elif rounds >= settings.most_rounds:
                stopped_by = "most rounds"
            elif rounds >= FEWEST_ROUNDS_AT_TIME_LIMIT and clock() - started >= settings.time_limit:
                stopped_by = "time limit"
    return Alternation(timings, order, rounds, stopped_by)


def quartiles(values: list[float]) -> tuple[float, float]:
    """First and third quartile; of a single value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(baseline: Timing, contender: Timing) -> dict[str, Any]:
    """How many times faster `contender` is: ratio of the medians, and the quartiles of the ratios within each round."""
    low, high = quartiles([b / c for b, c in zip(baseline.samples, contender.samples, strict=True)])
    return {"ratio": baseline.median / contender.median, "ratio_quartiles": [low, high]}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a sample would be charged to whoever runs just then."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
