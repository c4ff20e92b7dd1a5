"""One warning for a critic that nothing fools any more."""

from __future__ import annotations

import logging

import torch

from medkd.nets.critic_watch import CriticWatch

NAMES = ("the critic of the source images", "the critic of the target images")


def observe(watch: CriticWatch, *accuracies: float) -> None:
    watch.observe([torch.tensor(value) for value in accuracies])


def test_a_critic_that_keeps_being_right_is_named_once(caplog):
    watch = CriticWatch(NAMES, steps=3, remedy="do this")
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            observe(watch, 0.6, 0.97)
    (record,) = caplog.records
    assert record.getMessage().startswith("the critic of the target images was right in at least 95 % of its answers")
    assert record.getMessage().endswith("3 steps in a row: nothing fools it now; do this")


def test_one_mistaken_step_starts_the_count_again(caplog):
    watch = CriticWatch(NAMES, steps=3)
    with caplog.at_level(logging.WARNING):
        for accuracy in (1.0, 1.0, 0.9, 1.0, 1.0, 0.5):
            observe(watch, accuracy, accuracy)
    assert not caplog.records


def test_counts_and_warnings_survive_a_resume(caplog):
    first = CriticWatch(NAMES, steps=3)
    observe(first, 1.0, 0.5)
    observe(first, 1.0, 0.5)
    second = CriticWatch(NAMES, steps=3)
    second.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING):
        observe(second, 1.0, 0.5)
        third = CriticWatch(NAMES, steps=3)
        third.load_state_dict(second.state_dict())
        observe(third, 1.0, 0.5)
    assert len(caplog.records) == 1


def test_zero_steps_watch_nothing(caplog):
    watch = CriticWatch(NAMES, steps=0)
    with caplog.at_level(logging.WARNING):
        observe(watch, 1.0, 1.0)
    assert not caplog.records
    assert int(watch.counts.sum()) == 0
