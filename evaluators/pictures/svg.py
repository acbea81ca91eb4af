"""Drawing of the figures as SVG text: style for light and dark mode, and escaped text and lines."""

from __future__ import annotations

import html
import unicodedata

WIDTH = 760
CHARACTER = 6.6  # width of a letter at 12 px, on average
STYLE = """
.ground{fill:#ffffff;stroke:#e6e3dc}.ink{fill:#1b1c1b}.quiet{fill:#66635c}.line{stroke:#e6e3dc}
.chance{stroke:#8c8980;stroke-width:1.5;stroke-dasharray:2 3}.merge{stroke:#0d8a78;fill:#0d8a78}.open{fill:#ffffff}
text{font:12px ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.task{font-size:13px;font-weight:600}.value{font-size:11px;font-variant-numeric:tabular-nums}
.value{paint-order:stroke;stroke:#ffffff;stroke-width:3px;stroke-linejoin:round}.mean{fill:#f6f4f0}
@media (prefers-color-scheme:dark){.ground{fill:#1b1c1b;stroke:#3d3c39}.ink{fill:#f3f1ed}.quiet{fill:#b5b1a7}
.line{stroke:#35342f}.mean{fill:#222321}.value{stroke:#1b1c1b}.merge{stroke:#3fb3a2;fill:#3fb3a2}.open{fill:#1b1c1b}}
"""


def document(title: str, description: str, height: int, drawn: str) -> str:
    """SVG file with a title and a description for screen readers around the elements of `drawn`."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><desc>{escape(description)}</desc><style>{STYLE}</style>'
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>{drawn}</svg>\n'
    )


def line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line {look} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text_at(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def shortened(text: str, longest: int) -> str:
    shown = _plain(text)
    return shown if len(shown) <= longest else f"{shown[: longest - 1 - longest // 3]}…{shown[-(longest // 3) :]}"


def _plain(text: str) -> str:
    """Text without invisible characters and those that XML forbids."""
    return "".join(each for each in text if unicodedata.category(each)[0] != "C" and each.isprintable())


def escape(text: str) -> str:
    return html.escape(_plain(text), quote=True)
