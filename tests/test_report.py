"""The HTML report, read by Python's own parser: what was put in comes out, and nothing is fetched or run."""

import base64
import html.parser
import io
import json
import re

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dino3d.evaluation.report import Report
from dino3d.evaluation.statistics import format_metric

FETCHES = re.compile(
    r"(?:https?:)?//[a-z0-9]|\b(?:href|srcset|action|poster)\s*=|@import|url\(|<\s*(?:script|link|iframe|object)"
)


class Parsed(html.parser.HTMLParser):
    """Elements, their attributes, and the text in them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def check_report(folder):
    """Parsed report.html of a run: whole by itself; the figures of all folds and of each stand in its table."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    bare = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]*"', "", text)  # base64 has slashes of its own
    assert not FETCHES.search(bare) and "src=" not in bare, FETCHES.search(bare)
    pictures = [attributes for tag, attributes in parsed.tags if tag == "img"]
    for picture in pictures:
        content = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert np.asarray(Image.open(io.BytesIO(content))).std() > 0 and picture["alt"]
    said = json.loads((folder / "metrics.json").read_text())
    cells = {text.strip() for text in parsed.texts}
    for record in (*said["folds"], said["all_folds"]):
        for name, value in record.items():
            if (
                name in ("reliability", "confusion_matrix", "logit_offset", "notes", "tolerance_mm")
                or "interval" in name
            ):
                continue
            if name.startswith("validation_"):
                continue
            interval = record.get(f"{name}_interval")
            shown = str(value) if isinstance(value, int) else format_metric(value)
            shown += f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            assert shown in cells, (name, shown)
        assert all(any(note in cell for cell in cells) for note in record["notes"])
    for name, mean in said["mean"].items():
        deviation = said["sd"][name]
        assert format_metric(mean) + (f" ± {deviation:.3f}" if deviation is not None else "") in cells, name
    return parsed, pictures


def test_what_is_put_in_comes_out(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [0, 1])
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    report = Report("AUC of <b> & others")
    report.heading("Results")
    report.text("one < two", "<script>alert(1)</script>")
    report.table(["name", 'a "quoted" one'], [["x", 0.5], ["<td>", "0.912"]])
    report.figure(figure, 'a "line"')
    report.image(tmp_path / "a.png", "a ramp")
    report.save(tmp_path / "report.html")

    parsed = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    shown = [text for text in parsed.texts if text.strip()]
    for text in ("AUC of <b> & others", "one < two", "<script>alert(1)</script>", "<td>", "0.912", 'a "quoted" one'):
        assert text in shown
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("td") == 4 and tags.count("th") == 2 and tags.count("img") == 2 and "script" not in tags
    pictures = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert [one["alt"] for one in pictures] == ['a "line"', "a ramp"]
    content = base64.b64decode(pictures[1]["src"].removeprefix("data:image/png;base64,"))
    assert content == (tmp_path / "a.png").read_bytes()
    assert all(one["src"].startswith("data:image/png;base64,") for one in pictures)
    assert not any({"href", "srcset", "onload"} & attributes.keys() for _, attributes in parsed.tags)
    policy = next(one for tag, one in parsed.tags if tag == "meta" and "content" in one)
    assert policy["content"].startswith("default-src 'none'")
