"""Columns of the int64 tables by which the hot-id cache's kernels know where things are."""

# classes [widths, 5]: where the sets for rows of one width begin in the memory, how many they are, the bytes of a set
# and of a row, and by how many misses S3-FIFO leads over CLOCK there.
START, SETS, SIZE, WIDTH, DUEL = range(5)

# tables [tables, 6]: the tables of one release. PLACE is the owner's line in `owners`, DEFAULT the first byte of the
# table's default row among those of the release.
CLASS, OWNER, PLACE, SALT, SPARSE, DEFAULT = range(6)
TABLE_COLUMNS = 6

# owners [places, 16]: whoever has or had entries. An owner's number has its place in the low bits; the number that
# stands there tells whether it still is the owner. The counters, which readers write, have a cache line to themselves.
PLACE_BITS = 14
HELD_BY, RELEASE, MODEL, HELD_SALT, HELD_SPARSE = range(5)
HITS, MISSES, ABSENTS, EVICTIONS, REJECTIONS, ENTRIES = range(8, 14)
OWNER_COLUMNS = 16
