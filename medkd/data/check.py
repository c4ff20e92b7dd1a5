"""What is wrong with a datalist's files, found before a run spends hours on them.

Every image and label map is opened through the same door as in training (:mod:`medkd.data.volumes`), once; what only
shows across files is looked for afterwards: one scan under two patients, a patient on both sides of a split, a voxel
size or orientation unlike all others.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from nibabel.orientations import axcodes2ornt

from medkd.data.check_images import ImageLook, SeenImage, class_findings, image_findings, look_at
from medkd.data.findings import Finding
from medkd.data.tile_images import is_tile_image, read_tile_image, read_tile_mask
from medkd.data.volumes import Volume, check_pair, read_frames, read_label, read_volume, split_frame
from medkd.errors import InputError

if TYPE_CHECKING:
    from medkd.data.datalists import Datalist

Section = Literal["training", "unlabeled", "validation", "test"]
_SIDE_OF: dict[Section, str] = {
    "training": "training",
    "unlabeled": "training",
    "validation": "validation",
    "test": "test",
}
_UNUSUAL_RATIO = 2.0  # of a voxel size to the usual one
_FEW = 0.2  # a share of files up to which the odd ones are named one by one
_FEWEST_TO_COMPARE = 3


@dataclass
class _Seen:
    """What is kept of a case after its files were read."""

    item: dict[str, Any]
    section: Section
    findings: list[Finding] = field(default_factory=list)
    digest: bytes | None = None
    spacing_mm: tuple[float, ...] | None = None  # along right, anterior, superior
    orientation: str | None = None
    labels: frozenset[int] = frozenset()
    fold: int | None = None
    look: ImageLook | None = None

    def add(self, severity: Literal["error", "warning"], file: str, problem: str, remedy: str) -> None:
        self.findings.append(Finding(severity, self.item["case"], file, problem, remedy))


def check_datalist(datalist: Datalist, *, workers: int | None = None) -> list[Finding]:
    """Read every file of a datalist and report what is wrong.

    Errors: a file that :func:`~medkd.data.volumes.read_volume` or :func:`~medkd.data.volumes.read_label` refuses
    (unreadable, damaged, NaN or infinite, unknown label values, …), a label map that does not lie on its image, the
    same voxels under two patients, a patient on both sides of a split. Warnings: empty label maps, labels that no
    training case shows, the same voxels twice under one patient, voxel sizes or orientations unlike the others.
    Of photographs and tiles also (:mod:`medkd.data.check_images`): near-duplicates on two sides of the split, one
    picture with two classes, classes with fewer than two training images (errors); mixed sizes and modes (warnings).

    Args:
        datalist: the cases.
        workers: threads that read files; the number of processors, up to 4, if left out.

    Returns:
        findings in the order of the datalist, those across files last; empty when all is well.
    """
    groups = _by_image(datalist)
    labels = frozenset(datalist.label_names)
    with ThreadPoolExecutor(max_workers=workers or min(4, os.cpu_count() or 1)) as pool:
        seen = [case for cases in pool.map(lambda group: _read_group(group, labels), groups) for case in cases]
    findings = [finding for case in seen for finding in case.findings]
    return [
        *findings,
        *_leaks(seen),
        *_duplicates(seen),
        *_unusual_spacings(seen),
        *_unusual_orientations(seen),
        *image_findings(_images(seen)),
        *(_classes(datalist, seen) if datalist.classifies else _unseen_labels(datalist, seen)),
    ]


def require_trainable(datalist: Datalist, *, workers: int | None = None) -> None:
    """Refuse a datalist on whose files a training would fail or lie.

    Raises:
        InputError: the first error of :func:`check_datalist`, and how many there are.
    """
    errors = [finding for finding in check_datalist(datalist, workers=workers) if finding.severity == "error"]
    if errors:
        first = errors[0]
        others = f" ({len(errors) - 1} more: run `medkd data check`)" if len(errors) > 1 else ""
        raise InputError(first.file, first.problem, first.remedy + others)


def _by_image(datalist: Datalist) -> list[list[_Seen]]:
    """Cases that share an image file, so that a 4-D file is read once for all its frames."""
    groups: dict[str, list[_Seen]] = {}
    for section in _SIDE_OF:
        items = datalist.section(section, for_training=False)
        for item, case in zip(items, datalist.cases(section), strict=True):
            path = str(split_frame(item["image"])[0])
            groups.setdefault(path, []).append(_Seen(item, section, fold=case.fold))
    return list(groups.values())


def _read_group(group: list[_Seen], labels: frozenset[int]) -> list[_Seen]:
    path = str(split_frame(group[0].item["image"])[0])
    if isinstance(group[0].item.get("label"), int) or is_tile_image(path):
        return _read_tile(group)
    frames = [case.item.get("frame") for case in group]
    images: Sequence[Volume | None]
    try:
        images = _read_images(path, frames)
    except InputError as error:
        group[0].add("error", error.where, error.problem, error.remedy)
        images = [None] * len(group)
    for case, image in zip(group, images, strict=True):
        if image is not None:
            _note_image(case, image)
        if "label" in case.item:
            _check_label(case, image, labels)
    return group


def _read_tile(group: list[_Seen]) -> list[_Seen]:
    """A photograph or tile; its label is the class of all of it, or a mask."""
    try:
        pixels = read_tile_image(group[0].item["image"])
    except InputError as error:
        group[0].add("error", error.where, error.problem, error.remedy)
        return group
    digest, look = _digest(pixels), look_at(group[0].item["image"], pixels)
    for case in group:
        case.digest, case.look = None if look.flat else digest, look
        label = case.item.get("label")
        if isinstance(label, int):
            case.labels = frozenset([label])
        elif label is not None:
            _check_mask(case, pixels.shape[:2])
    return group


def _check_mask(case: _Seen, shape: tuple[int, ...]) -> None:
    path = case.item["label"]
    try:
        mask = read_tile_mask(path)
    except InputError as error:
        case.add("error", error.where, error.problem, error.remedy)
        return
    if mask.shape != shape:
        problem = f"its size {mask.shape} is not that of its image {shape}"
        case.add("error", path, problem, "give the mask of this image")
    case.labels = frozenset(int(value) for value in np.unique(mask))


def _read_images(path: str, frames: Sequence[int | None]) -> list[Volume]:
    chosen = [frame for frame in frames if frame is not None]
    if len(frames) > 1 and len(chosen) == len(frames):
        return read_frames(path, chosen)
    return [read_volume(path, frame=frame) for frame in frames]


def _note_image(case: _Seen, image: Volume) -> None:
    case.digest = _digest(image.array)
    case.orientation = image.orientation
    order = np.argsort(axcodes2ornt(tuple(image.orientation))[:, 0])
    case.spacing_mm = tuple(image.spacing_mm[axis] for axis in order)


def _digest(array: npt.NDArray[Any]) -> bytes:
    """Equal for equal voxels, however they were stored."""
    values = np.ascontiguousarray(array.T)  # a view for Fortran order
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    digest.update(values.data)
    return digest.digest()


def _check_label(case: _Seen, image: Volume | None, labels: frozenset[int]) -> None:
    path = case.item["label"]
    try:
        label = read_label(path, labels=labels or None, frame=case.item.get("frame"))
        if image is not None:
            check_pair(image, label)
    except InputError as error:
        case.add("error", error.where, error.problem, error.remedy)
        return
    if not label.array.any():
        case.add("warning", path, "its label map is empty", "check that this is meant")
    case.labels = frozenset(value for value in labels if (label.array == value).any())


def _leaks(seen: Sequence[_Seen]) -> Iterator[Finding]:
    first: dict[str, _Seen] = {}
    for case in seen:
        known = first.setdefault(case.item["patient"], case)
        if _SIDE_OF[known.section] != _SIDE_OF[case.section]:
            problem = f"patient {case.item['patient']} is in {case.section} and in {known.section} (leakage)"
            remedy = "keep each patient on one side of the split"
            yield Finding("error", case.item["case"], case.item["image"], problem, remedy)


def _duplicates(seen: Sequence[_Seen]) -> Iterator[Finding]:
    first: dict[bytes, _Seen] = {}
    for case in seen:
        if case.digest is None:
            continue
        known = first.setdefault(case.digest, case)
        if known is case:
            continue
        mine, theirs = case.item["patient"], known.item["patient"]
        problem = f"holds the same {'voxels' if case.look is None else 'pixels'} as {known.item['image']}"
        labels = case.item.get("label"), known.item.get("label")
        if isinstance(labels[0], int) and isinstance(labels[1], int) and labels[0] != labels[1]:
            problem += f", but is of class {labels[0]} instead of {labels[1]}"
            remedy = "find out which class is right, and leave the other entry out"
            yield Finding("error", case.item["case"], case.item["image"], problem, remedy)
        elif mine != theirs:
            problem += f", but of patient {mine} instead of {theirs}"
            remedy = "find out whose scan it is and remove the other, or the split leaks"
            yield Finding("error", case.item["case"], case.item["image"], problem, remedy)
        else:
            yield Finding("warning", case.item["case"], case.item["image"], problem, "list every scan once")


def _images(seen: Sequence[_Seen]) -> list[SeenImage]:
    """The pictures, each exact one once and at its first place: :func:`_duplicates` has told of the others."""
    found: list[SeenImage] = []
    digests: set[bytes] = set()
    for case in seen:
        if case.look is None or case.digest in digests:
            continue
        if case.digest is not None:
            digests.add(case.digest)
        place = _SIDE_OF[case.section] if case.fold is None else f"fold {case.fold}"
        found.append(SeenImage(case.item["case"], case.item["image"], case.section, place, case.look))
    return found


def _classes(datalist: Datalist, seen: Sequence[_Seen]) -> Iterator[Finding]:
    labels: dict[str, list[int]] = {section: [] for section in _SIDE_OF}
    for case in seen:
        labels[case.section] += case.labels
    training = labels.pop("training")
    return class_findings(datalist.where, datalist.label_names, training, labels)


def _by_domain(seen: Iterable[_Seen]) -> Iterator[tuple[str, list[_Seen]]]:
    """Scanners and modalities may differ; what is unusual is so among its own kind."""
    domains: dict[str, list[_Seen]] = defaultdict(list)
    for case in seen:
        if case.spacing_mm is not None:
            domains[str(case.item.get("domain", ""))].append(case)
    for domain, cases in domains.items():
        if len(cases) >= _FEWEST_TO_COMPARE:
            yield (f" of domain {domain}" if domain else ""), cases


def _unusual_spacings(seen: Sequence[_Seen]) -> Iterator[Finding]:
    for domain, cases in _by_domain(seen):
        sizes = [case.spacing_mm for case in cases if case.spacing_mm is not None]
        usual = [median(axis) for axis in zip(*sizes, strict=True)]
        for case, size in zip(cases, sizes, strict=True):
            ratios = [mine / theirs for mine, theirs in zip(size, usual, strict=True)]
            if max(max(ratios), 1 / min(ratios)) > _UNUSUAL_RATIO:
                problem = f"its voxel size {_mm(size)} is far from the usual {_mm(usual)}{domain}"
                yield Finding(
                    "warning", case.item["case"], case.item["image"], problem, "check its header, or resample all alike"
                )


def _unusual_orientations(seen: Sequence[_Seen]) -> Iterator[Finding]:
    for domain, cases in _by_domain(seen):
        counts = Counter(case.orientation for case in cases)
        usual, most = counts.most_common(1)[0]
        remedy = "reorient while loading (MONAI's Orientationd), and check that left is left"
        if len(cases) - most > _FEW * len(cases):
            listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
            yield Finding("warning", "", cases[0].item["image"], f"orientations{domain} are mixed: {listed}", remedy)
            continue
        for case in cases:
            if case.orientation != usual:
                problem = f"its orientation {case.orientation} is not the usual {usual}{domain}"
                yield Finding("warning", case.item["case"], case.item["image"], problem, remedy)


def _unseen_labels(datalist: Datalist, seen: Sequence[_Seen]) -> Iterator[Finding]:
    training = [case for case in seen if case.section == "training" and "label" in case.item]
    if not training:
        return
    shown = frozenset[int]().union(*(case.labels for case in training))
    for value, name in datalist.label_names.items():
        if value != 0 and value not in shown:
            problem = f"no training case shows label {value} ({name})"
            yield Finding("warning", "", datalist.where, problem, "remove the label, or add a case that shows it")


def _mm(sizes: Iterable[float]) -> str:
    return " x ".join(f"{size:.3g}" for size in sizes) + " mm"
