"""Translation of whole volumes inside a pipeline of transforms, slice by slice."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, ensure_tuple
from torch import nn
from torch.nn import functional


class TranslateSlicesd(MapTransform):
    """Send every slice of a volume through a network, and put what it makes beside the volume.

    For translations that do not change while another network trains: put it in front of the random transforms, where
    a ``CacheDataset`` computes it once. It computes where the network is, in eval mode and without gradient.

    Args:
        keys: of volumes (C, X, Y, Z), scaled as the network takes them; slices lie across the last axis.
        network: (B, C, X, Y) → (B, C', X, Y).
        output_key: where each translation goes, one per key; MetaTensors keep their geometry.
        batch: slices at a time.
        divisor: sides are padded to a multiple of this for the network, by repeating the border, and cut again.
        allow_missing_keys: pass over keys that an item lacks.

    Raises:
        ValueError: If the numbers of keys and output keys differ, or a volume is not (C, X, Y, Z).
    """

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        output_key: str | Sequence[str],
        *,
        batch: int = 16,
        divisor: int = 4,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.network = network
        self.output_keys = ensure_tuple(output_key)
        if len(self.output_keys) != len(self.keys):
            raise ValueError(f"{len(self.keys)} keys have {len(self.output_keys)} output keys: give one for each")
        self.batch = batch
        self.divisor = divisor

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the translations to an item."""
        item = dict(data)
        for key, output_key in self.key_iterator(item, self.output_keys):
            translated = translate_slices(item[key], self.network, batch=self.batch, divisor=self.divisor)
            item[output_key] = convert_to_dst_type(translated, item[key], dtype=torch.float32)[0]
        return item


@torch.no_grad()
def translate_slices(volume: torch.Tensor, network: nn.Module, *, batch: int = 16, divisor: int = 4) -> torch.Tensor:
    """Send every slice of a volume through a network.

    Args:
        volume: (C, X, Y, Z).
        network: (B, C, X, Y) → (B, C', X, Y); used in eval mode, left in the mode it was in.
        batch: slices at a time.
        divisor: sides are padded to a multiple of this, by repeating the border, and cut again.

    Returns:
        (C', X, Y, Z) float32 on the volume's device.

    Raises:
        ValueError: If the volume is not (C, X, Y, Z).
    """
    if volume.ndim != 4:
        raise ValueError(f"a volume must be (C, X, Y, Z), got {tuple(volume.shape)}")
    place = next(network.parameters(), torch.empty(0)).device
    slices = torch.as_tensor(volume).as_subclass(torch.Tensor).permute(3, 0, 1, 2).float()
    height, width = slices.shape[2:]
    padding = (0, -width % divisor, 0, -height % divisor)
    was_training = network.training
    network.eval()
    try:
        made = [
            network(functional.pad(part.to(place), padding, mode="replicate"))[..., :height, :width].float()
            for part in slices.split(batch)
        ]
    finally:
        network.train(was_training)
    return torch.cat(made).permute(1, 2, 3, 0).to(volume.device)
