"""The one trainer: runs any method, with mixed precision, accumulation and several processes in one place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from medkd.engine.context import StepContext
from medkd.engine.method import Method
from medkd.errors import ConfigError, TrainingError
from medkd.nets.precision import computes_in_bf16

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MethodTrainer(Trainer):
    """Trains a :class:`Method`; a MONAI ``Trainer``, so MONAI and ignite handlers attach to it.

    Args:
        device: where to train.
        max_epochs: epochs to run.
        train_data_loader: yields batches of named streams, usually :class:`medkd.data.Streams`.
        method: the method.
        optimizers: one optimizer per role of the method (a lone optimizer serves a method with one role).
        lr_schedulers: at most one schedule per role, stepped after every optimizer update.
        epoch_length: iterations per epoch; by default the loader's length.
        amp: False for float32, ``"bf16"``, ``"fp16"`` (scales the loss, one scaler per role), or ``"auto"``: bf16
            where the hardware computes in it, float32 elsewhere.
        accumulate: micro-batches per optimizer update. A short window at the end of an epoch weighs its
            micro-batches by its own size.
        clip_norm: largest gradient norm of a role, or None.
        channels_last: store 4-D and 5-D weights and images channels last, which is faster on most hardware.
        seed: the step's randomness is a function of (seed, iteration, rank).
        handlers: MONAI or ignite handlers.
        decollate: hand decollated batches and outputs to the handlers of ``MODEL_COMPLETED``.
        postprocessing: transforms applied to them at ``MODEL_COMPLETED``.

    Attributes:
        method: the method.
        network: the network that ships (``method.deployed``).
        optimizers: role → optimizer; ``optimizer`` is that of the first role.

    Raises:
        ConfigError: If optimizers or schedules do not match the roles, or the streams do not match the method.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        method: Method,
        optimizers: Mapping[str, Optimizer] | Optimizer,
        *,
        lr_schedulers: Mapping[str, LRScheduler] | LRScheduler | None = None,
        epoch_length: int | None = None,
        amp: bool | str = False,
        accumulate: int = 1,
        clip_norm: float | None = None,
        channels_last: bool = False,
        seed: int = 0,
        handlers: Sequence[Any] | None = None,
        decollate: bool = False,
        postprocessing: Any = None,
    ) -> None:
        if amp and amp not in (*AMP_TYPES, "auto"):
            raise ConfigError("amp", f"{amp!r} is not a precision", "use false, 'bf16', 'fp16' or 'auto'")
        if accumulate < 1:
            raise ConfigError("accumulate", f"{accumulate} is below 1", "use 1 or more micro-batches per update")
        if accumulate > 1 and not method.accumulates:
            raise ConfigError("accumulate", f"{type(method).__name__} cannot accumulate gradients", "use accumulate=1")
        self.method = method
        self.optimizers = _by_role("optimizers", optimizers, method.roles)
        self.lr_schedulers = _by_role("lr_schedulers", lr_schedulers or {}, method.roles, complete=False)
        _require_owned_parameters(self.optimizers, method)
        _require_streams(train_data_loader, method)
        self.restorers: list[Callable[[MethodTrainer], None]] = []
        self.stopped_early = False
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            handlers=handlers,
            decollate=decollate,
            postprocessing=postprocessing,
        )
        if amp == "auto":
            amp = "bf16" if computes_in_bf16(self.state.device) else False
        self.amp_type = AMP_TYPES[amp] if isinstance(amp, str) else None
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.channels_last = channels_last
        self.seed = seed
        self.scalers = {
            role: torch.amp.GradScaler(self.state.device.type, enabled=self.amp_type is torch.float16)
            for role in method.roles
        }
        self.updates = 0
        self.state.best_iteration = -1

    @property
    def network(self) -> nn.Module:
        """The network that ships."""
        return self.method.deployed

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the first role."""
        return self.optimizers[self.method.roles[0]]

    @property
    def finished(self) -> bool:
        """Whether every epoch has been run, or training stopped early."""
        return self.stopped_early or bool(self.state.iteration >= self.state.epoch_length * self.state.max_epochs)

    def run(self) -> None:
        """Train to the end, from wherever a checkpoint left the trainer; a finished run stays as it is."""
        if not self.state.epoch_length:
            raise ConfigError("training data", "there is not one batch", "give every stream at least one case")
        self.method.to(self.state.device)
        if self.channels_last:
            to_channels_last(self.method)
        _move_optimizer_state(self.optimizers, self.state.device)
        for restore in self.restorers:
            restore(self)
        if self.finished:
            self.fire_event(Events.COMPLETED)  # so that what follows training is there after any interruption
            return
        if world_size() > 1:
            _broadcast(self.method)
        if hasattr(self.data_loader, "seek"):
            self.data_loader.seek(self.state.iteration)
        self.method.train()
        Workflow.run(self)  # MONAI's Trainer.run would make a CUDA-only scaler

    def save_checkpoint(self, trainer: MethodTrainer) -> None:
        """Save now; the Checkpoints handler puts its own here."""
        raise ConfigError("checkpoints", "this run keeps none", "add medkd.engine.Checkpoints to its handlers")

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> dict[str, Any]:
        state = self.state
        rank = dist.get_rank() if world_size() > 1 else 0
        seed = seed_everything(self.seed, state.iteration, rank)
        batch = _to_device(batchdata, state.device, self.channels_last)
        within = (state.iteration - 1) % state.epoch_length
        window = min(self.accumulate, state.epoch_length - within // self.accumulate * self.accumulate)
        context = StepContext(
            device=state.device,
            epoch=state.epoch,
            iteration=state.iteration,
            progress=(state.iteration - 1) / (state.epoch_length * state.max_epochs),
            generator=torch.Generator(device=state.device).manual_seed(seed),
            updates=self.updates,
            window_ends=within % self.accumulate == window - 1,
        )
        context.apply_update = lambda losses: self._update(losses, context, window)
        # The parameters change inside a step, so cached low-precision copies of them would be stale.
        with torch.autocast(
            state.device.type, dtype=self.amp_type, enabled=self.amp_type is not None, cache_enabled=False
        ):
            output = self.method.step(batch, context)
        if context.window_ends:
            self.updates += 1
            for scheduler in self.lr_schedulers.values():
                scheduler.step()
        state.output = output
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return state.output

    def _update(self, losses: Mapping[str, torch.Tensor], context: StepContext, window: int) -> None:
        unknown = sorted(set(losses) - set(self.optimizers))
        if unknown:
            raise ValueError(f"update() got losses for {unknown}; the roles are {list(self.optimizers)}")
        for role, loss in losses.items():
            if loss.ndim:
                raise ValueError(f"the loss of {role!r} must be a scalar, got shape {tuple(loss.shape)}")
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"iteration {self.state.iteration}",
                    f"the loss of {role!r} is {loss.item()} on {_sample_ids(self.state.batch)}",
                    "look at these images, lower the learning rate or set clip_norm",
                )
        last = len(losses) - 1
        with torch.autocast(self.state.device.type, enabled=False):
            for position, (role, loss) in enumerate(losses.items()):
                parameters = self.method.role_parameters(role)
                # Losses of several roles may share a graph, which the last of them frees.
                self.scalers[role].scale(loss / window).backward(inputs=parameters, retain_graph=position < last)
            if context.window_ends:
                for role in losses:
                    self._step_role(role)

    def _step_role(self, role: str) -> None:
        parameters = self.method.role_parameters(role)
        if world_size() > 1:
            _average_gradients(parameters)
        scaler, optimizer = self.scalers[role], self.optimizers[role]
        if self.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _handle_exception(self, e: BaseException) -> None:
        """Let handlers see an error, and raise it: ignite drops one that any handler listens to."""
        super()._handle_exception(e)
        raise e

    def average_buffers(self) -> None:
        """Make floating-point buffers (BatchNorm statistics) the mean over all processes."""
        if world_size() > 1:
            for buffer in self.method.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= world_size()


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def seed_everything(*key: int) -> int:
    """Seed torch, numpy and random from a key such as (seed, iteration, rank); returns the 63-bit seed used."""
    words = np.random.SeedSequence([part % 2**32 for part in key]).generate_state(2)
    seed = int(words[0]) << 31 ^ int(words[1])
    torch.manual_seed(seed)
    np.random.seed(int(words[0]))
    random.seed(seed)
    return seed


def to_channels_last(module: nn.Module) -> None:
    """Store the weights of 2-D and 3-D convolutions channels last."""
    for parameter in module.parameters():
        layout = _channels_last_layout(parameter)
        if layout is not None:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _channels_last_layout(tensor: torch.Tensor) -> torch.memory_format | None:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)


def _by_role(name: str, given: Any, roles: tuple[str, ...], *, complete: bool = True) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        if len(roles) != 1:
            raise ConfigError(name, f"one was given for the roles {list(roles)}", "give a mapping with one per role")
        given = {roles[0]: given}
    missing = [role for role in roles if role not in given] if complete else []
    surplus = sorted(set(given) - set(roles))
    if missing or surplus:
        raise ConfigError(name, f"missing {missing}, surplus {surplus}", f"the method's roles are {list(roles)}")
    return {role: given[role] for role in roles if role in given}


def _require_owned_parameters(optimizers: Mapping[str, Optimizer], method: Method) -> None:
    for role, optimizer in optimizers.items():
        own = {id(parameter) for parameter in method.role_parameters(role)}
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if own != held:
            raise ConfigError(
                f"optimizers[{role!r}]",
                f"{len(own - held)} parameters of the role are missing and {len(held - own)} are not its own",
                f"build it from the parameters of method.{role}",
            )


def _require_streams(loader: Iterable[Any], method: Method) -> None:
    names = getattr(loader, "names", None)
    if names is None:
        return
    missing = [name for name in method.streams if name not in names]
    surplus = sorted(set(names) - set(method.streams) - set(method.optional_streams))
    if missing or surplus:
        raise ConfigError(
            "streams",
            f"{type(method).__name__} misses {missing} and cannot use {surplus}",
            f"it needs {list(method.streams)}"
            + (f" and may have {list(method.optional_streams)}" if method.optional_streams else ""),
        )


def _to_device(value: Any, device: torch.device, channels_last: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_device(item, device, channels_last) for key, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    # A plain tensor: the networks need no affine, and MetaTensor slows every operation.
    plain = value.as_subclass(torch.Tensor).to(device, non_blocking=True)
    layout = _channels_last_layout(plain) if channels_last and plain.is_floating_point() else None
    return plain if layout is None else plain.contiguous(memory_format=layout)


def _move_optimizer_state(optimizers: Mapping[str, Optimizer], device: torch.device) -> None:
    for optimizer in optimizers.values():
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and key != "step":
                    state[key] = value.to(device)


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    bucket = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(bucket)
    bucket /= world_size()
    for parameter, piece in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter).contiguous(memory_format=torch.preserve_format)


def _broadcast(method: Method) -> None:
    for tensor in (*method.parameters(), *method.buffers()):
        dist.broadcast(tensor.data, src=0)


def _sample_ids(batch: Any) -> str:
    """Case names in a batch of streams, for messages."""
    parts = []
    for stream, items in batch.items() if isinstance(batch, Mapping) else []:
        names = items.get("case") if isinstance(items, Mapping) else None
        if names is not None:
            parts.append(f"{stream}: {', '.join(str(name) for name in names)}")
    return "; ".join(parts) or "unnamed samples"
