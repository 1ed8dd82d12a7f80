"""Pieces of a self-contained HTML page: tables with bars, histograms and pictures as inline SVG. Nothing is fetched.

A piece is ``Html``; any other text is escaped where it is put into one, so that a tag or a key cannot become markup.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

GENERATOR = "anime-base-trainer inspect_shards"  # by this a page is known as ours


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """One chapter of the page; ``anchor`` is its place in the table of contents."""

    anchor: str
    title: str
    parts: Sequence[Html]


def escape(value: Any) -> Html:
    """A value as text of a page; ``Html`` stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Several pieces as one."""
    return Html(between.join(escape(part) for part in parts))


def element(name: str, content: Any, class_: str = "") -> Html:
    """``<name class=...>content</name>``; names and classes are ours."""
    opening = f'<{name} class="{class_}">' if class_ else f"<{name}>"
    return Html(f"{opening}{escape(content)}</{name}>")


def paragraph(text: Any) -> Html:
    return element("p", text)


def notice(text: Any) -> Html:
    """What the reader must not miss."""
    return element("p", text, "notice")


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Large numbers with what they are."""
    cells = [element("div", join([element("b", value), element("span", name)])) for name, value in pairs]
    return element("div", join(cells), "facts")


def number(value: float, digits: int = 0) -> str:
    """12,345 or 1.25."""
    return f"{value:,.{digits}f}"


def percent(part: float, whole: float) -> str:
    """A share with as many digits as tell it from none and from all."""
    if not whole:
        return "-"
    share = 100 * part / whole
    if 0 < share < 0.05 or 99.95 < share < 100:
        return f"{share:.3f}%"
    return f"{share:.1f}%"


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Sequence[int] = (), caption: str = "",
    class_: str = "wide",
) -> Html:  # fmt: skip
    """A table; columns in ``numeric`` are aligned to the right."""

    def line(name: str, cells: Sequence[Any]) -> Html:
        return element("tr", join(element(name, cell, "n" * (i in numeric)) for i, cell in enumerate(cells)))

    title = [element("caption", caption)] if caption else []
    body = join(line("td", row) for row in rows)
    whole = join([*title, element("thead", line("th", head)), element("tbody", body)])
    return element("div", element("table", whole), f"scroll {class_}")


def bar(share: float) -> Html:
    """A bar of a table's cell, ``share`` of its width."""
    width = 100 * min(max(share, 0.0), 1.0)
    return Html(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="fill" width="{width:.2f}" height="10"/></svg>'
    )


def bars(name: str, counts: Sequence[tuple[Any, int]], whole: int, caption: str = "", things: str = "images") -> Html:
    """Counts as a table with shares of ``whole`` and bars, the longest for the largest count."""
    most = max((count for _, count in counts), default=0) or 1
    rows = [(label, number(count), percent(count, whole), bar(count / most)) for label, count in counts]
    return table([name, things, "share", ""], rows, numeric=(1, 2), caption=caption, class_="bars")


