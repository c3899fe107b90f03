"""What is wrong with input data, said in one line."""

from __future__ import annotations


class DataError(ValueError):
    """Input that cannot be used. Names the file (or folder, or URL), the column where there is one, what was found
    and what is accepted."""

    def __init__(self, file: str, *, found: str, accepted: str, column: str | None = None) -> None:
        self.file = file
        self.column = column
        self.found = " ".join(found.split())  # what libraries say may have lines
        self.accepted = accepted
        where = file if column is None else f"{file}: column {column!r}"
        super().__init__(f"{where}: found {self.found}; accepted: {accepted}")
