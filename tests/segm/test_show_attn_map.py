"""The picture command: files of every mode, what the pictures show, ground truth, and input that is wrong."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import patch
from segm import show_attn_map
from segm.data import class_info, create_dataset, normalize
from segm.data.files import read_sample
from segm.run import Run
from segm.show_attn_map import (
    check_query,
    chosen_layer,
    chosen_place,
    class_queries,
    look,
    read_class_list,
)

DATA = Path(__file__).parents[1] / "data"  # 6 + 2 layers, 2 heads, patch 16, 192 pixels, 11 classes
METHODS = {
    "graph": ["--patch-type", "graph", "--threshold", "0.5"],
    "algm": ["--patch-type", "algm", "--selected-layers", "1", "4", "--threshold", "0.5"],
    "tome": ["--patch-type", "tome", "--r", "5"],
}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A photograph with its label map beside it."""
    root = tmp_path_factory.mktemp("own")
    sample = create_dataset("shapes", "val", image_size=(96, 120))[0]
    for kind, picture in (("images", sample.image[..., ::-1]), ("annotations", sample.label)):
        (root / kind).mkdir()
        cv2.imwrite(str(root / kind / "house.png"), picture)
    return root / "images/house.png"


def invoke(*arguments):
    return CliRunner().invoke(show_attn_map.main, [*map(str, arguments), "--device", "cpu"])


def draw(photo, out, *options, cmap=("shapes",)):
    """Names of the files that a run writes, below OUT/house."""
    result = invoke(DATA, photo, out, *cmap, *options)
    assert result.exit_code == 0, result.output
    files = [file for file in out.rglob("*") if file.is_file()]
    assert all(cv2.imread(str(file)) is not None and cv2.imread(str(file)).std() > 0 for file in files)
    return {file.relative_to(out / "house").as_posix() for file in files}


def maps_of(layer, *names):
    return {
        f"{layer}/{name}/{layer}_attn-head{head}_{name}{end}.png"
        for name in names
        for head in range(2)
        for end in ("", "_overlay")
    }


LABELS = {"house_seg_pred.png", "house_seg_gt.png"}


MODES = [
    ([], maps_of("enc_layer5", "cls")),
    (["--cls", "--enc", "--layer-id", "0"], maps_of("enc_layer0", "cls")),
    (["--patch", "--x-patch", "11", "--y-patch", "0", "--layer-id", "3"], maps_of("enc_layer3", "patch_11_0")),
    (["--y-patch", "2"], maps_of("enc_layer5", "patch_6_2")),
    (["--dec", "--patch"], maps_of("dec_layer1", "patch_6_6")),
    (
        ["--dec", "--layer-id", "0", "--class", "sky", "--class", "tree"],
        maps_of("dec_layer0", "cls_sky", "cls_tree"),
    ),
]


@pytest.mark.slow
def test_files_of_every_mode(photo, tmp_path):
    for index, (options, maps) in enumerate(MODES):
        assert draw(photo, tmp_path / str(index), *options) == maps | LABELS | {"house_grid.png"}, options


def test_every_layer_draws_the_tokens_that_it_leaves(photo, tmp_path, golden_model):
    """Before CLAP, between it and GBM, and after both, which is the default."""
    image = cv2.resize(cv2.imread(str(photo))[..., ::-1], (192, 192), interpolation=cv2.INTER_LINEAR)
    patch.apply(golden_model, "algm", layers=[2, 4], threshold=0.5)
    golden_model.predict(normalize(image, "vit")[None])
    clap, gbm = (step.counts.item() for step in patch.reductions(golden_model).values())
    assert 144 > clap > gbm
    merging = ["--patch-type", "algm", "--selected-layers", "2", "4", "--threshold", "0.5"]
    for layer, count in ((0, None), (2, clap), (None, gbm)):
        chosen = [] if layer is None else ["--layer-id", str(layer)]
        files = draw(photo, tmp_path / str(layer), *merging, *chosen)
        tokens = {"house_grid.png"} if count is None else {f"house_vis_{count}_tokens{e}.png" for e in ("", "_overlay")}
        assert {file for file in files if "/" not in file} - LABELS == tokens, layer


