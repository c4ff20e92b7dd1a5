"""A small cohort to learn and test with: virtual patients made from one real MRI.

What is real: the T1-weighted image and the gray- and white-matter maps of the MNI152 template (ICBM 152 nonlinear
symmetric 2009a, 1 mm, the average of the MRI of 152 adults), as the nilearn package ships them. What is simulated:
that there are several patients. Each virtual patient is that one brain, smoothly deformed, with another contrast,
bias field, slice thickness and noise. No result on this cohort says anything about patients.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medkd.data.atomic import atomic_write
from medkd.errors import InputError

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Axes = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

LABELS: Mapping[int, str] = {0: "background", 1: "gray matter", 2: "white matter", 3: "cerebrospinal fluid"}
GRID_SHAPE = (96, 112, 20)
"""Voxels of every volume along X, Y, Z."""
SPACING_MM = (2.0, 2.0, 4.0)
"""In-plane spacing, and the distance of the slices, which is also their thickness."""
FIRST_VOXEL_MM = (-95.0, -129.0, -23.0)
"""Center of voxel (0, 0, 0) in MNI space, RAS: the slab runs from the midbrain to above the ventricles."""

_SECTIONS = ("training", "unlabeled", "validation", "test")
_PATIENTS_PER_SECTION = 1000  # patient 4003 is the fourth of `test` however many the other sections have
_CENTER_MM = np.array([0.0, -18.0, 15.0])  # what rotation and scaling leave in place
_SUBSLICES = 2  # positions averaged over the thickness of a slice
_TEMPLATE_BLUR_VOXELS = 0.6  # so that 2 mm samples of the 1 mm template do not alias
_SURFACE_VOXELS = 2  # depth of the brain's surface in which nothing is called fluid
_COARSE_MM, _FINE_MM, _BIAS_MM = 48.0, 20.0, 80.0  # distances of spline control points
_FINE_SHARE = 0.45  # amplitude of the fine deformation over that of the coarse one
_SMALLEST_JACOBIAN = 0.15
_SPLINE_SD = (151 / 315) ** 1.5  # of a 3-D cubic B-spline with standard normal coefficients
# What the template shows where its maps are nearly pure (0..1), and the mean intensity given to a virtual patient.
_TEMPLATE_INTENSITY = {"csf": 0.31, "gray": 0.65, "white": 0.86}
_MEAN_INTENSITY = {"csf": 0.35, "gray": 0.72, "white": 1.0}
# T2 weighting turns the order round: fluid is brightest. Beyond white matter: what is brighter than it in T1, fat say.
_MEAN_INTENSITY_T2 = {"csf": 1.0, "gray": 0.62, "white": 0.42}

SOURCE = """\
Template: ICBM 152 nonlinear symmetric 2009a, T1 with gray- and white-matter maps, 1 mm, skull-stripped; the files
mni_icbm152_{t1,gm,wm}_tal_nlin_sym_09a_converted.nii.gz of the nilearn package (nilearn itself: BSD-3-Clause).
Licence: nilearn's own description of the template says "License: unknown". Other distributors of the ICBM 152 atlases
quote this notice of the authors, which asks to appear in all copies:
  Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
  University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
  without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
  University make no representations about the suitability of this software for any purpose. It is provided "as is"
  without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
  loss, or injury to subjects or patients resulting from the use or misuse of this software package.
Cite: Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54(1):313-327, 2011,
doi:10.1016/j.neuroimage.2010.07.033; Fonov et al., Unbiased nonlinear average age-appropriate brain templates from
birth to adulthood, NeuroImage 47(S1):S102, 2009, doi:10.1016/S1053-8119(09)70884-5."""


@dataclass(frozen=True)
class VirtualPatient:
    """One virtual patient.

    Attributes:
        image: (X, Y, Z) int16, T1-weighted, arbitrary units as MRI has them, 0 or more.
        label: (X, Y, Z) uint8, the values of ``LABELS``.
        affine: (4, 4) voxel to MNI RAS, mm.
        smallest_jacobian: of the map from this patient to the template; above 0 where nothing folds.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]
    smallest_jacobian: float


