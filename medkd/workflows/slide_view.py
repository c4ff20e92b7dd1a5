"""``medkd slide view``: look at a slide, and at what a model found on it, in a browser on this computer."""

from __future__ import annotations

import logging
import webbrowser
from collections.abc import Callable
from pathlib import Path

from medkd.wsi.slides import Slide
from medkd.wsi.viewer import ViewerServer, find_overlay

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8650


def view_slide(
    slide: str | Path,
    overlay: str | Path | None = None,
    port: int = DEFAULT_PORT,
    *,
    mpp: float | None = None,
    open_browser: bool = False,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve a page with the slide on 127.0.0.1 until interrupted (Ctrl-C).

    Args:
        slide: the slide's file.
        overlay: a folder that holds its prediction, as `slide predict` writes it.
        port: where to listen; 0 takes any free one.
        mpp: µm per pixel of the slide at level 0, in place of what the file says.
        open_browser: open the page in the default browser.
        announce: called with the page's address as soon as it can be opened. The address holds a secret that keeps
            other users of this computer out, so it is not logged.

    Raises:
        InputError: the slide or the prediction cannot be read, or they do not belong together.
        ConfigError: the port cannot be used.
    """
    with Slide(slide, mpp=mpp) as opened:
        prediction = None if overlay is None else find_overlay(overlay, opened)
        server = ViewerServer(opened, prediction, port)
        logger.info("%s is shown on port %d", opened.path.name, server.port)
        try:
            if announce is not None:
                announce(server.address)
            if open_browser:
                webbrowser.open(server.address)
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("the viewer was stopped")
        finally:
            server.close()
