"""MM-WHS 2017: the challenge's volumes, or the slices that PnP-AdaNet made of them and SIFA and others train on."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np

from medkd.data.datalists import Case
from medkd.data.tf_slices import read_tf_slice
from medkd.data.volumes import write_image, write_segmentation
from medkd.errors import InputError

logger = logging.getLogger(__name__)

SLICE_LABELS = {
    0: "background",
    1: "left ventricular myocardium",
    2: "left atrium",
    3: "left ventricle",
    4: "ascending aorta",
    5: "structure 5, which the release does not name and its authors do not score",
}
CONVERTED = "medkd_slices"
_STACK = 600  # slices that the release made of one volume
_VOLUME = re.compile(r"((ct|mr)_(?:train|test)_\d{4})_image\.nii(?:\.gz)?")
_SLICES = {  # PnP-AdaNet's folders and those of SIFA's repository
    **{f"{kind}_{part}_tfs": (kind, part) for kind in ("ct", "mr") for part in ("train", "val")},
    **{
        f"{part}_{kind}": (kind, short)
        for kind in ("ct", "mr")
        for part, short in (("training", "train"), ("validation", "val"))
    },
}


def mm_whs_volumes(root: Path) -> dict[str, list[Case]]:
    """The volumes wherever below root the archives left them; those without a label beside them are unlabeled.

    Args:
        root: what paths are relative to.

    Returns:
        ``training`` and ``unlabeled`` cases with ``domain`` ``CT`` or ``MR``; empty where there are no such files.

    Raises:
        InputError: a training volume without its label.
    """
    found: dict[str, list[Case]] = {"training": [], "unlabeled": []}
    for path in sorted(root.rglob("*_image.nii*")):
        match = _VOLUME.fullmatch(path.name)
        if match is None:
            continue
        label = path.with_name(path.name.replace("_image.nii", "_label.nii"))
        has_label = label.is_file()
        if not has_label and "_train_" in path.name:
            raise InputError(path, "has no label beside it", "unpack the challenge's archive again")
        case = Case(
            image=path.relative_to(root).as_posix(),
            label=label.relative_to(root).as_posix() if has_label else None,
            patient=match[1],
            domain=match[2].upper(),
        )
        found["training" if has_label else "unlabeled"].append(case)
    return found if any(found.values()) else {}


def mm_whs_slices(root: Path) -> dict[str, list[Case]]:
    """PnP-AdaNet's slices, joined to NIfTI stacks of up to 600 in ``medkd_slices/`` (made once, then kept).

    The records say neither from whom a slice is nor how large its pixels are. So all slices of one folder count as one
    patient, which keeps the release's split by patient and allows no other, and the pixel size in the stacks, 1 mm, is
    made up: scores in mm mean nothing here.

    Args:
        root: the folder with ``ct_train_tfs`` and so on, or with ``training_ct`` and so on.

    Returns:
        ``training`` and ``validation`` cases with ``domain`` ``CT`` or ``MR``; empty where there are no such folders,
        or where the challenge's volumes, which say more, lie there too.

    Raises:
        InputError: a record that cannot be read; a folder that cannot be written.
    """
    found: dict[str, list[Case]] = {"training": [], "validation": []}
    if next(root.rglob("??_train_????_image.nii*"), None) is not None:
        return {}
    for folder in sorted(path for path in root.rglob("*") if path.name in _SLICES and path.is_dir()):
        kind, part = _SLICES[folder.name]
        records = sorted(folder.glob("*.tfrecords"), key=lambda path: (_last_number(path.name), path.name))
        for start in range(0, len(records), _STACK):
            name = f"{kind}_{part}_{start:05}"
            image, label = _stack(root / CONVERTED, name, records[start : start + _STACK])
            case = Case(
                image=image.relative_to(root).as_posix(),
                label=label.relative_to(root).as_posix(),
                patient=f"all of {kind}_{part}",
                domain=kind.upper(),
            )
            found["training" if part == "train" else "validation"].append(case)
    return found if any(found.values()) else {}


def _stack(folder: Path, name: str, records: list[Path]) -> tuple[Path, Path]:
    image, label = folder / f"{name}.nii", folder / f"{name}_label.nii.gz"
    if label.is_file() and image.is_file():
        logger.info("%s is kept", image)
        return image, label
    slices = [read_tf_slice(record) for record in records]
    try:
        folder.mkdir(exist_ok=True)
        write_image(image, np.stack([pixels.T for pixels, _ in slices], axis=2), np.eye(4))
        write_segmentation(label, np.stack([labels.T for _, labels in slices], axis=2), np.eye(4))
    except OSError as error:
        raise InputError(
            folder, f"cannot be written ({error.strerror})", "copy the dataset where you may write"
        ) from None
    logger.info("%d slices joined to %s", len(records), image)
    return image, label


def _last_number(name: str) -> int:
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else -1
