"""The domain-adaptation baselines resume bit for bit, with what they remember of the target."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from engine import toy
from ignite.engine import Events

from medkd.methods.adapt_seg_net import AdaptSegNet
from medkd.methods.advent import AdvEnt
from medkd.methods.cbst import CBST
from medkd.methods.dacs import DACS
from medkd.methods.pro_da import ProDA
from medkd.methods.random_convolution import RandomConvolution
from medkd.methods.shot import SHOT
from medkd.methods.tent import Tent


class StopHereError(Exception):
    pass


def run_until(method_class, folder: Path, stop_at: int, *, resume: bool):
    built = toy.method(method_class, norm=True)
    trainer = toy.trainer(built, toy.streams(method_class), folder=folder, resume=resume)

    def stop(engine):
        if engine.state.iteration == stop_at:
            raise StopHereError

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    with contextlib.suppress(StopHereError):
        trainer.run()
    return built


@pytest.mark.parametrize("method_class", [AdaptSegNet, AdvEnt, CBST, DACS, ProDA, RandomConvolution, SHOT, Tent])
def test_a_resumed_run_equals_an_uninterrupted_one(method_class, tmp_path):
    whole = run_until(method_class, tmp_path / "whole", -1, resume=False)
    run_until(method_class, tmp_path / "cut", 5, resume=False)
    resumed = run_until(method_class, tmp_path / "cut", -1, resume=True)
    assert toy.same_state(whole, resumed)


def test_a_run_cut_before_its_first_round_resumes(tmp_path):
    whole = run_until(CBST, tmp_path / "whole", -1, resume=False)
    run_until(CBST, tmp_path / "cut", 1, resume=False)
    assert toy.same_state(run_until(CBST, tmp_path / "cut", -1, resume=True), whole)
