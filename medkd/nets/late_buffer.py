"""A buffer whose shape is known only once training has begun."""

from __future__ import annotations

import torch
from torch import nn


class LateBuffer(nn.Module):
    """Holds one tensor, or none yet; part of the state dict (as extra state), so that a resumed run goes on with it."""

    def __init__(self) -> None:
        super().__init__()
        self._value: torch.Tensor | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is a value."""
        return self._value is not None

    @property
    def value(self) -> torch.Tensor:
        """The tensor.

        Raises:
            RuntimeError: If none was set.
        """
        if self._value is None:
            raise RuntimeError("the buffer is read before it was set")
        return self._value

    @value.setter
    def value(self, tensor: torch.Tensor) -> None:
        self._value = tensor.detach().clone()

    def get_extra_state(self) -> torch.Tensor:
        """The tensor; an empty one when none was set."""
        return torch.empty(0) if self._value is None else self._value

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Put the tensor back."""
        self._value = state.clone() if state.numel() else None
