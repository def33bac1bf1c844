"""The figure's lines against the records they are drawn from; the places of its names against SciPy's optimizer."""

import math

import numpy as np
import pytest
from scipy import optimize

from benchmarks.learning import METHODS, SEEDS, STEPS, Run
from benchmarks.learning_figure import distance, draw, plot, running_mean, spread

TWINS = {name: method.same_function_as for name, method in METHODS.items() if method.same_function_as}


def losses(scale):
    return [scale * 2.0 / (step + 1) for step in range(STEPS)]


def names(figure):
    """The methods written beside the lines."""
    return {text.get_text().partition(" ")[0] for text in figure.axes[0].texts}


def points(axes):
    """The colour and the points of each line."""
    return [(line.get_color(), np.asarray(line.get_xydata())) for line in axes.lines]


def test_methods_of_anothers_function_are_not_drawn_but_named(records):
    records.complete()
    for seed in SEEDS:  # the mean over seeds is 2% higher than bone's
        records.write(Run("miss", 2e-3, seed), training=losses(0.96 + 0.03 * seed), items=[(20.0, 10, True)])
    study = records.study()
    assert distance(study, "miss", "bone") == pytest.approx(0.02)
    figure = draw(study)
    assert names(figure) == set(METHODS) - set(TWINS)
    caption = " ".join(figure.get_supxlabel().split())
    assert "miss (as bone; never further off than 2%)" in caption
    assert all(f"{name} (as {origin}; never" in caption for name, origin in TWINS.items())


def test_distance_compares_shared_seeds_alone(records):
    records.complete().remove("miss-*-seed[13].json")
    records.write(Run("bone", 2e-3, 1), training=losses(5), items=[(20.0, 10, True)])
    assert distance(records.study(), "miss", "bone") == 0


def test_methods_that_leave_the_others_line_are_drawn(records):
    records.complete().remove("bat-lr0.002-seed[123].json")
    records.write(Run("miss", 2e-3, 2), training=[3.0, math.nan], items=[(math.nan, 10, False)])
    figure = draw(records.study())
    assert names(figure) == {*METHODS} - {"bat", "bat-row-exact"}
    assert "miss" not in figure.get_supxlabel()


def test_time_is_steps_times_the_seconds_of_one(records):
    steps, time = draw(records.complete().study(), {"bone": 0.5, "lora": 2.0, "miss": 9.0}).axes
    colours = {colour for colour, line in points(steps) if len(line) == STEPS}
    assert len(colours) == len(METHODS) - len(TWINS)
    timed = {line[-1, 0]: colour for colour, line in points(time) if len(line) == STEPS}
    assert timed.keys() == {STEPS * 0.5, STEPS * 2.0}
    assert set(timed.values()) < colours
    assert "CPU seconds" in time.get_xlabel()


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_diverged_runs_are_crossed(records, tmp_path, lost):
    records.complete()
    records.write(Run("bat", 2e-3, 2), training=[3.0, lost], items=[(lost, 10, False)])
    records.write(Run("lora", 2e-3, 2), training=[lost], items=[(lost, 10, False)])
    figure = draw(records.study())
    (cross,) = [line.get_xydata() for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert np.array_equal(cross, [(1, 3.0)])
    assert "cross: a diverged run" in figure.axes[0].get_title(loc="left")
    plot(records.study(), None, tmp_path / "figures" / "losses.png")
    assert (tmp_path / "figures" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_running_mean_is_a_convolution_once_its_window_is_full():
    values = list(np.random.default_rng(0).exponential(size=20))
    assert running_mean(values, 5)[4:] == pytest.approx(np.convolve(values, np.full(5, 0.2), mode="valid"))
    assert running_mean(values, 5)[:3] == pytest.approx([values[0], np.mean(values[:2]), np.mean(values[:3])])


def test_spread_is_the_nearest_with_a_gap():
    places = [0.1, 0.11, 0.12, 0.5, 0.52, 0.9]
    constraint = {"type": "ineq", "fun": lambda x: np.diff(x) - 0.05}
    start = 0.05 * np.arange(6)
    expected = optimize.minimize(lambda x: 1e3 * np.sum((x - places) ** 2), start, method="SLSQP", constraints=constraint)
    assert spread(places, 0.05) == pytest.approx(expected.x, abs=1e-5)
