"""``medkd train``: from a bundle's training configuration to a run folder with a deployable bundle and a report."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from monai.bundle import ConfigParser

from medkd.data.check import require_trainable
from medkd.data.datalists import Datalist, read_datalist
from medkd.data.shipped import shipped_folder
from medkd.deploy.trust import read_config, require_trust
from medkd.engine.processes import is_main_process, start_processes, stop_processes
from medkd.errors import ConfigError, MedkdError, TrainingError
from medkd.report.html import write_report
from medkd.workflows import run_folder
from medkd.workflows.image_train import require_one_size
from medkd.workflows.overrides import SEPARATOR, apply_overrides
from medkd.workflows.trained_bundle import deploy

logger = logging.getLogger(__name__)


def train(
    config_or_bundle: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    overlays: Sequence[str | Path] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    fold: int | None = None,
    devices: int = 1,
    device: str = "auto",
    seed: int | None = None,
    trust: str | None = None,
) -> Path:
    """Train what a bundle's ``configs/train.json`` (or another configuration file) describes.

    Args:
        config_or_bundle: a bundle folder, the name of a shipped bundle, or a training configuration file.
        overrides: MONAI id → value; they have the last word.
        overlays: configuration files that change the first one, in order: files, or names of files beside it.
        run_dir: the run folder; ``runs/<bundle>-<time>`` by default.
        resume: go on with the run in ``run_dir``.
        overwrite: replace the run in ``run_dir``.
        fold: which fold of the datalist is held out for validation.
        devices: training processes; each takes its share of the joint batch. Under torchrun its own count holds.
        device: auto, cpu or cuda[:N].
        seed: seeds weights, order and augmentation.
        trust: SHA-256 of all files of a bundle whose configuration is beyond the allow-list.

    Returns:
        The run folder.

    Raises:
        ConfigError: For a configuration, bundle or folder that cannot be used.
        InputError: For data that cannot be trained on.
        TrainingError: If training stopped by itself.
        TrainingPaused: If it was asked to stop and wrote a checkpoint.
    """
    file = training_file(config_or_bundle)
    in_bundle = file.parent.name == "configs"
    bundle_root = file.resolve().parents[1] if in_bundle else file.resolve().parent
    name = bundle_root.name if in_bundle else file.stem
    run_dir = Path(run_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    under_torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1
    several = under_torchrun or devices > 1
    files = [file, *(overlay_file(file, overlay) for overlay in overlays)]
    if several:
        files.append(overlay_file(file, "multi_gpu_train"))
    chosen = dict(overrides or {})
    chosen.update({"fold": fold} if fold is not None else {}, **({"seed": seed} if seed is not None else {}))
    if device != "auto":
        chosen["device"] = f"$torch.device('{torch.device(device)}')"
    config = merged_config(files)
    require_trust(bundle_root, config, source=str(file), trust=trust)  # overrides are the user's own words
    apply_overrides(config, chosen)
    config.update(run_dir=str(run_dir.resolve()), resume=resume)
    config["output_weights"] = str(run_dir.resolve() / "bundle" / "models" / "model.pt")
    config["bundle_root"] = str(bundle_root)

    start_processes()
    try:
        if under_torchrun and not is_main_process():
            torch.distributed.barrier()  # the first process prepares the folder
            _run(config)
            return run_dir
        run_folder.require_free(run_dir, resume=resume, overwrite=overwrite)
        datalist = training_cases(config)
        with run_folder.hold_run_folder(run_dir):
            if resume:
                run_folder.require_same_run(run_dir, config, datalist)
            else:
                run_folder.clear(run_dir)
                run_folder.write_identity(run_dir, config, datalist)
            if under_torchrun:
                torch.distributed.barrier()
            with run_folder.log_to(run_dir):
                if devices > 1 and not under_torchrun:
                    _run_processes(run_dir, devices, resume=resume)
                else:
                    _run(config)
                finish(run_dir, config, datalist)
    finally:
        stop_processes()
    return run_dir


def training_file(config_or_bundle: str | Path) -> Path:
    """The training configuration of a bundle folder, a shipped bundle's name, or the file itself."""
    path = Path(config_or_bundle)
    if path.is_file():
        return path
    folder = path if path.is_dir() else shipped_folder("bundles") / str(config_or_bundle)
    file = folder / "configs" / "train.json"
    if not file.is_file():
        raise ConfigError(folder, "has no configs/train.json", "give a bundle that can be trained")
    return file


def overlay_file(file: Path, overlay: str | Path) -> Path:
    """A configuration file that changes ``file``: a path, or the name of one beside it.

    Raises:
        ConfigError: There is none; those beside ``file`` are listed.
    """
    path = Path(overlay)
    if path.suffix == ".json" and path.is_file():
        return path
    beside = file.with_name(path.name if path.suffix == ".json" else f"{path.name}.json")
    if beside == file or not beside.is_file():
        others = {"inference", "metadata", file.stem}
        known = sorted(found.stem for found in file.parent.glob("*.json") if found.stem not in others)
        raise ConfigError(f"overlay {overlay}", "is not a file", f"beside {file.name} there are {known}")
    return beside