def histogram(counts: Sequence[int], step: int, marks: Sequence[int]) -> Html:
    """Captions by tokens: columns for 1 .. step, step + 1 .. 2 step, ...; dashed lines at ``marks``, multiples of
    ``step``.
    """
    width, height, most = 24 * len(counts), 160, max(counts, default=0) or 1
    parts = []
    for place, count in enumerate(counts):
        tall = round(height * count / most, 1)
        title = f"<title>{place * step + 1} to {(place + 1) * step} tokens: {number(count)}</title>"
        parts.append(
            f'<rect class="fill" x="{24 * place + 2}" y="{height - tall}" width="20" height="{tall}">{title}</rect>'
        )
    for mark in marks:
        x = 24 * mark / step
        parts.append(f'<line class="mark" x1="{x:g}" x2="{x:g}" y1="-18" y2="{height}"/>')
        parts.append(f'<text class="mark" x="{x:g}" y="-24">{mark}</text>')
    every = max(1, -(-len(counts) // 20))
    parts += [
        f'<text x="{24 * place}" y="{height + 18}">{place * step}</text>' for place in range(0, len(counts) + 1, every)
    ]
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>')
    return Html(
        f'<div class="scroll"><svg class="histogram" viewBox="-20 -44 {width + 40} {height + 74}" role="img" '
        f'aria-label="captions by tokens" style="width:{width + 40}px">{"".join(parts)}</svg></div>'
    )


def columns(parts: Iterable[Html]) -> Html:
    """Pieces beside each other where there is room."""
    return element("div", join(element("div", part) for part in parts), "columns")


def bucket_icon(width: int, height: int) -> Html:
    """A bucket's shape, small."""
    scale = 18 / max(width, height)
    w, h = width * scale, height * scale
    return Html(
        '<svg class="icon" viewBox="0 0 20 20" aria-hidden="true">'
        f'<rect x="{10 - w / 2:.1f}" y="{10 - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}" rx="1.5"/></svg>'
    )


def picture(
    jpeg: bytes, size: tuple[int, int], title: str, crop: tuple[float, float, float, float] | None = None
) -> Html:
    """A JPEG inside the page; ``crop`` (left, top, width, height in pixels of ``size``) is framed, the rest dimmed."""
    width, height = size
    data = base64.b64encode(jpeg).decode()
    parts = [f'<image href="data:image/jpeg;base64,{data}" width="{width}" height="{height}"/>']
    if crop is not None:
        x, y, w, h = crop
        inner = f"M{x:.2f} {y:.2f}h{w:.2f}v{h:.2f}h{-w:.2f}z"
        parts.append(f'<path class="dim" fill-rule="evenodd" d="M0 0h{width}v{height}H0z{inner}"/>')
        parts.append(f'<path class="crop" d="{inner}"/>')
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
    return element("figure", join([Html(drawing), element("figcaption", title)]))


def page(title: str, subtitle: Any, sections: Sequence[Section]) -> str:
    """The whole page, with a table of contents."""
    links = [
        element("li", Html(f'<a href="#{section.anchor}">{html.escape(section.title)}</a>')) for section in sections
    ]
    chapters = [
        Html(f'<section id="{section.anchor}"><h2>{html.escape(section.title)}</h2>{join(section.parts)}</section>')
        for section in sections
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{GENERATOR}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # the page asks for nothing, and could not if something in it wanted to
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1>{element('p', subtitle)}</header>\n"
        f"<nav>{element('ul', join(links))}</nav>\n<main>\n{join(chapters, chr(10))}\n</main>\n</body>\n</html>\n"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #f6f7f9; --card: #fff; --line: #dfe3e9;
  --fill: #3f6fd8; --track: #e9ecf2; --mark: #c2410c; --warn: #fff4e0; --warn-line: #e6a23c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #9aa5b5; --paper: #13171e; --card: #1b212b;
  --line: #2f3846; --fill: #7aa2ff; --track: #28303d; --mark: #fb923c; --warn: #33290f; --warn-line: #a8781e; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; }
header p { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 1; margin: 1.2rem -1.5rem; padding: .5rem 1.5rem; background: var(--paper);
  border-bottom: 1px solid var(--line); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0; padding: 0; list-style: none; }
a { color: var(--fill); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem 1.4rem;
  margin: 0 0 1.2rem; scroll-margin-top: 4.5rem; }
p { margin: 0 0 .8rem; max-width: 62rem; }
p.notice { max-width: none; }
.notice { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem .8rem; border-radius: 4px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem 1.2rem;
  margin: 0 0 .8rem; }
.facts div { display: flex; flex-direction: column; }
.facts b { font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.25; }
.facts span { color: var(--soft); font-size: .86rem; }
.columns { columns: 2 25rem; column-gap: 2.2rem; }
.columns > div { break-inside: avoid; margin: 0 0 1rem; }
.nowrap { white-space: nowrap; }
.scroll { overflow-x: auto; margin: 0 0 .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding: 0 0 .3rem; }
th { color: var(--soft); font-weight: 500; font-size: .84rem; text-align: left; vertical-align: bottom; }
th, td { padding: .22rem .9rem .22rem 0; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
td { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; overflow-wrap: normal; }
td:has(.bar) { min-width: 6rem; padding-right: 0; }
.bars table { table-layout: fixed; max-width: 46rem; }
.bars th:nth-child(2) { width: 5.8rem; } .bars th:nth-child(3) { width: 4.6rem; } .bars th:nth-child(4) { width: 26%; }
.bars th:nth-child(3), .bars td:nth-child(3) { padding-right: .8rem; }
.wide td:has(.bar) { width: 30%; }
.bar { display: block; width: 100%; height: .6rem; border-radius: 3px; }
.track { fill: var(--track); } .fill { fill: var(--fill); }
.icon { width: 1.25rem; height: 1.25rem; vertical-align: -.3rem; margin-right: .45rem; }
.icon rect { fill: var(--track); stroke: var(--fill); }
.histogram { display: block; max-width: 100%; min-width: 24rem; height: auto; }
.histogram text { fill: var(--soft); font-size: 11px; text-anchor: middle; }
.histogram .axis { stroke: var(--line); }
.histogram line.mark { stroke: var(--mark); stroke-dasharray: 4 3; }
.histogram text.mark { fill: var(--mark); font-weight: 600; font-size: 12px; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1.2rem; }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; min-width: 0; }
.sample h3 { margin: 0 0 .1rem; font-size: 1rem; overflow-wrap: anywhere; }
.sample p { margin: 0 0 .6rem; }
.pictures { display: flex; gap: .8rem; align-items: flex-start; }
figure { margin: 0 0 .6rem; flex: 1 1 0; min-width: 0; max-width: 20rem; }
figure svg { display: block; max-width: 100%; max-height: 18rem; border-radius: 4px; background: var(--track); }
figcaption, .soft { color: var(--soft); font-size: .84rem; }
.dim { fill: #000; fill-opacity: .45; } .crop { fill: none; stroke: #ff5a36; stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
.caption { font-size: .88rem; overflow-wrap: anywhere; }
.caption b { color: var(--soft); font-weight: 500; }
"""
