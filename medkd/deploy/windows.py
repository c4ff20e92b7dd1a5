"""Real input for a network: windows of a real image, as the bundle's inferer would cut them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from monai.inferers.inferer import SliceInferer, SlidingWindowInferer

from medkd.data.volumes import Volume, read_volume
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.predict import prepare
from medkd.errors import ConfigError, InputError


def sample_volume() -> Volume:
    """The MNI152 T1 template that the nilearn package ships: real MRI that every installation has.

    Raises:
        InputError: If nilearn does not hold it where expected.
    """
    spec = find_spec("nilearn")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("nilearn")
    path = folder / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    if not path.is_file():
        raise InputError(path, "the MNI152 template is not there", "name an image of your own with --image")
    return read_volume(path)


def window_size(bundle: LoadedBundle) -> tuple[int, ...]:
    """The size in voxels of what the network is fed, from the inferer or else the metadata.

    Raises:
        ConfigError: If neither fixes it.
    """
    inferer = bundle.inferer
    if isinstance(inferer, SlidingWindowInferer):
        size = inferer.orig_roi_size if isinstance(inferer, SliceInferer) else inferer.roi_size
        size = tuple(size) if isinstance(size, list | tuple) else (size,) * spatial_dims(bundle)
        if all(isinstance(side, int) and side > 0 for side in size):
            return size
    image = bundle.metadata.get("network_data_format", {}).get("inputs", {}).get("image", {})
    size = tuple(image.get("spatial_shape", ()))
    if size and all(isinstance(side, int) and side > 0 for side in size):
        return size
    raise ConfigError(
        bundle.path, "neither its inferer nor its metadata fixes the input size", "write spatial_shape as integers"
    )


def spatial_dims(bundle: LoadedBundle) -> int:
    """2 or 3, from the network's first convolution.

    Raises:
        ConfigError: If the network has none.
    """
    for module in bundle.network.modules():
        weight = getattr(module, "weight", None)
        if torch.is_tensor(weight) and weight.ndim in (4, 5):
            return weight.ndim - 2
    raise ConfigError(bundle.path, "its network has no convolution", "export a segmentation network")


def sample_windows(bundle: LoadedBundle, volume: Volume, count: int = 4) -> torch.Tensor:
    """Windows of a real image after the bundle's preprocessing.

    Args:
        bundle: whose preprocessing and window size are used.
        volume: the image.
        count: how many windows, spread evenly over the image; small images are padded with zeros.

    Returns:
        (count, C, *size) float32 on the CPU.
    """
    image = prepare(bundle, volume)["image"].as_tensor().float().cpu()
    size = window_size(bundle)
    if len(size) == 2 and image.ndim == 4:
        axis = 1 + getattr(bundle.inferer, "spatial_dim", 2)
        middle = np.linspace(0.25, 0.75, count) * (image.shape[axis] - 1)
        return torch.stack([_cut(image.select(axis, round(place)), size, 0.5) for place in middle])
    return torch.stack([_cut(image, size, place) for place in np.linspace(0.25, 0.75, count)])


def _cut(image: torch.Tensor, size: tuple[int, ...], place: float) -> torch.Tensor:
    """One window whose free corner moves from the image's start (0) to its end (1)."""
    padding = [
        amount for have, want in zip(image.shape[:0:-1], size[::-1], strict=True) for amount in (0, max(want - have, 0))
    ]
    image = F.pad(image, padding)
    for axis, want in enumerate(size, start=1):
        start = round(place * (image.shape[axis] - want))
        image = image.narrow(axis, start, want)
    return image.contiguous()
