"""Images and label maps of every kind that people store: taken rightly, or refused in a line that says why."""

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from segm.data import create_dataset
from segm.data.images import read_image
from segm.data.inventory import copies, inspect_dataset
from segm.errors import LONGEST

SIZE = (12, 16)  # pixels
LABEL = np.arange(np.prod(SIZE), dtype=np.uint8).reshape(SIZE) % 3
COLORS = np.array([[200, 40, 40], [40, 40, 200], [40, 180, 40]], np.uint8)
IMAGE = COLORS[LABEL]
IN_COLOR = "- {name: a, color: [200, 40, 40]}\n- {name: b, color: [40, 40, 200]}\n- {name: c, color: [40, 180, 40]}\n"
IN_GRAY = "- {name: a, color: [50, 50, 50]}\n- {name: b, color: [100, 100, 100]}\n- {name: c, color: [0, 0, 0]}\n"


def save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, values, **({"photometric": "minisblack"} if values.ndim == 2 else {}) | options)
    elif isinstance(values, Image.Image):
        values.save(path, **options)
    elif values.dtype == np.uint16 and values.ndim == 3:
        cv2.imwrite(str(path), values[..., ::-1])
    else:
        Image.fromarray(values).save(path, **options)


@pytest.fixture
def data(tmp_path):
    """Writes a data set of two images for training; returns a function that loads the first one."""

    def build(image=IMAGE, label=LABEL, suffixes=(".png", ".png"), classes="[a, b, c]", stems=("{}", "{}"), **options):
        for name in "uv":
            stored = options.get("stored", {"photometric": "rgb"} if suffixes[0] == ".tif" else {})
            save(tmp_path / "images/train" / (stems[0].format(name) + suffixes[0]), image, **stored)
            save(
                tmp_path / "annotations/train" / (stems[1].format(name) + suffixes[1]),
                label,
                **options.get("stored_label", {}),
            )
        (tmp_path / "classes.yml").write_text(classes)
        return create_dataset("folder", "train", root=tmp_path, value_range=options.get("value_range"))

    return build


def refused(dataset, *words):
    with pytest.raises(ValueError) as error:
        dataset.load(0)
    text = str(error.value)
    assert "\n" not in text and len(text) < 2 * LONGEST
    assert str(dataset.paths(0)[0].parents[2]) in text, text
    assert all(word in text for word in words), text


# ------------------------------------------------------------------------------------------- label maps


@pytest.mark.parametrize("kind", ["int16", "uint16", "int32", "uint32", "float32", "float64", "bool"])
def test_whole_numbers_of_every_type_are_labels(data, kind):
    label = LABEL % 2 if kind == "bool" else LABEL
    assert (data(label=label.astype(kind), suffixes=(".png", ".tif")).load(0).label == label).all()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("int16", -32768), ("int16", -1), ("int16", -255), ("int32", -(2**31)), ("uint32", 2**32 - 1)),
        *(("float32", -3.4e38), ("float32", 0.5), ("float32", float("nan")), ("uint16", 256), ("uint8", 3)),
    ],
)
def test_values_that_no_class_has_are_named(data, kind, value):
    label = LABEL.astype(kind)
    label[:2] = value
    refused(data(label=label, suffixes=(".png", ".tif")), f"{np.array(value, kind):g}" if "f" in kind else str(value))


def test_fractions_are_no_labels(data):
    refused(data(label=(LABEL / 255).astype(np.float32), suffixes=(".png", ".tif")), "no whole number", "0.0039")


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".webp"])
def test_masks_that_were_compressed_with_loss_are_refused(data, suffix):
    label = LABEL.repeat(4, 0).repeat(4, 1)
    options = {"photometric": "minisblack", "compression": "jpeg"} if suffix == ".tif" else {}
    image = IMAGE.repeat(4, 0).repeat(4, 1)
    refused(data(image=image, label=label, suffixes=(".png", suffix), stored_label=options), "without loss")


def test_palettes_with_the_colors_of_the_classes_are_read_by_color(data):
    palette = Image.fromarray(COLORS[LABEL]).quantize(3, dither=0)
    assert (np.asarray(palette) != LABEL).any()  # its numbers are in an order of its own
    assert (data(label=palette, classes=IN_COLOR).load(0).label == LABEL).all()