def test_similarities_in_windows_are_those_that_clap_compares(photo, tmp_path, golden_model, monkeypatch):
    """Of the unpatched model, whatever merges in the run."""
    drawn, real = [], show_attn_map.similarity_map
    monkeypatch.setattr(show_attn_map, "similarity_map", lambda *args: drawn.append(args) or real(*args))
    merging = ["--patch-type", "algm", "--selected-layers", "1", "4", "--threshold", "0.5"]
    for layer, sides in ((0, [2]), (2, [2, 3])):
        options = [*merging, "--layer-id", str(layer), "--similarity-window", *map(str, sides)]
        height, width = (sides * 2)[:2]
        name = f"house_enc_layer{layer}_similarity_{height}x{width}.png"
        assert name in draw(photo, tmp_path / str(layer), *options)
        values, window = drawn.pop()
        assert window == (height, width) and values.shape == (12 // height, 12 // width)
        image = cv2.resize(cv2.imread(str(photo))[..., ::-1], (192, 192), interpolation=cv2.INTER_LINEAR)
        threshold = float(np.quantile(values, 0.6))
        patch.apply(golden_model, "algm", layers=[layer + 1, 6], threshold=threshold, window=window, gbm_threshold=1.0)
        golden_model.predict(normalize(image, "vit")[None])
        sizes = patch.reductions(golden_model)[layer + 1].sizes
        assert (sizes > 1).sum() == (values >= threshold).sum() > 0
        patch.remove(golden_model)


def test_merged_tokens_are_drawn_and_counted(photo, tmp_path):
    for name, merging in METHODS.items():
        files = draw(photo, tmp_path / name, *merging, "--dec", "--class", "car", "--layer-id", "1")
        tokens = sorted(files - maps_of("dec_layer1", "cls_car") - LABELS)
        count = int(tokens[0].split("_")[2])
        assert tokens == [f"house_vis_{count}_tokens.png", f"house_vis_{count}_tokens_overlay.png"]
        assert count == 144 - 6 * 5 if name == "tome" else 1 <= count < 144


def test_tokens_that_are_no_groups_of_patches_are_shown_by_the_photograph(photo, tmp_path):
    """Their attention has no place to be drawn at; that of the layers before has."""
    merging = ["--patch-type", "dct", "--r", "5", "--selected-layers", "3"]
    cases = (([], "photo", set()), (["--layer-id", "1"], "grid", maps_of("enc_layer1", "cls")))
    for options, tokens, maps in cases:
        files = draw(photo, tmp_path / tokens, *merging, *options)
        assert files == maps | LABELS | {f"house_{tokens}.png"}
    assert "no groups of patches" in invoke(DATA, photo, tmp_path / "again", *merging).stdout


def test_nothing_merged_is_the_grid_though_a_method_is_on(photo, tmp_path):
    assert "house_grid.png" in draw(photo, tmp_path, "--patch-type", "graph", "--threshold", "1")


def test_every_predicted_class_attends_by_default(photo, tmp_path, golden_model):
    files = draw(photo, tmp_path, "--dec")
    image = cv2.resize(cv2.imread(str(photo))[..., ::-1], (192, 192), interpolation=cv2.INTER_LINEAR)
    view = normalize(image, "vit")[None]
    present = golden_model.predict(view).unique().tolist()
    names = class_info("shapes")[0]
    assert {file.split("/")[1] for file in files if "/" in file} == {f"cls_{names[i]}" for i in present}


def test_pictures_are_enlarged_and_padding_is_left_out(photo, tmp_path):
    draw(photo, tmp_path, "--image-size", "100")  # 7 × 7 patches of 16 pixels reach to 112
    for name in ("house_grid.png", "enc_layer5/cls/enc_layer5_attn-head1_cls_overlay.png"):
        assert cv2.imread(str(tmp_path / "house" / name)).shape == (600, 600, 3)


def test_colors_are_those_of_the_class_list(photo, tmp_path):
    """By default the data set's."""
    entries = [{"id": i, "name": f"class {i}", "color": [i, 200, 255 - i]} for i in range(11)]
    (tmp_path / "colors.yml").write_text(yaml.safe_dump(entries))
    draw(photo, tmp_path / "out", cmap=(tmp_path / "colors.yml",))
    picture = cv2.imread(str(tmp_path / "out/house/house_seg_pred.png"))[:576, :576, ::-1]
    assert {tuple(color) for color in picture.reshape(-1, 3).tolist()} <= {(i, 200, 255 - i) for i in range(11)}
    draw(photo, tmp_path / "own", cmap=())
    own = cv2.imread(str(tmp_path / "own/house/house_seg_pred.png"))[:576, :576, ::-1]
    assert (own[picture[..., 0] == 0] == class_info("shapes")[1][0]).all()


MERGING = [
    ("mpm", {"layers": [2, 5]}),  # which merges before its layers attend
    ("graph", {"threshold": 0.5, "layers": [2]}),
    ("algm", {"threshold": 0.5, "layers": [1, 4]}),
    ("tome", {"r": 4}),
    ("tome", {"r": 4, "layers": [2, 5]}),
]


@torch.inference_mode()
def test_attention_belongs_to_the_tokens_that_a_layer_sees(golden_model):
    """After earlier layers' merges, not after later ones, or its own where it merges after its attention."""
    for (name, options), side in product(MERGING, (192, 100)):
        check_layers(patch.apply(patch.remove(golden_model), name, **options), side)


def check_layers(golden_model, side):
    view, grid = torch.rand(1, 3, side, side) * 2 - 1, (-(-side // 16),) * 2
    first = patch.find(patch.method(golden_model)).place == "before"
    merging = [layer - first for layer in patch.options(golden_model)["layers"]]
    counts, left = [], []
    for layer in range(6):
        weights, before, after = look(golden_model, view, layer, "encoder", grid)
        assert weights.shape == (2, before.max() + 2, before.max() + 2) and before.shape == (grid[0] * grid[1],)
        assert np.allclose(weights.sum(-1), 1, atol=1e-5)
        assert set(before) == set(range(before.max() + 1))
        counts.append(before.max() + 1)
        left.append(after.max() + 1)
    final = patch.reduction(golden_model).assignment[0].numpy()
    assert (after == final).all() and counts[0] == len(before)
    assert left == counts if first else left[:-1] == counts[1:]
    for layer in range(1, 6):
        assert counts[layer] == counts[layer - 1] or layer in merging
    weights, before, after = look(golden_model, view, 0, "decoder", grid)
    assert weights.shape[-1] == before.max() + 1 + golden_model.n_cls
    assert (before == final).all() and (after == final).all()


QUERIES = [
    (["--cls"], "encoder", lambda tokens: 0),
    (["--x-patch", "4", "--y-patch", "9"], "encoder", lambda tokens: 1 + tokens[9 * 12 + 4]),
    (["--dec", "--x-patch", "4", "--y-patch", "9"], "decoder", lambda tokens: tokens[9 * 12 + 4]),
    (
        ["--dec", "--class", "tree"],
        "decoder",
        lambda tokens: tokens.max() + 1 + class_info("shapes")[0].index("tree"),
    ),
]


def test_the_right_row_is_drawn_over_the_right_tokens(photo, tmp_path, golden_model, monkeypatch):
    drawn, real = [], show_attn_map.attention_pictures
    monkeypatch.setattr(show_attn_map, "attention_pictures", lambda *args: drawn.append(args) or real(*args))
    patch.apply(golden_model, "graph", threshold=0.5)
    image = cv2.resize(cv2.imread(str(photo))[..., ::-1], (192, 192), interpolation=cv2.INTER_LINEAR)
    for options, part, row in QUERIES:
        drawn.clear()
        layer, first = (3, 1) if part == "encoder" else (1, 0)
        draw(photo, tmp_path, *METHODS["graph"], *options, "--layer-id", str(layer))
        weights = golden_model.attention(normalize(image, "vit")[None], layer, part)[0]
        tokens = patch.reduction(golden_model).assignment[0].numpy()
        for head, (_, of_tokens, grid, patch_size, assignment, query) in enumerate(drawn):
            expected = weights[head, row(tokens), first : first + tokens.max() + 1].detach().numpy()
            assert np.allclose(of_tokens, expected, atol=1e-6) and (assignment == tokens).all()
            assert (grid, patch_size) == ((12, 12), (48, 48))
            assert query == (9 * 12 + 4 if "--x-patch" in options else None)
        assert len(drawn) == 2


class TestGroundTruth:
    def write(self, file, picture):
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), picture)
        return file

    def labels(self, dataset, image, label, values, given=None):
        values = np.array([values, values], dtype=np.uint8)
        self.write(image, np.zeros((*values.shape, 3), dtype=np.uint8))
        self.write(label, values)
        return read_sample(image, given, dataset, *class_info(dataset)).label

    def test_ade20k_ignores_0_and_shifts_the_others(self, tmp_path):
        image, label = tmp_path / "images/validation/a.jpg", tmp_path / "annotations/validation/a.png"
        assert self.labels("ade20k", image, label, [0, 1, 2, 150]).tolist() == 2 * [[255, 0, 1, 149]]

    def test_cityscapes(self, tmp_path):
        image = tmp_path / "leftImg8bit/val/ulm/ulm_000001_leftImg8bit.png"
        label = tmp_path / "gtFine/val/ulm/ulm_000001_gtFine_labelTrainIds.png"
        assert self.labels("cityscapes", image, label, [0, 18, 255]).tolist() == 2 * [[0, 18, 255]]

    def test_camvid_ignores_void(self, tmp_path):
        image, label = tmp_path / "images/val/a.jpg", tmp_path / "annotations/val/a.png"
        assert self.labels("camvid", image, label, [0, 10, 11]).tolist() == 2 * [[0, 10, 255]]

    def test_pascal_context(self, tmp_path):
        image, label = tmp_path / "JPEGImages/a.jpg", tmp_path / "SegmentationClassContext/a.png"
        assert self.labels("pascal_context", image, label, [0, 59]) is not None

    def test_an_explicit_file(self, tmp_path):
        image, label = tmp_path / "a.jpg", tmp_path / "truth.png"
        assert self.labels("shapes", image, label, [0, 10, 255], label).tolist() == 2 * [[0, 10, 255]]
        assert self.labels("shapes", image, label, [0, 10, 255]) is None

    def test_none_is_drawn_where_none_is(self, photo, tmp_path):
        lone = tmp_path / "house.png"
        lone.write_bytes(photo.read_bytes())
        assert "house_seg_gt.png" not in draw(lone, tmp_path / "out")
        assert "no ground truth" in invoke(DATA, lone, tmp_path / "out").stdout

    def test_the_label_map_is_resized_to_the_nearest(self, photo, tmp_path):
        draw(photo, tmp_path)
        picture = cv2.imread(str(tmp_path / "house/house_seg_gt.png"))[:576, :576, ::-1]
        palette = {tuple(color) for color in class_info("shapes")[1].tolist()}
        assert {tuple(color) for color in picture.reshape(-1, 3).tolist()} <= palette


class TestRefused:
    def test_options(self, photo, tmp_path):
        for options, hint in [
            (["--layer-id", "6"], "--layer-id 6: the encoder has layers 0 to 5"),
            (["--layer-id", "-1"], "layers 0 to 5"),
            (["--dec", "--layer-id", "2"], "the decoder has layers 0 to 1"),
            (["--x-patch", "12"], "--x-patch 12: the grid has columns 0 to 11"),
            (["--patch", "--y-patch", "-1"], "rows 0 to 11"),
            (["--cls", "--x-patch", "1"], "--patch"),
            (["--cls", "--dec", "--y-patch", "1"], "--patch"),
            (["--class", "sky"], "--dec"),
            (["--dec", "--class", "sky", "--patch"], "classes or a patch"),
            (["--dec", "--class", "sky", "--x-patch", "1"], "classes or a patch"),
            (["--dec", "--class", "skye"], "skye: there is no such class, choose from sky"),
            (["--ground-truth", "nowhere.png"], "nowhere.png"),
            (["--patch-type", "graph", "--selected-layer", "9"], "1 to 6"),
            (["--patch-type", "nosuch"], "graph"),
            (["--image-size", "0"], "--image-size"),
            (["--similarity-window", "2", "--dec"], "--similarity-window"),
            (["--similarity-window", "13"], "larger than the grid of 12×12"),
            (["--similarity-window", "1"], "at least two patches"),
        ]:
            self.refuse(hint, tmp_path, DATA, photo, tmp_path / "out", "shapes", *options)

    def test_class_lists(self, photo, tmp_path):
        for cmap, hint in [
            ("nosuch", "neither|give a data set"),
            ("cityscapes", "19 classes, the model 11"),
            ("folder", "YAML file"),
        ]:
            self.refuse(hint.split("|")[-1], tmp_path, DATA, photo, tmp_path / "out", cmap)

    def test_class_list_files(self, photo, tmp_path):
        (tmp_path / "bad.yml").write_text("sky: 1")
        message = self.error(DATA, photo, tmp_path / "out", tmp_path / "bad.yml")
        assert "bad.yml" in message and not (tmp_path / "out").exists()

    def test_files(self, photo, tmp_path):
        self.refuse("nowhere.jpg: the image is missing", tmp_path, DATA, tmp_path / "nowhere.jpg", tmp_path / "out")
        self.refuse("nowhere", tmp_path, tmp_path / "nowhere", photo, tmp_path / "out")
        (tmp_path / "damaged.jpg").write_bytes(b"")
        assert "damaged.jpg" in self.error(DATA, tmp_path / "damaged.jpg", tmp_path / "out")
        assert self.error(DATA, photo, tmp_path / "damaged.jpg")
        assert [file.name for file in tmp_path.iterdir()] == ["damaged.jpg"]

    def test_a_label_map_of_another_size(self, photo, tmp_path):
        cv2.imwrite(str(tmp_path / "truth.png"), np.zeros((5, 7), dtype=np.uint8))
        assert "7x5" in self.error(DATA, photo, tmp_path / "out", "--ground-truth", tmp_path / "truth.png")
        assert not (tmp_path / "out").exists()

    def test_models_without_what_was_asked_for(self):
        model = SimpleNamespace(encoder=SimpleNamespace(cls_token=None), decoder=SimpleNamespace(blocks=[]))
        with pytest.raises(ValueError, match="no CLS token, give --patch"):
            chosen_place(model, True, (4, 6), True, None, None)
        assert chosen_place(model, True, (4, 6), None, None, None) == (3, 2)
        assert chosen_place(model, False, (4, 6), None, None, None) is None
        with pytest.raises(ValueError, match="give --enc"):
            chosen_layer(model, "decoder", None)

    def test_a_run_on_own_data(self):
        run = Run.load(DATA, device="cpu")
        classes = [{"name": str(index), "color": [index, 2, 3]} for index in range(11)]
        for n_cls, cmap in ((11, None), (11, "folder"), (10, None)):
            own = replace(run, config=run.config.with_values(dataset="folder", classes=classes[:n_cls]))
            if n_cls == 11:
                names, palette = read_class_list(cmap, own)
                assert names == tuple(map(str, range(11))) and palette.tolist()[5] == [5, 2, 3]
            else:
                with pytest.raises(ValueError, match="10 classes, the model 11"):
                    read_class_list(cmap, own)

    def refuse(self, hint, folder, *arguments):
        assert hint in self.error(*arguments)
        assert not list(folder.iterdir())

    def error(self, *arguments):
        result = invoke(*arguments)
        assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.exception
        text = result.stderr[result.stderr.index("Error: ") :].strip()
        assert "\n" not in text and len(text) > len("Error: ")
        return text


def test_names_of_classes_stay_within_their_folder():
    queries = class_queries(["a/b", "c"], (), np.array([[0, 1], [1, 1]]), 7)
    assert [(query.name, query.row) for query in queries] == [("cls_a-b", 7), ("cls_c", 8)]
    assert [query.row for query in class_queries(["a/b", "c"], ("c", "c"), np.zeros((1, 1), int), 7)] == [8]


def test_options_that_agree():
    check_query(None, 1, 2, True, ())
    check_query(False, None, None, False, ())
    check_query(True, None, None, False, ("sky",))


def test_the_help_says_how_layers_are_counted():
    text = " ".join(CliRunner().invoke(show_attn_map.main, ["--help"]).output.split())
    assert "counted from 0" in text and "--class" in text and "--patch-type" in text

    def test_masks_that_show_the_colors_of_the_classes(self, tmp_path):
        palette = np.array([[200, 40, 40], [40, 40, 200]], np.uint8)
        image = self.write(tmp_path / "images/a.png", np.zeros((2, 2, 3), np.uint8))
        self.write(tmp_path / "annotations/a.png", palette[np.eye(2, dtype=int)][..., ::-1])
        assert (read_sample(image, None, "folder", ("a", "b"), palette).label == np.eye(2)).all()
