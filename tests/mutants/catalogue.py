"""The mutants, all of them. A kernel that changes usually moves its mutants with it: run.py says which text it no longer
finds.
"""

from catalogue_elements import ELEMENTS
from catalogue_features import FEATURES
from catalogue_joint import JOINT
from catalogue_rows import ROWS

MUTANTS = [*FEATURES, *ROWS, *ELEMENTS, *JOINT]
