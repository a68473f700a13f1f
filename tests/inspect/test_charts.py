"""Charts draw what they are given, and say so when there is nothing to draw."""

import math
import re

import numpy as np
import pytest

from coterie.inspect.charts import Series, confusion_chart, line_chart, short, smooth


def points(svg: str) -> list[tuple[float, float]]:
    path = re.search(r'class="line" d="M([^"]*)"', svg)
    return [tuple(map(float, pair.split())) for pair in path[1].split("L")]


def test_a_line_goes_where_the_values_go() -> None:
    svg = line_chart([Series("a", [0, 1, 2], [0.0, 1.0, 0.5])], x_label="step", describe="x")
    (x0, y0), (x1, y1), (x2, y2) = points(svg)
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0  # SVG counts downwards
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.2)


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_nothing_to_draw(values: list[float]) -> None:
    assert "No finite values" in line_chart([Series("a", range(len(values)), values)], x_label="step", describe="x")


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [-5, 1e7], [0.99999, 1.0]])
def test_awkward_values_stay_inside(values: list[float]) -> None:
    for percent in (False, True):
        svg = line_chart([Series("a", range(len(values)), values)], x_label="step", describe="x", percent=percent)
        assert all(0 <= x <= 440 and 0 <= y <= 250 for x, y in points(svg))
        assert "nan" not in svg


def test_a_long_curve_is_thinned_but_keeps_its_spike() -> None:
    values = np.zeros(10_000)
    values[7777] = 1.0
    drawn = points(line_chart([Series("a", range(10_000), values)], x_label="step", describe="x"))
    assert len(drawn) < 500
    assert min(y for _, y in drawn) < 30


def test_logarithmic_scale() -> None:
    drawn = points(line_chart([Series("a", [0, 1, 2, 3], [1, 10, 100, 0])], x_label="s", describe="x", log=True))
    assert len(drawn) == 3
    assert drawn[0][1] - drawn[1][1] == pytest.approx(drawn[1][1] - drawn[2][1], abs=0.2)


def test_smoothing_starts_at_the_first_value_and_skips_nan() -> None:
    values = [2.0] * 50 + [math.nan] + [2.0] * 50
    assert smooth(values) == pytest.approx([2.0] * 101)
    assert smooth([1.0, 5.0, 2.0]).tolist() == [1.0, 5.0, 2.0]  # a short curve is left alone


def test_confusion_matrix_cells() -> None:
    svg = confusion_chart(np.array([[8, 2], [0, 1234]]), ["a long <name> here", "b"])
    assert "true a long &lt;name&gt; here, predicted b: 2 (20.0% of the class)" in svg
    assert ">1234</text>" in svg
    assert "1242 right, 2 wrong" in svg


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234567, "1.23M"), (12345, "12.3k"), (417.3, "417"),
     (0.5, "0.5"), (1e-5, "1e-5"), (2.5e-4, "2.5e-4"), (-0.25, "-0.25")],
)  # fmt: skip
def test_short_numbers(value: float, shown: str) -> None:
    assert short(value) == shown
