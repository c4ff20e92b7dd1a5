from __future__ import annotations

import pytest
import torch
from torch import nn

from medkd.wsi.fold import TileNetwork
from medkd.wsi.pool import PoolAfterRelu

MEAN, STD = (0.71, 0.553, 0.697), (0.2, 0.25, 0.18)


def trained_like(network: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics of BatchNorm that fit the data and scales that differ, as after training."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.3, 1.7)
            nn.init.normal_(module.bias, 0, 0.3)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, 3, 24, 24) + torch.rand(3, 1, 1))
    return network.eval()


def reference(network: nn.Module, tiles: torch.Tensor) -> torch.Tensor:
    images = tiles.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return network((images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])


def tiles(count=5, size=24, seed=1):
    # Bright and dark ones: the border of the padding shows most where a tile is far from the mean.
    random = torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed))
    random[0], random[1] = 255, 0
    return random.to(torch.uint8)


def block(**options):
    return nn.Sequential(nn.Conv2d(3, 8, **options), nn.BatchNorm2d(8), nn.ReLU())


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.left_norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.left_norm(self.left(x)) + self.right(x)


class UsesImageTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return x + self.norm(self.conv(x))


class SharesConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.shared, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.shared(self.first(x)))
        return self.other(self.shared(x))


class NormSeesMore(nn.Module):
    """What the norm gets goes elsewhere, too, so it must stay."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.first(x)
        return self.norm(x) * x


class DependsOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(block(kernel_size=3, padding=1), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)))

    def forward(self, x):
        return self.body(x) if float(x.sum()) > -1e9 else x


@pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
@pytest.mark.parametrize(
    ("network", "norms", "folds_input"),
    [
        (block(kernel_size=3, padding=1, stride=2), 1, True),
        (block(kernel_size=3, padding=0, bias=False), 1, True),
        (block(kernel_size=7, padding=(3, 2), stride=(2, 1)), 1, True),
        (block(kernel_size=4, padding="same"), 1, True),
        (block(kernel_size=3, padding=2, dilation=2), 1, True),
        (block(kernel_size=3, padding=1, padding_mode="reflect"), 1, True),
        (block(kernel_size=3, padding=1, padding_mode="circular"), 1, True),
        (nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6, affine=False)), 1, True),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)), 0, True),
        (nn.Sequential(nn.AvgPool2d(2), block(kernel_size=3, padding=1)), 1, False),
        (nn.Sequential(nn.BatchNorm2d(3), block(kernel_size=3, padding=1)), 1, False),
        (TwoHeads(), 2, True),
        (UsesImageTwice(), 1, False),
        (SharesConvolution(), 0, True),
        (NormSeesMore(), 0, True),
        (DependsOnValues(), 2, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_folding_changes_nothing_but_speed(network, norms, folds_input):
    network = trained_like(network)
    folded = TileNetwork(network, mean=MEAN, std=STD, size=24)
    assert (folded.folded_norms, folded.folded_input) == (norms, folds_input)
    expected = reference(network, tiles())
    difference = (folded(tiles()) - expected).abs().max()
    assert difference <= 2e-5 * expected.abs().max()


def test_the_border_is_padded_with_the_mean_and_not_with_black():
    network = trained_like(nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.BatchNorm2d(8)))
    folded = TileNetwork(network, mean=MEAN, std=STD, size=24)
    expected, found = reference(network, tiles()), folded(tiles())
    for border in (found[..., :2, :] - expected[..., :2, :], found[..., -2:] - expected[..., -2:]):
        assert border.abs().max() < 2e-5 * expected.abs().max()
    with torch.no_grad():
        black = folded.network[0](nn.functional.pad(folded._levels.padded(tiles(), (0, 0, 0, 0)), (2, 2, 2, 2)))
    assert (black - expected).abs().max() > 1e-3  # a border of zero levels would have been noticed


def test_the_original_network_stays_as_it_is():
    network = trained_like(block(kernel_size=3, padding=1)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    TileNetwork(network, mean=MEAN, std=STD, size=24)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_smaller_last_batch_does_not_see_the_former_one():
    network = trained_like(block(kernel_size=3, padding=1))
    folded = TileNetwork(network, mean=MEAN, std=STD, size=24)
    folded(tiles(8, seed=3))
    assert torch.allclose(folded(tiles()), reference(network, tiles()), atol=2e-5)


def test_torchscript_runs_as_it_is():
    network = trained_like(block(kernel_size=3, padding=1))
    scripted = torch.jit.script(network)
    folded = TileNetwork(scripted, mean=MEAN, std=STD, size=24)
    assert folded.folded_norms == 0
    assert torch.allclose(folded(tiles()), reference(network, tiles()), atol=2e-5)


def test_bf16_keeps_the_levels_exactly_and_errs_by_its_own_rounding_only():
    network = trained_like(block(kernel_size=3, padding=1, stride=2))
    low = TileNetwork(network, mean=MEAN, std=STD, size=24, dtype=torch.bfloat16)
    levels = low._levels.padded(tiles(), (0, 0, 0, 0)).float()
    assert torch.equal(levels, tiles().permute(0, 3, 1, 2).float() - 128)
    expected = reference(network, tiles())
    assert low(tiles()).dtype == torch.float32
    assert (low(tiles()) - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_network_that_folding_would_change_runs_unfolded(caplog):
    class Peeks(nn.Module):
        """Reads a parameter behind the module's back, which no trace of modules shows."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) * self.conv.weight.sum()

    network = trained_like(Peeks())
    folded = TileNetwork(network, mean=MEAN, std=STD, size=24)
    assert (folded.folded_norms, folded.folded_input) == (0, False)
    assert "not done" in caplog.text
    expected = reference(network, tiles())
    assert (folded(tiles()) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", [(2, 16, 8, 12), (1, 3, 2, 2), (3, 5, 7, 8), (1, 1, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pooling_after_a_relu_is_the_plain_pooling_bit_for_bit(shape, dtype):
    torch.manual_seed(0)
    images = torch.randn(shape).mul(100).to(dtype).contiguous(memory_format=torch.channels_last).relu()
    images[0, 0, 0, 0] = torch.inf
    expected = nn.functional.max_pool2d(images, 3, stride=2, padding=1)
    assert torch.equal(PoolAfterRelu()(images), expected)
    assert torch.equal(PoolAfterRelu()(images.contiguous()), expected)


@pytest.mark.parametrize(
    ("before", "pool", "quick"),
    [
        (nn.ReLU(), nn.MaxPool2d(3, 2, 1), True),
        (nn.ReLU(), nn.MaxPool2d((3, 3), (2, 2), (1, 1)), True),
        (nn.ReLU(), nn.MaxPool2d(3, 2, 0), False),
        (nn.ReLU(), nn.MaxPool2d(2), False),
        (nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True), False),
        (nn.PReLU(), nn.MaxPool2d(3, 2, 1), False),
    ],
)
def test_only_that_pooling_is_replaced_and_only_after_a_relu(before, pool, quick):
    network = trained_like(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), before, pool))
    folded = TileNetwork(network, mean=MEAN, std=STD, size=24, dtype=torch.bfloat16)
    assert isinstance(folded.network[3], PoolAfterRelu) == quick
    expected = reference(network, tiles())
    assert (folded(tiles()) - expected).abs().max() < 0.02 * expected.abs().max()


def test_weights_that_are_not_finite_still_show():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] = torch.nan
    found = TileNetwork(network, mean=MEAN, std=STD, size=24, dtype=torch.bfloat16)(tiles())
    assert found[:, 0].isnan().all()
