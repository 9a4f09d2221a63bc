"""The web page, and what its script computes."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import networkx
import numpy as np
import pytest
import torch

import g2tm
from vis import page

NASTY = '<img src=x onerror="alert(1)"> & \'</script>'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def script():
    """The pure functions of the explorer, in V8."""
    context = pytest.importorskip("py_mini_racer").MiniRacer()
    context.eval(page.asset("explorer.js"))
    context.eval("""
        const merged = (...edges) => {
            const { count, assignment } = mergedRegions(...edges);
            return { count, assignment: Array.from(assignment) };
        };
        const colors = (sums, assignment, count) => Array.from(meanColors(sums, Int32Array.from(assignment), count));
    """)
    return context


def tokens(grid, width=8):
    """Patch tokens (1, N, D) that vary smoothly over the grid, so that merging has something to decide."""
    rows, columns = (torch.linspace(0, 3, side) for side in grid)
    waves = torch.randn(width, 3)
    phase = waves[:, 0] * rows[:, None, None] + waves[:, 1] * columns[None, :, None] + waves[:, 2]
    return (phase.sin() + 0.2 * torch.randn(*grid, width)).reshape(1, -1, width)


def edges_of(x, grid):
    """(right, down), float32 arrays of one image."""
    return [values[0].numpy() for values in g2tm.edge_similarities(x, grid)]


def in_script(script, grid, right, down, threshold):
    return script.call("merged", right.ravel().tolist(), down.ravel().tolist(), *grid, threshold)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (2, 2), (13, 21), (32, 32)])
def test_the_browser_merges_as_graph_merge_does(script, grid):
    for threshold in (-1.0, 0.0, 0.5, 0.8, 0.88, 0.935, 1.0):
        x = tokens(grid)
        found = in_script(script, grid, *edges_of(x, grid), threshold)
        expected = g2tm.graph_merge(x, grid, threshold)
        assert found["count"] == expected.counts.item() and found["assignment"] == expected.assignment[0].tolist()


def test_the_browser_merges_long_winding_regions(script):
    """Half of the edges survive, where regions wind most and wrong unions show; numbered by their first patch."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        right, down = rng.choice([0.2, 0.9], (12, 11)), rng.choice([0.2, 0.9], (11, 12))
        graph = networkx.Graph([(i, i) for i in range(144)])
        graph.add_edges_from((12 * row + column, 12 * row + column + 1) for row, column in np.argwhere(right > 0.5))
        graph.add_edges_from((12 * row + column, 12 * row + column + 12) for row, column in np.argwhere(down > 0.5))
        regions = sorted(map(sorted, networkx.connected_components(graph)))
        numbers = {patch: number for number, region in enumerate(regions) for patch in region}
        found = in_script(script, (12, 12), right, down, 0.5)
        assert found["assignment"] == [numbers[patch] for patch in range(144)]


def test_the_browser_compares_as_torch_does(script):
    """The threshold counts as float32: a similarity that equals it so does not exceed it."""
    for threshold in (0.1, 0.7, 0.88, 0.935):
        similarity = np.float32(threshold)
        for value in (np.nextafter(similarity, np.float32(-1)), similarity, np.nextafter(similarity, np.float32(2))):
            found = in_script(script, (1, 2), np.array([[value]]), np.empty((0, 2)), threshold)
            assert found["count"] == (1 if torch.tensor(value) > threshold else 2)


def test_borders_lie_between_regions_and_nowhere_else(script):
    assignment = [0, 0, 1, 0, 2, 1]  # two rows of three
    script.eval("const lines = (...a) => borders(...a)")
    found = {tuple(line.values()) for line in script.call("lines", assignment, 2, 3)}
    assert found == {(2, 0, 2, True), (1, 1, 1, True), (1, 1, 1, False)}
    assert list(script.call("lines", [0] * 6, 2, 3)) == []


def test_regions_get_their_mean_color(script):
    sums = [8, 0, 0, 4, 4, 4, 4, 1, 10, 20, 30, 2]  # three patches; pixels: 4, 1, 2
    assert script.call("colors", sums, [0, 0, 1], 2) == [2, 1, 1, 5, 10, 15]


RECORD = {
    "n_images": {"mean_iou": 2, "cost": 2},
    "device": "CPU",
    "python": "3",
    "torch": "2",
    "timm": "1",
    "date": "today",
}
EDGES = (("right", (5, 7)), ("down", (4, 8)))
DATA = {"images": 5, "smallest": [40, 30], "largest": [80, 60], "masks_counted": 3, "ignored_pixels": 10}


def example(name="street", threshold=0.88, size=(40, 60), grid=(5, 8), patch_size=(8, 8)):
    """A page with one of everything, and the token count of its explorer."""
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    x = tokens(grid)
    right, down = edges_of(x, grid)
    image = {"name": name, "photo": photo, "right": right, "down": down, "patch_size": patch_size, "ratio": 1.5}
    rows = [
        {"name": name, "path": name, "method": "graph", "settings": {"layers": (2,), "threshold": 0.9, "note": name}}
        | {"mean_iou": 71.25, "per_class_iou": [80.0, 62.5], "images_per_second": 12.34, "gflops": 1.5, "tokens": 20.5}
        | {"speedup": 1.254, "realized_share": 0.957, "n_patches": 40, "counts": [20, 21]}
    ]
    picture, labels = page.picture(photo, name), page.label_picture(photo[..., 0] % 2, [[9, 9, 9]] * 2, name)
    text = page.comparison_page(
        RECORD | {"dataset": name, "command": name},
        rows,
        [name, "sky"],
        {name: [{"epoch": 0, "train_loss": 1.0}]},
        ([(name, [(picture, labels)])], [name], [[1, 2, 3]]),
        {"name": name, "layer": 2, "threshold": threshold, "images": [image, image]},
        {name: {"train": DATA | {"pixels": {name: 30, "sky": 60}, "notes": [name]}}},
    )
    return text, g2tm.graph_merge(x, grid, threshold).counts.item()