def test_palettes_with_other_colors_are_read_by_number(data):
    for classes in ("[a, b, c]", IN_COLOR):
        label = Image.fromarray(LABEL, "P")
        label.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        assert (data(label=label, classes=classes).load(0).label == LABEL).all()


def test_gray_values_that_are_the_colors_of_the_classes(data):
    gray = np.array([50, 100, 0], np.uint8)[LABEL]
    assert (data(label=gray, classes=IN_GRAY).load(0).label == LABEL).all()
    assert (data(label=LABEL, classes="[a, b, c]").load(0).label == LABEL).all()


def test_gray_masks_among_colored_ones_are_colors(data, tmp_path):
    """An optimizer stores a picture of black and white alone in gray."""
    classes = "- {name: a, color: [255, 255, 255]}\n- {name: b, color: [0, 0, 0]}\n- {name: c, color: [9, 0, 0]}\n"
    shown = np.array([[255, 255, 255], [0, 0, 0], [9, 0, 0]], np.uint8)
    data(label=shown[LABEL], classes=classes)
    save(tmp_path / "annotations/train/u.png", np.array([255, 0], np.uint8)[LABEL % 2])
    dataset = create_dataset("folder", "train", root=tmp_path)
    assert (dataset.load(0).label == LABEL % 2).all() and (dataset.load(1).label == LABEL).all()
    save(tmp_path / "annotations/train/u.png", np.full(SIZE, 1, np.uint8))
    refused(create_dataset("folder", "train", root=tmp_path), "colors of no class", "[1, 1, 1]")


@pytest.mark.parametrize(
    ("ignore", "values"),
    [
        *(("0", {0: 255, 1: 0, 2: 1, 3: 2, 255: 255}), ("254", {0: 0, 1: 1, 2: 2, 254: 255})),
        *(("-1", {-1: 255, 2: 2}), ("[0, 254]", {0: 255, 254: 255, 1: 0, 3: 2}), ("1", {0: 0, 1: 255, 2: 1, 3: 2})),
    ],
)
def test_values_to_ignore(data, ignore, values):
    keys, labels = np.array([*values]), np.array([*values.values()])
    places = np.arange(np.prod(SIZE)).reshape(SIZE) % len(keys)
    dataset = data(
        label=keys[places].astype(np.int16), suffixes=(".png", ".tif"), classes=f"ignore: {ignore}\nclasses: [a, b, c]"
    )
    assert (dataset.load(0).label == labels[places]).all()


def test_a_wrong_ignore_is_refused(data):
    for text in ("ignore: x\nclasses: [a]", "ignore: 1.5\nclasses: [a]", "ignore: 0", "classes: [a]\nignored: 0"):
        with pytest.raises(ValueError, match=r"classes\.yml"):
            data(classes=text)


def test_more_than_255_classes(data):
    label = LABEL.astype(np.uint16) * 140 + 15
    label[0, 0] = 65535
    dataset = data(label=label, suffixes=(".png", ".tif"), classes=str([f"c{index}" for index in range(300)]))
    found = dataset.load(0).label
    assert found.dtype == np.uint16 and (found == label).all()
    item = dataset[(0, 0)]["label"]
    assert {*item.unique().tolist()} <= {15, 155, 295, 65535}
    inventory = inspect_dataset(dataset)
    assert inventory.pixels["c295"] == 2 * (label == 295).sum() and inventory.ignored == 2


# ------------------------------------------------------------------------------------------- where masks lie


@pytest.mark.parametrize(
    ("stems", "suffix"), [(("{}", "{}_mask"), ".png"), (("{}", "{}.jpg"), ".png"), (("{}", "{}"), ".gif")]
)
def test_masks_with_an_ending_of_their_own_are_found(data, stems, suffix):
    dataset = data(stems=stems, suffixes=(".png", suffix))
    assert (dataset.load(1).label == LABEL).all()
    assert not dataset.masks_without_image


