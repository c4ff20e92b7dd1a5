"""Volumes sent through a network slice by slice."""

from __future__ import annotations

import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose
from torch import nn

from medkd.data.translate_slices import TranslateSlicesd, translate_slices


class Doubling(nn.Module):
    """2 x, and a second channel with the number of slices in the batch; notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls: list[tuple[tuple[int, ...], bool]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls.append((tuple(image.shape), self.training))
        return torch.cat([image * self.scale, torch.full_like(image, len(image))], 1)


def test_every_slice_comes_back_in_its_place_at_any_batch():
    volume = torch.randn(1, 6, 9, 5)
    network = Doubling()
    translated = translate_slices(volume, network, batch=2)
    assert translated.shape == (2, 6, 9, 5)
    assert not translated.requires_grad
    torch.testing.assert_close(translated[:1], 2 * volume)
    assert translated[1, 0, 0].tolist() == [2, 2, 2, 2, 1]
    assert [shape for shape, _ in network.calls] == [(2, 1, 8, 12), (2, 1, 8, 12), (1, 1, 8, 12)]


def test_the_network_computes_in_eval_mode_and_is_left_as_it_was():
    network = Doubling()
    translate_slices(torch.zeros(1, 4, 4, 1), network)
    assert network.training
    assert not network.calls[0][1]
    translate_slices(torch.zeros(1, 4, 4, 1), network.eval())
    assert not network.training


def test_translations_lie_beside_the_volume_with_its_geometry():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    item = {"image": MetaTensor(torch.randn(1, 4, 4, 3), affine=affine), "case": "a"}
    made = TranslateSlicesd(["image"], Doubling(), "translated")(item)
    assert set(item) == {"image", "case"}
    assert isinstance(made["translated"], MetaTensor)
    assert torch.equal(made["translated"].affine, affine)
    torch.testing.assert_close(made["translated"][:1].as_tensor(), 2 * made["image"].as_tensor())


def test_a_cached_pipeline_translates_once():
    network = Doubling()
    transform = Compose([TranslateSlicesd("image", network, "translated")])
    dataset = CacheDataset([{"image": torch.zeros(1, 4, 4, 2)}], transform, progress=False)
    for _ in range(3):
        assert "translated" in dataset[0]
    assert len(network.calls) == 1


def test_missing_keys_wrong_shapes_and_uneven_names_are_refused():
    with pytest.raises(ValueError, match="one for each"):
        TranslateSlicesd(["image", "cycled"], Doubling(), "translated")
    with pytest.raises(KeyError):
        TranslateSlicesd("image", Doubling(), "translated")({"label": 1})
    assert TranslateSlicesd("image", Doubling(), "translated", allow_missing_keys=True)({"label": 1}) == {"label": 1}
    with pytest.raises(ValueError, match=r"\(C, X, Y, Z\)"):
        translate_slices(torch.zeros(4, 4, 2), Doubling())