@pytest.fixture(scope="module")
def text():
    """The page of `example`."""
    torch.manual_seed(0)
    return example()[0]


class Elements(HTMLParser):
    """All elements of a page as (name, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(text):
    assert "http:" not in text and "https:" not in text and "url(" not in re.sub(r"url\(#", "", text)
    for tag, attributes in Elements(text).found:
        for key in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, attributes)
        assert tag not in ("iframe", "object", "embed") and not any(key.startswith("on") for key in attributes)
    assert "default-src 'none'" in text and "@import" not in text


def test_the_page_is_accessible(text):
    elements = Elements(text).found
    assert ("html", {"lang": "en"}) in elements
    assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in elements if tag == "svg")
    assert sum(tag == "h1" for tag, _ in elements) == 1
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_number_stands_in_the_table(text):
    for number in ("71.25", "12.3", "1.25", "1.500", "20.5 of 40"):
        assert f"<td>{number}</td>" in text
    assert "graph, layers 2, threshold 0.9" in text and "realized share 0.96" in text
    for cell in ("40x30 to 80x60", "sky 66.7 %", "10.0%"):
        assert cell in text


def test_the_slider_spans_the_thresholds_between_one_region_and_none(text):
    slider = next(attributes for tag, attributes in Elements(text).found if attributes.get("type") == "range")
    lowest, highest = float(slider["min"]), float(slider["max"])
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    image = data["images"][0]
    edges = [np.frombuffer(base64.b64decode(image[key]), "<f4").reshape(shape) for key, shape in EDGES]
    graph = networkx.grid_2d_graph(5, 8)
    for (row, column), (lower, righter) in graph.edges:
        graph.edges[(row, column), (lower, righter)]["similarity"] = edges[lower > row][row, column]

    def count(threshold):
        kept = [edge for edge in graph.edges if graph.edges[edge]["similarity"] > threshold]
        return networkx.number_connected_components(networkx.Graph(kept)) + 40 - len({x for edge in kept for x in edge})

    assert count(lowest) == 1 < count(lowest + 2 * page.STEP)
    assert count(highest) == 40 > count(highest - 2 * page.STEP)


def test_names_are_text(text):
    nasty, _ = example(NASTY)
    elements = Elements(nasty).found
    assert not any(attributes.get("src") == "x" or "onerror" in attributes for _, attributes in elements)
    assert [tag for tag, _ in elements] == [tag for tag, _ in Elements(text).found]
    assert NASTY in unescape(nasty)
    data = re.search(r'<script type="application/json">(.*?)</script>', nasty, re.DOTALL)[1]
    assert json.loads(data)["images"][0]["name"] == NASTY


def test_the_page_is_the_same_every_time(text):
    torch.manual_seed(0)
    assert example()[0] == text


def test_light_and_dark_and_small_screens(text):
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "overflow-x: auto" in text


def test_sections_without_content_are_left_out(text):
    row = {"name": "a", "path": "a", "method": "pure", "settings": {}, "mean_iou": 9.0, "per_class_iou": [9.0]}
    row |= {"images_per_second": 1.0, "gflops": 1.0, "tokens": 4, "n_patches": 4, "realized_share": 1.0, "counts": [4]}
    row |= {"speedup": 1.0}
    explored = {"name": "a", "layer": 2, "threshold": 0.9, "images": []}
    record = RECORD | {"dataset": "own", "command": "report"}
    small = page.comparison_page(record, [row], ["sky"], {}, ([], [], np.zeros((0, 3))), explored, {})
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings[-1] == "Threshold explorer" and len(headings) == 8
    assert re.findall("<h2>(.*?)</h2>", small) == headings[:3] and "<script" not in small


@pytest.mark.nightly
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("moved", [None, "0.95"])
def test_in_a_real_browser(tmp_path, moved):
    """The count in the browser is graph_merge's, at first and after the slider was moved."""
    threshold = 0.6 if moved is None else float(moved)
    torch.manual_seed(1)
    text, expected = example("street <1>", threshold)
    if moved:
        text = text.replace(f'"threshold": {moved}', '"threshold": 0.6').replace(f'value="{moved}"', 'value="0.6"')
        move = f"s.value = '{moved}'; s.dispatchEvent(new Event('input')); c.selectedIndex = 1;"
        names = "const [s, c] = ['input[type=range]', 'select'].map((n) => document.querySelector(n));"
        text = text.replace("</body>", f"<script>{names}{move} c.dispatchEvent(new Event('change'));</script></body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=8000"]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    command.append((tmp_path / "page.html").as_uri())
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f">{expected} of 40 tokens ({100 * expected / 40:.1f} %)</output>" in dom
    assert re.search(r'<canvas[^>]*width="1560" height="1040"', dom)  # 40 x 60 pixels, enlarged to about 1024
