"""``medkd slide predict`` and ``medkd slide tile``: many slides, of which a bad one never stops the others."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medkd.errors import ConfigError, InputError
from medkd.workflows.slide_batch import SlideBatch, SlideView, run_batch
from medkd.workflows.slide_list import ListedSlide, list_slides, take_shard
from medkd.workflows.slide_units import BundleNetwork, Job, PredictUnit, TileUnit, network_hash, predict_unit, tile_unit
from medkd.wsi.fleet_clusters import available_cores, require_cluster
from medkd.wsi.prediction import TileTask
from medkd.wsi.slide_state import alone, prepare_out, read_record, setup_hash


def predict_slides(
    model: str | Path,
    slides: Sequence[str | Path],
    out: str | Path,
    *,
    slides_csv: str | Path | None = None,
    slide_mpp: float | None = None,
    mpp: float | None = None,
    overlap: int | None = None,
    min_tissue: float = 0.5,
    tissue: str | Path | None = None,
    threshold: float = 0.5,
    heatmap_mpp: float | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    memory_limit: int | None = None,
    cluster: str | None = None,
    shard: tuple[int, int] | None = None,
    devices: int | None = None,
    device: str = "auto",
    trust: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    deidentify: bool = False,
    view: SlideView | None = None,
) -> SlideBatch:
    """Run a bundle over slides; outputs as in the docs under "Slide prediction", summary.csv, failures.csv.

    One slide is worked on in this process, several on local worker processes, or on a running dask cluster.

    Args:
        model: bundle folder, or a run folder with one; its metadata.json says what it expects of a tile. Or a file
            that ``medkd export --int8`` wrote, which computes on the CPU.
        slides: files.
        out: output folder; must be absent or empty unless ``resume`` or ``overwrite``.
        slides_csv: a table with the columns ``slide`` and, optionally, ``mpp``.
        slide_mpp: µm per level-0 pixel, in place of what the slides say.
        mpp: target µm per pixel, in place of the bundle's.
        overlap: pixels that neighboring tiles share, in place of the bundle's.
        min_tissue: smallest share of tissue of a tile that is predicted; 0 predicts all.
        tissue: a mask file (GeoJSON or picture), or a folder with one per slide, in place of our own.
        threshold: smallest probability of a tile inside an outline.
        heatmap_mpp: µm per pixel of a segmentation's heatmap.
        batch_size: tiles per step.
        workers: local processes; by default one per core or slide, or one on a GPU. 0: all in this process.
        memory_limit: bytes of each local worker process.
        cluster: address of a running dask scheduler, as ``tcp://host:8786``.
        shard: (I, N): only the I-th of N shares of the list.
        devices: so many GPUs, one slide on each.
        device: auto, cpu or cuda[:N].
        trust: hash of a bundle whose code is beyond the allow-list.
        resume: go on in ``out``: slides whose outputs are complete and of the same content, model and parameters
            are left alone, all others are worked on.
        overwrite: work on all slides in a folder that is not empty.
        deidentify: name outputs slide-0001, … and keep file names out of everything written and logged.
        view: shows progress.

    Raises:
        ConfigError, InputError: nothing was started: bundle, list, folder, device or cluster cannot be used.
    """
    listed = list_slides(slides, slides_csv, slide_mpp=slide_mpp, deidentify=deidentify)
    own = take_shard(listed, shard)
    environments = _gpu_environments(devices, device, cluster, workers)
    out = Path(os.path.abspath(out))
    source, task, model_name = _load(model, trust, "cuda:0" if environments else device, cluster)
    task = replace(task, mpp=mpp or task.mpp, overlap=task.overlap if overlap is None else overlap)
    _check_fraction("--min-tissue", min_tissue)
    _check_fraction("--threshold", threshold)
    masks = _files_of(tissue, own, "--tissue")
    if workers is None and cluster is None and not environments and _is_gpu(source.device):
        workers = 1  # one slide has the GPU to itself
    parameters = {
        "what": "predict", "task": vars(task), "min_tissue": min_tissue, "threshold": threshold,
        "heatmap_mpp": heatmap_mpp,
    }  # fmt: skip
    threads = _threads(workers, len(own), cluster)
    jobs = _jobs(own, out, source.sha256, parameters, {"tissue": masks}, resume=resume, deidentify=deidentify)
    units = [
        PredictUnit(
            job=job, network=source, model_name=model_name, task=task, min_tissue=min_tissue, tissue=mask,
            threshold=threshold, heatmap_mpp=heatmap_mpp, batch_size=batch_size, threads=threads, device=source.device,
        )
        for job, mask in zip(jobs, masks, strict=True)
    ]  # fmt: skip
    identity = _identity(listed, setup_hash(source.sha256, parameters), shard, deidentify)
    names = [slide.name for slide in own]
    if cluster is not None:
        require_cluster(cluster)
    prepare_out(out, identity, names, resume=resume, overwrite=overwrite, shared=shard is not None)
    return run_batch(
        predict_unit, units, out, listed=listed, shard=shard, workers=workers, cluster=cluster,
        environments=environments, memory_limit=memory_limit, view=view,
    )  # fmt: skip


def tile_slides(
    slides: Sequence[str | Path],
    out: str | Path,
    *,
    size: int,
    mpp: float,
    slides_csv: str | Path | None = None,
    slide_mpp: float | None = None,
    overlap: int = 0,
    min_tissue: float = 0.5,
    tissue: str | Path | None = None,
    exclude_pen: bool = True,
    exclude_fat: bool = True,
    save_images: bool = False,
    annotations: str | Path | None = None,
    rule: Literal["center", "fraction"] = "center",
    masks: bool = False,
    workers: int | None = None,
    memory_limit: int | None = None,
    cluster: str | None = None,
    shard: tuple[int, int] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    deidentify: bool = False,
    view: SlideView | None = None,
) -> SlideBatch:
    """Find tissue on slides and lay tiles over it, see :func:`medkd.workflows.slide_tiles.tile_slide`.

    With labelled images also writes datalist.json over all slides; patients are those of the column ``patient`` of
    the table, else every slide is a patient.

    Args:
        slides: files.
        out: output folder; must be absent or empty unless ``resume`` or ``overwrite``.
        size: side of a tile in pixels as the network sees it.
        mpp: target µm per pixel.
        slides_csv: see :func:`predict_slides`, also for ``slide_mpp``, ``tissue`` and all from ``workers`` on.
        slide_mpp: µm per level-0 pixel, in place of what the slides say.
        overlap: pixels that neighboring tiles share.
        min_tissue: smallest share of tissue of a tile.
        tissue: a mask file, or a folder with one per slide.
        exclude_pen: pen marks are no tissue.
        exclude_fat: fat is no tissue.
        save_images: write the tiles as PNG.
        annotations: a GeoJSON file, or a folder with one per slide.
        rule: what gives a tile its class, its center or the larger part of it.
        masks: label every pixel.
        workers: local processes.
        memory_limit: bytes of each.
        cluster: address of a running dask scheduler.
        shard: (I, N).
        resume: go on.
        overwrite: begin again.
        deidentify: name outputs slide-0001, …
        view: shows progress.

    Raises:
        ConfigError, InputError: nothing was started.
    """
    from medkd.workflows.slide_tiles import find_classes, join_datalists

    listed = list_slides(slides, slides_csv, slide_mpp=slide_mpp, deidentify=deidentify)
    own = take_shard(listed, shard)
    out = Path(os.path.abspath(out))
    _check_fraction("--min-tissue", min_tissue)
    if masks and not (save_images and annotations):
        raise ConfigError("--masks", "needs images and annotations", "add --save-images and --annotations")
    if size < 1 or not 0 <= overlap < size or not (math.isfinite(mpp) and mpp > 0):
        raise ConfigError(
            "--size, --mpp, --overlap",
            f"{size}, {mpp:g}, {overlap} make no tiles",
            "use numbers above 0, overlap < size",
        )
    tissue_files = _files_of(tissue, own, "--tissue")
    annotation_files = _files_of(annotations, own, "--annotations")
    # The classes of all shards, so that every slide's labels mean the same.
    classes = find_classes(file for file in _files_of(annotations, listed, "--annotations") if file is not None)
    options: dict[str, Any] = {
        "size": size, "mpp": mpp, "overlap": overlap, "min_tissue": min_tissue, "exclude_pen": exclude_pen,
        "exclude_fat": exclude_fat, "save_images": save_images, "rule": rule, "masks": masks,
        "classes": list(classes) if annotations is not None else None,
    }  # fmt: skip
    parameters = {"what": "tile", **options}
    files = {"tissue": tissue_files, "annotations": annotation_files}
    jobs = _jobs(own, out, "", parameters, files, resume=resume, deidentify=deidentify)
    threads = _threads(workers, len(own), cluster)
    units = [
        TileUnit(job, {**options, "threads": threads}, tissue=mask, annotations=regions)
        for job, mask, regions in zip(jobs, tissue_files, annotation_files, strict=True)
    ]
    names = [slide.name for slide in own]
    identity = _identity(listed, setup_hash("", parameters), shard, deidentify)
    if cluster is not None:
        require_cluster(cluster)
    prepare_out(out, identity, names, resume=resume, overwrite=overwrite, shared=shard is not None)
    batch = run_batch(
        tile_unit, units, out, listed=listed, shard=shard, workers=workers, cluster=cluster, memory_limit=memory_limit,
        view=view,
    )  # fmt: skip
    with alone(out):
        records = [read_record(out, slide.name) for slide in listed]
        names = [record.name for record in records if record is not None and record.is_success]
        if join_datalists(out, names) is None:
            (out / "datalist.json").unlink(missing_ok=True)  # of a former run
    return batch


def _threads(workers: int | None, slides: int, cluster: str | None) -> int:
    """How many threads a slide may read with."""
    if cluster is not None:
        return 2
    return max(1, available_cores() // max(min(workers or available_cores(), slides), 1))


def _jobs(
    slides: Sequence[ListedSlide],
    out: Path,
    model: str,
    parameters: dict[str, Any],
    files: Mapping[str, Sequence[Path | None]],
    *,
    resume: bool,
    deidentify: bool,
) -> list[Job]:
    """What is to be done with each slide, its setup being the parameters and what is said of it alone.

    Raises:
        InputError: one of the files cannot be read.
    """
    jobs = []
    for index, slide in enumerate(slides):
        own: dict[str, Any] = {"name": slide.name, "slide_mpp": slide.mpp, "patient": slide.patient}
        own |= {what: _sha256(given[index]) for what, given in files.items()}
        jobs.append(Job(slide, out, setup_hash(model, {**parameters, **own}), resume=resume, deidentify=deidentify))
    return jobs


def _sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the path") from None


def _load(
    model: str | Path, trust: str | None, device: str, cluster: str | None
) -> tuple[BundleNetwork, TileTask, str]:
    """The bundle's network for workers, and what it expects; loaded once here, so that a bad one stops all at once."""
    from medkd.deploy.bundle import load_bundle
    from medkd.deploy.slide_bundle import slide_task
    from medkd.workflows.devices import choose_device

    model = Path(model)
    if model.suffix == ".onnx":
        from medkd.deploy.onnx_network import OnnxTiles

        if device not in ("auto", "cpu"):
            raise ConfigError("--device", f"is {device}, but {model.name} computes on the CPU", "leave --device out")
        model = model.absolute()
        task = OnnxTiles(model).task
        return BundleNetwork(model, network_hash(model), None, "cpu"), task, model.stem
    if cluster is None:
        choose_device(device)
    bundle = load_bundle(model, trust=trust)
    task = slide_task(bundle)
    return BundleNetwork(bundle.path, network_hash(bundle.path), trust, device), task, bundle.name


