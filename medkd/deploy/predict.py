"""From a volume to a label map, or a translation, on the volume's own grid, through a bundle's transforms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.post.array import AsDiscrete
from monai.transforms.post.dictionary import Activationsd, AsDiscreted, Invertd

from medkd.data.volumes import Volume, read_volume
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.metadata import translates
from medkd.errors import ConfigError, InputError

_IMAGE, _PRED = "image", "pred"


def predict_volume(bundle: LoadedBundle, image: Volume | str | Path) -> npt.NDArray[np.integer[Any]]:
    """Segment a volume: preprocessing, inferer and postprocessing of the bundle, in float32.

    Args:
        bundle: a loaded bundle.
        image: a checked volume, or what :func:`medkd.data.volumes.read_volume` reads.

    Returns:
        (X, Y, Z) labels on the input's own grid, uint8 or the smallest wider unsigned type.

    Raises:
        InputError: the image cannot be used, or gives predictions that are not finite.
        ConfigError: the bundle's postprocessing does not end in a label map on the input's grid.
    """
    require_segmentation(bundle)
    volume = image if isinstance(image, Volume) else read_volume(image)
    item = _infer(bundle, volume)
    return _to_labels(bundle, _run(bundle, bundle.postprocessing, item, "postprocessing"), volume)


def translate_volume(bundle: LoadedBundle, image: Volume | str | Path) -> npt.NDArray[np.float32]:
    """Translate a volume into another modality: preprocessing, inferer and postprocessing of the bundle, in float32.

    Args:
        bundle: a loaded bundle that translates.
        image: a checked volume, or what :func:`medkd.data.volumes.read_volume` reads.

    Returns:
        (X, Y, Z) intensities on the input's own grid: in the target's unit where the bundle knows it, else in [-1, 1].

    Raises:
        InputError: the image cannot be used, or gives values that are not finite.
        ConfigError: the bundle does not translate, or not onto the input's grid.
    """
    if not translates(bundle.metadata):
        raise ConfigError(bundle.path, "does not translate images", "use a translation bundle")
    volume = image if isinstance(image, Volume) else read_volume(image)
    item = _run(bundle, bundle.postprocessing, _infer(bundle, volume), "postprocessing")
    array = _values(item)
    if array.shape[0] != 1 or array.shape[1:] != volume.array.shape:
        raise _other_grid(bundle, volume, array.shape[1:])
    translated: npt.NDArray[np.float32] = array[0]
    return translated


def require_segmentation(bundle: LoadedBundle) -> None:
    """Refuse a bundle whose network makes images instead of labels.

    Raises:
        ConfigError: as said.
    """
    if translates(bundle.metadata):
        raise ConfigError(
            bundle.path, "translates images and gives no labels", "use a segmentation bundle, or `medkd predict`"
        )


def predict_probabilities(bundle: LoadedBundle, image: Volume | str | Path) -> npt.NDArray[np.float32]:
    """Class probabilities on the input's own grid: softmax, then the inverse of the preprocessing, linearly.

    Outside the field of view that the preprocessing kept, all classes but the background are 0.

    Returns:
        (K, X, Y, Z), summing to 1 over K.

    Raises:
        InputError, ConfigError: as :func:`predict_volume`; also a network with a single output channel.
    """
    require_segmentation(bundle)
    volume = image if isinstance(image, Volume) else read_volume(image)
    item = _infer(bundle, volume)
    if item[_PRED].shape[0] < 2:
        raise ConfigError(bundle.path, "its network has one output channel", "use a bundle with a channel per class")
    softmax = Activationsd(keys=_PRED, softmax=True)
    item = _run(bundle, Compose([softmax, *_inverse(bundle)]), item, "probabilities")
    probabilities = item[_PRED].as_tensor().float().cpu().numpy()
    if probabilities.shape[1:] != volume.array.shape:
        raise _other_grid(bundle, volume, probabilities.shape[1:])
    probabilities[0] += np.clip(1 - probabilities.sum(axis=0), 0, None)
    result: npt.NDArray[np.float32] = probabilities / probabilities.sum(axis=0, keepdims=True)
    return result


def predict_ensemble(bundles: Sequence[LoadedBundle], image: Volume | str | Path) -> npt.NDArray[np.integer[Any]]:
    """Segment a volume with several bundles: argmax of their mean probabilities.

    What the first bundle's postprocessing does after its argmax is then applied.

    Returns:
        (X, Y, Z) labels on the input's own grid.

    Raises:
        InputError, ConfigError: as :func:`predict_volume`; also bundles with different numbers of classes.
    """
    volume = image if isinstance(image, Volume) else read_volume(image)
    if len(bundles) == 1:
        return predict_volume(bundles[0], volume)
    total = predict_probabilities(bundles[0], volume)
    for bundle in bundles[1:]:
        probabilities = predict_probabilities(bundle, volume)
        if len(probabilities) != len(total):
            raise ConfigError(bundle.path, f"has {len(probabilities)} classes, not {len(total)}", "pool equal models")
        total += probabilities
    labels = MetaTensor(torch.from_numpy(total.argmax(axis=0)[None]).float(), affine=torch.from_numpy(volume.affine))
    item = _run(bundles[0], Compose(_after_argmax(bundles[0])), {_PRED: labels}, "postprocessing")
    return _to_labels(bundles[0], item, volume)


def prepare(bundle: LoadedBundle, volume: Volume) -> dict[str, Any]:
    """A volume after the bundle's preprocessing: ``{"image": (C, *S) MetaTensor, "case": …}``."""
    array = torch.from_numpy(np.ascontiguousarray(volume.array, dtype=np.float32))
    meta = {
        "filename_or_obj": str(volume.path),
        "spatial_shape": np.asarray(volume.array.shape),
        "original_affine": volume.affine.copy(),
        "original_channel_dim": 0 if bundle.adds_channel else float("nan"),
        "space": "RAS",
    }
    affine = torch.from_numpy(volume.affine.copy())
    image = MetaTensor(array[None] if bundle.adds_channel else array, affine=affine, meta=meta)
    item = _run(bundle, bundle.preprocessing, {_IMAGE: image}, "preprocessing")
    if not torch.isfinite(item[_IMAGE]).all():
        raise InputError(volume.path, "is not finite after preprocessing", "check its intensities")
    return item


