"""The look of ``report.html``: style sheet and page frame."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark;
  --bg: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --soft: #666a73; --rule: #e4e2dd; --grid: #ece9e4;
  --c1: #2563a8; --c2: #c2410c; --c3: #2f8f5b; --c4: #8b5fbf; --c5: #b7791f; --c6: #5b7083;
  --good: #1a7f4b; --bad: #b42318; --del: #ffdcd6; --ins: #cdeed9; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #15171b; --card: #1d2026; --ink: #e7e6e3; --soft: #9a9ea8; --rule: #32363e; --grid: #2a2e35;
  --c1: #6ba4e6; --c2: #f08a4b; --c3: #5cc28c; --c4: #b594e6; --c5: #dfb15b; --c6: #93a7b8;
  --good: #5fcf95; --bad: #ff8a7a; --del: #5c2622; --ins: #1d4a31; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
p { margin: 6px 0; } .soft, .none { color: var(--soft); }
.facts { color: var(--soft); margin: 4px 0 0; } .facts span { white-space: nowrap; margin-right: 18px; }
.badge { font-size: 13px; font-weight: 600; padding: 2px 9px; border-radius: 99px; vertical-align: 4px;
  margin-left: 8px; border: 1px solid currentColor; }
.badge.finished { color: var(--good); } .badge.interrupted, .badge.failed { color: var(--c2); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); }
.two { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.tile .big { font-size: 27px; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.tile .arrow { color: var(--soft); font-weight: 400; margin: 0 2px; }
.tile .gain { font-weight: 600; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); } .even { color: var(--soft); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg line.grid { stroke: var(--grid); } svg .axis { stroke: var(--soft); }
svg text { font: 11.5px system-ui, "DejaVu Sans", sans-serif; fill: var(--soft); } svg .label { fill: var(--ink); }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; } svg .hit { fill: transparent; stroke: none; }
svg .track { fill: var(--grid); }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.c6 { --c: var(--c6); }
svg .line, svg .estimate line { stroke: var(--c); } svg .dot, svg rect.c1, svg rect.c2, svg rect.c3, svg rect.c4,
svg rect.c5, svg rect.c6, svg .estimate path { fill: var(--c); }
svg .estimate line { stroke-width: 2; } svg .estimate path { stroke: var(--card); }
svg rect:hover { opacity: .75; }
.legend { color: var(--soft); font-size: 13px; margin-top: 4px; } .key { margin-right: 16px; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; background: var(--c);
  margin-right: 6px; }
.key i.dash { height: 3px; width: 16px; vertical-align: 3px; }
.key i.point { transform: rotate(45deg); width: 9px; height: 9px; border-radius: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--soft); font-weight: 500; }
td:first-child { white-space: normal; } tr:last-child td { border-bottom: 0; }
.scroll { overflow-x: auto; } .wide svg { min-width: 640px; } .tile svg { max-width: 300px; }
pre, .answer { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0; }
.sample { margin-bottom: 14px; } .sample .prompt { color: var(--soft); max-height: 11.5em; overflow: auto; }
.sample .sides { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr));
  margin-top: 10px; } .side { border-top: 2px solid var(--rule); padding-top: 8px; }
.verdict { font-size: 13px; margin-top: 6px; }
del { background: var(--del); text-decoration: none; border-radius: 3px; }
ins { background: var(--ins); text-decoration: none; border-radius: 3px; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--soft); }
details > :not(summary) { margin-top: 10px; }
footer { color: var(--soft); font-size: 13px; margin-top: 40px; }
@media print { .card, .sample { break-inside: avoid; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document that loads nothing; a policy in the page forbids it to.

    Characters that are not text (controls, lone surrogates, line separators) become ``?``.
    """
    document = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in document)


def card(title: str, body: str, css: str = "") -> str:
    """A box with a heading; ``body`` is HTML, ``title`` is text."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card {css}">{heading}{body}</div>'


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of texts (escaped here)."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
