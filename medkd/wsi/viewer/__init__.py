"""A local web page that shows one slide and what a model found on it."""

from medkd.wsi.viewer.deep_zoom import DeepZoom
from medkd.wsi.viewer.overlay import Overlay, find_overlay
from medkd.wsi.viewer.server import ViewerServer

__all__ = ["DeepZoom", "Overlay", "ViewerServer", "find_overlay"]
