"""Training loops by hand to hold a step against: same batches, same optimizers, same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from engine import toy
from torch import nn

from medkd.engine import Method
from medkd.engine.trainer import seed_everything

SEED = 7  # of toy.trainer
Losses = Callable[[dict[str, Any], float, torch.Generator], Mapping[str, torch.Tensor]]


def trained(built: Method, steps: int, **arguments: Any) -> Method:
    """The method after so many steps of the trainer, in one epoch."""
    toy.trainer(built, toy.streams(type(built)), epochs=1, epoch_length=steps, **arguments).run()
    return built


def batches(method_class: type[Method], count: int) -> list[dict[str, Any]]:
    """The batches that the trainer draws."""
    source = iter(toy.streams(method_class))
    return [
        {
            stream: {k: v.as_subclass(torch.Tensor) if isinstance(v, torch.Tensor) else v for k, v in items.items()}
            for stream, items in next(source).items()
        }
        for _ in range(count)
    ]


def by_hand(
    method_class: type[Method],
    networks: Mapping[str, nn.Module],
    steps: int,
    losses: Losses,
    after: Callable[[dict[str, Any], int], None] = lambda batch, step: None,
) -> None:
    """Minimize each network's loss, all gradients first, then all updates.

    Args:
        method_class: whose batches.
        networks: role → network, trained in place.
        steps: how many.
        losses: (batch, progress, generator) → role → loss.
        after: (batch, step) called after each update.
    """
    optimizers = {
        role: torch.optim.SGD(trainable(network), lr=0.05, momentum=0.9, weight_decay=1e-4)
        for role, network in networks.items()
    }
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in optimizers.values()]
    for step, batch in enumerate(batches(method_class, steps)):
        generator = torch.Generator().manual_seed(seed_everything(SEED, step + 1, 0))
        found = losses(batch, step / steps, generator)
        gradients = {
            role: torch.autograd.grad(loss, trainable(networks[role]), retain_graph=True)
            for role, loss in found.items()
        }
        for role, optimizer in optimizers.items():
            for parameter, gradient in zip(trainable(networks[role]), gradients[role], strict=True):
                parameter.grad = gradient
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        after(batch, step)


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def assert_same_parameters(found: nn.Module, expected: nn.Module, *, atol: float = 2e-6) -> None:
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=name)
