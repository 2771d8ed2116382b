"""Comparisons of recipes: students of several seeds with one teacher, in a table with differences and their intervals.

``rows.py``: what is compared; ``run.py``: the trainings, in their order; ``summary.py``: the statistics and the table;
``chart.py``: the picture of the differences.
"""

from __future__ import annotations

from .rows import COMPARE, TABLES, Row, rows

# run.py is not imported here: whoever reads flags needs the rows alone.
__all__ = ["COMPARE", "TABLES", "Row", "rows"]