def _is_gpu(device: str) -> bool:
    from medkd.workflows.devices import choose_device

    return choose_device(device).type == "cuda"


def _gpu_environments(
    devices: int | None, device: str, cluster: str | None, workers: int | None
) -> list[dict[str, str]]:
    """One worker per GPU, each of which sees its own GPU only.

    Raises:
        ConfigError: there are not so many, or other options say something else.
    """
    if devices is None:
        return []
    for option, given in (("--cluster", cluster), ("--workers", workers)):
        if given is not None:
            raise ConfigError("--devices", f"does not go with {option}", "start the cluster's workers one per GPU")
    if device != "auto":
        raise ConfigError("--devices", "does not go with --device", "pass one of them")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices > count:
        raise ConfigError("--devices", f"asks for {devices} GPUs, this machine has {count}", "ask for fewer")
    given_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given_gpus.split(",") if given_gpus else [str(index) for index in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": names[index].strip()} for index in range(devices)]


def _files_of(given: str | Path | None, slides: Sequence[ListedSlide], option: str) -> list[Path | None]:
    """The user's file for each slide.

    Raises:
        ConfigError: one file for several slides, or a slide without a file.
    """
    if given is None:
        return [None] * len(slides)
    return [_file_of(Path(given), slide, option, len(slides)) for slide in slides]


def _file_of(given: Path, slide: ListedSlide, option: str, slides: int) -> Path:
    if given.is_dir():
        for suffix in (".geojson", ".json", ".png", ".tif", ".tiff"):
            if (given / f"{slide.path.stem}{suffix}").is_file():
                return given / f"{slide.path.stem}{suffix}"
        raise ConfigError(option, f"{given} has no file for {slide.name}", f"add {slide.name}.geojson")
    if slides > 1:
        raise ConfigError(option, "is one file for several slides", "give a folder with a file for each slide")
    if not given.is_file():
        raise ConfigError(option, f"{given} does not exist", "check the path")
    return given


def _check_fraction(option: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(option, f"{value:g} is out of range", "use 0 to 1")


def _identity(
    listed: Sequence[ListedSlide], setup: str, shard: tuple[int, int] | None, deidentify: bool
) -> dict[str, Any]:
    """What all shards of one run share."""
    paths = [slide.name if deidentify else str(slide.path) for slide in listed]
    return {
        "slides": hashlib.sha256("\n".join(sorted(paths)).encode(errors="surrogateescape")).hexdigest(),
        "setup": setup,
        "shards": shard[1] if shard is not None else 1,
    }
