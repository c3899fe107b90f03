"""The frame of report.html: one file with its style inside, readable in light and dark, that loads nothing."""

from __future__ import annotations

from export.html_elements import Html, element, join

_STYLE = """
:root { color-scheme: light dark;
  --back: #fbfbfa; --card: #fff; --text: #1c1c1a; --soft: #66655f; --line: #e3e2dc;
  --one: #2f6fb5; --two: #c9c8c1; --good: #2c7a4b; --bad: #b3372c; }
@media (prefers-color-scheme: dark) { :root {
  --back: #161615; --card: #1f1f1d; --text: #ebeae5; --soft: #a09f97; --line: #37362f;
  --one: #6ea8e6; --two: #4a4942; --good: #6cc08b; --bad: #f0887c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 76ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin-top: 20px; }
.tile, .scroll, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.good, .bad { font-weight: 600; }
details summary { cursor: pointer; color: var(--soft); }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
td:first-child, td div { white-space: nowrap; }
.bar { display: block; height: 6px; margin-top: 4px; border-radius: 3px; background: var(--two); min-width: 90px; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--one); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 16px; } figcaption { font-size: 14px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .count { fill: var(--one); } svg .over { fill: var(--bad); }
svg .axis { stroke: var(--line); } svg .limit { stroke: var(--bad); stroke-dasharray: 4 3; }
"""


def page(title: str, *parts: Html) -> str:
    """The whole document."""
    head = join(
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    body = element("body", element("main", *parts))
    return f"<!doctype html>\n{element('html', element('head', head), body, lang='en')}\n"


def tile(value: str, label: str) -> Html:
    return element("div", element("b", value), element("span", label), class_="tile")


def with_bar(text: str, share: float) -> Html:
    """A number over a bar; `share` of its full length, 0 to 1."""
    filled = element("i", style=f"width:{min(max(share, 0), 1) * 100:.1f}%")
    return join(text, element("span", filled, class_="bar"))
