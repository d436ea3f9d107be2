"""Sources of images: one module for each layout of files, and a registry that opens them by name."""

from firstlight.pipeline.data.sources.registry import SOURCES, open_source
from firstlight.pipeline.data.sources.source import Record, Source, SourceOptions, SourcePart

__all__ = ["SOURCES", "Record", "Source", "SourceOptions", "SourcePart", "open_source"]
