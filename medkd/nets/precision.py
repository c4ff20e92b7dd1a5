"""Which arithmetic the hardware has."""

from __future__ import annotations

import torch


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 arithmetic; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return device.type == "cpu" and any(check() for check in known if check is not None)
