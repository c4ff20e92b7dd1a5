"""Image-to-image generators and their critics: CycleGAN's and UNIT's.

Sources: CycleGAN, arXiv:1703.10593; UNIT, arXiv:1703.00848, as released (per-domain networks without shared weights,
unit variance in the latent space).
"""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv, Pool
from monai.networks.layers.utils import get_norm_layer
from monai.networks.nets.patchgan_discriminator import PatchDiscriminator
from torch import nn

from medkd.nets.critics import require_sides


def init_gan_weights(module: nn.Module, std: float = 0.02) -> nn.Module:
    """Draw all weights as GANs start: convolutions and linear layers N(0, std), norms N(1, std), biases 0.

    Returns:
        The same module.
    """
    for layer in module.modules():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if not isinstance(weight, nn.Parameter):
            continue
        nn.init.normal_(weight, 0.0 if weight.dim() > 1 else 1.0, std)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
    return module


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with norm, added to their input.

    Args:
        spatial_dims: 2 or 3.
        channels: of the input and the output.
        norm: MONAI's name of a normalization.
    """

    def __init__(self, spatial_dims: int, channels: int, norm: str) -> None:
        super().__init__()
        self.block = nn.Sequential(
            _convolution(spatial_dims, channels, channels, 3),
            get_norm_layer(norm, spatial_dims, channels),
            nn.ReLU(inplace=True),
            _convolution(spatial_dims, channels, channels, 3),
            get_norm_layer(norm, spatial_dims, channels),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → (B, C, *S)."""
        return features + self.block(features)