@torch.inference_mode()
def _infer(bundle: LoadedBundle, volume: Volume) -> dict[str, Any]:
    item = prepare(bundle, volume)
    channels = _expected_channels(bundle)
    if channels is not None and item[_IMAGE].shape[0] != channels:
        raise InputError(
            volume.path,
            f"has {item[_IMAGE].shape[0]} channel(s), {bundle.name} expects {channels}",
            "use another model",
        )
    batch = item[_IMAGE][None].to(bundle.device)
    output = bundle.inferer(inputs=batch, network=bundle.network)
    if not torch.is_tensor(output):
        raise ConfigError(bundle.path, "its network does not return one tensor", "use a segmentation bundle")
    if not torch.isfinite(output).all():
        raise InputError(volume.path, f"{bundle.name} predicts values that are not finite", "check its intensities")
    # What SupervisedEvaluator hands to postprocessing: decollated, image beside prediction.
    prediction = output[0]
    if not isinstance(prediction, MetaTensor):
        prediction = MetaTensor(prediction, affine=item[_IMAGE].affine)
    item[_PRED] = prediction
    return item


@torch.inference_mode()
def _run(bundle: LoadedBundle, transforms: Compose, item: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return dict(transforms(item))
    except (InputError, ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise InputError(
            f"{bundle.path}: {where}",
            f"failed ({str(cause).splitlines()[0] if str(cause) else type(cause).__name__})",
            "check that the image is what the bundle expects",
        ) from error


def _to_labels(bundle: LoadedBundle, item: dict[str, Any], volume: Volume) -> npt.NDArray[np.integer[Any]]:
    array = _values(item)
    if array.ndim != 4 or array.shape[0] != 1:
        raise ConfigError(
            bundle.path, f"its postprocessing gives shape {array.shape}, not one label map", "end it in an argmax"
        )
    array = array[0]
    if array.shape != volume.array.shape:
        raise _other_grid(bundle, volume, array.shape)
    rounded = np.rint(array)
    if (array < 0).any() or not np.array_equal(array, rounded):
        raise ConfigError(bundle.path, "its postprocessing does not give integer labels", "end it in an argmax")
    highest = int(rounded.max(initial=0))
    return rounded.astype(np.uint8 if highest < 256 else np.uint16 if highest < 65536 else np.uint32)


def _values(item: dict[str, Any]) -> npt.NDArray[np.float32]:
    prediction = item[_PRED]
    values = prediction.as_tensor() if isinstance(prediction, MetaTensor) else torch.as_tensor(prediction)
    array: npt.NDArray[np.float32] = values.float().cpu().numpy()
    return array


def _other_grid(bundle: LoadedBundle, volume: Volume, shape: tuple[int, ...]) -> ConfigError:
    return ConfigError(
        bundle.path,
        f"its postprocessing gives {shape} for an image of {volume.array.shape}",
        "add Invertd, so that predictions come back to the input's grid",
    )


def _inverse(bundle: LoadedBundle) -> list[Any]:
    """The inverse of the preprocessing, linear on probabilities."""
    return [Invertd(keys=_PRED, transform=bundle.preprocessing, orig_keys=_IMAGE, nearest_interp=False, to_tensor=True)]


def _after_argmax(bundle: LoadedBundle) -> list[Any]:
    steps = list(bundle.postprocessing.transforms)
    places = [place for place, step in enumerate(steps) if isinstance(step, AsDiscrete | AsDiscreted)]
    if not places:
        raise ConfigError(bundle.path, "its postprocessing has no argmax", "predict with one model")
    return steps[places[-1] + 1 :]


def _expected_channels(bundle: LoadedBundle) -> int | None:
    inputs = bundle.metadata.get("network_data_format", {}).get("inputs", {})
    image = inputs.get(_IMAGE, {}) if isinstance(inputs, dict) else {}
    channels = image.get("num_channels") if isinstance(image, dict) else None
    return channels if isinstance(channels, int) else None
