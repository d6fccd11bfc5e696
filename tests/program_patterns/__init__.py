"""What people write in a forward, as pieces of code that the property test puts together into blocks.

A piece has what `__init__` runs, a line `---`, and what `forward` runs: from `x`, `[N, 4, 6, 6]`, to `x` of that shape.
`@` becomes a number, so that pieces don't meet each other's attributes; `CONV` becomes a conv from 4 to 4 channels that
keeps the size.
"""

from program_patterns.batch import BATCH
from program_patterns.branches import BRANCHES
from program_patterns.contexts import CONTEXTS
from program_patterns.functions import FUNCTIONS
from program_patterns.in_place import IN_PLACE
from program_patterns.patched import PATCHED
from program_patterns.plain import PLAIN
from program_patterns.random import RANDOM
from program_patterns.scope import SCOPE
from program_patterns.state import STATE
from program_patterns.styles import STYLES
from program_patterns.weights import WEIGHTS

__all__ = ["CHANNELS", "PATTERNS", "SCOPE", "SIDE", "STYLES"]

CHANNELS, SIDE = 4, 6

_TABLES = {
    "plain": PLAIN,
    "branch": BRANCHES,
    "context": CONTEXTS,
    "in place": IN_PLACE,
    "state": STATE,
    "random": RANDOM,
    "batch": BATCH,
    "function": FUNCTIONS,
    "weight": WEIGHTS,
    "conv": PATCHED,
}
PATTERNS: dict[str, str] = {
    f"{table}: {kind}": code for table, kinds in _TABLES.items() for kind, code in kinds.items()
}
