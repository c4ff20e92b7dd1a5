"""Self-contained HTML reports of runs and comparisons, and the pictures in them."""

from medkd.report.gallery import picture_name, representative_cases
from medkd.report.html import write_comparison, write_report
from medkd.report.overlays import overlay, overlay_volume

__all__ = ["overlay", "overlay_volume", "picture_name", "representative_cases", "write_comparison", "write_report"]
