"""CECA: text-to-image person retrieval. The library half: no Ray here, every function runs in one process."""

__version__ = "0.1.0"