def demo_mri(
    out: str | Path,
    *,
    labeled: int = 4,
    unlabeled: int = 28,
    validation: int = 2,
    test: int = 10,
    seed: int = 0,
    warp_mm: float = 4.0,
    contrast: float = 0.15,
    bias: float = 0.5,
    noise: float = 0.03,
    workers: int = 2,
) -> Path:
    """Write a cohort of virtual patients made from the real MNI152 MRI, and its datalist.

    Real: the T1-weighted MNI152 template and its gray- and white-matter maps (see ``SOURCE``). Simulated: everything
    that tells one patient from another. Per patient the template and its maps are moved by one random smooth
    deformation (scaling, rotation, two scales of cubic B-splines; shrunk until its Jacobian is positive everywhere),
    averaged over 4 mm slices, then the image gets a random monotone change of contrast, a smooth multiplicative bias
    field and Rician noise. The label is the largest of the gray-matter map, the white-matter map, the rest of the
    brain 2 mm or more below its surface (called cerebrospinal fluid) and everything else, all deformed with the
    image. It is therefore exact, unlike a radiologist's.

    A patient depends on ``seed`` and its own number only, so cohorts of one seed that differ in size share their
    patients, and the test patients stay the same whatever the number of labeled ones. Two seeds share none.

    The default difficulty was chosen so that a network of millions of parameters trained on the labeled patients is
    clearly better (0.05 Dice or more) than one of ten thousand trained on the same. Only these supervised arms were
    looked at, on the patients of seeds 9000 to 9005: keep those seeds out of any comparison. In single runs a stronger
    bias field widened the difference and more noise narrowed it.

    Args:
        out: folder to write ``images/``, ``labels/``, ``README.md`` and ``datalist.json`` to; made if absent.
        labeled: patients in ``training``.
        unlabeled: patients without a label; none is written for them.
        validation: patients in ``validation``.
        test: patients in ``test``.
        seed: 0 or more; another seed gives other patients.
        warp_mm: standard deviation of the coarse deformation along each axis, mm.
        contrast: largest change of gray-matter and fluid intensity, as a share of that of white matter, up to 0.25.
        bias: standard deviation of the logarithm of the bias field.
        noise: mean standard deviation of the noise, as a share of the intensity of white matter.
        workers: threads; the result does not depend on them.

    Returns:
        The path of ``datalist.json``, which is written last.

    Raises:
        InputError: for a number of patients, seed or amplitude out of range, or when nilearn's template is missing.
    """
    counts = dict(zip(_SECTIONS, (labeled, unlabeled, validation, test), strict=True))
    settings = {"seed": seed, "warp_mm": warp_mm, "contrast": contrast, "bias": bias, "noise": noise}
    refuse_out_of_range(counts, settings)
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "labels").mkdir(exist_ok=True)
    path = out / "datalist.json"
    path.unlink(missing_ok=True)  # a datalist that is there stands for a cohort that is complete
    _template()  # once, before the threads ask for it

    def write(job: tuple[str, int]) -> dict[str, str]:
        section, number = job
        patient = virtual_patient(seed, number, warp_mm=warp_mm, contrast=contrast, bias=bias, noise=noise)
        return write_patient(out, number, patient, with_label=section != "unlabeled")

    jobs = [(section, number) for section in _SECTIONS for number in patient_numbers(section, counts[section])]
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        entries = list(pool.map(write, jobs))
    description = _describe(counts, settings)
    datalist: dict[str, Any] = {
        "name": "demo_mri",
        "modality": "MR",
        "description": description,
        "labels": {str(value): name for value, name in LABELS.items()},
    }
    for section in _SECTIONS:
        datalist[section] = [entry for (where, _), entry in zip(jobs, entries, strict=True) if where == section]
    with atomic_write(out / "README.md") as file:
        file.write(f"# demo_mri: virtual patients from the MNI152 template\n\n{description}\n")
    with atomic_write(path) as file:
        json.dump(datalist, file, indent=1)
    logger.info("wrote %d virtual patients to %s", len(jobs), out)
    return path


