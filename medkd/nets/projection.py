"""The head that a contrastive loss looks through."""

from __future__ import annotations

from torch import nn


def projection_head(in_features: int, out_features: int = 128, hidden_features: int | None = None) -> nn.Sequential:
    """SimCLR's head: linear, ReLU, linear; it is thrown away after the self-supervised stage.

    Args:
        in_features: of the encoder.
        out_features: of the projection.
        hidden_features: as many as ``in_features`` by default.

    Source: Chen et al. 2020, arXiv:2002.05709, section 2.1.
    """
    hidden = hidden_features or in_features
    return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features))
