"""``--device auto|cpu|cuda[:N]``."""

from __future__ import annotations

import re

import torch

from medkd.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device a name stands for; ``auto`` is the first GPU if there is one.

    Raises:
        ConfigError: an unknown name, or a device this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError("--device", f"{name!r} is not a device", "use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            problem = "this machine has no usable GPU" if count == 0 else f"this machine has {count} GPUs"
            raise ConfigError("--device", f"{name}: {problem}", "use --device cpu, or see `medkd doctor`")
    return device