def patient_numbers(section: str, count: int) -> range:
    """The numbers of the first ``count`` patients of a section of the datalist."""
    first = _PATIENTS_PER_SECTION * (1 + _SECTIONS.index(section))
    return range(first, first + count)


def virtual_patient(
    seed: int,
    number: int,
    *,
    warp_mm: float,
    contrast: float,
    bias: float,
    noise: float,
    weighting: Literal["t1", "t2"] = "t1",
) -> VirtualPatient:
    """One virtual patient, the same for the same arguments in any order, thread and process.

    Args:
        seed: of the cohort.
        number: of the patient.
        warp_mm: see ``demo_mri``, as for the others.
        contrast: see ``demo_mri``.
        bias: see ``demo_mri``.
        noise: see ``demo_mri``.
        weighting: ``"t2"`` shows the same anatomy with fluid bright and white matter dark.
    """
    # One source of random numbers per cause, so that a change of noise leaves the anatomy as it is.
    anatomy, appearance, acquisition = (
        np.random.default_rng(sequence) for sequence in np.random.SeedSequence([seed, number]).spawn(3)
    )
    axes_mm = _sample_positions()
    coordinates_mm, smallest_jacobian = _deformation(axes_mm, warp_mm, anatomy)
    template = _template()
    voxels = coordinates_mm - template.first_voxel_mm[:, None, None, None]
    t1, gray, white, fluid = (
        _average_subslices(ndimage.map_coordinates(volume, voxels, order=1)) for volume in template.maps
    )
    label = np.argmax(np.stack([1 - gray - white - fluid, gray, white, fluid]), axis=0).astype(np.uint8)
    change = _change_contrast if weighting == "t1" else _t2_contrast
    image = change(t1, contrast, appearance)
    slice_axes = (axes_mm[0], axes_mm[1], axes_mm[2].reshape(-1, _SUBSLICES).mean(axis=1))
    image *= np.exp(bias * _smooth_field(slice_axes, _BIAS_MM, 1, acquisition)[0])
    image = _add_rician_noise(image, noise * acquisition.uniform(0.6, 1.4), acquisition)
    gain = acquisition.uniform(400.0, 1200.0)  # MRI has no unit
    return VirtualPatient(np.rint(gain * image).astype(np.int16), label, _affine(), smallest_jacobian)


@dataclass(frozen=True)
class _Template:
    """The real data on the template's 1 mm grid: T1, gray matter, white matter and fluid, each (X, Y, Z) in 0..1."""

    maps: tuple[Floats, Floats, Floats, Floats]
    first_voxel_mm: NDArray[np.float64]


@lru_cache(maxsize=1)
def _template() -> _Template:
    images = [_read_template(kind) for kind in ("t1", "gm", "wm")]
    t1, gray, white = (np.asanyarray(image.dataobj).astype(np.float32) / 255 for image in images)
    # The template is skull-stripped (0 outside the brain) and comes without a fluid map. The remainder at the very
    # surface is left out: there it is the blur of an average of many heads more than fluid.
    inside = ndimage.binary_erosion(t1 > 0, iterations=_SURFACE_VOXELS)
    fluid = np.where(inside, np.clip(1 - gray - white, 0, 1), 0).astype(np.float32)
    blurred = [ndimage.gaussian_filter(array, _TEMPLATE_BLUR_VOXELS) for array in (t1, gray, white, fluid)]
    return _Template((blurred[0], blurred[1], blurred[2], blurred[3]), images[0].affine[:3, 3])


def _read_template(kind: str) -> Any:
    """A file of nilearn's template, found without importing nilearn, which takes seconds."""
    name = f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    spec = find_spec("nilearn")
    path = Path(spec.origin).parent / "datasets" / "data" / name if spec and spec.origin else Path(name)
    if not path.is_file():
        raise InputError(path, "the MNI152 template is not there", "run `pip install --force-reinstall nilearn`")
    image: Any = nib.load(path)
    if not np.allclose(image.affine[:3, :3], np.eye(3)):
        raise InputError(
            path, "this is not the 1 mm RAS template the demo was made for", "install nilearn 0.11 to 0.14"
        )
    return image


