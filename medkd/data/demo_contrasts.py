"""The embedded demo in two contrasts: labels in one, none in the other, no patient in both."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medkd.data.atomic import atomic_write
from medkd.data.demo import LABELS, SOURCE, patient_numbers, refuse_out_of_range, virtual_patient, write_patient

logger = logging.getLogger(__name__)

_TARGET_OFFSET = 400  # patients of the unlabeled section from this place on are seen in the second contrast


@dataclass(frozen=True)
class _Part:
    """The patients of one section in one contrast."""

    section: Literal["training", "unlabeled", "validation", "test"]
    domain: Literal["t1", "t2"]
    numbers: range


def demo_two_contrasts(
    out: str | Path,
    *,
    labeled: int = 4,
    source: int = 12,
    target: int = 16,
    validation: int = 2,
    test: int = 10,
    seed: int = 0,
    warp_mm: float = 4.0,
    contrast: float = 0.15,
    bias: float = 0.3,
    noise: float = 0.03,
    workers: int = 2,
) -> Path:
    """Write the virtual patients of ``demo_mri`` in two contrasts, and their datalist.

    Source domain ``"t1"``: the MNI152 T1-weighted MRI as ``demo_mri`` renders it. Target domain ``"t2"``: the same
    anatomy with its intensities turned round as T2 weighting does, fluid bright and white matter dark. That the
    intensities of a T2-weighted image follow from those of a T1-weighted one is a simplification: texture, noise and
    resolution are the same in both. No patient is in both domains, nor in two sections.

    Args:
        out: folder to write ``images/``, ``labels/``, ``README.md`` and ``datalist.json`` to; made if absent.
        labeled: source patients in ``training``.
        source: source patients in ``unlabeled``.
        target: target patients in ``unlabeled``. Their entries carry a label, which no method that reads
            ``Datalist.section`` sees; a target-supervised bound may take it from ``Datalist.cases``.
        validation: source patients in ``validation``: a target label never selects a model.
        test: target patients in ``test``.
        seed: 0 or more; another seed gives other patients.
        warp_mm: see ``demo_mri``.
        contrast: see ``demo_mri``.
        bias: see ``demo_mri``; lower by default, since the contrast is what tells the domains apart.
        noise: see ``demo_mri``.
        workers: threads; the result does not depend on them.

    Returns:
        The path of ``datalist.json``, which is written last.

    Raises:
        InputError: for a number of patients, seed or amplitude out of range, or when nilearn's template is missing.
    """
    settings = {"warp_mm": warp_mm, "contrast": contrast, "bias": bias, "noise": noise}
    counts = {"training": labeled, "unlabeled": max(source, target), "validation": validation, "test": test}
    refuse_out_of_range(counts, {"seed": seed, **settings})
    whole = patient_numbers("unlabeled", _TARGET_OFFSET + target)
    parts = [
        _Part("training", "t1", patient_numbers("training", labeled)),
        _Part("unlabeled", "t1", patient_numbers("unlabeled", min(source, _TARGET_OFFSET))),
        _Part("unlabeled", "t2", whole[_TARGET_OFFSET:]),
        _Part("validation", "t1", patient_numbers("validation", validation)),
        _Part("test", "t2", patient_numbers("test", test)),
    ]
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "labels").mkdir(exist_ok=True)
    path = out / "datalist.json"
    path.unlink(missing_ok=True)  # a datalist that is there stands for a cohort that is complete

    def write(job: tuple[_Part, int]) -> dict[str, str]:
        part, number = job
        patient = virtual_patient(seed, number, weighting=part.domain, **settings)
        return {**write_patient(out, number, patient, with_label=True), "domain": part.domain}

    jobs = [(part, number) for part in parts for number in part.numbers]
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        entries = list(pool.map(write, jobs))
    description = _describe(parts, settings)
    datalist: dict[str, Any] = {
        "name": "demo_two_contrasts",
        "modality": "MR",
        "description": description,
        "labels": {str(value): name for value, name in LABELS.items()},
        **{part.section: [] for part in parts},
    }
    for (part, _), entry in zip(jobs, entries, strict=True):
        datalist[part.section].append(entry)
    with atomic_write(out / "README.md") as file:
        file.write(f"# demo_two_contrasts: virtual patients from the MNI152 template\n\n{description}\n")
    with atomic_write(path) as file:
        json.dump(datalist, file, indent=1)
    logger.info("wrote %d virtual patients in two contrasts to %s", len(jobs), out)
    return path


def _describe(parts: list[_Part], settings: Mapping[str, float]) -> str:
    """What is real, what is simulated, and where it comes from."""
    sizes = ", ".join(f"{len(part.numbers)} {part.section} {part.domain}" for part in parts)
    values = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    return (
        "Real: the T1-weighted MNI152 template, an average of the MRI of 152 adults, and its gray- and white-matter "
        "maps.\nSimulated: the patients, each that one brain under a random smooth deformation, and the second "
        "contrast: T1 intensities mapped so that fluid is brightest and white matter darkest, as in T2 weighting. "
        "Results on this cohort show how a method behaves; they say nothing about patients.\n\n"
        f"Patients: {sizes}. Settings: {values}.\n\n{SOURCE}"
    )
