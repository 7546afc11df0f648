import pytest
from PIL import Image

from training.config.schema import Stage
from training.optim import lr_range_test
from training.optim.schedules import schedule_at
from training.report import lr_plots
from training.run.history import Step


def steps_of(stage, rates, steps=5, momentum=0.9):
    for epoch in range(stage.epochs):
        for step in range(steps):
            position = epoch + step / steps
            point = schedule_at(stage, position, steps, momentum=momentum)
            here = [rate * point.factor for rate in rates]
            momentum_now = momentum if point.momentum is None else point.momentum
            yield lr_plots.RateRow(stage.name, position, here, momentum_now)


HEAD = list(steps_of(Stage(name="head", cycles=2), [1e-2]))
CYCLE = list(steps_of(Stage(name="all", schedule="one_cycle", cycle_len=3), [1e-4, 1e-3, 1e-2]))


@pytest.fixture
def figure(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_steps_are_placed_within_their_epochs():
    taken = [
        Step("head", epoch, step, 1.0, 0.9, (0.1, 0.2))
        for epoch, count in ((1, 4), (2, 4), (3, 2))
        for step in range(1, count + 1)
    ] + [Step("all", 1, 1, 1.0, 0.8, (0.3,))]
    drawn = lr_plots.rows(taken)
    assert [row.epoch for row in drawn] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 0]
    assert drawn[-1] == lr_plots.RateRow("all", 0.0, (0.3,), 0.8)


@pytest.mark.parametrize("rows", [[], HEAD[:1], HEAD, HEAD + CYCLE])
def test_a_schedule_is_saved_as_one_png(tmp_path, rows):
    lr_plots.schedule(rows, tmp_path / "schedule.png", "tiny")
    with Image.open(tmp_path / "schedule.png") as image:
        assert image.format == "PNG"
        assert image.width == 960
    assert [p.name for p in tmp_path.iterdir()] == ["schedule.png"]


def test_the_lines_of_a_schedule_are_the_recorded_rates(tmp_path, figure):
    lr_plots.schedule(HEAD + CYCLE, tmp_path / "schedule.png", "tiny")
    axes, below = figure[0].axes
    lines = {len(line.get_xdata()): line for line in axes.lines if len(line.get_xdata()) > 2}
    assert list(lines[len(HEAD)].get_ydata()) == [row.rates[0] for row in HEAD]
    drawn = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == len(CYCLE)]
    expected = [[row.rates[i] for row in CYCLE] for i in (2, 1, 0)]
    assert drawn == expected
    assert [text.get_text() for text in axes.texts] == ["head", "all"]
    assert axes.get_yscale() == "log"  # the deepest group's rate is a hundredth of the head's
    assert list(below.lines[0].get_ydata()) == [0.9] * len(HEAD)
    assert list(below.lines[1].get_ydata()) == [row.momentum for row in CYCLE]
    boundaries = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert boundaries == [2.0]  # start of the second stage, in epochs


def test_one_group_has_a_linear_axis_and_constant_momentum_has_no_panel(tmp_path, figure):
    lr_plots.schedule(HEAD, tmp_path / "schedule.png", "tiny")
    (axes,) = figure[0].axes
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("picked", ["valley", "steepest", "minimum/10", "minimum"])
def test_lr_find_marks_every_suggestion_and_the_picked_rate(tmp_path, figure, picked, direction):
    rates = [10 ** (-5 + i / 10) for i in range(60)]
    rates = rates if direction == "up" else rates[::-1]
    losses = [2 - i / 60 for i in range(60)]
    curve = lr_range_test.suggest(rates, losses, direction)
    lr_plots.lr_find(curve, tmp_path / "lr_find-head.png", "head", picked)
    assert (tmp_path / "lr_find-head.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["lr_find-head.png"]
    (axes,) = figure[0].axes
    _, labels = axes.get_legend_handles_labels()
    suggestions = [
        f"{r:.1e}" for r in (curve.valley, curve.steepest, curve.tenth_of_minimum, curve.minimum)
    ]
    assert [label.rpartition(": ")[2] for label in labels] == [
        *suggestions,
        f"{curve.pick(picked):.1e}",
    ]
