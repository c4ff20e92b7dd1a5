"""Checkpoints: whole, verified, strict, and bit-exact on resume."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import toy
from ignite.engine import Events

from medkd.engine.checkpoint import list_checkpoints, load_newest, read_checkpoint, write_checkpoint
from medkd.errors import CheckpointError, TrainingError
from medkd.methods.act_net import ACTNet
from medkd.methods.kd import KD
from medkd.methods.mean_teacher import MeanTeacher

METHODS = [KD, MeanTeacher, ACTNet]


class StopHereError(Exception):
    pass


def run_until(method_class, folder: Path, stop_at: int, *, resume: bool, workers: int = 0, amp=False):
    built = toy.method(method_class, norm=True)
    trainer = toy.trainer(built, toy.streams(method_class, workers=workers), folder=folder, resume=resume, amp=amp)

    def stop(engine):
        if engine.state.iteration == stop_at:
            raise StopHereError

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    with contextlib.suppress(StopHereError):
        trainer.run()
    return built, trainer


@pytest.mark.parametrize("method_class", METHODS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(method_class, workers, tmp_path):
    if workers and method_class is not ACTNet:
        pytest.skip("one method is enough to show that workers change nothing")
    whole, _ = run_until(method_class, tmp_path / "whole", -1, resume=False)
    run_until(method_class, tmp_path / "cut", 6, resume=False, workers=workers)
    resumed, trainer = run_until(method_class, tmp_path / "cut", -1, resume=True, workers=workers)
    assert trainer.finished
    assert toy.same_state(whole, resumed)


def test_fp16_scalers_are_part_of_a_checkpoint(tmp_path):
    whole, _ = run_until(MeanTeacher, tmp_path / "whole", -1, resume=False, amp="fp16")
    run_until(MeanTeacher, tmp_path / "cut", 5, resume=False, amp="fp16")
    resumed, _ = run_until(MeanTeacher, tmp_path / "cut", -1, resume=True, amp="fp16")
    assert toy.same_state(whole, resumed)


def test_two_checkpoints_are_kept_and_links_point_at_the_newest(tmp_path):
    run_until(KD, tmp_path, -1, resume=False)
    kept = list_checkpoints(tmp_path)
    assert len(kept) == 2
    assert (tmp_path / "last.pt").resolve() == kept[-1].resolve()
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*partial"))


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_html(path: Path) -> None:
    path.write_text("<html>404</html>")


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_empty, damage_html])
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(damage, tmp_path, caplog):
    whole, _ = run_until(KD, tmp_path / "whole", -1, resume=False)
    run_until(KD, tmp_path / "cut", 6, resume=False)
    damage(list_checkpoints(tmp_path / "cut")[-1])
    with caplog.at_level(logging.WARNING):
        resumed, _ = run_until(KD, tmp_path / "cut", -1, resume=True)
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1
    assert toy.same_state(whole, resumed)


def test_no_valid_checkpoint_is_an_error_never_a_restart(tmp_path):
    run_until(KD, tmp_path, 4, resume=False)
    for path in list_checkpoints(tmp_path):
        damage_flip(path)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        run_until(KD, tmp_path, -1, resume=True)


def test_every_single_bit_flip_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, {"format_version": 1, "x": torch.arange(50)}, 1, is_best=False)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(good)
        content[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(content))
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_a_missing_key_is_refused_by_name(tmp_path):
    run_until(KD, tmp_path, 4, resume=False)
    path, state = load_newest(tmp_path)
    for path in list_checkpoints(tmp_path):
        path.unlink()
    (tmp_path / "whole").mkdir()
    method = dict(state["method"])
    name = next(key for key in method if key.startswith("student"))
    del method[name]
    write_checkpoint(tmp_path, {**state, "method": method}, 4, is_best=False)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        run_until(KD, tmp_path, -1, resume=True)
    for path in list_checkpoints(tmp_path):
        path.unlink()
    write_checkpoint(tmp_path, {k: v for k, v in state.items() if k != "rng"}, 4, is_best=False)
    with pytest.raises(CheckpointError, match=r"missing \['rng'\]"):
        run_until(KD, tmp_path, -1, resume=True)


def test_another_run_length_is_refused(tmp_path):
    run_until(KD, tmp_path, 4, resume=False)
    trainer = toy.trainer(toy.method(KD, norm=True), toy.streams(KD), epochs=9, folder=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="max_epochs was 3 and is now 9"):
        trainer.run()


def test_an_old_run_is_not_overwritten(tmp_path):
    run_until(KD, tmp_path, 4, resume=False)
    with pytest.raises(CheckpointError, match="earlier run"):
        run_until(KD, tmp_path, -1, resume=False)


def test_a_pickle_payload_is_never_executed(tmp_path):
    marker = tmp_path / "owned"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    torch.save({"format_version": 1, "x": Payload()}, tmp_path / "raw.pt")
    content = (tmp_path / "raw.pt").read_bytes()
    path = tmp_path / f"step-1-{hashlib.sha256(content).hexdigest()}.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not marker.exists()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    built = toy.method(KD)
    trainer = toy.trainer(built, toy.streams(KD), folder=tmp_path)
    saves = []

    def full(descriptor):
        saves.append(descriptor)
        if len(saves) > 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("medkd.engine.checkpoint.os.fsync", full)
    with pytest.raises(TrainingError, match="disk is full"):
        trainer.run()
    assert not list(tmp_path.glob(".step*"))
    load_newest(tmp_path)


def train_in_child(method_class, folder: str, pipe) -> None:
    """What a killed process was doing; sends "running" when it starts and the weights' hash at the end."""
    torch.set_num_threads(1)
    built = toy.method(method_class, norm=True)
    trainer = toy.trainer(built, toy.streams(method_class), folder=Path(folder), resume=True, epochs=30)
    pipe.send("running")
    trainer.run()
    pipe.send(hashlib.sha256(b"".join(v.numpy().tobytes() for v in built.state_dict().values())).hexdigest())


@pytest.fixture(scope="module")
def children():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine.toy", *(m.__module__ for m in METHODS)])
    return context


@pytest.mark.parametrize("method_class", METHODS)
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(method_class, tmp_path, children):
    def start(folder: str):
        ours, theirs = children.Pipe()
        process = children.Process(target=train_in_child, args=(method_class, str(tmp_path / folder), theirs))
        process.start()
        assert ours.recv() == "running"
        return process, ours

    process, pipe = start("clean")
    clean = pipe.recv()
    process.join()
    rng = np.random.default_rng(len(method_class.__name__))
    for _ in range(4):  # every iteration saves, so many of these land inside a save
        process, pipe = start("killed")
        time.sleep(float(rng.uniform(0.02, 0.3)))
        process.kill()
        process.join()
    process, pipe = start("killed")
    assert pipe.recv() == clean
    process.join()
