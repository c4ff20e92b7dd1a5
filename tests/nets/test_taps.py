from __future__ import annotations

import pytest
import torch
from torch import nn

from medkd.nets.taps import Taps


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


def hooks(module):
    return sum(len(child._forward_hooks) for child in module.modules())


def test_taps_give_what_the_named_modules_return():
    tapped = network()
    x = torch.randn(5, 3)
    with Taps(tapped, ["0", "1.1"]) as features:
        y = tapped(x)
    assert list(features) == ["0", "1.1"]
    torch.testing.assert_close(features["0"], tapped[0](x), rtol=0, atol=0)
    assert features["1.1"] is y


def test_gradients_flow_through_a_tapped_feature():
    tapped = network()
    with Taps(tapped, ["0"]) as features:
        tapped(torch.randn(5, 3))
    features["0"].sum().backward()
    assert tapped[0].weight.grad is not None
    assert tapped[1][1].weight.grad is None


def test_hooks_are_gone_after_the_context():
    tapped = network()
    with Taps(tapped, ["0", "1"]):
        assert hooks(tapped) == 2
    assert hooks(tapped) == 0


def test_hooks_are_gone_after_an_error_inside():
    tapped = network()
    with pytest.raises(RuntimeError), Taps(tapped, ["0", "1"]):
        tapped(torch.randn(5, 7))
    assert hooks(tapped) == 0


def test_one_taps_object_can_be_entered_again_and_forgets_what_it_saw():
    tapped = network()
    taps = Taps(tapped, ["0"])
    with taps as first:
        tapped(torch.randn(2, 3))
    with taps as second:
        assert second == {}
    assert set(first) == {"0"}
    assert hooks(tapped) == 0


def test_two_taps_of_one_network_do_not_disturb_each_other():
    tapped = network()
    with Taps(tapped, ["0"]) as outer:
        with Taps(tapped, ["1"]) as inner:
            tapped(torch.randn(2, 3))
        assert hooks(tapped) == 1
    assert (set(outer), set(inner)) == ({"0"}, {"1"})


def test_an_unknown_name_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"no module is named 'layer\.2'; the nearest names are layer\.1"):
        Taps(nn.ModuleDict({"layer": nn.Sequential(nn.ReLU(), nn.ReLU())}), ["layer.2"])


def test_a_module_that_returns_no_tensor_is_refused_by_name_and_its_hook_removed():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    tapped = nn.Sequential(Pair())
    with pytest.raises(TypeError, match="'0' returns tuple"), Taps(tapped, ["0"]):
        tapped(torch.randn(1))
    assert hooks(tapped) == 0
