"""Sources of images: a folder, tables, tar files, Hugging Face datasets, and the published layouts.

A source yields named records (`ceca.datasets.records`) one at a time, and reads the bytes of some of them.
"""

from ceca.datasets.sources.choose import KINDS, open_source
from ceca.datasets.sources.source import Source

__all__ = ["KINDS", "Source", "open_source"]