def _affine() -> NDArray[np.float64]:
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = FIRST_VOXEL_MM
    return affine


def _sample_positions() -> Axes:
    """Where the template is sampled, mm along each axis: voxel centers in-plane, several positions per slice in Z."""
    x, y, z = (
        np.asarray(FIRST_VOXEL_MM[axis] + SPACING_MM[axis] * np.arange(GRID_SHAPE[axis]), dtype=np.float64)
        for axis in range(3)
    )
    within_slice = (np.arange(_SUBSLICES) + 0.5) / _SUBSLICES - 0.5
    return x, y, (z[:, None] + SPACING_MM[2] * within_slice).ravel()


def _average_subslices(volume: Floats) -> Floats:
    return volume.reshape(*volume.shape[:2], -1, _SUBSLICES).mean(axis=3)


def _deformation(axes_mm: Axes, warp_mm: float, random: np.random.Generator) -> tuple[Floats, float]:
    """Template position of every sample, (3, X, Y, Z) in mm, and the smallest Jacobian determinant of that map."""
    grid = np.stack(np.meshgrid(*axes_mm, indexing="ij")).astype(np.float32)
    linear = _rotation(np.radians(random.normal(0.0, 4.0, 3))) @ np.diag(1 + random.normal(0.0, 0.04, 3))
    shift = _CENTER_MM + random.normal(0.0, 2.0, 3) - linear @ _CENTER_MM
    base = np.einsum("ij,jxyz->ixyz", linear.astype(np.float32), grid) + shift.astype(np.float32)[:, None, None, None]
    displacement = warp_mm * _smooth_field(axes_mm, _COARSE_MM, 3, random)
    displacement += warp_mm * _FINE_SHARE * _smooth_field(axes_mm, _FINE_MM, 3, random)
    while True:
        moved = base + displacement
        smallest = float(_jacobian(moved, axes_mm).min())
        if smallest >= _SMALLEST_JACOBIAN:
            return moved, smallest
        displacement *= 0.85  # ends: without displacement the determinant is that of a rotation and mild scaling


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) rotation about X, then Y, then Z; radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _jacobian(positions: Floats, axes_mm: Axes) -> Floats:
    """Determinant of the derivative of ``positions`` (3, X, Y, Z) at every sample, by finite differences."""
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (np.gradient(component, *axes_mm) for component in positions)
    return ax * (by * cz - bz * cy) - ay * (bx * cz - bz * cx) + az * (bx * cy - by * cx)


def _smooth_field(axes_mm: Axes, control_mm: float, channels: int, random: np.random.Generator) -> Floats:
    """Cubic B-splines with random coefficients: (channels, X, Y, Z), mean 0, standard deviation 1."""
    bases = [_spline_basis(axis, control_mm) for axis in axes_mm]
    coefficients = random.standard_normal((channels, *(basis.shape[1] for basis in bases)), dtype=np.float32)
    # Without `optimize`, so that no BLAS with a varying number of threads can change the last digit.
    field = np.einsum("cijk,xi->cxjk", coefficients, bases[0])
    field = np.einsum("cxjk,yj->cxyk", field, bases[1])
    field = np.einsum("cxyk,zk->cxyz", field, bases[2])
    return np.asarray(field / _SPLINE_SD, dtype=np.float32)


def _spline_basis(positions_mm: NDArray[np.float64], control_mm: float) -> Floats:
    """Uniform cubic B-splines at the positions: (positions, control points), each row sums to 1."""
    first = np.floor(positions_mm[0] / control_mm) - 1
    last = np.floor(positions_mm[-1] / control_mm) + 2
    distance = np.abs(positions_mm[:, None] / control_mm - np.arange(first, last + 1)[None, :])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _change_contrast(t1: Floats, contrast: float, random: np.random.Generator) -> Floats:
    """Map the template's intensities by a random increasing function to a patient's; white matter becomes 1."""
    gray = _MEAN_INTENSITY["gray"] + contrast * random.uniform(-1.0, 1.0)
    fluid = min(_MEAN_INTENSITY["csf"] + contrast * random.uniform(-1.0, 1.0), gray - 0.1)
    known = [0.0, *_TEMPLATE_INTENSITY.values(), 1.0]
    wanted = [0.0, max(fluid, 0.02), gray, _MEAN_INTENSITY["white"], 1.15]
    return np.interp(t1, known, wanted).astype(np.float32)


