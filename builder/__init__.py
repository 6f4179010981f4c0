"""Image-text tar shards in, hybrid shards out."""

__version__ = "0.1.0"
