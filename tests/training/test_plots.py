import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bonetune.training.charts import SIDE, Line, chart
from bonetune.training.plots import evaluated, mean_window, plot_loss, points, running_mean, tokens_per_second

NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])
VALUES = st.lists(NUMBERS, min_size=1, max_size=40)


def curve(values):
    return list(enumerate(values, 1))


def line(values, look="raw"):
    return Line("a", look, curve(values))


def places(path):
    """The points of SVG path data of M, L and h0."""
    parts = path.replace("h0", "").replace("M", " M ").replace("L", " L ").split()
    return [(float(parts[i + 1]), float(parts[i + 2])) for i in range(0, len(parts), 3)]


@given(values=VALUES, window=st.integers(1, 50))
def test_a_running_mean_is_that_of_the_finite_values_of_its_window(values, window):
    for (step, mean), end in zip(running_mean(curve(values), window), range(1, len(values) + 1), strict=True):
        finite = [v for v in values[max(0, end - window) : end] if math.isfinite(v)]
        assert step == end
        assert (mean == pytest.approx(math.fsum(finite) / len(finite), abs=1e-6)) if finite else math.isnan(mean)


@given(st.integers(0, 10**6))
def test_a_mean_s_window_is_a_part_of_the_run(count):
    assert 1 <= mean_window(count) <= max(1, count // 8)


def test_evaluations_do_not_slow_the_tokens_a_second():
    steps = [
        {"step": 1, "seconds": 2.0, "tokens": 200, "loss": 1.0},
        {"step": 2, "seconds": 3.0, "tokens": 400, "loss": 1.0},
        {"step": 2, "seconds": 9.0, "tokens": 400, "eval_loss": 1.0},
        {"step": 3, "seconds": 10.0, "tokens": 500, "loss": 1.0},
    ]
    assert tokens_per_second(steps) == [(1, 100.0), (2, 200.0), (3, 100.0)]
    assert tokens_per_second([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0, "seconds": 1.0, "tokens": 5}]) == [(2, 5.0)]


def test_what_is_absent_from_a_line_is_left_out():
    lines = [{"step": 1, "loss": 2, "eval_f1": 0.5}, {"step": 2, "loss": None, "eval_note": "x"}, {"step": 3, "eval_loss": 1.5}]
    assert points(lines, "loss") == [(1, 2.0)]
    assert evaluated(lines) == {"eval_loss": [(3, 1.5)], "eval_f1": [(1, 0.5)]}


@pytest.mark.parametrize("values", [[], [1.0], [math.nan] * 20, [1.0, math.inf, math.nan, 0.5] * 10])
def test_a_picture_of_any_losses(tmp_path, values):
    plot_loss([{"step": step, "loss": value} for step, value in curve(values)], tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@given(values=VALUES, zero=st.booleans())
@example(values=[1.0, 1.0, 101.0, -math.inf], zero=False)
@example(values=[5e-324], zero=False)
@example(values=[-5e-324, 0.0], zero=True)
@example(values=[5e-324, 1e-300, 1.0], zero=False)
@example(values=[5e-324, 1e-310, 1e-302], zero=False)
@example(values=[1e6, math.nextafter(1e6, math.inf)], zero=False)
@example(values=[-1e6, math.nextafter(-1e6, 0)], zero=False)
def test_a_chart_shows_each_finite_value_where_its_ticks_say(values, zero):
    drawn = chart("a", [line(values)], (1, len(values)), from_zero=zero)
    finite = [(step, value) for step, value in curve(values) if math.isfinite(value)]
    if drawn is None:
        assert not finite
        return
    assert drawn.missing == len(values) - len(finite)
    shown = places(drawn.lines[0].stroke)
    assert len(shown) == len(finite)
    assert all(0 <= x <= SIDE and -0.1 <= y <= SIDE + 0.1 for x, y in shown)
    assert [x for x, _ in shown] == sorted(x for x, _ in shown)
    by_height = [value for _, value in sorted(zip((-y for _, y in shown), (v for _, v in finite), strict=True))]
    spread = max(by_height) - min(by_height)
    assert all(a <= b + 1e-3 * spread for a, b in pairwise(by_height)) or drawn.logarithmic
    assert drawn.values[0].place == 0
    assert drawn.values[-1].place == pytest.approx(SIDE)


@given(low=st.floats(-1e5, 1e5), size=st.floats(1e-3, 1e5), zero=st.booleans())
def test_ticks_are_round_numbers_at_their_places(low, size, zero):
    drawn = chart("a", [line([low, low + size])], (1, 2), from_zero=zero)
    assert drawn is not None
    assert 2 <= len(drawn.values) <= 8
    if drawn.logarithmic:
        return
    heights = [SIDE - y for _, y in places(drawn.lines[0].stroke)]
    first, last = (float(drawn.values[i].text.replace(",", "")) for i in (0, -1))
    for height, value in zip(heights, (low, low + size), strict=True):
        # a tick's text has four digits, a place one decimal
        assert first + height / SIDE * (last - first) == pytest.approx(value, abs=2e-3 * (abs(first) + abs(last)))


def test_amounts_begin_at_zero_and_losses_near_zero_do():
    lowest = [
        chart("a", [line(values)], (1, 2), from_zero=zero).values[0].text  # pyright: ignore[reportOptionalMemberAccess]
        for values, zero in (([90, 100], True), ([90, 100], False), ([1, 100], False), ([5, 5], False))
    ]
    assert lowest == ["0", "90", "0", "0"]


def test_values_over_decades_are_on_a_logarithmic_axis():
    drawn = chart("a", [line([1.0, 2.0, 1.0, 1e6])], (1, 4))
    assert drawn is not None
    assert drawn.logarithmic
    assert drawn.values[0].text == "1"
    assert not chart("a", [line([0.0, 2.0, 1.0, 1e6])], (1, 4)).logarithmic  # pyright: ignore[reportOptionalMemberAccess]


def test_a_gap_is_a_gap_and_a_lone_value_a_dot():
    drawn = chart("a", [line([1, 2, math.nan, 3, math.inf, 4, 5])], (1, 7))
    assert drawn is not None
    assert drawn.lines[0].stroke.count("M") == 3
    assert drawn.lines[0].dots.count("h0") == 1
    dotted = chart("a", [line([1, 2, math.nan], "dots")], (1, 3))
    assert dotted is not None
    assert dotted.lines[0].dots.count("h0") == 2


def test_a_long_run_keeps_its_spikes_and_is_small():
    values = [1.0] * 100_000
    values[54_321] = 9.0
    drawn = chart("a", [line(values)], (1, len(values)))
    assert drawn is not None
    shown = places(drawn.lines[0].stroke)
    assert len(shown) <= 1000
    assert min(y for _, y in shown) < SIDE / 5
    assert len(drawn.hints) <= 200
    assert sum(hint.width for hint in drawn.hints) == pytest.approx(SIDE)
