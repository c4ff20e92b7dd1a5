"""MONAI bundles: reading one to predict with, writing one that others can run."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle.config_parser import ConfigParser
from monai.transforms.compose import Compose
from monai.transforms.io.array import LoadImage, SaveImage
from monai.transforms.io.dictionary import LoadImaged, SaveImaged
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from medkd.data.atomic import sync_folder
from medkd.deploy.inference_config import inference_config
from medkd.deploy.metadata import SCHEMA, channel_names, check_metadata, license_text
from medkd.deploy.trust import Code, read_config, require_trust
from medkd.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

WEIGHTS = ("model.pt", "model.safetensors", "model.ts")  # the first that exists is used
WEIGHTS_HASH = "weights_sha256"  # in metadata.json: file name → hash


@dataclass(frozen=True, eq=False)
class LoadedBundle:
    """A bundle ready to predict.

    Attributes:
        path: its folder.
        network: the network with its weights, in eval mode, on ``device``: (B, C, *S) → logits (B, K, *S).
        parser: the checked ``inference.json``; ``get_parsed_content(id)`` builds any part of it.
        labels: label value → name; empty where the metadata names none.
        metadata: the content of metadata.json; empty without one.
        preprocessing: the bundle's transforms, without reading files.
        inferer: the bundle's inferer.
        postprocessing: the bundle's transforms, without writing files.
        device: where it computes.
        adds_channel: whether the bundle's reader hands on a channel dimension.
        weights: the file with the weights.
        fold: the cross-validation fold it held out, if any.
    """

    path: Path
    network: nn.Module
    parser: ConfigParser
    labels: dict[int, str]
    metadata: dict[str, Any]
    preprocessing: Compose
    inferer: Any
    postprocessing: Compose
    device: torch.device
    adds_channel: bool
    weights: Path
    fold: int | None = None

    @property
    def name(self) -> str:
        """What to call it in outputs: its folder's name, or the run's for a run folder's ``bundle/``."""
        return self.path.parent.name if self.path.name == "bundle" else self.path.name


def bundle_folder(path: str | Path) -> Path:
    """The bundle of a bundle folder or of a run folder.

    Raises:
        ConfigError: If there is none.
    """
    path = Path(path)
    for folder in (path, path / "bundle"):
        if (folder / "configs").is_dir():
            return folder.resolve()
    if not path.exists():
        raise ConfigError(path, "does not exist", "name a bundle folder (`medkd bundle list` shows those shipped)")
    raise ConfigError(path, "is not a bundle: it has no configs/", "name the folder that holds configs/ and models/")


def load_bundle(path: str | Path, *, trust: str | None = None, device: str | torch.device = "cpu") -> LoadedBundle:
    """Load a MONAI inference bundle to predict with; its dataset, handlers and evaluator are not built.

    Args:
        path: bundle folder, or a run folder that holds ``bundle/``.
        trust: SHA-256 of all files of the bundle; needed only for code beyond the allow-list.
        device: where to compute.

    Raises:
        ConfigError: no bundle, no weights, weights that do not fit the network or their recorded hash, a
            configuration that cannot be built or needs trust.
    """
    root = bundle_folder(path)
    weights = _weights_file(root)
    file = _inference_file(root)
    config = read_config(file)
    metadata = _read_metadata(root)
    program = [Code(str(weights), "file", "TorchScript", "a TorchScript file is a program")]
    where = f"{file}:"
    trusted = require_trust(root, config, source=where, trust=trust, extra=program if weights.suffix == ".ts" else ())
    parser = _parser(config, root, torch.device(device), trusted=trusted)
    _check_weights_hash(weights, metadata)
    if weights.suffix == ".ts":
        network = torch.jit.load(str(weights), map_location=device).eval()
    else:
        network = _build(parser, "network_def", file)
        if not isinstance(network, nn.Module):
            raise ConfigError(file, "network_def is not a network", "define a torch module there")
        _load_strictly(network, _read_weights(weights), weights)
        network = network.to(device).eval()
    preprocessing = _flatten(_build(parser, "preprocessing", file))
    loaders = [step for step in preprocessing if isinstance(step, LoadImage | LoadImaged)]
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    fold = metadata.get("fold")
    return LoadedBundle(
        path=root,
        network=network,
        parser=parser,
        labels=channel_names(metadata),
        metadata=metadata,
        preprocessing=Compose([step for step in preprocessing if not isinstance(step, LoadImage | LoadImaged)]),
        inferer=_build(parser, "inferer", file),
        postprocessing=Compose(
            [
                step
                for step in _flatten(_build(parser, "postprocessing", file) if "postprocessing" in parser else [])
                if not isinstance(step, SaveImage | SaveImaged)
            ]
        ),
        device=torch.device(device),
        adds_channel=any(_ensures_channel_first(loader) for loader in loaders),
        weights=weights,
        fold=fold if isinstance(fold, int) and not isinstance(fold, bool) else None,
    )


