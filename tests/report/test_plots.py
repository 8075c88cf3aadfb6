"""Pictures of reports, predictions and results."""

import subprocess
import sys

import pytest

from kvtier import TurnReport, plots
from kvtier.errors import ConfigurationError

pyplot = pytest.importorskip("matplotlib.pyplot")
to_hex = pytest.importorskip("matplotlib.colors").to_hex
REPORTS = [
    TurnReport(prompt_tokens=10, computed_tokens=10, first_token_seconds=0.5, cold_seconds=0.5),
    TurnReport(
        prompt_tokens=30,
        cached_tokens=25,
        computed_tokens=5,
        cached_by_tier={"device": 9, "host": 0, "disk": 12, "shelf": 4},
        first_token_seconds=0.25,
        cold_seconds=1.5,
    ),
]


@pytest.fixture(autouse=True)
def _without_a_window():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


@pytest.fixture
def axes(_without_a_window):
    return pyplot.subplots()[1]


def bars(axes):
    return {each.get_label(): [bar.get_height() for bar in each] for each in axes.containers}


def test_bars_of_turns_add_up_to_their_prompts(axes):
    assert plots.plot_turns(iter(REPORTS), axes) is axes
    assert bars(axes) == {"device": [0, 9], "disk": [0, 12], "shelf": [0, 4], "computed": [10, 5]}
    assert [max(b.get_y() + b.get_height() for c in axes.containers for b in [c[i]]) for i in (0, 1)] == [10, 30]


@pytest.mark.parametrize("size", [(6.4, 4.8), (5, 2.6)], ids=["default", "small"])
@pytest.mark.parametrize("turns", [1, 2, 12])
def test_legend_of_turns_covers_no_bar_and_lies_in_the_figure(size, turns):
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    plots.plot_turns([REPORTS[1], *REPORTS[:1] * (turns - 1)], axes)
    axes.set_title("as high as a bar can be")
    figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert not [bar for each in axes.containers for bar in each if bar.get_window_extent().overlaps(legend)]
    assert figure.bbox.fully_containsx(legend.x0)
    assert figure.bbox.fully_containsx(legend.x1)
    assert not axes.title.get_window_extent().overlaps(legend)


def test_tokens_have_the_colours_of_reports_in_notebooks(axes):
    plots.plot_turns(REPORTS, axes)
    html = REPORTS[1]._repr_html_()
    assert [each.get_label() for each in axes.containers if to_hex(each[0].get_facecolor()) not in html] == []


def test_first_tokens_are_beside_what_a_cold_turn_would_take(axes):
    plots.plot_first_token([*REPORTS, TurnReport()], axes)
    assert axes.collections[0].get_offsets().tolist() == [[10, 0.5], [30, 0.25]]
    assert axes.lines[0].get_xydata().tolist() == [[10, 0.5], [30, 1.5]]


def test_a_bar_is_the_median_and_says_how_much_faster(axes):
    plots.plot_seconds({"cold": [4.0, 8.0, 6.0], "kvtier": [0.5, 0.6, 0.7]}, "cold", axes)
    assert [bar.get_width() for bar in axes.patches] == [0.6, 6.0]
    assert [text.get_text() for text in axes.texts] == ["600 ms (10×)", "6.00 s (1×)"]


def test_labels_keep_off_the_whiskers(axes):
    plots.plot_seconds({"kvtier": [0.5, 0.6, 0.7]}, axes=axes)
    (label,) = axes.texts
    assert label.xy[0] == pytest.approx(0.7), "the longest round, not the median"
    assert label.xyann[0] > 0, "padding: SVG drops leading spaces"


def test_lines_of_a_benchmark_are_drawn_by_length(axes):
    case = {"rows": [{"name": "computed", "spread": {"median": 2.0}}]}
    result = {"cases": [{"facts": {"n": n, "link": link}, **case} for n in (20, 10) for link in (1, 2)]}
    lines = plots.benchmark_lines(result, "n", link=1)
    assert lines == {"computed": [(20, 2.0), (10, 2.0)]}
    plots.plot_lengths(lines, axes)
    assert axes.lines[0].get_xydata().tolist() == [[10, 2.0], [20, 2.0]]


def test_a_plan_is_drawn_as_computing_beside_loading(axes):
    rows = [{"tokens": n, "cold_seconds": n / 10, "load_seconds": {"host": 1.0, "disk": 2.0}} for n in (8, 16)]
    plots.plot_break_even({"predictions": rows}, axes)
    assert [line.get_label() for line in axes.lines] == ["computed", "kvtier, from host", "kvtier, from disk"]


def test_without_axes_a_figure_is_made():
    assert plots.plot_turns(REPORTS).figure in map(pyplot.figure, pyplot.get_fignums())


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.plot_turns([]),
        lambda: plots.plot_first_token([TurnReport()]),
        lambda: plots.plot_seconds({}),
        lambda: plots.plot_seconds({"a": [1.0]}, "b"),
        lambda: plots.plot_break_even({"rows": []}),
    ],
)
def test_nothing_to_draw_is_an_error(draw):
    with pytest.raises(ConfigurationError):
        draw()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    with pytest.raises(ConfigurationError, match=r"pip install 'kvtier\[plots\]'"):
        plots.plot_turns(REPORTS)


def test_importing_plots_imports_neither_matplotlib_nor_torch():
    code = "import sys, kvtier.plots; sys.exit(any(m in sys.modules for m in ('matplotlib', 'torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
