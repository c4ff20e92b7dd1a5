"""What a segmentation or a classifier is worth, and how sure that is."""

from medkd.metrics.calibration import Calibration, measure_calibration, pool_calibration
from medkd.metrics.cases import CaseScore, read_per_case, score_case, summarize, write_evaluation
from medkd.metrics.overlap import dice
from medkd.metrics.statistics import Interval, PairedResult, bootstrap_ci, paired_test, relative_score
from medkd.metrics.surface import SurfaceScores, assd_mm, hd95_mm, surface_dice, surface_scores

__all__ = [
    "Calibration",
    "CaseScore",
    "Interval",
    "PairedResult",
    "SurfaceScores",
    "assd_mm",
    "bootstrap_ci",
    "dice",
    "hd95_mm",
    "measure_calibration",
    "paired_test",
    "pool_calibration",
    "read_per_case",
    "relative_score",
    "score_case",
    "summarize",
    "surface_dice",
    "surface_scores",
    "write_evaluation",
]
