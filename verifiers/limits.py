"""The caps that keep one verdict under 50 ms of CPU time, whatever the text is.

All but one are counts, not clocks, so a verdict does not depend on how busy the machine is. Every one is far above what
an extraction task needs; a text over a cap scores as if no JSON had been found, and the reason names the cap.
"""

from __future__ import annotations

# Characters of the whole output. A reasoning model's 32k tokens are about 130,000.
MAX_TEXT_CHARS = 150_000
# Characters of one JSON value.
MAX_JSON_CHARS = 65_536
# Objects, arrays and scalars read in one search of the text (a failed start counts as one).
MAX_VALUES = 2_000
# Containers inside one another. jsonschema recurses, and Python's stack is short.
MAX_DEPTH = 32
# Characters of one object key: keys are searched with a schema's patternProperties.
MAX_KEY_CHARS = 128
# Characters of one number: converting digits costs more than linear time.
MAX_NUMBER_CHARS = 400
# Characters of a string that a schema's `pattern` is tried on: re.search is quadratic for many ordinary patterns.
MAX_PATTERN_CHARS = 1_000
# Keyword checks of one validation; faults, long strings and patterns cost several (see `schema.py`).
MAX_SCHEMA_STEPS = 3_000
# Field paths listed in a verdict, for each of missing, invented and wrong. Counts and rewards use all of them.
MAX_REPORTED_PATHS = 200
# A run of more combining marks than this is not normalized: normalization sorts a run in quadratic time. 30 is the
# bound of Unicode's own Stream-Safe Text Format (UAX #15, section 13).
MAX_COMBINING_RUN = 30
# CPU seconds of all searches for patterns in one validation. The only clock here: how long a search goes on cannot be
# counted. Ordinary patterns take microseconds, those that backtrack exponentially more than any bound.
MAX_PATTERN_SECONDS = 0.010
# Characters of one pattern in a schema, and its size once repetitions such as {50} are written out.
MAX_PATTERN_SOURCE_CHARS = 2_000
MAX_PATTERN_SIZE = 10_000
# Patterns of one schema.
MAX_PATTERNS = 500
# A schema as JSON text: compiling takes up to a second for so many. Levels inside one another.
MAX_SCHEMA_CHARS = 100_000
MAX_SCHEMA_DEPTH = 100