def merged_config(files: list[Path]) -> dict[str, Any]:
    """Files merged in order, expressions unevaluated; ids of overlays such as ``train#method`` take their place.

    Raises:
        ConfigError: If this is not a training configuration with a run folder, or an overlay's id is not in it.
    """
    config = read_config(*files)
    apply_overrides(config, {key: config.pop(key) for key in list(config) if "#" in key or SEPARATOR in key})
    for needed in ("run_dir", "resume", "initialize", "run"):
        if needed not in config:
            raise ConfigError(files[0], f"defines no {needed!r}", "use a training configuration of medkd's bundles")
    return config


def training_cases(config: Mapping[str, Any]) -> Datalist | None:
    """The datalist of a configuration, read and checked as training data; None where it uses none.

    Raises:
        ConfigError: If dataset_dir or the datalist is missing.
        InputError: If the data cannot be trained on.
    """
    if "cases" not in config:
        return None
    parser = ConfigParser(dict(config))
    dataset_dir = Path(parser.get_parsed_content("dataset_dir"))
    if not dataset_dir.is_dir():
        raise ConfigError("dataset_dir", f"{dataset_dir} is not a folder", "set dataset_dir=FOLDER")
    unpaired = bool(config["cases"].get("unpaired", False))
    datalist = read_datalist(parser.get_parsed_content("datalist"), dataset_dir, unpaired=unpaired)
    fold = config.get("fold")
    if config.get("task") == "translation":
        _require_both_domains(parser, datalist)
    elif not datalist.section("training", fold=fold):
        raise ConfigError(datalist.where, "has no labeled case to train on", "list cases with labels under training")
    require_trainable(datalist)
    if config.get("task") == "classification":
        require_one_size(parser, datalist)
    return datalist


def _require_both_domains(parser: ConfigParser, datalist: Datalist) -> None:
    """Refuse a datalist without images of a domain to translate between, before anything is written."""
    fold = parser.get_parsed_content("fold")
    for name in ("source_domain", "target_domain"):
        domain = parser.get_parsed_content(name)
        if not any(datalist.section(section, fold=fold, domain=domain) for section in ("training", "unlabeled")):
            raise ConfigError(
                name, f"{datalist.where} has no image of {domain!r} to train on", f"set {name} to one of its domains"
            )


def _run(config: Mapping[str, Any]) -> None:
    """Evaluate ``initialize``, ``run`` and ``finalize`` of a configuration."""
    parser = ConfigParser(dict(config))
    try:
        for section in ("initialize", "run", "finalize"):
            if section in config:
                parser.get_parsed_content(section)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "memory",
            f"the device is out of memory with batch_size {config.get('batch_size')}, patch {config.get('patch_size')}"
            f" and amp {config.get('amp')}",
            "lower batch_size or patch_size or use amp=bf16, then continue with --resume; the last checkpoint is kept",
        ) from error
    except Exception as error:
        raise _as_medkd_error(error) from error


def _as_medkd_error(error: BaseException) -> BaseException:
    """The error a user can mend, if MONAI wrapped one; otherwise the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MedkdError | KeyboardInterrupt):
            return cause
        if "DataLoader worker" in str(cause) and "exited unexpectedly" in str(cause):
            return TrainingError(
                "data loading", "a loader process died, often for lack of memory", "lower num_workers, then --resume"
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return TrainingError("run folder", "the disk is full", "make room, then continue with --resume")
        cause = cause.__cause__ or cause.__context__
    return error


def _run_processes(run_dir: Path, count: int, *, resume: bool) -> None:
    """Train in ``count`` processes of this machine that share the run folder, and pass signals on to them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, "-m", "medkd.cli.worker", str(run_dir), "resume" if resume else "start"]
        processes.append(subprocess.Popen(command, env=environment))

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        _wait_for_all(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    codes = [process.returncode for process in processes]
    if any(codes):
        raise SystemExit(next((code for code in codes if code > 0), 3))


def _wait_for_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait; when one process fails, the others would wait for it for ever, so they are stopped."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode not in (None, 0) for process in processes):
            time.sleep(5)
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.1)


def finish(run_dir: Path, config: Mapping[str, Any], datalist: Datalist | None) -> None:
    """Turn the trained weights into a bundle and write the report."""
    weights_file = Path(str(config["output_weights"]))
    if datalist is not None and weights_file.is_file():
        weights = torch.load(weights_file, map_location="cpu", weights_only=True)
        deploy(run_dir / "bundle", config, datalist, weights)
    write_report(run_dir)


def run_process(run_dir: Path, *, resume: bool) -> None:
    """Be one of several training processes: run the configuration of a prepared run folder."""
    config = json.loads((run_dir / run_folder.CONFIG).read_text(encoding="utf-8"))
    config["resume"] = resume
    start_processes()
    try:
        _run(config)
    finally:
        stop_processes()
