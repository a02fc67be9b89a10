"""The HTML report, read by Python's own parser: what was put in comes out, and nothing is fetched or run."""

import base64
import html.parser

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dino3d.evaluation.report import Report


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
