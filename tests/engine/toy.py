"""Small networks, streams and trainers the engine and contract tests share."""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from monai.data import Dataset
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from medkd.data import Stream, Streams
from medkd.engine import Checkpoints, Method, MethodTrainer
from medkd.losses.segmentation import dice_ce_loss

CLASSES = 3
SMALL = Path(__file__).parents[1] / "contract" / "small"
LABELED_STREAMS = ("labeled", "source", "student", "teacher")
per_sample_loss = partial(dice_ce_loss, per_sample=True)


def network(width: int = 4, *, norm: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(width))
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, CLASSES, 1))


def small(method_class: type[Method]) -> ModuleType | None:
    """What a method's own file in tests/contract/small says of its networks and streams, if it has one."""
    name = method_class.__module__.rsplit(".", 1)[-1]
    return importlib.import_module(f"contract.small.{name}") if (SMALL / f"{name}.py").is_file() else None


def method(method_class: type[Method], *, norm: bool = False, seed: int = 0, **arguments: Any) -> Method:
    """Any method built from small networks: its roles and frozen networks are the modules it asks for."""
    own = small(method_class)
    if own is not None:
        return method_class(**{**own.arguments(method_class, norm=norm, seed=seed), **arguments})
    wanted = inspect.signature(method_class.__init__).parameters
    for index, name in enumerate((*method_class.roles, *method_class.frozen)):
        if name in wanted and name not in arguments:
            arguments[name] = network(4 + 2 * index, norm=norm, seed=seed + index)
    return method_class(**arguments)


def example(method_class: type[Method]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """An input of the deployed network, and the shape of what comes out."""
    own = getattr(small(method_class), "example", None)
    if own is not None:
        return own(method_class)
    channels = 1 if method_class.task == "translation" else CLASSES
    return torch.randn(2, 1, 8, 8), (2, channels, 8, 8)


def items(count: int, *, labeled: bool, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        image = torch.randn(1, 8, 8, generator=generator)
        item: dict[str, Any] = {"image": image, "case": f"case-{seed}-{index}"}
        if labeled:
            item["label"] = (image > 0).long() + (image > 1).long()
        made.append(item)
    return made


def streams(
    method_class: type[Method], *, batch_size: int = 2, workers: int = 0, noise: bool = True, seed: int = 0
) -> Streams:
    transform = Compose([RandGaussianNoised("image", prob=1.0 if noise else 0.0, std=0.05)])
    make = getattr(small(method_class), "items", None)

    def of(name: str, index: int) -> list[dict[str, Any]]:
        labeled = name in LABELED_STREAMS
        if make is not None:
            return make(name, labeled=labeled, seed=index)
        return items(5 if labeled else 8, labeled=labeled, seed=index)

    sources = {
        name: Stream(
            Dataset(of(name, index), transform),
            batch_size,
            num_workers=workers,
        )
        for index, name in enumerate((*method_class.streams, *method_class.optional_streams))
    }
    return Streams(length_of=list(sources)[-1], seed=seed, **sources)


def trainer(
    built: Method,
    loader: Streams,
    *,
    epochs: int = 3,
    folder: Path | None = None,
    resume: bool = False,
    **arguments: Any,
) -> MethodTrainer:
    optimizers = {
        role: torch.optim.SGD(built.role_parameters(role), lr=0.05, momentum=0.9, weight_decay=1e-4)
        for role in built.roles
    }
    schedules = {role: torch.optim.lr_scheduler.ExponentialLR(o, 0.95) for role, o in optimizers.items()}
    handlers = list(arguments.pop("handlers", []))
    if folder is not None:
        handlers.append(Checkpoints(folder, resume=resume, every_iters=1))
    return MethodTrainer(
        "cpu", epochs, loader, built, optimizers, lr_schedulers=schedules, handlers=handlers, seed=7, **arguments
    )


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
