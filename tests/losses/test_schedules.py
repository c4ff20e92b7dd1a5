"""Ramps and EMA decay against the values of the reference code."""

from __future__ import annotations

import pytest

from medkd.schedules import LinearDecay, ema_decay, sigmoid_ramp_up


@pytest.mark.parametrize(
    ("position", "length", "value"),
    [
        (0, 200, 0.0067379470),
        (50, 200, 0.0600546679),
        (100, 200, 0.2865047969),
        (150, 200, 0.7316156289),
        (200, 200, 1.0),
        (250, 200, 1.0),
        (30, 150, 0.0407622040),
        (149, 150, 0.9997778025),
        (0.25, 1.0, 0.0600546679),
        (7, 0, 1.0),
    ],
)
def test_ramp_up_equals_the_reference(position, length, value):
    assert sigmoid_ramp_up(position, length) == pytest.approx(value, abs=1e-9)


def test_early_ema_is_a_running_mean():
    average = 0.0
    for step, value in enumerate([1.0, 2.0, 3.0, 4.0]):
        decay = ema_decay(step, 0.99)
        average = decay * average + (1 - decay) * value
        assert average == pytest.approx([1, 1.5, 2, 2.5][step])


def test_decay_settles_at_its_limit():
    assert ema_decay(10_000, 0.99) == 0.99


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="length"):
        sigmoid_ramp_up(1, -1)
    with pytest.raises(ValueError, match="decay"):
        ema_decay(0, 1.0)
    with pytest.raises(ValueError, match="step"):
        ema_decay(-1, 0.5)


def test_linear_decay_is_constant_then_falls_to_zero():
    factor = LinearDecay(10, 20)
    assert [factor(step) for step in (0, 10, 15, 20, 25)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    for start, stop in ((-1, 5), (5, 5)):
        with pytest.raises(ValueError, match="start < stop"):
            LinearDecay(start, stop)