def _t2_contrast(t1: Floats, contrast: float, random: np.random.Generator) -> Floats:
    """Map the template's T1 intensities to those of a patient's T2-weighted image; fluid becomes 1."""
    gray = _MEAN_INTENSITY_T2["gray"] + contrast * random.uniform(-1.0, 1.0) / 2
    white = min(_MEAN_INTENSITY_T2["white"] + contrast * random.uniform(-1.0, 1.0) / 2, gray - 0.05)
    known = [0.0, *_TEMPLATE_INTENSITY.values(), 1.0]
    wanted = [0.0, _MEAN_INTENSITY_T2["csf"], gray, white, 0.7 * white]
    return np.interp(t1, known, wanted).astype(np.float32)


def _add_rician_noise(image: Floats, sigma: float, random: np.random.Generator) -> Floats:
    """Magnitude of a complex signal with Gaussian noise of standard deviation ``sigma`` in both channels."""
    real, imaginary = sigma * random.standard_normal((2, *image.shape), dtype=np.float32)
    return np.hypot(image + real, imaginary)


def refuse_out_of_range(counts: Mapping[str, int], settings: Mapping[str, float]) -> None:
    """Raise InputError naming a number of patients or a setting that no cohort can have."""
    for section, count in counts.items():
        lowest = 1 if section == "training" else 0
        if not lowest <= count < _PATIENTS_PER_SECTION:
            remedy = f"ask for {lowest} to {_PATIENTS_PER_SECTION - 1}"
            raise InputError(f"demo cohort, {section}", f"{count} patients", remedy)
    highest = {"contrast": 0.25, "bias": 1.0, "noise": 1.0}  # beyond: gray as bright as white, int16 overflow, no image
    for name, value in settings.items():
        if not (np.isfinite(value) and 0 <= value <= highest.get(name, np.inf)):
            limit = f"a number from 0 to {highest[name]:g}" if name in highest else "0 or more"
            raise InputError(f"demo cohort, {name}", f"{value} is out of range", f"give {limit}")


def write_patient(out: Path, number: int, patient: VirtualPatient, *, with_label: bool) -> dict[str, str]:
    """Write a patient's files; its entry of the datalist."""
    name = f"patient_{number}"
    entry = {"image": f"images/{name}.nii.gz", "patient": name}
    _write_nifti(out / entry["image"], patient.image, patient.affine)
    if with_label:
        entry["label"] = f"labels/{name}.nii.gz"
        _write_nifti(out / entry["label"], patient.label, patient.affine)
    return entry


def _write_nifti(path: Path, array: NDArray[Any], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="mni")
    image.set_qform(affine, code="mni")
    # Level 1: noise does not compress. No time stamp: the same patient is the same file.
    with atomic_write(path, "wb") as file:
        file.write(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _describe(counts: Mapping[str, int], settings: Mapping[str, float]) -> str:
    """What is real, what is simulated, and where it comes from."""
    sizes = ", ".join(f"{count} {section}" for section, count in counts.items())
    values = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    return (
        "Real: the T1-weighted MNI152 template, an average of the MRI of 152 adults, and its gray- and white-matter "
        "maps.\nSimulated: the patients. Each is that one brain under a random smooth deformation, with random "
        "contrast, bias field, 4 mm slices and Rician noise. Labels are the largest of the maps deformed along with "
        "it; label 3 is what is neither gray nor white 2 mm or more below the brain's surface. Results on this "
        f"cohort show how a method behaves; they say nothing about "
        f"patients.\n\nPatients: {sizes}. Settings: {values}.\n\n{SOURCE}"
    )