def test_what_lies_in_place_of_a_mask_is_named(data, tmp_path):
    dataset = data(stems=("{}", "{}_mask"))
    save(tmp_path / "annotations/train/u_color.png", LABEL)
    save(tmp_path / "annotations/train/v_color.png", LABEL)
    with pytest.raises(FileNotFoundError, match=r"masks are missing.*u_color\.png, u_mask\.png"):
        inspect_dataset(create_dataset("folder", "train", root=tmp_path))
    assert len(dataset) == 2


def test_linked_folders_are_followed_and_their_circles_are_not(data, tmp_path):
    data()
    other = tmp_path / "elsewhere"
    for kind, picture in (("images", IMAGE), ("annotations", LABEL)):
        save(other / kind / "w.png", picture)
        (tmp_path / kind / "train/more").symlink_to(other / kind)
        (tmp_path / kind / "train/again").symlink_to(tmp_path / kind / "train")
    dataset = create_dataset("folder", "train", root=tmp_path)
    assert [dataset.load(index).name for index in range(len(dataset))] == ["more/w", "u", "v"]


def notes(tmp_path):
    return " | ".join(inspect_dataset(create_dataset("folder", "train", root=tmp_path)).warnings)


def test_what_is_not_taken_is_counted(data, tmp_path):
    data()
    for name in ("a.heic", "b.heic", "notes.txt"):
        (tmp_path / "images/train" / name).write_text("?")
    assert ".heic (2), .txt (1)" in notes(tmp_path)


def test_a_list_beside_split_folders_counts(data, tmp_path):
    data()
    (tmp_path / "train.txt").write_text("v\n")
    assert "1 of the 2 images" in notes(tmp_path)
    assert create_dataset("folder", "train", root=tmp_path).load(0).name == "v"


@pytest.mark.parametrize(
    "line", ["v", "v.png", "images/train/v.png", "./images/train/v.png", "{root}/images/train/v.png"]
)
@pytest.mark.parametrize("more", ["", " annotations/train/v.png", ",annotations/train/v.png", " 1"])
def test_lists_with_paths_and_comments(data, tmp_path, line, more):
    data()
    (tmp_path / "train.txt").write_text("# ours\n" + line.format(root=tmp_path) + more + "\n\n")
    assert create_dataset("folder", "train", root=tmp_path).load(0).name == "v"


def test_a_list_with_other_masks_is_refused(data, tmp_path):
    data()
    (tmp_path / "train.txt").write_text("v annotations/train/u.png\n")
    with pytest.raises(ValueError, match="masks are found by the names of images"):
        create_dataset("folder", "train", root=tmp_path)


def test_images_of_two_splits_are_compared(data, tmp_path):
    def both():
        return (create_dataset("folder", split, root=tmp_path) for split in ("train", "val"))

    data()
    for name, image in (("w", IMAGE), ("x", 255 - IMAGE)):
        save(tmp_path / f"images/val/{name}.png", image)
        save(tmp_path / f"annotations/val/{name}.png", LABEL)
    assert "1 of 2 images of val are in train, too" in copies(*both()) and "val/w.png" in copies(*both())
    save(tmp_path / "images/val/w.png", IMAGE[::-1])
    assert copies(*both()) == ""


# ------------------------------------------------------------------------------------------- images

