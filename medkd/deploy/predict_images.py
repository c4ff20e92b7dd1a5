"""From photographs and tiles to class probabilities through a bundle's own transforms."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data.image_reader import PILReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms.io.array import LoadImage
from monai.transforms.io.dictionary import LoadImaged

from medkd.data.tile_images import read_tile_image
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.metadata import classifies
from medkd.deploy.trust import read_config
from medkd.errors import ConfigError, InputError, MedkdError

Probabilities = npt.NDArray[np.float64]
_IMAGE, _PRED = "image", "pred"
_SUM_TOLERANCE = 1e-3
BATCH = 16


def bundle_classifies(path: str | Path) -> bool:
    """Whether a bundle or run folder's metadata says that it classifies images; nothing of it is built or loaded."""
    for file in (Path(path, "configs", "metadata.json"), Path(path, "bundle", "configs", "metadata.json")):
        if file.is_file():
            return classifies(read_config(file))
    return False


def require_classifier(bundle: LoadedBundle) -> dict[int, str]:
    """The classes of a bundle that classifies images, from 0 without gaps.

    Raises:
        ConfigError: it does not classify, or its metadata names no classes.
    """
    if not classifies(bundle.metadata):
        raise ConfigError(bundle.path, "does not classify images", "use a bundle whose task is classification")
    names = bundle.labels
    if len(names) < 2 or sorted(names) != list(range(len(names))):
        where = bundle.path / "configs" / "metadata.json"
        raise ConfigError(where, f"names the classes {names}", 'give "channel_def" a name for 0, 1, …')
    return names


def classify_images(
    bundle: LoadedBundle, paths: Sequence[str | Path], *, batch_size: int = BATCH
) -> Iterator[Probabilities | Exception]:
    """Class probabilities of image files, in their order; a bad file gives its error and never stops the others.

    Every file goes through one door (:func:`medkd.data.tile_images.read_tile_image`: RGB, 8 bits, transparency on
    white), then through the bundle's preprocessing, network and postprocessing, in float32. Images that come out of the
    preprocessing in another size than the metadata states are refused: the network was not trained on them.

    Args:
        bundle: a loaded bundle that classifies.
        paths: PNG, JPEG, TIFF and BMP files.
        batch_size: images computed together where they have one size; results do not depend on it (within 1e-5).

    Yields:
        (K,) probabilities, or why there are none.

    Raises:
        ConfigError: the bundle does not classify, or does not end in probabilities.
    """
    count = len(require_classifier(bundle))
    loader = _Loader(bundle)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), batch_size):
            files = [Path(path) for path in paths[start : start + batch_size]]
            pixels = list(pool.map(_read, files))
            items = [
                read if isinstance(read, Exception) else loader.prepare(read, file)
                for read, file in zip(pixels, files, strict=True)
            ]
            yield from _classify(bundle, items, files, count)


class _Loader:
    """Pixels in the layout that the bundle's own reader hands on."""

    def __init__(self, bundle: LoadedBundle) -> None:
        self.bundle = bundle
        self._transposes = _reads_columns_first(bundle.parser.get_parsed_content("preprocessing"))
        inputs = bundle.metadata.get("network_data_format", {}).get("inputs", {}).get(_IMAGE, {})
        self._shape = list(inputs.get("spatial_shape", [])) if isinstance(inputs, dict) else []
        self._channels = inputs.get("num_channels") if isinstance(inputs, dict) else None

    def prepare(self, pixels: npt.NDArray[np.uint8], path: Path) -> dict[str, Any] | Exception:
        """The item after the bundle's preprocessing."""
        array = np.ascontiguousarray(pixels.transpose(1, 0, 2) if self._transposes else pixels, dtype=np.float32)
        if self.bundle.adds_channel:
            array = np.ascontiguousarray(array.transpose(2, 0, 1))
        meta = {
            "filename_or_obj": str(path),
            "original_channel_dim": 0 if self.bundle.adds_channel else -1,
            "spatial_shape": np.asarray(pixels.shape[:2]),
        }
        try:
            item = dict(self.bundle.preprocessing({_IMAGE: MetaTensor(torch.from_numpy(array), meta=meta)}))
            self._require_fit(torch.as_tensor(item[_IMAGE]), path)
        except (MedkdError, MemoryError, torch.OutOfMemoryError) as error:
            return error
        except Exception as error:
            cause = error.__cause__ or error
            lines = str(cause).splitlines() or [type(cause).__name__]
            problem = f"preprocessing failed on {pixels.shape[1]} x {pixels.shape[0]} px ({lines[0]})"
            return InputError(path, problem, "check that the image is what the bundle expects")
        return item

    def _require_fit(self, image: torch.Tensor, path: Path) -> None:
        name = self.bundle.name
        if not torch.isfinite(image).all():
            raise InputError(path, "is not finite after preprocessing", "check the image")
        if isinstance(self._channels, int) and image.shape[0] != self._channels:
            problem = f"has {image.shape[0]} channels after preprocessing, {name} expects {self._channels}"
            raise InputError(path, problem, "use another model")
        found = tuple(image.shape[1:])
        if all(isinstance(side, int) for side in self._shape) and self._shape and found != tuple(self._shape):
            wanted, is_ = (" x ".join(str(side) for side in reversed(shape)) for shape in (self._shape, found))
            remedy = "cut or resize the image to that, or train a bundle whose normalization resizes (Resized)"
            raise InputError(path, f"is {is_} px after preprocessing, {name} was trained on {wanted} px", remedy)


