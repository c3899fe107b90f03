"""From files to batches: sources, the loader, and the two data sets that the project demonstrates itself with.

    source.py    Source: rows of many files as one ordered, sharded stream (parquet.py, csv.py)
    loader.py    Loader: a source and a FeatureTransform → batches of features and labels
    feed.py      the synthetic video feed; its world is in feed_world.py, its columns in feed_columns.py
    census.py    UCI Census-Income as Parquet

Errors: DataError (a ValueError) for everything that is wrong with files.
"""

from torchrank.data.csv import CsvSource
from torchrank.data.errors import DataError
from torchrank.data.loader import Batch, Loader
from torchrank.data.parquet import ParquetSource
from torchrank.data.source import Source

__all__ = ["Batch", "CsvSource", "DataError", "Loader", "ParquetSource", "Source"]