class ResNetGenerator(nn.Module):
    """CycleGAN's generator; with 3 channels in and out, 11,378,179 parameters as published, with 1 channel 11,365,633.

    Differs: sides that are no multiples of 4 come back as they went in; the release returns them larger. Sides are
    at least 5.

    Args:
        channels: of the input image.
        out_channels: of the output image.
        width: filters at full resolution.
        blocks: residual blocks at a quarter of the resolution.
        norm: MONAI's name of a normalization.
        spatial_dims: 2 or 3.
    """

    def __init__(
        self,
        channels: int = 1,
        out_channels: int = 1,
        width: int = 64,
        blocks: int = 9,
        norm: str = "instance",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()

        def normed(convolution: nn.Module, out: int) -> nn.Sequential:
            return nn.Sequential(convolution, get_norm_layer(norm, spatial_dims, out), nn.ReLU(inplace=True))

        down, up = Conv["conv", spatial_dims], Conv["convtrans", spatial_dims]
        self.first = normed(_convolution(spatial_dims, channels, width, 7), width)
        self.down = nn.ModuleList(
            normed(down(inputs, 2 * inputs, kernel_size=3, stride=2, padding=1), 2 * inputs)
            for inputs in (width, 2 * width)
        )
        self.blocks = nn.Sequential(*(ResidualBlock(spatial_dims, 4 * width, norm) for _ in range(blocks)))
        self.up = nn.ModuleList(
            normed(up(inputs, inputs // 2, kernel_size=3, stride=2, padding=1, output_padding=1), inputs // 2)
            for inputs in (4 * width, 2 * width)
        )
        self.last = nn.Sequential(_convolution(spatial_dims, width, out_channels, 7), nn.Tanh())
        init_gan_weights(self)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) in [-1, 1] → (B, C', *S) in [-1, 1]."""
        features = self.first(image)
        sizes: list[list[int]] = []
        for layer in self.down:
            sizes.append(features.shape[2:])
            features = layer(features)
        features = self.blocks(features)
        for layer in self.up:
            features = layer(features)
            size = sizes.pop()
            for axis in range(len(size)):
                features = features.narrow(axis + 2, 0, size[axis])
        return self.last(features)


class VAETranslator(nn.Module):
    """UNIT's encoder and decoder of one domain: translation decodes with the other domain's decoder.

    The latent distribution has unit variance, so that the encoder gives its mean alone; whoever trains it adds the
    noise. With 1 channel, 11,127,937 parameters.

    Differs: the decoder's layer norm is ``GroupNorm(1)``, whose epsilon is inside the root and whose scales start at
    1; the release divides by an unbiased deviation and starts at random scales.

    Args:
        channels: of the image.
        width: filters at full resolution.
        blocks: residual blocks of the encoder and of the decoder, at a quarter of the resolution.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int = 1, width: int = 64, blocks: int = 4, spatial_dims: int = 2) -> None:
        super().__init__()
        latent = 4 * width

        def residual_blocks() -> list[nn.Module]:
            return [ResidualBlock(spatial_dims, latent, "instance") for _ in range(blocks)]

        encoder: list[nn.Module] = []
        for inputs, outputs, kernel, stride in (
            (channels, width, 7, 1),
            (width, 2 * width, 4, 2),
            (2 * width, latent, 4, 2),
        ):
            encoder += [
                _convolution(spatial_dims, inputs, outputs, kernel, stride),
                get_norm_layer("instance", spatial_dims, outputs),
                nn.ReLU(inplace=True),
            ]
        self.encoder = nn.Sequential(*encoder, *residual_blocks())
        decoder: list[nn.Module] = []
        for inputs in (latent, 2 * width):
            decoder += [
                nn.Upsample(scale_factor=2),
                _convolution(spatial_dims, inputs, inputs // 2, 5),
                nn.GroupNorm(1, inputs // 2),
                nn.ReLU(inplace=True),
            ]
        self.decoder = nn.Sequential(
            *residual_blocks(), *decoder, _convolution(spatial_dims, width, channels, 7), nn.Tanh()
        )
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @torch.jit.export
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → mean of the latent distribution (B, 4 width, *S / 4).

        Raises:
            ValueError: If a side is no multiple of 4.
        """
        for side in image.shape[2:]:
            if side % 4 != 0:
                raise ValueError(f"this translator needs sides that are multiples of 4, got {image.shape}")
        return self.encoder(image)

    @torch.jit.export
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, 4 width, *S / 4) → (B, C, *S) in [-1, 1]."""
        return self.decoder(latent)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → its reconstruction (B, C, *S) from the latent mean."""
        return self.decode(self.encode(image))


class PatchCritic(nn.Module):
    """MONAI's ``PatchDiscriminator``, reduced to its map of logits."""

    def __init__(self, network: PatchDiscriminator) -> None:
        super().__init__()
        self.network = network
        self.smallest_side = 3 * 2**network.num_layers_d

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → logits (B, 1, *S'), one per patch.

        Raises:
            ValueError: If a side is below 3 × 2 ** layers.
        """
        require_sides(image, self.smallest_side)
        for layer in self.network.children():
            image = layer(image)
        return image


def patch_critic(channels: int = 1, width: int = 64, layers: int = 3, *, spatial_dims: int = 2) -> PatchCritic:
    """CycleGAN's 70×70 PatchGAN: 2,762,689 parameters for 1 channel.

    Args:
        channels: of the image.
        width: filters of the first convolution.
        layers: convolutions with norm after the first; 3 give the receptive field of 70 pixels.
        spatial_dims: 2 or 3.
    """
    network = PatchDiscriminator(
        spatial_dims, channels=width, in_channels=channels, num_layers_d=layers, norm="INSTANCE", bias=True
    )
    return PatchCritic(network)


class MultiScaleCritic(nn.Module):
    """UNIT's critic: the same small critic at halved resolutions.

    Args:
        channels: of the image.
        width: filters of the first convolution, doubled by every further one.
        layers: convolutions that halve the resolution.
        scales: number of resolutions.
        spatial_dims: 2 or 3.
    """

    def __init__(
        self, channels: int = 1, width: int = 64, layers: int = 4, scales: int = 3, *, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        self.critics = nn.ModuleList(_unit_critic(spatial_dims, channels, width, layers) for _ in range(scales))
        self.halve = Pool["AVG", spatial_dims](3, stride=2, padding=1, count_include_pad=False)
        self.smallest_side = 2 ** (layers + scales - 1)
        init_gan_weights(self)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, *S) → logits (B, 1, *S') of every scale, the finest first.

        Raises:
            ValueError: If a side is below 2 ** (layers + scales - 1).
        """
        require_sides(image, self.smallest_side)
        logits = []
        for critic in self.critics:
            logits.append(critic(image))
            image = self.halve(image)
        return logits


def multi_scale_critic(
    channels: int = 1, width: int = 64, layers: int = 4, scales: int = 3, *, spatial_dims: int = 2
) -> MultiScaleCritic:
    """UNIT's critic of three scales: 8,265,027 parameters for 1 channel. See :class:`MultiScaleCritic`."""
    return MultiScaleCritic(channels, width, layers, scales, spatial_dims=spatial_dims)


def _unit_critic(spatial_dims: int, channels: int, width: int, layers: int) -> nn.Sequential:
    inputs = channels
    stack: list[nn.Module] = []
    for layer in range(layers):
        outputs = width * 2**layer
        stack += [_convolution(spatial_dims, inputs, outputs, 4, 2), nn.LeakyReLU(0.2, inplace=True)]
        inputs = outputs
    return nn.Sequential(*stack, Conv["conv", spatial_dims](inputs, 1, kernel_size=1))


def _convolution(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
) -> nn.Module:
    """A convolution that pads by reflection."""
    return Conv["conv", spatial_dims](
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=(kernel_size - 1) // 2,
        padding_mode="reflect",
    )
