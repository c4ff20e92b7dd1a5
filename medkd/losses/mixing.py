"""Images made of two: pasted classes, exchanged spectra."""

from __future__ import annotations

import torch

from medkd.losses.precision import at_least_float32
from medkd.losses.shapes import require_same_shape


def class_mix_mask(label: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Where each image's elements belong to a random half of the classes it shows (of an odd number, the larger half).

    Args:
        label: (B, 1, *S) class indices; negative ones (ignored elements) are never chosen.
        generator: of the draw.

    Returns:
        (B, 1, *S) bool, on the label's device.

    Raises:
        ValueError: If ``label`` is not (B, 1, *S).

    Source: Olsson et al. 2020, arXiv:2007.07936; Tranheden et al. 2021, arXiv:2007.08702.
    """
    if label.ndim < 3 or label.shape[1] != 1:
        raise ValueError(f"label must be (B, 1, *S), got {tuple(label.shape)}")
    device = generator.device if generator is not None else torch.device("cpu")
    masks = []
    for image in label:
        present = image.unique()
        present = present[present >= 0]
        order = torch.randperm(len(present), generator=generator, device=device).to(present.device)
        masks.append(torch.isin(image, present[order[: (len(present) + 1) // 2]]))
    return torch.stack(masks)


def paste(mask: torch.Tensor, foreground: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """``foreground`` where the mask is set, ``background`` elsewhere; for images and for their labels alike.

    Args:
        mask: (B, 1, *S) bool.
        foreground: (B, C, *S).
        background: (B, C, *S).

    Returns:
        (B, C, *S).

    Raises:
        ValueError: If the shapes do not match.
    """
    require_same_shape("foreground", foreground, "background", background)
    if tuple(mask.shape) != (foreground.shape[0], 1, *foreground.shape[2:]):
        raise ValueError(f"mask must be (B, 1, *S) for images {tuple(foreground.shape)}, got {tuple(mask.shape)}")
    return torch.where(mask.bool(), foreground, background)


def low_frequency_swap(source: torch.Tensor, target: torch.Tensor, beta: float) -> torch.Tensor:
    """``source`` with the low-frequency amplitudes of ``target``: its content in the other's style.

    Amplitudes are taken over in a square of half-width floor(beta × shortest side) around frequency 0, bounds included;
    so ``beta`` = 0 exchanges the mean brightness alone. Phases stay. Apply before any normalization; the result may
    leave the images' range by a little.

    Args:
        source: (B, C, *S); computed in float32, in float64 if given so.
        target: (B, C, *S).
        beta: in [0, 0.5]; FDA has 0.01, 0.05 and 0.09.

    Returns:
        (B, C, *S); ``source`` itself, up to rounding, if both are the same.

    Raises:
        ValueError: If the shapes differ or ``beta`` is out of range.

    Source: Yang and Soatto 2020, arXiv:2004.05498, with the symmetric square of its NumPy code.
    """
    return amplitude_mix(source, target, ratio=1.0, beta=beta)


def amplitude_mix(
    image: torch.Tensor, other: torch.Tensor, *, ratio: float | torch.Tensor, beta: float | None = None
) -> torch.Tensor:
    """``image`` with amplitudes (1 - ratio) × its own + ratio × those of ``other``, phases kept.

    Args:
        image: (B, C, *S); computed in float32, in float64 if given so.
        other: (B, C, *S).
        ratio: in [0, 1]; a number, or (B,) one per image.
        beta: mix within the square of `low_frequency_swap` only; None: at all frequencies.

    Returns:
        (B, C, *S).

    Raises:
        ValueError: If the shapes do not match or ``ratio`` or ``beta`` is out of range.

    Source: Xu et al. 2021, arXiv:2105.11120.
    """
    require_same_shape("image", image, "other", other)
    if image.ndim < 3:
        raise ValueError(f"images must be (B, C, *S), got {tuple(image.shape)}")
    share = _ratios(ratio, image)
    axes = tuple(range(2, image.ndim))
    spectrum = torch.fft.fftn(at_least_float32(image), dim=axes)
    amplitude = spectrum.abs()
    mixed = torch.lerp(amplitude, torch.fft.fftn(at_least_float32(other), dim=axes).abs().to(amplitude), share)
    if beta is not None:
        mixed = torch.where(_low_frequencies(image.shape[2:], beta, image.device), mixed, amplitude)
    return torch.fft.ifftn(torch.polar(mixed, spectrum.angle()), dim=axes).real


def _ratios(ratio: float | torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """The ratio as at least float32, of shape () or (B, 1, 1, …)."""
    share = at_least_float32(torch.as_tensor(ratio, device=image.device)).to(at_least_float32(image[:0]).dtype)
    if share.ndim and tuple(share.shape) != (image.shape[0],):
        raise ValueError(f"ratio must be a number or (B,) for images {tuple(image.shape)}, got {tuple(share.shape)}")
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"ratio must lie in [0, 1], got {share.tolist()}")
    return share.reshape(-1, *[1] * (image.ndim - 1)) if share.ndim else share


def _low_frequencies(sides: torch.Size, beta: float, device: torch.device) -> torch.Tensor:
    """(*S) bool: frequencies within the square, in the order of an unshifted FFT."""
    if not 0 <= beta <= 0.5:
        raise ValueError(f"beta must lie in [0, 0.5], got {beta}")
    half_width = int(min(sides) * beta + 1e-9)
    inside = torch.ones(tuple(sides), dtype=torch.bool, device=device)
    for axis, side in enumerate(sides):
        frequency = (torch.fft.fftfreq(side, device=device) * side).abs().round()
        shape = [1] * len(sides)
        shape[axis] = side
        inside = inside & (frequency <= half_width).reshape(shape)
    return inside
