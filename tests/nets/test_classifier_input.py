"""The last layer of networks, and what it sees."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet

from medkd.nets.classifier_input import classifier_name, logits_and_features
from medkd.nets.unet import unet


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (BasicUNet(2, 1, 3, (4, 4, 8, 8, 8, 4)), "final_conv"),
        (unet(3, 4, out_channels=3), "output_block.conv.conv"),
    ],
)
def test_the_features_give_the_logits_through_the_classifier(network: BasicUNet | DynUNet, name):
    assert classifier_name(network) == name
    network.eval()
    image = torch.randn(1, 1, 32, 32)
    logits, features = logits_and_features(network, image, name)
    torch.testing.assert_close(network.get_submodule(name)(features), logits)
    torch.testing.assert_close(network(image), logits)
    features.sum()
    assert not network.get_submodule(name)._forward_pre_hooks


def test_the_hook_is_removed_when_the_network_fails():
    network = unet(3, 4, out_channels=3)
    with pytest.raises(RuntimeError):
        logits_and_features(network, torch.randn(1, 2, 32, 32), "output_block.conv.conv")
    assert not network.get_submodule("output_block.conv.conv")._forward_pre_hooks
