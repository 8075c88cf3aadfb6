"""What a cache did: the report of one turn, and the totals of many."""

from kvtier.report.divergence import Divergence
from kvtier.report.totals import Totals, TurnLog
from kvtier.report.turn import RowReport, TurnReport

__all__ = ["Divergence", "RowReport", "Totals", "TurnLog", "TurnReport"]
