"""What a look at a data set finds (`python -m tools.check`)."""

from typing import NamedTuple

ERROR, WARNING = "error", "warning"


class Problem(NamedTuple):
    """One finding. A task's `KINDS` gives the level and the meaning of each kind."""

    kind: str
    path: str  # below the data path
    reason: str
