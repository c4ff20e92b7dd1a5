"""What the segmentation networks of the papers share, and their published sizes."""

from __future__ import annotations

import pytest
import torch

from medkd.nets.bilinear_unets import BilinearUNet, cmedl_unet, mt_uda_unet
from medkd.nets.dense_fcn import DenseFCN
from medkd.nets.mrrn import MRRN
from medkd.nets.taps import Taps

MT_UDA = {"dropout": (0.1, 0.2, 0.3), "negative_slope": 0.01, "halves": True, "head_kernel_size": 3}
SMALL = {
    "cmedl_unet": lambda dims: BilinearUNet(dims, 1, 3, widths=(4, 8, 8)),
    "mt_uda_unet": lambda dims: BilinearUNet(dims, 1, 3, widths=(4, 8, 16), **MT_UDA),
    "dense_fcn": lambda dims: DenseFCN(dims, 1, 3, growth=2, layers=2, first_width=4, levels=2),
    "mrrn": lambda dims: MRRN(dims, 1, 3, stream_width=4, widths=(4, 8, 8)),
}
AUXILIARY = ("auxiliary_block.", "auxiliary_head.")  # MRRN's; forward() does not use them, as documented

every_segmenter = pytest.mark.parametrize("name", SMALL)


def small(name, dims=2):
    torch.manual_seed(0)
    return SMALL[name](dims)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "published"),
    [(cmedl_unet, 13_394_242), (mt_uda_unet, 28_956_229), (DenseFCN, 1_374_194), (MRRN, 38_935_012)],
    ids=["cmedl_unet", "mt_uda_unet", "dense_fcn", "mrrn"],
)
def test_parameters_number_as_published(build, published):
    assert count(build()) == published


@every_segmenter
@pytest.mark.parametrize("size", [(8, 8), (16, 24), (19, 21), (8, 9, 11), (16, 8, 12)], ids=str)
def test_logits_have_the_size_of_the_image_for_any_sides(name, size):
    network = small(name, len(size)).eval()
    assert network(torch.randn(2, 1, *size)).shape == (2, 3, *size)


@every_segmenter
def test_every_parameter_has_a_gradient(name):
    network = small(name)
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    without = {key for key, parameter in network.named_parameters() if parameter.grad is None}
    assert {key for key in without if not key.startswith(AUXILIARY)} == set()
    assert all(
        parameter.grad.abs().sum() > 0
        for key, parameter in network.named_parameters()
        if parameter.dim() > 1 and key not in without
    )


@every_segmenter
@pytest.mark.parametrize("dims", [2, 3])
def test_a_scripted_segmenter_computes_the_same(name, dims):
    network = small(name, dims).eval()
    image = torch.randn(1, 1, *(16, 13, 8)[:dims])
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


@every_segmenter
def test_an_exported_segmenter_computes_the_same(name):
    network = small(name).eval()
    image = torch.randn(1, 1, 16, 12)
    torch.testing.assert_close(torch.export.export(network, (image,)).module()(image), network(image))


@every_segmenter
def test_hint_layers_are_the_last_two_and_tensors_of_known_size(name):
    network = small(name)
    with Taps(network, network.hint_layers) as features:
        network(torch.randn(1, 1, 16, 16))
    before_last, last = (features[layer] for layer in network.hint_layers)
    assert last.shape[2:] == (16, 16)
    assert before_last.shape[2:] == ((16, 16) if name == "mrrn" else (8, 8))


def test_hint_layers_of_the_published_u_net_have_the_published_width():
    network = cmedl_unet().eval()
    with torch.no_grad(), Taps(network, network.hint_layers) as features:
        network(torch.randn(1, 1, 32, 32))
    assert [tuple(f.shape) for f in features.values()] == [(1, 64, 16, 16), (1, 64, 32, 32)]


def test_a_hinted_feature_can_be_read_after_the_forward_pass_and_differentiated():
    network = small("cmedl_unet")
    with Taps(network, network.hint_layers) as features:
        logits = network(torch.randn(2, 1, 16, 16))
    (sum(feature.square().mean() for feature in features.values()) + logits.mean()).backward()
    assert network.encoder[0][0].conv.weight.grad.abs().sum() > 0


def test_norm_free_networks_treat_samples_one_by_one():
    torch.manual_seed(0)
    network = BilinearUNet(widths=(4, 8), norm=None)
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


@pytest.mark.parametrize("arguments", [{"widths": (4,)}, {"widths": (4, 8), "dropout": (0.1,)}])
def test_a_u_net_without_levels_or_with_missing_dropout_is_refused(arguments):
    with pytest.raises(ValueError, match="two or more widths"):
        BilinearUNet(**arguments)


def test_mrrn_of_one_level_is_refused():
    with pytest.raises(ValueError, match="two or more widths"):
        MRRN(widths=(8,))


def test_mrrn_leaves_only_the_auxiliary_head_without_gradient():
    network = small("mrrn")
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    without = {key for key, parameter in network.named_parameters() if parameter.grad is None}
    assert without == {key for key, _ in network.named_parameters() if key.startswith(AUXILIARY)}


def test_the_published_mrrn_has_18594_parameters_in_its_auxiliary_head():
    with torch.device("meta"):
        network = MRRN()
    assert sum(p.numel() for key, p in network.named_parameters() if key.startswith(AUXILIARY)) == 18_594


def test_mrrn_trains_every_parameter_through_both_heads():
    network = small("mrrn")
    logits, auxiliary = network.forward_with_auxiliary(torch.randn(2, 1, 16, 16))
    assert logits.shape == auxiliary.shape == (2, 3, 16, 16)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_mrrn_gives_the_same_logits_with_and_without_its_auxiliary_head():
    network = small("mrrn").eval()
    image = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(network(image), network.forward_with_auxiliary(image)[0], rtol=0, atol=0)
