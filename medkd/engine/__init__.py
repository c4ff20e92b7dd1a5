"""The one engine: methods say what to minimise, the engine does the rest."""

from medkd.engine.checkpoint import Checkpoints
from medkd.engine.context import StepContext
from medkd.engine.handlers import MetricsLog, PauseOnSignal, Progress, SaveWeights, Validate
from medkd.engine.method import Method
from medkd.engine.trainer import MethodTrainer

__all__ = [
    "Checkpoints",
    "Method",
    "MethodTrainer",
    "MetricsLog",
    "PauseOnSignal",
    "Progress",
    "SaveWeights",
    "StepContext",
    "Validate",
]
