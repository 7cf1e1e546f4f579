"""Drawn pedestrians: a synthetic person-retrieval benchmark with known attributes.

Demonstrations and tests use it in place of the licensed benchmarks. It consists of drawn people in drawn scenes with
captions, in the published layout of CUHK-PEDES, ICFG-PEDES or RSTPReid.
"""

from ceca.datasets.drawn.attributes import VOCABULARY, Attributes
from ceca.datasets.drawn.captions import describe
from ceca.datasets.drawn.generate import DrawnStatistics, draw_dataset
from ceca.datasets.drawn.sheet import contact_sheet

__all__ = ["VOCABULARY", "Attributes", "DrawnStatistics", "contact_sheet", "describe", "draw_dataset"]
