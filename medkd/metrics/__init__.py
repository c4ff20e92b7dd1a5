"""What a segmentation, a classifier or a generated image is worth, and how sure that is."""

from medkd.metrics.calibration import Calibration, measure_calibration, pool_calibration
from medkd.metrics.cases import CaseScore, read_per_case, score_case, summarize, write_evaluation
from medkd.metrics.classification import Classified, delong_difference, delong_interval, roc_curve
from medkd.metrics.froc import Froc, find_detections, find_lesions, froc_curve, froc_intervals, match_detections
from medkd.metrics.overlap import dice
from medkd.metrics.roc import auc_difference, auc_interval, roc_auc
from medkd.metrics.statistics import Interval, PairedResult, bootstrap_ci, paired_test, relative_score
from medkd.metrics.surface import SurfaceScores, assd_mm, hd95_mm, surface_dice, surface_scores
from medkd.metrics.synthesis import Estimate, density_and_coverage, fid, kid, ssim

__all__ = [
    "Calibration",
    "CaseScore",
    "Classified",
    "Estimate",
    "Froc",
    "Interval",
    "PairedResult",
    "SurfaceScores",
    "assd_mm",
    "auc_difference",
    "auc_interval",
    "bootstrap_ci",
    "delong_difference",
    "delong_interval",
    "density_and_coverage",
    "dice",
    "fid",
    "find_detections",
    "find_lesions",
    "froc_curve",
    "froc_intervals",
    "hd95_mm",
    "kid",
    "match_detections",
    "measure_calibration",
    "paired_test",
    "pool_calibration",
    "read_per_case",
    "relative_score",
    "roc_auc",
    "roc_curve",
    "score_case",
    "ssim",
    "summarize",
    "surface_dice",
    "surface_scores",
    "write_evaluation",
]
