"""One slide of a batch, from its file to its record: what a worker process does with it.

Whatever happens to a slide ends in a record; only a dying process ends otherwise.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medkd.errors import ConfigError, InputError, MedkdError
from medkd.workflows.failures import is_out_of_memory, names_nothing, one_line
from medkd.workflows.slide_list import ListedSlide
from medkd.wsi.grid import TileGrid
from medkd.wsi.prediction import TileTask
from medkd.wsi.slide_state import (
    SlideRecord,
    Status,
    forget,
    is_complete,
    is_run,
    publish,
    read_record,
    slide_key,
    staging,
    write_record,
)
from medkd.wsi.slides import Slide
from medkd.wsi.tissue import read_tissue

if TYPE_CHECKING:
    from torch import nn

Report = Callable[[int, int], None]
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_NO_OVERVIEW, _COPY_AGAIN = "is too damaged to find tissue on it", "copy it again from where it was scanned"
_WITHHELD = "cannot be used; work on it without --deidentify to see why"


class UnreadableError(InputError):
    """A slide that opens, but whose pixels cannot be used."""


@dataclass(frozen=True)
class Produced:
    """What was made of a slide.

    Attributes:
        status: done or empty-tissue.
        tiles: how many its tissue has.
        failed_tiles: how many of them could not be used.
    """

    status: Status
    tiles: int
    failed_tiles: int = 0


@dataclass(frozen=True)
class Job:
    """What every unit says, whatever is to be done with the slide.

    Attributes:
        slide: which.
        out: the batch's output folder.
        setup: hash of model and parameters.
        resume: use what an earlier run finished.
        deidentify: keep file names out of everything.
    """

    slide: ListedSlide
    out: Path
    setup: str
    resume: bool = False
    deidentify: bool = False


@dataclass(frozen=True)
class BundleNetwork:
    """A bundle's network, or an int8 export of one, loaded by the process that needs it, once.

    Attributes:
        path: the bundle's folder, or the export's file.
        sha256: of what it computes with, see :func:`network_hash`; another content is refused.
        trust: hash of a bundle whose code is beyond the allow-list.
        device: auto, cpu or cuda[:N].
    """

    path: Path
    sha256: str
    trust: str | None = None
    device: str = "auto"

    def __call__(self) -> nn.Module:
        """The network, in eval mode.

        Raises:
            ConfigError: It cannot be loaded, or was replaced since the batch began.
        """
        return _load_network(self)


@lru_cache(maxsize=1)
def _load_network(source: BundleNetwork) -> nn.Module:
    if source.path.suffix == ".onnx":
        from medkd.deploy.onnx_network import OnnxTiles

        network = OnnxTiles(source.path)
        _require_content(source, network_hash(source.path))
        return network
    from medkd.deploy.bundle import load_bundle
    from medkd.workflows.devices import choose_device

    bundle = load_bundle(source.path, trust=source.trust, device=choose_device(source.device))
    _require_content(source, network_hash(bundle.path))
    return bundle.network


def _require_content(source: BundleNetwork, found: str) -> None:
    if found != source.sha256:
        raise ConfigError(source.path, "was replaced while the batch ran", "start the batch again with --resume")


def network_hash(bundle: Path) -> str:
    """SHA-256 over the files of a bundle that its predictions depend on: weights, inference configuration, scripts.

    Of an exported file, of the file.
    """
    if bundle.is_file():
        return hashlib.sha256(bundle.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    files = [
        *sorted((bundle / "models").glob("model.*")),
        *sorted((bundle / "configs").glob("inference.*")),
        *sorted(path for path in (bundle / "scripts").rglob("*.py")),
    ]
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(bundle)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class PredictUnit:
    """A slide to predict.

    Attributes:
        job: the slide and where its outputs go.
        network: gives the network, in the process that needs it.
        model_name: what to call it in outputs.
        task: what it expects and means.
        min_tissue: smallest share of tissue of a tile.
        tissue: file of the user's own tissue mask.
        threshold: smallest probability of a tile inside an outline.
        heatmap_mpp: of a segmentation's heatmap.
        batch_size: tiles per step.
        threads: that read tiles.
        device: auto, cpu or cuda[:N].
    """

    job: Job
    network: Callable[[], nn.Module]
    model_name: str
    task: TileTask
    min_tissue: float = 0.5
    tissue: Path | None = None
    threshold: float = 0.5
    heatmap_mpp: float | None = None
    batch_size: int = 32
    threads: int = 2
    device: str = "auto"


def predict_unit(unit: PredictUnit, report: Report) -> SlideRecord:
    """Predict a slide and write its outputs, or find that an earlier run did."""
    return process_slide(unit.job, lambda slide, folder: _predict(unit, slide, folder, report))


def _predict(unit: PredictUnit, slide: Slide, folder: Path, report: Report) -> Produced:
    task = unit.task
    tissue = None if unit.tissue is None else read_tissue(unit.tissue, slide)
    grid = TileGrid.build(
        slide, size=task.size, mpp=task.mpp, overlap=task.overlap, min_tissue=unit.min_tissue, tissue=tissue
    )
    if not len(grid) and slide.bad_tiles:
        raise UnreadableError(
            slide.path, "is too damaged to find tissue on it", "copy it again from where it was scanned"
        )
    if unit.job.deidentify:
        grid = replace(grid, slide_name=unit.job.slide.name)
    from medkd.workflows.devices import choose_device
    from medkd.wsi.export import write_prediction
    from medkd.wsi.predict import predict_slide

    prediction = predict_slide(
        unit.network(), slide, grid, classes=task.classes, mean=task.mean, std=task.std, task=task.task,
        activation=task.activation, batch_size=unit.batch_size, threads=unit.threads,
        device=choose_device(unit.device), heatmap_mpp=unit.heatmap_mpp, progress=report, scratch=folder,
    )  # fmt: skip
    try:
        failed = len(prediction.failed)
        if failed and failed == len(grid):
            problem = f"none of its {failed} tiles could be used ({prediction.failed[0][2]})"
            raise UnreadableError(slide.path, problem, _COPY_AGAIN)
        write_prediction(prediction, slide, folder, name=unit.job.slide.name, details={"model": unit.model_name})
    finally:
        prediction.close()
    return Produced("done" if len(grid) else "empty-tissue", len(grid), failed)


@dataclass(frozen=True)
class TileUnit:
    """A slide to tile.

    Attributes:
        job: the slide and where its outputs go.
        options: of :func:`medkd.workflows.slide_tiles.tile_slide`.
        tissue: file of the user's own tissue mask.
        annotations: GeoJSON of the slide.
    """

    job: Job
    options: Mapping[str, Any]
    tissue: Path | None = None
    annotations: Path | None = None


def tile_unit(unit: TileUnit, report: Report) -> SlideRecord:
    """Tile a slide and write its outputs, or find that an earlier run did."""
    return process_slide(unit.job, lambda slide, folder: _tile(unit, slide, folder, report))


def _tile(unit: TileUnit, slide: Slide, folder: Path, report: Report) -> Produced:
    from medkd.workflows.slide_tiles import tile_slide

    listed = unit.job.slide
    result = tile_slide(
        slide, folder, tissue=unit.tissue, annotations=unit.annotations, name=listed.name,
        patient=None if unit.job.deidentify else listed.patient, progress=report, **unit.options,
    )  # fmt: skip
    if not result.n_tiles and slide.bad_tiles:
        raise UnreadableError(slide.path, _NO_OVERVIEW, _COPY_AGAIN)
    failed = len(result.failed_tiles)
    if failed and failed == result.n_tiles:
        raise UnreadableError(slide.path, f"none of its {failed} tiles could be read", _COPY_AGAIN)
    return Produced(result.status, result.n_tiles, failed)


def process_slide(job: Job, produce: Callable[[Slide, Path], Produced]) -> SlideRecord:
    """Do something with a slide, in the order that makes it safe to be killed at any moment.

    Args:
        job: the slide and where its outputs go.
        produce: called with the open slide and a staging folder; writes the outputs there.

    Returns:
        How it ended. The record is on disk too, unless the disk is full.
    """
    start = time.monotonic()
    with _collected_warnings() as notes:
        record = _attempt(job, produce)
    if not record.reused:
        record = replace(record, seconds=round(time.monotonic() - start, 3))
        try:
            _keep(job, record)
        except OSError as error:
            if record.is_success:  # without a record its outputs count for nothing
                with suppress(OSError):
                    forget(job.out, record.name)
                record = replace(_failed(job, error, record.key), seconds=record.seconds)
            else:
                record = replace(record, disk_is_full=record.disk_is_full or error.errno in _DISK_FULL)
    return replace(record, notes=() if job.deidentify else tuple(notes))


def _attempt(job: Job, produce: Callable[[Slide, Path], Produced]) -> SlideRecord:
    name, key = job.slide.name, ""
    status: Status = "unreadable"
    blank = SlideRecord(name, "failed", setup=job.setup)
    try:
        if not is_run(job.out):
            raise ConfigError(job.out, "is not seen by the worker", "use a folder that all machines share")
        with Slide(job.slide.path, mpp=job.slide.mpp) as slide:
            key = slide_key(slide.fingerprint, job.setup)
            status = "no-mpp"
            mpp = slide.mpp
            status = "failed"
            earlier = read_record(job.out, name)
            if job.resume and earlier is not None and is_complete(job.out, earlier, key):
                return replace(earlier, reused=True)
            forget(job.out, name)
            with staging(job.out, name) as folder:
                made = produce(slide, folder)
                files = publish(folder, job.out, name)
        return replace(
            blank, status=made.status, key=key, files=files, tiles=made.tiles, failed_tiles=made.failed_tiles, mpp=mpp
        )
    except Exception as error:
        if isinstance(error, ConfigError):
            status = "failed"
        elif isinstance(error, UnreadableError) or (
            isinstance(error, InputError) and not os.path.exists(job.slide.path)
        ):
            status = "unreadable"
        return _failed(job, error, key, status)


def _keep(job: Job, record: SlideRecord) -> None:
    """Write a record; a slide that cannot be read now keeps what an earlier run made of it in the same way."""
    if not record.key:
        earlier = read_record(job.out, record.name)
        if earlier is not None and earlier.is_success and earlier.setup == job.setup and job.resume:
            return
        forget(job.out, record.name)
    write_record(job.out, record)


def _failed(job: Job, error: Exception, key: str, status: Status = "failed") -> SlideRecord:
    """The record of a failure, with a reason fit to be read by whoever may read the outputs."""
    reason = _one_line(error)
    details = "" if isinstance(error, MedkdError) or job.deidentify else "".join(traceback.format_exception(error))
    if job.deidentify:
        text = f"{error.problem}; {error.remedy}" if isinstance(error, MedkdError) else type(error).__name__
        reason = " ".join(text.split()) if names_nothing(text, job.slide.path) else _WITHHELD
    return SlideRecord(
        job.slide.name,
        status,
        setup=job.setup,
        key=key,
        reason=reason,
        disk_is_full=isinstance(error, OSError) and error.errno in _DISK_FULL,
        details=details,
    )


def _one_line(error: Exception) -> str:
    if is_out_of_memory(error):
        return "does not fit into memory; use a smaller --batch-size, or another --device"
    return one_line(error)


class _Collector(logging.Handler):
    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self.notes:
            self.notes.append(record.getMessage())


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """What the slide's code warns of goes into its record, not to the terminal of some other machine."""
    notes: list[str] = []
    package, handler = logging.getLogger("medkd.wsi"), _Collector(notes)
    propagated = package.propagate
    package.addHandler(handler)
    package.propagate = False
    try:
        yield notes
    finally:
        package.propagate = propagated
        package.removeHandler(handler)
