from __future__ import annotations

import pickle

import pytest
import torch

from medkd.errors import InputError
from medkd.nets.vgg_features import vgg19_features

CONVOLUTIONS = {  # torchvision's numbering of vgg19().features, and every convolution's channels
    0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
    16: (256, 256), 19: (256, 512), 21: (512, 512), 23: (512, 512), 25: (512, 512), 28: (512, 512), 30: (512, 512),
    32: (512, 512), 34: (512, 512),
}  # fmt: skip


def state_dict():
    """The keys and shapes of torchvision's file; every layer holds one number, so that the file stays small."""
    state = {}
    for number, (inputs, outputs) in CONVOLUTIONS.items():
        state[f"features.{number}.weight"] = torch.tensor(1e-3 * (number + 1)).expand(outputs, inputs, 3, 3)
        state[f"features.{number}.bias"] = torch.tensor(1.0 * number).expand(outputs)
    return state | {
        f"classifier.{number}.{kind}": torch.zeros(1) for number in (0, 3, 6) for kind in ("weight", "bias")
    }


def saved(tmp_path, state):
    torch.save(state, tmp_path / "vgg19.pth")
    return tmp_path / "vgg19.pth"


def test_default_layers_have_the_sizes_that_the_contextual_loss_is_computed_on():
    network = vgg19_features(weights=None)
    with torch.no_grad():
        shapes = [tuple(features.shape) for features in network(torch.rand(2, 1, 32, 48))]
    assert shapes == [(2, 256, 8, 12), (2, 256, 8, 12), (2, 512, 4, 6)]


def test_layers_come_in_the_order_asked_for_and_grey_images_count_as_three_equal_channels():
    network = vgg19_features(("conv2_1", "conv1_2"), weights=None)
    image = torch.rand(1, 1, 16, 16) * 2 - 1
    grey, color = network(image), network(image.expand(-1, 3, -1, -1))
    assert [f.shape[1] for f in grey] == [128, 64]
    for a, b in zip(grey, color, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_images_are_normalized_as_imagenet_expects():
    network = vgg19_features(("conv1_1",), weights=None)
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    expected = network.features[0](((image + 1) / 2 - mean) / std).relu()
    torch.testing.assert_close(network(image)[0], expected)


def test_features_are_frozen_but_pass_gradients_to_the_image():
    network = vgg19_features(("conv1_2",), weights=None)
    image = torch.rand(1, 1, 8, 8, requires_grad=True)
    network.train()
    network(image)[0].sum().backward()
    assert image.grad.abs().sum() > 0
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_random_weights_are_a_function_of_the_seed_alone():
    first = vgg19_features(("conv2_1",), weights=None, seed=3).state_dict()
    torch.rand(7)
    again = vgg19_features(("conv2_1",), weights=None, seed=3).state_dict()
    other = vgg19_features(("conv2_1",), weights=None, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_a_torchvision_file_is_loaded_into_the_layers_it_names(tmp_path):
    network = vgg19_features(weights=saved(tmp_path, state_dict()))
    loaded = network.state_dict()
    assert set(loaded) == {f"features.{n}.{kind}" for n in CONVOLUTIONS if n <= 19 for kind in ("weight", "bias")}
    for number in (0, 14, 19):
        assert loaded[f"features.{number}.weight"].unique().tolist() == pytest.approx([1e-3 * (number + 1)])
        assert loaded[f"features.{number}.bias"].unique().tolist() == [number]


def changed(change):
    state = state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (changed(lambda s: s.pop("features.34.bias")), "it lacks features.34.bias"),
        (changed(lambda s: s.update({"features.1.weight": torch.zeros(64)})), "unknown key features.1.weight"),
        (changed(lambda s: s.update({"features.0.weight": torch.zeros(64, 1, 3, 3)})), "another shape of features.0"),
        ({"state_dict": state_dict()}, "it lacks features.0.weight"),
        ([1, 2], "holds a list"),
    ],
    ids=["missing", "batch-norm", "shape", "nested", "list"],
)
def test_another_network_is_refused_in_one_line(tmp_path, state, problem):
    path = saved(tmp_path, state)
    with pytest.raises(InputError, match=problem) as caught:
        vgg19_features(weights=path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


class Planted:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps({"features.0.weight": Planted()}, protocol=2), b"no weights", b""],
    ids=["code", "text", "empty"],
)
def test_a_file_that_is_no_plain_weights_is_refused_and_nothing_in_it_runs(tmp_path, capsys, content):
    path = tmp_path / "vgg19.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no file of plain PyTorch weights"):
        vgg19_features(weights=path)
    assert capsys.readouterr().out == ""


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        vgg19_features(weights=tmp_path / "absent.pth")


def test_an_unknown_layer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"conv1_1.*conv5_4; got conv6_1"):
        vgg19_features(("conv6_1",), weights=None)


def test_volumes_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 1 or 3, H, W\)"):
        vgg19_features(("conv1_1",), weights=None)(torch.rand(1, 1, 8, 8, 8))
