"""Drawn pedestrians: a synthetic person-retrieval benchmark whose every attribute is known.

It stands in for the licensed benchmarks in demonstrations and tests: drawn people in drawn scenes, with
captions, in the published layout of CUHK-PEDES, ICFG-PEDES or RSTPReid.
"""

from .attributes import VOCABULARY, Attributes
from .captions import describe
from .generate import DrawnStatistics, draw_dataset
from .sheet import contact_sheet

__all__ = ["VOCABULARY", "Attributes", "DrawnStatistics", "contact_sheet", "describe", "draw_dataset"]
