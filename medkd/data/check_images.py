"""What only shows across photographs and tiles: near-duplicates on two sides of a split, classes of one image.

Two images are near-duplicates when their 64-bit difference hashes differ in at most :data:`HASH_DISTANCE` bits **and**
their 16 x 16 thumbnails by at most :data:`THUMBNAIL_RMS` gray levels (root mean square). The hash alone would not do:
of the 132,870 pairs of IDRiD's fundus photographs, 11,935 have hashes within 4 bits, and 6 are of one photograph; both
conditions together find those 6. What that catches is the same picture compressed or scaled again. It does not see
through cropping, mirroring, rotation or other colors.

Source of the hash: N. Krawetz, "Kind of like that", 2013 (dHash: is each pixel of a 9 x 8 thumbnail darker than the
next one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from medkd.data.findings import Finding

HASH_DISTANCE = 4  # bits of 64
THUMBNAIL_RMS = 4.0  # gray levels of 256
_FLAT = 8  # gray levels between the darkest and the brightest place of a picture of nothing
_SIDE = 16
_COMPARED_AT_ONCE = 4_000_000
_FEWEST_OF_A_CLASS = 2


@dataclass(frozen=True, eq=False)
class ImageLook:
    """What is kept of a picture to compare it with others.

    Attributes:
        size: (width, height) in pixels.
        mode: as the file stores it: RGB, RGBA, L, …
        difference_hash: 64 bits.
        thumbnail: (768,) int16.
        flat: whether it shows nothing to compare: one color.
    """

    size: tuple[int, int]
    mode: str
    difference_hash: np.uint64
    thumbnail: npt.NDArray[np.int16]
    flat: bool


@dataclass(frozen=True, eq=False)
class SeenImage:
    """One case with what was seen of its picture.

    Attributes:
        case: its name.
        file: its file.
        section: where the datalist has it, for messages.
        place: what it must not share with others: the side of the split, or the fold.
        look: its picture.
    """

    case: str
    file: str
    section: str
    place: str
    look: ImageLook


def look_at(path: str | Path, pixels: npt.NDArray[np.uint8]) -> ImageLook:
    """What is kept of a picture.

    Args:
        path: its file, of which the header is read again for the mode.
        pixels: (H, W, 3) RGB.
    """
    with Image.open(path) as header:
        mode = header.mode
    picture = Image.fromarray(pixels)
    gray = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    bits = (gray[:, 1:] > gray[:, :-1]).ravel()
    small = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    return ImageLook(
        size=picture.size,
        mode=mode,
        difference_hash=np.packbits(bits).view(np.uint64)[0],
        thumbnail=small.ravel(),
        flat=int(np.ptp(small, axis=(0, 1)).max()) <= _FLAT,
    )


def image_findings(images: Sequence[SeenImage]) -> list[Finding]:
    """Near-duplicates on two sides of the split (errors), mixed sizes and modes (warnings)."""
    return [*_near_duplicates(images), *_mixed(images)]


def class_findings(
    where: str, names: Mapping[int, str], training: Sequence[int], held_out: Mapping[str, Sequence[int]]
) -> Iterator[Finding]:
    """Classes without enough images.

    Args:
        where: the datalist.
        names: class → name.
        training: the classes of the training images.
        held_out: section → the classes of its images.
    """
    counts = Counter(training)
    for label, name in names.items():
        if counts[label] < _FEWEST_OF_A_CLASS and training:
            number = "no training image is" if not counts[label] else "only one training image is"
            remedy = "add images of it, keep more labels, or leave the class out of the labels"
            yield Finding("error", "", where, f"{number} of class {label} ({name})", remedy)
    for section, labels in held_out.items():
        if labels and len(set(labels)) == 1:
            problem = f"all {len(labels)} images of {section} are of class {labels[0]} ({names.get(labels[0], '?')})"
            yield Finding("warning", "", where, problem, "an AUC needs images of two classes")


def _near_duplicates(images: Sequence[SeenImage]) -> Iterator[Finding]:
    by_place: dict[str, list[SeenImage]] = {}
    for image in images:
        if not image.look.flat:
            by_place.setdefault(image.place, []).append(image)
    places = list(by_place.values())
    for number, later in enumerate(places):
        reported: set[int] = set()
        for earlier in places[:number]:
            for mine, theirs, distance in _matches(later, earlier):
                if mine in reported:
                    continue
                reported.add(mine)
                image, other = later[mine], earlier[theirs]
                problem = (
                    f"is nearly the picture {other.file} of {other.section} "
                    f"(difference hashes {distance} of 64 bits apart), but in {image.section}"
                )
                remedy = "look at both; keep one, or both on one side of the split"
                yield Finding("error", image.case, image.file, problem, remedy)


def _matches(later: Sequence[SeenImage], earlier: Sequence[SeenImage]) -> Iterator[tuple[int, int, int]]:
    """Pairs of near-duplicates: index in ``later``, index in ``earlier``, bits between their hashes."""
    hashes, others = (np.array([image.look.difference_hash for image in part]) for part in (later, earlier))
    pictures, theirs = (np.stack([image.look.thumbnail for image in part]) for part in (later, earlier))
    rows = max(1, _COMPARED_AT_ONCE // len(others))
    for start in range(0, len(hashes), rows):
        distances = np.bitwise_count(hashes[start : start + rows, None] ^ others[None])
        for first, second in _blocks(np.argwhere(distances <= HASH_DISTANCE)):
            gaps = (pictures[start + first] - theirs[second]).astype(np.float32)
            alike = np.sqrt(np.mean(gaps**2, axis=1)) <= THUMBNAIL_RMS
            for row, column in zip(first[alike], second[alike], strict=True):
                yield start + int(row), int(column), int(distances[row, column])


def _blocks(pairs: npt.NDArray[np.intp]) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    size = _COMPARED_AT_ONCE // (3 * _SIDE * _SIDE)
    for start in range(0, len(pairs), size):
        block = pairs[start : start + size]
        yield block[:, 0], block[:, 1]


def _mixed(images: Sequence[SeenImage]) -> Iterator[Finding]:
    for what, counts, remedy in (
        (
            "sizes",
            Counter(f"{image.look.size[0]} x {image.look.size[1]}" for image in images),
            "resize in the bundle's normalization (Resized), or cut all to one size",
        ),
        (
            "modes",
            Counter(image.look.mode for image in images),
            "all are read as RGB, transparency on white; check that the difference does not give the class away",
        ),
    ):
        if len(counts) > 1:
            listed = ", ".join(f"{count} {value}" for value, count in counts.most_common(5))
            more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
            yield Finding("warning", "", images[0].file, f"{what} of the images are mixed: {listed}{more}", remedy)
