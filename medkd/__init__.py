"""medkd: small, label-cheap, portable networks for medical images."""

__version__ = "0.1.0"
