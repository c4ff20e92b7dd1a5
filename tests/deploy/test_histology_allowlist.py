"""What a configuration for slides may use without trust: pixel transforms, not what calls functions or reads files."""

from __future__ import annotations

import inspect

import pytest

from medkd.deploy.allowlist import NAMES, Refused, check_component_name

ALBUMENTATIONS = sorted(name for name in NAMES if name.startswith("albumentations."))


@pytest.mark.parametrize(
    "name",
    [
        *ALBUMENTATIONS,
        "medkd.data.patch_augment.Albumented",
        "medkd.losses.classification.cross_entropy_loss",
        "medkd.wsi.patches.FolderTiles",
        "medkd.wsi.patches.slide_tiles",
        "medkd.wsi.stain.Macenko",
        "medkd.wsi.stain_transforms.StainJitterd",
    ],
)
def test_what_slides_need_is_allowed(name):
    assert callable(check_component_name(name))


@pytest.mark.parametrize("name", ALBUMENTATIONS)
def test_no_allowed_transform_takes_functions_or_other_images(name):
    parameters = inspect.signature(check_component_name(name)).parameters.values()
    assert not [parameter.name for parameter in parameters if "Callable" in str(parameter.annotation)]
    assert not {parameter.name for parameter in parameters} & {"read_fn", "reference_images", "metadata_key"}


@pytest.mark.parametrize(
    "name",
    [
        "albumentations.Lambda",
        "albumentations.FDA",
        "albumentations.HistogramMatching",
        "albumentations.OverlayElements",
        "albumentations.from_dict",
        "albumentations.load",
        "albumentations.save",
        "albumentations.check_version.fetch_version_info",
        "albumentations.check_for_updates",
        "albumentations.core.serialization.load",
        "medkd.wsi.patches.Slide",
        "medkd.wsi.patches.os.system",
        "medkd.wsi.grid.TileGrid",
        "medkd.wsi.export.write_prediction",
        "medkd.wsi.viewer",
    ],
)
def test_what_runs_code_reads_or_writes_files_is_not(name):
    with pytest.raises(Refused):
        check_component_name(name)
