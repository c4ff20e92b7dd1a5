"""From files on disk to batches: datalists, volumes, streams and the embedded demo."""

from medkd.data.streams import Stream, Streams

__all__ = ["Stream", "Streams"]
