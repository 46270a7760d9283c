"""What the page, the tables and the pictures of an analysis show are its numbers."""

import base64
import csv
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from analysis_fixtures import CLOSE, SIZES, E, K, analysis, analysis_of_series, texts, trained
from lightning_fixtures import word_tokenizer
from PIL import Image

from lightning_moe import analyze, write_report
from lightning_moe.analysis import definitions
from lightning_moe.analysis.charts import Line, bar_chart, line_chart
from lightning_moe.analysis.page import written
from lightning_moe.analysis.verdict import findings, short_names, verdict
from lightning_moe.canvas import SCALE, SERIES
from lightning_moe.heatmap import RELATIVE, SHARE, heatmap

PAPERS = re.compile(r"https://arxiv\.org/abs/\d{4}\.\d{5}")


@pytest.fixture(scope="module")
def model():
    return trained(60)


@pytest.fixture(scope="module")
def found():
    return analysis()


@pytest.fixture(scope="module")
def series():
    return analysis_of_series()


# --- the report ---


class Page(HTMLParser):
    """What a page refers to, its pictures, its tables and the tags left open."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.links, self.sources, self.ids, self.tags, self.open, self.cells = [], [], set(), Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags[tag] += 1
        self.open += [tag] * (tag not in self.VOID)
        self.links += [values[key] for key in ("href",) if key in values]
        self.sources += [values[key] for key in ("src",) if key in values]
        self.ids.add(values.get("id"))
        self.cells += [""] * (tag == "td")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture(scope="module")
def report(series, found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    # the studies of one and the checkpoints of the other
    result = type(found)(**{**vars(found), "checkpoints": series.checkpoints})
    write_report(result, folder)
    return result, folder


def test_the_page_needs_nothing_but_itself(report):
    _, folder = report
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(PAPERS.fullmatch(link) or link.removeprefix("#") in page.ids for link in page.links)
    assert any(PAPERS.fullmatch(link) for link in page.links)
    assert text.count("http") == text.count("https://arxiv.org/abs/")


def test_the_pictures_of_the_page_are_the_files(report):
    _, folder = report
    page = Page((folder / "report.html").read_text())
    inside = {base64.b64decode(source.partition(",")[2]) for source in page.sources}
    files = {path.read_bytes() for path in folder.glob("*.png")}
    assert inside == files
    assert len(files) == len(list(folder.glob("*.png"))) >= 12
    for picture in files:
        assert Image.open(BytesIO(picture)).width <= 2 * 900


def test_the_json_holds_every_number(report):
    result, folder = report
    assert json.loads((folder / "analysis.json").read_text()) == result.to_dict()


def rows_of(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_the_numbers(report):
    result, folder = report
    by_name = {layer.name: layer for layer in result.layers}
    for row in rows_of(folder, "layers"):
        layer = by_name[row["layer"]]
        for name in ("max_violation", "routing_entropy", "router_margin", "weight_cosine", "output_cka"):
            assert float(row[name]) == getattr(layer, name)
        assert float(row["domain_total_variation_chance_limit"]) == layer.domain_total_variation.limit
    for row in rows_of(folder, "experts"):
        layer, expert = by_name[row["layer"]], int(row["expert"])
        assert float(row["load"]) == layer.load[expert]
        assert float(row["relative_load"]) == CLOSE(layer.load[expert] / (sum(layer.load) / E))
        assert float(row["share_of_code"]) == layer.domain_shares[1][expert]
    for row in rows_of(folder, "coactivation"):
        assert float(row["share"]) == by_name[row["layer"]].coactivation[int(row["expert"])][int(row["other"])]
    for row in rows_of(folder, "studies"):
        study = next(s for s in result.studies if (s.name, str(s.setting or "")) == (row["study"], row["setting"]))
        assert float(row["loss"]) == study.loss[row["domain"]]
        assert float(row["difference"]) == study.loss[row["domain"]] - result.studies[0].loss[row["domain"]]
    for row in rows_of(folder, "checkpoints"):
        checkpoint = next(one for one in result.checkpoints if one.name == row["checkpoint"])
        assert float(row["saturation"]) == checkpoint.saturation[list(by_name).index(row["layer"])]
    assert len(rows_of(folder, "tokens")) == sum(
        len(tokens) for layer in result.layers for tokens in layer.specialized_tokens
    )


def test_the_tables_of_the_page_hold_the_numbers(report):
    result, folder = report
    cells = Page((folder / "report.html").read_text()).cells
    for layer in result.layers:
        place = cells.index(layer.name)
        assert cells[place + 1] == str(E)
        told = [float(cell) for cell in cells[place + 2 : place + 4]]
        assert told == pytest.approx([K, layer.max_violation], abs=5e-4)
    for study in result.studies:
        place = cells.index(study.label)
        told = [float(cell) for cell in cells[place + 1 : place + 3]]
        assert told == pytest.approx(list(study.loss.values()), abs=5e-4)


def test_small_numbers_are_no_zeros():
    assert [written(value) for value in (0.0, 0.00123, -0.5, 1234, None, "x")] == [
        "0.000", "0.0012", "-0.500", "1,234", "-", "x",
    ]  # fmt: skip


def test_what_is_in_the_texts_cannot_become_html(model, tmp_path):
    result = analyze(model, word_tokenizer(), data={"<b>": texts("prose"), "&": texts("code")}, name="<i>", **SIZES)
    page = Page(write_report(result, tmp_path).read_text())
    assert page.tags["b"] == len(findings(result))
    assert page.tags["i"] == 0


# --- pictures ---


def test_the_colours_of_a_heatmap_are_its_numbers():
    values = [[0.0, 0.5, 1.0], [1.25, 2.0, 7.0]]
    image = heatmap(values, ["a", "b"], title="", row_title="", column_title="", scale=RELATIVE, largest_cell=20).image
    drawn, wanted = np.asarray(image), RELATIVE.rgb(np.array(values))
    # from the corner of the first cell, where its colour begins
    top, left = (int(places[0]) for places in np.nonzero((drawn == wanted[0, 0]).all(-1)))
    for row, column in np.ndindex(2, 3):
        cell = drawn[top + row * 24 * SCALE + 4, left + column * 20 * SCALE + 4]
        assert cell.tolist() == wanted[row, column].tolist()
    assert wanted[1, 1].tolist() == wanted[1, 2].tolist() == [160, 30, 30]
    assert SHARE.rgb(np.array([float("nan")])).tolist() == [[225, 225, 225]]


def centre(image, colour):
    rows, columns = np.nonzero((np.asarray(image) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(-1))
    return rows, columns


def test_the_heights_of_a_line_chart_are_its_numbers():
    heights = []
    for value in (0.25, 0.5, 0.75):
        lines = [Line("a", [None]), Line("b", [value])]
        image = line_chart(lines, ["1"], title="", place_title="", limits=(0.0, 1.0)).image
        rows, _ = centre(image, SERIES[1])
        # below the key
        heights.append(float(rows[rows > 75 * SCALE].mean()))
    assert heights[0] - heights[1] == heights[1] - heights[2] == pytest.approx(50 * SCALE, abs=1)


def test_the_lengths_of_bars_are_their_numbers():
    image = bar_chart({"x": {"a": 0.5, "b": -0.25}}, title="").image

    def length(colour):
        rows, columns = centre(image, colour)
        # below the key
        columns = columns[rows > 75 * SCALE]
        return columns.max() - columns.min()

    assert length(SERIES[0]) == pytest.approx(2 * length(SERIES[1]), abs=2 * SCALE)


# --- the verdict ---


def test_the_documentation_says_what_each_number_is():
    told = (Path(__file__).parent.parent / "docs" / "analysis.md").read_text()
    every = [definitions.LOAD, definitions.CERTAINTY, definitions.DOMAINS, definitions.VOCABULARY]
    every += [definitions.COACTIVATION, definitions.CHECKPOINTS, definitions.LIKENESS, definitions.STUDIES]
    for one in itertools.chain.from_iterable(every):
        assert one.name in told, one.name
        assert one.address is None or one.address in told, one.name


def test_the_verdict_follows_the_numbers(found):
    def with_load(load):
        layers = [type(layer)(**{**vars(layer), **load}) for layer in found.layers]
        result = type(found)(**{**vars(found), "layers": layers})
        return verdict(findings(result)), {one.title: one for one in findings(result)}

    even = {"load": [10.0] * 4, "max_violation": 0.0, "dead_experts": 0, "weight_cosine": 0.5}
    assert with_load(even)[0].startswith("Routing is healthy")
    said, one = with_load({**even, "load": [20.0, 20.0, 0.0, 0.0], "max_violation": 1.0, "dead_experts": 2})
    assert said.startswith("Routing is not healthy. Look at: balance and dead experts")
    assert "gets 2.00 times its fair share (MaxVio 1.00, of at most 1.00)" in one["balance"].text
    assert one["dead experts"].text.startswith("4 of 8 experts got no token at all")
    said, one = with_load({**even, "load": [16.0, 12.0, 8.0, 4.0], "max_violation": 0.6})
    assert said == "Routing works, and something is worth a look: balance."


def test_short_names_are_where_names_differ():
    assert short_names(["a.0.mlp", "a.1.mlp"]) == ["0", "1"]
    assert short_names(["a.0.mlp", "b"]) == ["a.0.mlp", "b"]
    assert short_names(["a.0.mlp"]) == ["a.0.mlp"]
    assert short_names(["e.0.x", "d.0.x"]) == ["e", "d"]
