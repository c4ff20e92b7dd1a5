"""``medkd predict``: a bundle over many volumes or images, of which a bad one never stops the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medkd.data.volumes import read_volume, write_image, write_segmentation
from medkd.deploy.bundle import LoadedBundle, load_bundle
from medkd.deploy.dicom_seg import require_highdicom, write_dicom_seg
from medkd.deploy.metadata import translates
from medkd.deploy.predict import predict_volume, translate_volume
from medkd.deploy.predict_images import bundle_classifies
from medkd.errors import ConfigError, MedkdError
from medkd.workflows.devices import choose_device
from medkd.workflows.failures import (
    Failure,
    is_out_of_memory,
    names_nothing,
    note,
    one_line,
    prepare_out,
    write_failures,
)
from medkd.workflows.image_predict import predict_images, refuse_volume_options
from medkd.workflows.inputs import Source, find_sources

logger = logging.getLogger(__name__)

Format = Literal["nifti", "dicom-seg"]


@dataclass(frozen=True)
class Predictions:
    """What ``predict`` did.

    Attributes:
        written: the files, in the order of the inputs.
        failures: the cases that failed.
    """

    written: list[Path]
    failures: list[Failure]


def predict(
    model: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    output_format: Format = "nifti",
    series: str | None = None,
    deidentify: bool = False,
    device: str = "auto",
    trust: str | None = None,
    overwrite: bool = False,
) -> Predictions:
    """Segment volumes into ``<name>_seg.nii.gz`` (or ``<name>_seg.dcm``), each in its own geometry.

    A bundle that translates writes ``<name>_translated.nii.gz``, float32, likewise. One that classifies images writes
    one ``predictions.csv``, see :func:`medkd.workflows.image_predict.predict_images`.

    Args:
        model: bundle folder, or a run folder with one.
        inputs: NIfTI files, folders of them, DICOM folders; for a classifier image files and folders of them.
        out: output folder; must be absent or empty unless ``overwrite``.
        output_format: ``nifti`` or ``dicom-seg``, which needs DICOM input and the highdicom package.
        series: SeriesInstanceUID, where DICOM folders hold several.
        deidentify: name outputs case-0001, … and keep file names and ids out of everything written and logged.
        device: auto, cpu or cuda[:N].
        trust: hash of a bundle whose code is beyond the allow-list.
        overwrite: allow a folder that is not empty.

    Raises:
        ConfigError, InputError: the bundle, an input path or the folder cannot be used; nothing was written.
    """
    if output_format == "dicom-seg":
        if deidentify:
            raise ConfigError("--deidentify", "a DICOM-SEG has to name its series", "use --format nifti")
        require_highdicom()
    if bundle_classifies(model):
        classifier = load_bundle(model, trust=trust, device=choose_device(device))
        refuse_volume_options(classifier.path, output_format, series)
        return Predictions(*predict_images(classifier, inputs, Path(out), deidentify=deidentify, overwrite=overwrite))
    sources = find_sources(inputs, series=series, deidentify=deidentify)
    bundle = load_bundle(model, trust=trust, device=choose_device(device))
    if translates(bundle.metadata) and output_format != "nifti":
        raise ConfigError("--format", f"{bundle.path} translates images, which are no DICOM-SEG", "use --format nifti")
    out = Path(out)
    prepare_out(out, overwrite=overwrite)
    written: list[Path] = []
    failures: list[Failure] = []
    for number, source in enumerate(sources, start=1):
        start = time.perf_counter()
        try:
            written.append(_predict_one(bundle, source, out, output_format, series))
        except Exception as error:
            note(failures, _failure(source, error, deidentify=deidentify))
        else:
            logger.info("%d/%d %s: %.1f s", number, len(sources), source.name, time.perf_counter() - start)
    write_failures(out, failures)
    return Predictions(written, failures)


def _predict_one(bundle: LoadedBundle, source: Source, out: Path, output_format: Format, series: str | None) -> Path:
    volume = read_volume(source.path, frame=source.frame, series=series if source.is_dicom_folder else None)
    if translates(bundle.metadata):
        path = out / f"{source.name}_translated.nii.gz"
        write_image(path, translate_volume(bundle, volume), like=volume)
        return path
    labels = predict_volume(bundle, volume)
    if output_format == "nifti":
        path = out / f"{source.name}_seg.nii.gz"
        write_segmentation(path, labels, like=volume)
        return path
    path = out / f"{source.name}_seg.dcm"
    names = bundle.labels or {int(label): f"class {label}" for label in range(int(labels.max(initial=1)) + 1)}
    version = str(bundle.metadata.get("version", "0"))
    write_dicom_seg(path, labels, source.path, labels=names, model=bundle.name, version=version, series=series)
    return path


def _failure(source: Source, error: Exception, *, deidentify: bool) -> Failure:
    if not isinstance(error, MedkdError) and not is_out_of_memory(error):
        logger.debug("%s failed", source.name, exc_info=not deidentify)
    if not deidentify:
        return Failure(source.name, str(source.path), one_line(error))
    text = f"{error.problem}; {error.remedy}" if isinstance(error, MedkdError) else type(error).__name__
    return Failure(source.name, "", " ".join(text.split()) if names_nothing(text, source.path) else _WITHHELD)


_WITHHELD = "cannot be used; predict on it without --deidentify to see why"
