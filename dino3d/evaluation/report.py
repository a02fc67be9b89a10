"""A report in one HTML file: headings, text, tables and pictures, with nothing that a browser would fetch or run."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino3d.files import TEXT, atomic_write

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e5e5e5; white-space: nowrap }
th { border-bottom: 2px solid #999 } figure { margin: 1rem 0 } img { max-width: 100% }
figcaption { color: #555; font-size: .9rem }
"""
# Whatever finds its way into the file: no script runs, nothing is fetched
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Report:
    """The parts of a report in their order; `save` writes them. All text is plain: what looks like HTML is shown as it
    stands."""

    def __init__(self, title: str) -> None:
        self.title, self.parts = title, []

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, *lines: str) -> None:
        """A paragraph for each line."""
        self.parts += [f"<p>{html.escape(line)}</p>" for line in lines]

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of values as str() shows them; numbers that are to be rounded come as text."""

        def row_of(cells: Sequence[Any], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

        lines = [row_of(header, "th"), *(row_of(row, "td") for row in rows)]
        self.parts.append("<table>\n" + "\n".join(lines) + "\n</table>")

    def figure(self, figure: Any, caption: str) -> None:
        """A matplotlib Figure. caption: what it shows, for those who can't see it too"""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        self._picture(buffer.getvalue(), caption)

    def image(self, path: Path | str, caption: str) -> None:
        """A PNG file, which becomes part of the report. Raises OSError."""
        self._picture(Path(path).read_bytes(), caption)

    def save(self, path: Path | str) -> None:
        """Write the report. Raises OSError."""
        lines = [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
            f"<title>{html.escape(self.title)}</title><style>{CSS}</style></head><body>",
            f"<h1>{html.escape(self.title)}</h1>",
            *self.parts,
            "</body></html>",
        ]
        with atomic_write(path) as part:
            part.write_text("\n".join(lines) + "\n", **TEXT)

    def _picture(self, content: bytes, caption: str) -> None:
        data, caption = base64.b64encode(content).decode(), html.escape(caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        self.parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
