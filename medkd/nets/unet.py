"""U-Nets named by levels and width, as the distillation papers name theirs."""

from __future__ import annotations

from monai.networks.nets import DynUNet


def unet(levels: int, width: int, *, in_channels: int = 1, out_channels: int, spatial_dims: int = 2) -> DynUNet:
    """MONAI's DynUNet with ``levels`` resolutions and ``width`` filters at the first, doubling at each.

    Instance normalisation with learned scale keeps samples independent of their batch, so that accumulation and
    several processes compute exactly what one large batch does.

    Args:
        levels: number of resolutions, at least 2; the input's sides must be multiples of 2 ** (levels - 1).
        width: filters at full resolution.
        in_channels: image channels.
        out_channels: classes with background.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: If ``levels`` is below 2 or ``width`` below 1.
    """
    if levels < 2 or width < 1:
        raise ValueError(f"a U-Net needs levels >= 2 and width >= 1, got {levels} and {width}")
    return DynUNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=[width * 2**level for level in range(levels)],
        norm_name=("instance", {"affine": True}),
    )


def act_net_teacher(*, in_channels: int = 1, out_channels: int = 4) -> DynUNet:
    """The paper's teacher, "U-Net [6, 64]": 124,371,268 parameters for 1 channel and 4 classes.

    Source: ACT-Net, arXiv:2207.01900. Differs: DynUNet in place of the U-Net of the paper (124,387,332).
    """
    return unet(6, 64, in_channels=in_channels, out_channels=out_channels)


def act_net_student(*, in_channels: int = 1, out_channels: int = 4) -> DynUNet:
    """The paper's student, "U-Net [4, 16]": 482,388 parameters for 1 channel and 4 classes.

    Source: ACT-Net, arXiv:2207.01900. Differs: DynUNet in place of the U-Net of the paper (483,716).
    """
    return unet(4, 16, in_channels=in_channels, out_channels=out_channels)
