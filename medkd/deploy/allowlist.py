"""Which names a configuration may use without being trusted by its hash.

MONAI imports and calls every ``_target_`` of a configuration. Being inside an allowed package is not enough, since
``torch.os.system`` is; so a name has to be *defined* in an allowed module. The lists err on the side of refusing: what
is refused still runs with ``--trust``.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

MODULES = (
    "ignite.engine",
    "ignite.handlers",
    "ignite.metrics",
    "medkd.data",
    "medkd.engine",
    "medkd.losses",
    "medkd.methods",
    "medkd.metrics",
    "medkd.nets",
    "medkd.schedules",
    "medkd.wsi.patches",
    "medkd.wsi.stain",
    "medkd.wsi.stain_transforms",
    "monai.engines",
    "monai.handlers",
    "monai.inferers",
    "monai.losses",
    "monai.metrics",
    "monai.networks.blocks",
    "monai.networks.layers",
    "monai.networks.nets",
    "monai.networks.schedulers",
    "monai.optimizers",
    "monai.transforms",
    "torch.nn",
    "torch.optim",
)

# Parts of the above that reach the network, run a compiler, pick third-party code by name or write where they are told.
FORBIDDEN_MODULES = (
    "ignite.handlers.clearml_logger",
    "ignite.handlers.fbresearch_logger",
    "ignite.handlers.mlflow_logger",
    "ignite.handlers.neptune_logger",
    "ignite.handlers.polyaxon_logger",
    "ignite.handlers.tensorboard_logger",
    "ignite.handlers.visdom_logger",
    "ignite.handlers.wandb_logger",
    "medkd.data.archives",
    "medkd.data.atomic",
    "medkd.data.fetch",
    "medkd.data.make",
    "medkd.data.prepare",
    "monai.handlers.clearml_handlers",
    "monai.handlers.mlflow_handler",
    "monai.handlers.trt_handler",
    "monai.losses.perceptual",
    "monai.networks.layers.filtering",
    "monai.networks.layers.gmm",
    "monai.networks.nets.cell_sam_wrapper",
    "monai.networks.nets.milmodel",
    "monai.networks.nets.torchvision_fc",
    "monai.networks.nets.transchex",
    "monai.optimizers.lr_finder",
    "monai.transforms.utils_create_transform_ims",
)


def words(text: str) -> frozenset[str]:
    """The words of a list written as text."""
    return frozenset(text.split())


FORBIDDEN_NAMES = words(
    "CuCIM CuCIMd RandCuCIM RandCuCIMd RandTorchIO RandTorchIOd RandTorchVision RandTorchVisiond"
    " SaveClassificationd TorchIO TorchIOd TorchVision TorchVisiond WriteFileMapping WriteFileMappingd"
    " SpawnedProcess"
)
_FORBIDDEN_FUNCTION = re.compile(
    r"write|save|dump|download|fetch|upload|delete|remove|make_|export|pretrained|register"
)

# Single names from modules that are otherwise closed.
_MONAI_DATA = (
    "ArrayDataset CacheDataset DataLoader Dataset DistributedSampler DistributedWeightedRandomSampler GridPatchDataset"
    " ITKReader ITKWriter MetaTensor NibabelReader NibabelWriter NrrdReader PILReader PILWriter PatchDataset"
    " PatchIter PatchIterd PydicomReader ShuffleBuffer SmartCacheDataset TestTimeAugmentation ThreadDataLoader"
    " ZipDataset decollate_batch list_data_collate load_decathlon_datalist load_decathlon_properties"
    " no_collation pad_list_data_collate partition_dataset partition_dataset_classes select_cross_validation_folds"
)
_TORCH = (
    "Generator Size amp.GradScaler arange as_tensor cuda.current_device cuda.device_count cuda.is_available"
    " cuda.set_device device distributed.barrier distributed.destroy_process_group distributed.get_rank"
    " distributed.get_world_size distributed.init_process_group distributed.is_available distributed.is_initialized"
    " full linspace manual_seed ones sigmoid softmax tensor zeros utils.data.ConcatDataset utils.data.DataLoader"
    " utils.data.Dataset utils.data.RandomSampler utils.data.SequentialSampler utils.data.Subset"
    " utils.data.TensorDataset utils.data.WeightedRandomSampler utils.data.distributed.DistributedSampler"
)
_NUMPY = (
    "arange array bool_ clip deg2rad e float16 float32 float64 full inf int16 int32 int64 int8 linspace log max mean"
    " min nan ones pi prod radians round sqrt sum uint16 uint32 uint64 uint8 zeros"
)
# Albumentations that compute on pixels alone: none takes a function, a path or another image.
_ALBUMENTATIONS = (
    "AdditiveNoise Affine Blur CLAHE CenterCrop ChannelDropout ChannelShuffle CoarseDropout ColorJitter D4 Defocus"
    " Downscale ElasticTransform Emboss GaussNoise GaussianBlur GridDistortion GridDropout HEStain"
    " HorizontalFlip HueSaturationValue ISONoise ImageCompression InvertImg MedianBlur MotionBlur MultiplicativeNoise"
    " NoOp OneOf OpticalDistortion PadIfNeeded Perspective PiecewiseAffine PlanckianJitter Posterize RGBShift"
    " RandomBrightnessContrast RandomCrop RandomGamma RandomResizedCrop RandomRotate90 RandomScale RandomSizedCrop"
    " RandomToneCurve Resize Rotate SafeRotate Sequential Sharpen ShiftScaleRotate SomeOf Solarize ToGray Transpose"
    " UnsharpMask VerticalFlip ZoomBlur"
)
_MATH = "ceil cos exp floor inf log pi sin sqrt"
_PATH = "basename dirname exists isdir isfile join splitext"
NAMES = frozenset(
    [f"monai.data.{name}" for name in _MONAI_DATA.split()]
    + [f"torch.{name}" for name in _TORCH.split()]
    + [f"numpy.{name}" for name in _NUMPY.split()]
    + [f"os.path.{name}" for name in _PATH.split()]
    + [f"math.{name}" for name in _MATH.split()]
    + [f"albumentations.{name}" for name in _ALBUMENTATIONS.split()]
    + ["glob.glob", "pathlib.Path", "monai.utils.set_determinism", "monai.utils.ensure_tuple", "monai.__version__"]
)

# Parameters by which a component imports, unpickles, downloads or writes what its caller names.
CODE_PARAMETERS = frozenset({"allow_pickle", "merger_cls", "pickle_module", "reader", "weights_only", "writer"})
DOWNLOAD_PARAMETERS = frozenset({"path_or_repo_id", "pretrained", "pretrained_path", "pretrained_url"})
WRITE_PARAMETERS = words(
    "base_path cache_dir ckpt_dir dirname filename final_filename folder_layout key_metric_filename log_dir"
    " folder mapping_file_path out output_dir root_dir run_dir save_dir save_handler summary_writer"
)
READERS = frozenset({"ITKReader", "NibabelReader", "NrrdReader", "PILReader", "PydicomReader", "VolumeReader"})
WRITERS = frozenset({"ITKWriter", "NibabelWriter", "PILWriter"})
MERGERS = frozenset({"AvgMerger"})


class Refused(Exception):  # noqa: N818 - carries the reason of a refusal, is not an error of its own
    """Why a name or an expression is outside the allow-list."""


def check_component_name(dotted: str) -> Any:
    """Resolve the full dotted name of a class, function or constant.

    Args:
        dotted: for example ``"monai.networks.nets.UNet"``.

    Returns:
        The object.

    Raises:
        Refused: If it is not on the allow-list; nothing outside the allowed packages is imported to find out.
    """
    value = _resolve(dotted)
    if isinstance(value, Refused):
        raise value
    return value


@lru_cache(maxsize=4096)
def _resolve(dotted: str) -> Any:
    try:
        return _resolve_allowed(dotted)
    except Refused as refusal:
        return refusal


def _resolve_allowed(dotted: str) -> Any:
    parts = dotted.split(".")
    if dotted in NAMES:
        if parts[0] == "albumentations":
            importlib.import_module("medkd.data.patch_augment")  # imports it without its question to the network
        value: Any = importlib.import_module(parts[0])
        for position, part in enumerate(parts[1:], start=1):
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[: position + 1]))
            value = getattr(value, part)
        return value
    for part in parts:
        if not part.isidentifier() or part.startswith("_"):
            raise Refused(f"'{dotted}' is not a plain public name")
    if parts[:2] == ["torch", "backends"] and len(parts) == 4 and parts[2] in ("cudnn", "mps"):
        value = getattr(getattr(torch.backends, parts[2]), parts[3], None)
        if isinstance(value, bool):
            return value
    if len(parts) == 2 and parts[0] == "torch" and isinstance(getattr(torch, parts[1], None), torch.dtype):
        return getattr(torch, parts[1])
    home = next((module for module in MODULES if dotted.startswith(f"{module}.")), None)
    if home is None:
        raise Refused(f"'{dotted}' is outside the allowed modules")
    value = _walk(dotted, home)
    return _check_resolved(dotted, value)


def _walk(dotted: str, home: str) -> Any:
    value: Any = importlib.import_module(home)
    name = home
    for part in dotted[len(home) + 1 :].split("."):
        name = f"{name}.{part}"
        if isinstance(value, ModuleType) and not hasattr(value, part):
            try:
                value = importlib.import_module(name)
            except ImportError:
                raise Refused(f"'{dotted}' does not exist") from None
            continue
        if not (isinstance(value, ModuleType) or (inspect.isclass(value) and issubclass(value, enum.Enum))):
            raise Refused(f"'{dotted}' reaches into an object")
        if not hasattr(value, part):
            raise Refused(f"'{dotted}' does not exist")
        value = getattr(value, part)
        if isinstance(value, ModuleType) and value.__name__ != name:
            raise Refused(f"'{dotted}' leads to the module '{value.__name__}'")
    return value


def _check_resolved(dotted: str, value: Any) -> Any:
    if isinstance(value, int | float | str | bool | tuple | torch.dtype | enum.Enum | type(None)):
        return value
    if isinstance(value, ModuleType):
        raise Refused(f"'{dotted}' is a module")
    if not (inspect.isclass(value) or isinstance(value, FunctionType | BuiltinFunctionType)):
        raise Refused(f"'{dotted}' is neither a class, a function nor a constant")
    defined_in = str(getattr(value, "__module__", None))
    public = f"{defined_in}.{value.__name__}"
    inside = any(defined_in == module or defined_in.startswith(f"{module}.") for module in MODULES)
    if not (inside or public in NAMES):
        raise Refused(f"'{dotted}' is defined in '{defined_in}', outside the allowed modules")
    if any(defined_in == module or defined_in.startswith(f"{module}.") for module in FORBIDDEN_MODULES):
        raise Refused(f"'{dotted}' can reach the network, run a compiler or write files")
    if value.__name__ in FORBIDDEN_NAMES:
        raise Refused(f"'{dotted}' runs code it is given by name or writes where it is told")
    if not inspect.isclass(value) and _FORBIDDEN_FUNCTION.search(value.__name__):
        raise Refused(f"'{dotted}' writes files or reaches the network")
    return value


def sensitive_parameters(component: Any) -> frozenset[str]:
    """The parameters of a class or function by which its caller could name code, downloads or files to write."""
    if str(getattr(component, "__module__", "")).split(".")[0] not in {"ignite", "medkd", "monai", "torch"}:
        return frozenset()
    try:
        names = inspect.signature(component).parameters.keys()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(names) & (CODE_PARAMETERS | DOWNLOAD_PARAMETERS | WRITE_PARAMETERS)
