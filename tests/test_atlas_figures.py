"""The atlas in pictures shows what its records hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.atlas import figures
from benchmarks.atlas.estimate import Study, study
from benchmarks.atlas.forest import LOOKS, WIDEST, forest, halves
from benchmarks.atlas.records import Band, Run, band
from tests.atlas_records import records

pytest.importorskip("scipy", reason="pip install '.[test]'")
matplotlib = pytest.importorskip("matplotlib", reason="pip install '.[test]'")


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    matplotlib.use("agg")
    return [Run.of(record) for record in records(problems=32)]


@pytest.fixture(scope="module")
def found(runs: list[Run]) -> Study:
    return study(runs)


def test_the_pictures_are_small_and_the_same_bytes_each_time(runs: list[Run], tmp_path: Path) -> None:
    few = study([run for run in runs if run.experiment in ("baseline", "mu 4", "TRL") and run.task == "ways"])
    (tmp_path / "again").mkdir()
    written = figures.draw(few, tmp_path)
    assert [path.name for path in written] == ["curves-ways.png", "forest.png", "trl.png"]
    again = figures.draw(few, tmp_path / "again")
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    assert all(path.stat().st_size < 120_000 for path in written)


def test_a_panel_for_each_question_and_curve_with_the_baseline_in_it(found: Study) -> None:
    figure = figures.curves(found, "ways", {"mu": ["accuracy", "entropy"]})
    panels = {(axis.get_title(loc="left"), axis.get_ylabel()): axis for axis in figure.axes}
    accuracy, entropy = "right training samples", "entropy, nats a token"
    assert list(panels) == [("mu", accuracy), ("mu", entropy), ("group size", accuracy), ("checks", accuracy)]
    lines = {line.get_label(): line for line in panels["mu", entropy].get_lines()}
    assert {name for name in lines if not name.startswith("_")} == {"baseline", "mu 2", "mu 4", "mu 8, no clipping"}
    drawn = band(found.results["ways", "mu 4"].experiment, "entropy")
    assert drawn and np.array_equal(lines["mu 4"].get_ydata(), drawn.mean)
    names = [text.get_text().replace("\n", " ") for text in panels["mu", entropy].texts]
    assert sorted(names) == ["baseline", "mu 2", "mu 4", "mu 8, no clipping"]
    assert len({panels[key].get_ylim() for key in panels if key[1] == accuracy}) == 1
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("most", [1.0, 0.3, 0.18, 0.07, 0.021])
def test_a_share_says_the_value_of_its_tick(found: Study, most: float) -> None:
    from matplotlib import pyplot

    base = band(found.results["ways", "baseline"].experiment, "accuracy")
    assert base is not None
    figure, axis = pyplot.subplots(figsize=(3, 2.3))
    figures.panel(axis, "clipped", None, [("small", Band(base.steps, *[base.mean / base.mean.max() * most] * 3))])
    figure.canvas.draw()
    ticks = [(tick, label.get_text()) for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)]
    assert len(ticks) > 2 and all(float(text.strip("%")) == pytest.approx(100 * tick) for tick, text in ticks)
    pyplot.close(figure)


def test_labels_keep_their_order_and_stand_apart_within_the_axis() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        wanted, heights = sorted(draw.uniform(-0.1, 1.1, 6)), draw.uniform(0.05, 0.15, 6)
        places = figures.spread(wanted, list(heights))
        below = [place - height / 2 for place, height in zip(places, heights, strict=True)]
        above = [place + height / 2 for place, height in zip(places, heights, strict=True)]
        assert below[0] >= -1e-9 and above[-1] <= 1 + 1e-9
        assert all(low >= high - 1e-9 for high, low in zip(above, below[1:], strict=False))
    assert figures.spread([0.2, 0.6], [0.1, 0.1]) == pytest.approx([0.2, 0.6])


def test_the_forest_shows_each_difference_in_the_colour_of_its_verdict(found: Study) -> None:
    figure = forest(found)
    drawn = {}
    for axis in figure.axes:
        names = {round(text.get_position()[1], 6): text.get_text() for text in axis.texts if text.get_position()[0] < 0}
        for line in axis.get_lines()[1:]:  # the first is the zero
            if len(line.get_xdata()) == 2:
                drawn[axis, names[round(line.get_ydata()[0], 6)]] = (*line.get_xdata(), line.get_color())
    assert len(drawn) == len([each for each in found.results.values() if each.difference])
    assert halves(found) == [["ways"], ["budget"]]
    by_name = {name: values for (_, name), values in drawn.items()}
    low, high, color = by_name["mu 4"]
    difference = found.results["ways", "mu 4"].difference
    assert difference and (low, high) == pytest.approx((difference.low, difference.high))
    assert color == LOOKS[found.results["ways", "mu 4"].verdict][0]
    assert by_name["TRL"][2] == LOOKS["check"][0]
    assert by_name["mu 8, no clipping"][0] == pytest.approx(-WIDEST * 1.05)  # at the edge, an arrow
    matplotlib.pyplot.close(figure)