DEEP = {
    "16 bits": (IMAGE.astype(np.uint16) * 257, {}),
    "12 bits in 16": (np.rint(IMAGE * (4095 / 255)).astype(np.uint16), {}),
    "signed": (np.rint(IMAGE * (1023 / 255)).astype(np.int16), {}),
    "32 bits": (IMAGE.astype(np.uint32) * ((2**32 - 1) // 255), {}),
    "float": ((IMAGE / 255).astype(np.float32), {}),
    "float to 255": (IMAGE.astype(np.float32), {}),
    "with alpha": (np.dstack((IMAGE, IMAGE[..., 0] // 2)), {"extrasamples": ["unassalpha"]}),
    "with premultiplied alpha": (np.dstack((IMAGE, IMAGE[..., 0] // 2)), {"extrasamples": ["assocalpha"]}),
    "with infrared": (np.dstack((IMAGE, IMAGE[..., :2])), {"extrasamples": ["unspecified"] * 2}),
    "band by band": (np.ascontiguousarray(IMAGE.transpose(2, 0, 1)), {"planarconfig": "separate"}),
    "turned": (np.rot90(IMAGE), {"extratags": [(274, "H", 1, 6, True)]}),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
def test_tiffs_of_every_kind(data, kind, compression):
    values, options = DEEP[kind]
    top = {
        "16 bits": 65535,
        "12 bits in 16": 4095,
        "signed": 1023,
        "32 bits": 2**32 - 1,
        "float": 1,
        "float to 255": 255,
    }
    if kind in top:  # the highest value says how many bits there are
        values = values.copy()
        values[0, 0] = top[kind]
    found = data(
        image=np.ascontiguousarray(values),
        suffixes=(".tif", ".png"),
        stored={"photometric": "rgb", "compression": compression} | options,
    ).load(0)
    expected = IMAGE.copy()
    if kind in top:
        expected[0, 0] = 255
    assert (found.image == expected).all()


def test_deep_png(data):
    image = IMAGE.astype(np.uint16) * 257
    assert (data(image=image).load(0).image == IMAGE).all()


def test_all_images_of_a_data_set_have_one_range(data, tmp_path):
    """A dark image must not become as bright as the others."""
    data(image=IMAGE.astype(np.uint16) * 16)
    save(tmp_path / "images/train/u.png", IMAGE.astype(np.uint16))
    dataset = create_dataset("folder", "train", root=tmp_path)
    assert dataset.value_range == (0, 4095)
    assert dataset.load(0).image.max() == round(200 * 255 / 4095) and dataset.load(1).image.max() == 199
    assert "values of 0 to 4095 become 0 to 255" in notes(tmp_path)


def test_a_given_range_counts(data):
    image = IMAGE.astype(np.int16) - 100
    refused(data(image=image, suffixes=(".tif", ".png")), "int16 from -60 to 100", "--value-range")
    dataset = data(image=image, suffixes=(".tif", ".png"), value_range=(-100, 155))
    assert (dataset.load(0).image == IMAGE).all()


def test_bands_without_colors_are_refused(data):
    image = np.dstack((IMAGE, IMAGE[..., :2]))
    dataset = data(image=image, suffixes=(".tif", ".png"), stored={"photometric": "minisblack", "planarconfig": 1})
    refused(dataset, "5 bands")


def test_several_pictures_in_a_file_are_refused(data, tmp_path):
    dataset = data(suffixes=(".tif", ".png"))
    tifffile.imwrite(tmp_path / "images/train/u.tif", np.stack((IMAGE, IMAGE)), photometric="rgb")
    refused(dataset, "2 pictures")


def test_previews_inside_of_a_file_are_left_aside(data, tmp_path):
    dataset = data(suffixes=(".tif", ".png"))
    with tifffile.TiffWriter(tmp_path / "images/train/u.tif") as writer:
        writer.write(IMAGE, photometric="rgb")
        writer.write(IMAGE[::2, ::2], photometric="rgb", subfiletype=1)
    assert (dataset.load(0).image == IMAGE).all()


def png(path, damage):
    """A PNG with a comment, and one byte changed in the chunk of this name."""
    info = PngInfo()
    info.add_text("Comment", "made by hand")
    Image.fromarray(IMAGE).save(path, pnginfo=info)
    data = bytearray(path.read_bytes())
    data[data.index(damage) + 8] ^= 1
    path.write_bytes(data)


def test_a_wrong_checksum_counts_where_pixels_depend_on_it(data, tmp_path):
    dataset = data()
    png(tmp_path / "images/train/u.png", b"tEXt")
    assert (dataset.load(0).image == IMAGE).all()
    png(tmp_path / "images/train/u.png", b"IDAT")
    dataset = create_dataset("folder", "train", root=tmp_path)
    refused(dataset, "checksum of IDAT")


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("kind", [".png", "lzw", "jpeg", "deflate", None])
def test_files_that_are_cut_off_are_refused(data, tmp_path, kind, cut):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / ("a.png" if kind == ".png" else "a.tif")
    save(path, image, **({} if kind == ".png" else {"photometric": "rgb", "compression": kind}))
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(ValueError, match="damaged or no image"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(tmp_path, content, word):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=word):
        read_image(tmp_path / "a.png")
