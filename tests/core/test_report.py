"""Report pages: self-contained and escaped."""

from html.parser import HTMLParser

import pytest

from nearfar.core.plots import COLORS, new_figure, style
from nearfar.core.report import Report


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def test_page_is_self_contained_and_escaped(tmp_path):
    with style():
        figure = new_figure()
        axes = figure.subplots()
        (line,) = axes.plot([0, 1], [1, 0])
    assert line.get_color() == COLORS[0]
    report = Report("A & B", "First.\n\nSecond.")
    report.section("Table").table([{"name": "<x>", "value": 0.123456}, {"name": "y", "value": None}], "numbers")
    report.figure(figure, 'a "picture"').audio(b"RIFF", "a sound").code("a < b")
    page = report.write(tmp_path / "r.html").read_text()
    links = Links()
    links.feed(page)
    assert all(source.startswith("data:") for source in links.sources)
    assert links.tags.count("p") >= 2
    assert "&lt;x&gt;" in page
    assert '<td class="n">0.1235</td>' in page
    assert "A &amp; B" in page


def test_figure_from_file(tmp_path):
    figure = new_figure(1, 1)
    figure.savefig(tmp_path / "a.png")
    assert "data:image/png;base64," in Report("x").figure(tmp_path / "a.png").parts[-1]
    with pytest.raises(FileNotFoundError):
        Report("x").figure(tmp_path / "b.png")


def test_long_pages_link_to_their_chapters(tmp_path):
    report = Report("x").section("One").text("a").section("Part", level=3).section("Two & more").section("Three")
    links = Links()
    links.feed(page := report.write(tmp_path / "r.html").read_text())
    targets = [source for source in links.sources if source.startswith("#")]
    assert len(targets) == 3
    assert all(f'id="{target[1:]}"' in page for target in targets)
    assert "<nav" not in Report("x").section("One").section("Two").write(tmp_path / "s.html").read_text()
