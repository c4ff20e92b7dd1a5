"""The buffer of late shape."""

from __future__ import annotations

import pytest
import torch

from medkd.nets.late_buffer import LateBuffer


def test_it_is_read_only_after_it_was_set():
    buffer = LateBuffer()
    assert not buffer.is_set
    with pytest.raises(RuntimeError, match="before it was set"):
        _ = buffer.value
    buffer.value = torch.ones(2)
    assert buffer.is_set


@pytest.mark.parametrize("value", [None, torch.randn(3, 2)])
def test_it_survives_in_the_state_dict(value):
    buffer, restored = LateBuffer(), LateBuffer()
    if value is not None:
        buffer.value = value
    restored.load_state_dict(buffer.state_dict())
    assert restored.is_set == (value is not None)
    if value is not None:
        assert torch.equal(restored.value, value)
