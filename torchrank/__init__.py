"""torchrank: from raw columns to a ranked list."""

__version__ = "0.1.0"
