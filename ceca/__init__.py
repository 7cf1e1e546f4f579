"""CECA: text-to-image person retrieval. The library: it imports no Ray, and every function runs in one process."""

__version__ = "0.1.0"
