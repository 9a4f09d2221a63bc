"""Checkpoints and variant files: released, damaged, missing, hostile."""

import random
import re
import resource
import signal

import pytest
import torch

from segm.checkpoint import checkpoint_file, load_checkpoint, save_checkpoint
from segm.config import RunConfig
from segm.model.factory import copy_weights, create_segmenter, load_model
from tests.helpers import write_variant


@pytest.fixture
def run(tmp_path, small_net):
    """A run directory with random weights."""
    model = create_segmenter(small_net)
    save_checkpoint({"model": model.state_dict(), "epoch": 0}, tmp_path / "checkpoint.pth")
    write_variant({"net_kwargs": small_net, "dataset_kwargs": {}}, tmp_path)
    return tmp_path, model


def test_a_run_is_loaded_by_folder_and_by_file(run):
    folder, model = run
    for path in (folder, folder / "checkpoint.pth", str(folder)):
        loaded, config = load_model(path)
        assert not loaded.training and config.net.n_cls == 5
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("name", ["checkpoint_best.pth", "best_checkpoint.pth"])
def test_the_best_checkpoint_alone_is_one(run, name):
    """G2TM's released folders hold no other; the last one comes first where there are both."""
    folder, _ = run
    (folder / "checkpoint.pth").rename(folder / name)
    assert checkpoint_file(folder) == folder / name and load_model(folder)[0].n_cls == 5
    (folder / "checkpoint.pth").touch()
    assert checkpoint_file(folder) == folder / "checkpoint.pth"


def test_variant_yaml_and_tuples_are_read(run):
    folder, _ = run
    text = (
        (folder / "variant.yml")
        .read_text()
        .replace("image_size:\n  - 32\n  - 32", "image_size: !!python/tuple [32, 32]")
    )
    assert "python/tuple" in text
    (folder / "variant.yml").unlink()
    (folder / "variant.yaml").write_text(text)
    assert RunConfig.read(folder).net.image_size == (32, 32)
    load_model(folder)


def test_no_other_tag_is_executed(run, tmp_path):
    folder, _ = run
    flag = tmp_path / "executed"
    (folder / "variant.yml").write_text(f"net_kwargs: !!python/object/apply:os.mkdir ['{flag}']")
    with pytest.raises(ValueError, match=r"variant\.yml"):
        RunConfig.read(folder)
    assert not flag.exists()


def test_pickled_code_is_not_executed(tmp_path):
    import pickle

    flag = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            import os

            return os.mkdir, (str(flag),)

    (tmp_path / "checkpoint.pth").write_bytes(pickle.dumps({"model": Hostile()}))
    with pytest.raises(ValueError, match="damaged or no PyTorch checkpoint"):
        load_checkpoint(tmp_path)
    assert not flag.exists()


def test_damaged_checkpoints_are_named_in_one_line(run):
    file = run[0] / "checkpoint.pth"
    content = file.read_bytes()
    torch.save({"model": None}, file)
    for damaged in (file.read_bytes(), content[: len(content) // 2], b"hello", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pth") as error:
            load_model(run[0])
        assert "\n" not in str(error.value)


def test_missing_files_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    (run[0] / "variant.yml").unlink()
    with pytest.raises(FileNotFoundError, match=r"variant\.yml"):
        load_model(run[0])


def test_damaged_variants_are_named(run):
    for text in ("[1, 2", "- a", "a: 1", "\x00", "net_kwargs: {a: 1}\ndataset_kwargs: 3"):
        (run[0] / "variant.yml").write_text(text)
        with pytest.raises(ValueError, match=r"variant\.yml"):
            RunConfig.read(run[0])


def test_weights_that_do_not_fit_are_refused(run, small_net):
    write_variant({"net_kwargs": small_net | {"n_layers": 2}}, run[0])
    with pytest.raises(ValueError, match="net_kwargs") as error:
        load_model(run[0])
    assert "\n" not in str(error.value)


def test_an_interrupted_save_leaves_the_old_checkpoint(run, monkeypatch):
    file = run[0] / "checkpoint.pth"
    before = file.read_bytes()

    def interrupted(checkpoint, target):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"model": {}}, file)
    assert file.read_bytes() == before


def test_a_full_disk_leaves_the_old_checkpoint_and_is_named(run, monkeypatch):
    file = run[0] / "checkpoint.pth"
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match=f"cannot write {re.escape(str(file))}: File too large"):
            save_checkpoint({"model": {"weight": torch.zeros(10_000)}}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert file.read_bytes() == before and not list(run[0].glob("*.part"))


def test_a_flipped_bit_is_found(run):
    """Wherever it is: in a tensor, in the names, in the headers of the archive; or it changes nothing."""
    file = run[0] / "checkpoint.pth"
    original, weights = file.read_bytes(), load_checkpoint(file)["model"]
    chance, n_found = random.Random(0), 0
    for _ in range(100):
        damaged, place = bytearray(original), chance.randrange(len(original))
        damaged[place] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            loaded = load_checkpoint(file)["model"]
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            n_found += 1
        else:
            assert loaded.keys() == weights.keys()
            assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    assert n_found > 50


def test_fine_tuning_with_other_classes_keeps_everything_else(run, small_net):
    folder, old = run
    new = create_segmenter(small_net | {"n_cls": 3})
    classes = new.decoder.cls_emb.clone()
    copy_weights(new, folder)
    assert torch.equal(new.decoder.cls_emb, classes)
    assert torch.equal(new.encoder.blocks[1].mlp.fc1.weight, old.encoder.blocks[1].mlp.fc1.weight)
    assert torch.equal(new.decoder.proj_dec.weight, old.decoder.proj_dec.weight)
    larger = create_segmenter(small_net | {"image_size": [64, 32]})
    copy_weights(larger, folder)  # the position embedding is resized
    grid = old.encoder.pos_embed[:, 1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (8, 4), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(larger.encoder.pos_embed[:, 1:], expected)
    with pytest.raises(ValueError, match="does not fit"):
        copy_weights(create_segmenter(small_net | {"n_layers": 2}), folder)
