"""HTML written by functions: text is escaped unless it is `Html` already."""

from __future__ import annotations

from html import escape


class Html(str):
    """Markup, not text."""

    __slots__ = ()


def element(name: str, *children: object, **attributes: object) -> Html:
    """`element("td", "a < b", class_="number")`; a trailing underscore of an attribute goes, others become hyphens.

    An attribute that is None is left out, and so is a child.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    return Html(
        "".join(child if isinstance(child, Html) else escape(str(child)) for child in children if child is not None)
    )


def table(head: list[object], rows: list[list[object]], numbers: frozenset[int] = frozenset()) -> Html:
    """`numbers`: columns set right."""

    def cells(kind: str, row: list[object]) -> Html:
        return element("tr", *(element(kind, c, class_="number" if i in numbers else None) for i, c in enumerate(row)))

    body = element("tbody", *(cells("td", row) for row in rows))
    return element("div", element("table", element("thead", cells("th", head)), body), class_="scroll")
