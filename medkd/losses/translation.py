"""Terms of image-to-image translation without pairs, next to the adversarial ones."""

from __future__ import annotations

import torch

from medkd.losses.precision import at_least_float32
from medkd.losses.shapes import require_same_shape


def cycle_l1(reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of an image and what came back from a round trip, from an identity or an autoencoder.

    Args:
        reconstruction: (B, C, *S); computed in float32, in float64 if given so.
        image: (B, C, *S).

    Returns:
        Scalar, in the images' unit.

    Raises:
        ValueError: If the shapes differ.

    Source: Zhu et al. 2017, arXiv:1703.10593.
    """
    require_same_shape("reconstruction", reconstruction, "image", image)
    return (at_least_float32(reconstruction) - at_least_float32(image)).abs().mean()


def latent_kl(mean: torch.Tensor) -> torch.Tensor:
    """Mean of the squared latent mean, which is twice the KL divergence per value of N(mean, 1) from N(0, 1).

    Args:
        mean: latent means, any shape; computed in float32, in float64 if given so.

    Returns:
        Scalar.

    Source: Liu et al. 2017, arXiv:1703.00848; without the paper's factor 1/2, as in its code.
    """
    return at_least_float32(mean).square().mean()
