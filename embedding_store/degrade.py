"""What stands in for rows that could not be fetched, table by table; never without a flag in the row's status.

    cache      another look: a concurrent look-up may have brought the row meanwhile
    previous   the cached row of the release of this model that was in use before: status STALE
    default    the table's default row: status UNAVAILABLE
    error      the whole look-up fails with StoreUnavailable

The steps of a table are tried in order, each for the rows that the one before left over; what the last one leaves over
is an error. An id that the table does not have is not degraded at all: its status is ABSENT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

STEPS = ("cache", "previous", "default", "error")
_LAST = ("default", "error")  # leave nothing over

Steps = tuple[str, ...]
STRICT: Steps = ("cache", "error")


def parse_steps(text: str) -> Steps:
    """`cache,previous,default`. Raises ValueError."""
    return _checked(part.strip() for part in text.split(","))


def _checked(steps: Iterable[str]) -> Steps:
    known = tuple(steps)
    for place, step in enumerate(known):
        if step not in STEPS:
            raise ValueError(f"what to do for unavailable rows: {step!r} is unknown; accepted: {', '.join(STEPS)}")
        if step in known[:place]:
            raise ValueError(f"what to do for unavailable rows: {step!r} occurs twice in {','.join(known)}")
        if step in _LAST and place + 1 < len(known):
            raise ValueError(f"what to do for unavailable rows: {known[place + 1]!r} is never reached after {step!r}")
    return known


@dataclass(frozen=True, slots=True)
class DegradePolicy:
    """steps: for every table that `tables` does not name. max_default_share: of the ids of one look-up, 0 … 1, how many
    may be answered with default rows because they could not be fetched; more are an error."""

    steps: Steps = STRICT
    tables: Mapping[str, Steps] = field(default_factory=dict)
    max_default_share: float = 1.0

    def __post_init__(self) -> None:
        for steps in (self.steps, *self.tables.values()):
            _checked(steps)
        if not 0 <= self.max_default_share <= 1:
            raise ValueError(f"share of defaults {self.max_default_share:g}; accepted: 0 to 1")

    def of(self, table: str) -> Steps:
        return self.tables.get(table, self.steps)

    def check(self, release: str, tables: Iterable[str]) -> None:
        """Raises ValueError where it names a table that is not among those of the release, the only one in use."""
        there = set(tables)
        for table in sorted(self.tables.keys() - there):
            raise ValueError(
                f"--on-unavailable {table}={','.join(self.tables[table])}: {release} has no table {table!r}; "
                f"it has: {', '.join(sorted(there)) or 'none'}"
            )


def parse_policy(options: Iterable[str], max_default_share: float = 1.0) -> DegradePolicy:
    """Each option is `STEPS`, for all tables, or `TABLE=STEPS`. Raises ValueError."""
    steps, tables = STRICT, {}
    for option in options:
        table, equals, text = option.rpartition("=")
        if equals:
            tables[table] = parse_steps(text)
        else:
            steps = parse_steps(text)
    return DegradePolicy(steps, tables, max_default_share)