def write_bundle(
    out: str | Path,
    *,
    train_config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    readme: str,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a complete MONAI inference bundle; the folder appears whole or not at all.

    Args:
        out: the bundle's folder; must be absent or empty unless ``overwrite``.
        train_config: the training configuration, unevaluated; inference.json is derived from it.
        weights: state dict of ``network_def``.
        metadata: see :func:`medkd.deploy.metadata.segmentation_metadata`.
        readme: the text of docs/README.md.
        configs: further files of configs/, name → content.
        overwrite: replace an existing bundle.

    Returns:
        ``out``.

    Raises:
        ConfigError: ``out`` is not empty; metadata or training configuration are incomplete.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ConfigError(out, "is not empty", "choose another folder or pass --overwrite")
    inference = inference_config(train_config)
    content = io.BytesIO()
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    metadata = {**metadata, WEIGHTS_HASH: {"model.pt": digest}}
    check_metadata(metadata, "metadata.json")
    files: dict[str, bytes] = {
        "LICENSE": license_text().encode(),
        "configs/metadata.json": _json(metadata),
        "configs/inference.json": _json(inference),
        "docs/README.md": readme.encode(),
        "eval/schema.json": _json(SCHEMA),
        "models/model.pt": content.getvalue(),
        **{f"configs/{name}": _json(config) for name, config in (configs or {}).items()},
    }
    write_folder(out, files)
    return out


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a new folder under a temporary name, then give it its name, replacing what was there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".partial"))
    replaced = temporary.with_suffix(".replaced")
    try:
        temporary.chmod(0o755)
        for name, content in files.items():
            file = temporary / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "xb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()


def _inference_file(root: Path) -> Path:
    for name in ("inference.json", "inference.yaml", "inference.yml"):
        if (root / "configs" / name).is_file():
            return root / "configs" / name
    raise ConfigError(root, "has no configs/inference.json", "train it with medkd, or write one")


def _weights_file(root: Path) -> Path:
    for name in WEIGHTS:
        if (root / "models" / name).is_file():
            return root / "models" / name
    raise ConfigError(root, "has no models/model.pt", f"train it first: `medkd train {root}`")


def _read_metadata(root: Path) -> dict[str, Any]:
    file = root / "configs" / "metadata.json"
    return read_config(file) if file.is_file() else {}


def _parser(config: Mapping[str, Any], root: Path, device: torch.device, *, trusted: bool) -> ConfigParser:
    if trusted and (root / "scripts").is_dir() and str(root) not in sys.path:
        sys.path.insert(1, str(root))  # where MONAI's own commands find scripts.*
    parser = ConfigParser(deepcopy(dict(config)))
    parser["bundle_root"] = str(root)
    parser["device"] = f"$torch.device('{device}')"
    return parser


def _build(parser: ConfigParser, name: str, file: Path) -> Any:
    if name not in parser:
        raise ConfigError(file, f"does not define '{name}'", "define it, or use a bundle made for inference")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parser.get_parsed_content(name)
    except Exception as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{file}: {name}", f"cannot be built ({cause})", "correct the configuration") from error


def _flatten(transforms: Any) -> list[Any]:
    """The steps of nested Compose objects in their order; other compositions count as one step."""
    if type(transforms) is Compose:
        transforms = transforms.transforms
    elif not isinstance(transforms, Sequence):
        return [transforms]
    return [flat for step in transforms for flat in (_flatten(step) if type(step) is Compose else [step])]


def _ensures_channel_first(loader: LoadImage | LoadImaged) -> bool:
    return bool(getattr(getattr(loader, "_loader", loader), "ensure_channel_first", False))


def _check_weights_hash(file: Path, metadata: Mapping[str, Any]) -> None:
    recorded = metadata.get(WEIGHTS_HASH)
    expected = recorded.get(file.name) if isinstance(recorded, Mapping) else None
    if expected is None:
        return
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise ConfigError(
            file,
            f"its SHA-256 is {found[:12]}…, metadata.json says {str(expected)[:12]}…: damaged or replaced",
            f"copy it again; if you replaced it, remove '{WEIGHTS_HASH}' from metadata.json",
        )


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read weights without running any code of theirs.

    Raises:
        ConfigError: If the file is damaged, is a pickle of anything but tensors, or unpacks to far more than it is.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 2 * file.stat().st_size + 2**20:
                raise ConfigError(file, "unpacks to far more than its size", "use another copy of the bundle")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except (SafetensorError, Exception) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ConfigError(file, f"is not a readable file of weights ({reason})", "copy it again") from None
    if isinstance(content, Mapping) and set(content) == {"model"} and isinstance(content["model"], Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(torch.is_tensor(tensor) for tensor in content.values()):
        raise ConfigError(file, "does not hold one network's weights", "save network.state_dict() there")
    return dict(content)


def _load_strictly(network: nn.Module, state: Mapping[str, torch.Tensor], file: Path) -> None:
    own = network.state_dict()
    problems = []
    for title, names in (
        ("lacks", [name for name in own if name not in state]),
        ("has the unknown", [name for name in state if name not in own]),
        (
            "has another shape of",
            [name for name in own if name in state and own[name].shape != state[name].shape],
        ),
    ):
        if names:
            problems.append(f"{title} {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else ""))
    if problems:
        raise ConfigError(file, f"does not fit network_def: it {', '.join(problems)}", "use the matching weights")
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise InputError(file, f"holds values that are not finite, in {bad[0]}", "train again, or use another copy")
    network.load_state_dict(dict(state))