def _read(path: Path) -> npt.NDArray[np.uint8] | Exception:
    try:
        return read_tile_image(path)
    except (MedkdError, OSError, MemoryError) as error:
        return error


@torch.inference_mode()
def _classify(
    bundle: LoadedBundle, items: Sequence[dict[str, Any] | Exception], files: Sequence[Path], count: int
) -> list[Probabilities | Exception]:
    results: list[Probabilities | Exception] = [
        item if isinstance(item, Exception) else RuntimeError("not classified") for item in items
    ]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, item in enumerate(items):
        if not isinstance(item, Exception):
            by_shape.setdefault(tuple(item[_IMAGE].shape), []).append(place)
    for places in by_shape.values():
        batch = torch.stack([torch.as_tensor(_item(items[place])[_IMAGE]).float() for place in places])
        if isinstance(batch, MetaTensor):
            batch = batch.as_tensor()
        try:
            output = bundle.inferer(inputs=batch.to(bundle.device), network=bundle.network)
        except (MemoryError, torch.OutOfMemoryError) as error:
            for place in places:
                results[place] = error
            continue
        if not torch.is_tensor(output) or tuple(output.shape) != (len(places), count):
            shape = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
            problem = f"its network gives {shape} for {len(places)} images and {count} classes"
            raise ConfigError(bundle.path, problem, f"it must give {(len(places), count)} logits")
        for place, logits in zip(places, output, strict=True):
            results[place] = _probabilities(bundle, _item(items[place]), logits, files[place])
    return results


def _item(item: dict[str, Any] | Exception) -> dict[str, Any]:
    assert not isinstance(item, Exception)
    return item


def _probabilities(
    bundle: LoadedBundle, item: dict[str, Any], logits: torch.Tensor, path: Path
) -> Probabilities | Exception:
    if not torch.isfinite(logits).all():
        return InputError(path, f"{bundle.name} predicts values that are not finite", "check the image")
    values = torch.as_tensor(bundle.postprocessing({**item, _PRED: logits})[_PRED])
    found: Probabilities = np.asarray(values.float().cpu(), dtype=np.float64)
    if found.shape != tuple(logits.shape) or (found < 0).any() or abs(found.sum() - 1) > _SUM_TOLERANCE:
        where = f"{bundle.path}: postprocessing"
        raise ConfigError(where, "does not give class probabilities that sum to 1", "end it in a softmax")
    return found / found.sum()


def _reads_columns_first(preprocessing: Any) -> bool:
    """Whether the bundle's reader hands on (W, H), as MONAI's PILReader does unless told otherwise."""
    for step in getattr(preprocessing, "transforms", preprocessing) or ():
        if isinstance(step, LoadImage | LoadImaged):
            readers = getattr(getattr(step, "_loader", step), "readers", [])
            return any(isinstance(reader, PILReader) and reader.reverse_indexing for reader in readers)
        if hasattr(step, "transforms") and _reads_columns_first(step):
            return True
    return False
