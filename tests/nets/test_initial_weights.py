"""Weights of the user: loaded where they fit, refused in one line where they do not."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import ResNet
from torch import nn

from medkd.errors import InputError
from medkd.nets.initial_weights import with_weights


def network(classes: int = 2, seed: int = 0, width: int = 4) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(
        "basic", [1, 1, 1, 1], [width] * 4, spatial_dims=2, n_input_channels=3, num_classes=classes,
        bias_downsample=False,
    )  # fmt: skip


def test_everything_but_the_classifier_comes_from_the_file(tmp_path):
    source = network(classes=1000, seed=1)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    made = with_weights(network(), tmp_path / "weights.pt")
    before = network()
    for name, value in made.state_dict().items():
        expected = before if name.startswith("fc.") else source
        assert torch.equal(value, expected.state_dict()[name]), name


def test_nothing_is_loaded_without_a_file():
    before = network()
    made = with_weights(copy.deepcopy(before), None)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), before.parameters(), strict=True))


def test_what_does_not_fit_is_one_clear_line(tmp_path):
    file = tmp_path / "weights.pt"

    def saved(state):
        torch.save(state, file)
        return file

    whole = network().state_dict()
    lacking = {name: value for name, value in whole.items() if name != "conv1.weight"}
    for state, word in (
        (lacking, "lacks conv1.weight"),
        (whole | {"more": torch.zeros(1)}, "unknown key more"),
        (network(width=8).state_dict(), "another shape"),
        ([1], "no state dict"),
        ({"epoch": 3}, "no state dict"),
        (nn.Linear(1, 1), "plain PyTorch weights"),
    ):
        with pytest.raises(InputError, match=word) as refused:
            with_weights(network(), saved(state))
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="no such file"):
        with_weights(network(), tmp_path / "absent.pt")
