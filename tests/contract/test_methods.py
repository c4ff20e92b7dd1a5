"""What every method must hold, found by walking ``medkd.methods``: a new method is tested without an edit here."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import pkgutil

import pytest
import torch
import torch.distributed as dist
from engine import toy

import medkd.methods
from medkd.engine import Method
from medkd.errors import ConfigError


def found_methods() -> list[type[Method]]:
    modules = [
        importlib.import_module(f"medkd.methods.{info.name}") for info in pkgutil.iter_modules(medkd.methods.__path__)
    ]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]


METHODS = found_methods()
each_method = pytest.mark.parametrize("method_class", METHODS, ids=lambda m: m.__name__)


def snapshot(built: Method) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in built.state_dict().items()}


def train(method_class, *, epochs: int = 2, noise: bool = True, method_arguments=None, **arguments):
    built = toy.method(method_class, norm=True, **(method_arguments or {}))
    trainer = toy.trainer(built, toy.streams(method_class, noise=noise), epochs=epochs, **arguments)
    trainer.run()
    return built, trainer


def quiet(method_class) -> dict[str, object]:
    """Arguments that switch off what couples or perturbs the batch, where the method has them."""
    own = getattr(toy.small(method_class), "quiet", None)
    if own is not None:
        return own(method_class)
    wanted = inspect.signature(method_class.__init__).parameters
    values = {"segmentation_loss": toy.per_sample_loss, "noise_std": 0.0}
    return {name: value for name, value in values.items() if name in wanted}


def test_the_walk_finds_the_methods():
    assert {"Supervised", "KD", "MeanTeacher", "ACTNet"} <= {m.__name__ for m in METHODS}


@each_method
def test_every_role_moves_and_frozen_networks_stay_bit_identical(method_class):
    fresh = toy.method(method_class, norm=True)
    built, _ = train(method_class)
    for role in built.roles:
        before, after = fresh.role_parameters(role), built.role_parameters(role)
        assert before
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), role
    for name in built.frozen:
        assert toy.same_state(fresh.get_submodule(name), built.get_submodule(name)), name


@each_method
def test_outputs_are_finite_and_hold_a_loss(method_class):
    _, trainer = train(method_class)
    assert "loss" in trainer.state.output
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in trainer.state.output.values())


@each_method
def test_a_seed_fixes_everything(method_class):
    first, second = train(method_class)[0], train(method_class)[0]
    assert toy.same_state(first, second)


@each_method
def test_bf16_runs(method_class):
    built, _ = train(method_class, epochs=1, amp="bf16")
    assert all(torch.isfinite(p).all() for p in built.parameters())


@each_method
def test_the_deployed_network_alone_maps_an_image_to_its_output(method_class):
    built, trainer = train(method_class, epochs=1)
    network = trainer.network.eval()
    image, shape = toy.example(method_class)
    assert network(image).shape == shape
    torch.jit.script(network)
    assert built.deployed is trainer.network


@each_method
def test_a_missing_optimizer_is_refused(method_class):
    built = toy.method(method_class)
    from medkd.engine import MethodTrainer

    with pytest.raises(ConfigError, match="missing"):
        MethodTrainer("cpu", 1, toy.streams(method_class), built, {})


@each_method
def test_accumulation_equals_the_large_batch_or_is_refused(method_class):
    arguments = quiet(method_class)
    if not method_class.accumulates:
        with pytest.raises(ConfigError, match="cannot accumulate"):
            toy.trainer(toy.method(method_class, **arguments), toy.streams(method_class), accumulate=2)
        return

    def states(batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
        built = toy.method(method_class, **arguments)
        loader = toy.streams(method_class, batch_size=batch_size, noise=False)
        toy.trainer(built, loader, epochs=1, epoch_length=2 * accumulate, accumulate=accumulate).run()
        return snapshot(built)

    # Weights that ramp per iteration would differ between a window's micro-batches: fix them.
    ramps = {"start_frac", "ramp_up_frac"} & set(inspect.signature(method_class.__init__).parameters)
    arguments.update(dict.fromkeys(ramps, 0.0))
    for (name, large), small in zip(states(4, 1).items(), states(2, 2).values(), strict=True):
        torch.testing.assert_close(large, small, atol=1e-6, rtol=0, msg=name)


@each_method
def test_every_method_says_where_it_comes_from(method_class):
    module = inspect.getdoc(inspect.getmodule(method_class)) or ""
    assert "Paper:" in module
    assert "Roles:" in module
    assert method_class.paper
    assert method_class.task in {"segmentation", "classification", "detection", "translation", "synthesis"}


def joint_and_split(rank: int, port: int, names: list[str], pipe) -> None:
    """One of two gloo processes: train every method on its half of the joint batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for method_class in METHODS:
        arguments = quiet(method_class)
        built = toy.method(method_class, **arguments)
        toy.trainer(built, toy.streams(method_class, batch_size=2, noise=False), epochs=2, epoch_length=3).run()
        results[method_class.__name__] = {k: v.numpy() for k, v in built.state_dict().items()}
    dist.destroy_process_group()
    pipe.send(results)


def test_two_processes_equal_one_with_the_joint_batch():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine.toy", *(m.__module__ for m in METHODS)])
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=joint_and_split, args=(rank, port, [m.__name__ for m in METHODS], theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    first, second = (pipe.recv() for pipe in pipes)
    for process in processes:
        process.join()
    for method_class in METHODS:
        built = toy.method(method_class, **quiet(method_class))
        toy.trainer(built, toy.streams(method_class, batch_size=4, noise=False), epochs=2, epoch_length=3).run()
        for name, value in built.state_dict().items():
            a, b = (torch.from_numpy(side[method_class.__name__][name]) for side in (first, second))
            assert torch.equal(a, b), f"{method_class.__name__}.{name} differs between processes"
            torch.testing.assert_close(a, value, atol=1e-6, rtol=0, msg=f"{method_class.__name__}.{name}")
