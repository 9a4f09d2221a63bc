"""Conformance vectors: every case holds, and the command finds out what does not."""

import json
import shutil
from pathlib import Path

import conformance
import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

import g2tm
import patch
from segm.eval.sliding import Windows
from tests.helpers import view_logits

DATA = Path(__file__).parents[1] / "data"
FILES = sorted(DATA.glob("*.safetensors"))


def changed(name, folder, change):
    """A copy of a file of vectors, in which tensors or parameters were changed."""
    with safe_open(DATA / name, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        header = opened.metadata() or {}
    tensors, header = change(tensors, header)
    save_file(tensors, folder / name, header)
    for other in ("checkpoint.pth", "variant.yml"):
        shutil.copy(DATA / other, folder)
    return folder / name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_case_holds(file):
    cases = conformance.find_cases(file)
    assert (
        len(cases)
        >= {"cases": 37, "clustvit": 14, "cubist": 20, "expedit": 21, "opentome_a": 18, "opentome_b": 31}[file.stem]
    )
    assert {case.name: reason for case in cases if (reason := conformance.failure(case))} == {}


@pytest.mark.nightly
def test_every_output_that_is_wrong_is_found(tmp_path):
    """Every tensor that a case is held against, one at a time, by an amount that matters."""
    inputs = (".metric", ".x", ".size", ".attn", ".importance", ".cotangent", ".h")
    source = DATA / "opentome_b.safetensors"
    with safe_open(source, "pt") as opened:
        names = [name for name in opened.keys() if not (name.startswith("n") and name.endswith(inputs))]  # noqa: SIM118
    outputs = [n for n in names if n.endswith((".x", ".size", ".assignment", ".mask", ".restored", "_grad", ".gflops"))]
    for name in outputs[::7]:

        def change(tensors, header, name=name):
            tensors[name] = tensors[name].roll(1, -1) + (1 if tensors[name].is_floating_point() else 0)
            return tensors, header

        file = changed(source.name, tmp_path, change)
        assert any(conformance.failure(case) for case in conformance.find_cases(file)), name


def test_the_command_names_what_fails(tmp_path, call):
    assert "atc: 4 of 4 hold" in call(conformance, DATA / "opentome_b.safetensors")

    def change(tensors, header):
        parameters = json.loads(header["cases"])
        parameters["pitome.n65.bsm.r8.m0.75"]["margin"] = -0.3
        return tensors, {"cases": json.dumps(parameters)}

    file = changed("opentome_a.safetensors", tmp_path, change)
    result = CliRunner().invoke(conformance.main, [str(file)])
    assert result.exit_code == 1 and "pitome: 3 of 4 hold" in result.stdout
    assert "pitome.n65.bsm.r8.m0.75: the assignment differs in" in result.stdout


def test_files_that_it_does_not_know_are_refused(tmp_path, refused):
    save_file({"other.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "holds other, which no check knows" in refused(conformance, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    assert "is no .safetensors file" in refused(conformance, tmp_path / "broken.safetensors")
    file = changed("opentome_a.safetensors", tmp_path, lambda tensors, header: (tensors, {}))
    assert "the header lacks `cases`" in refused(conformance, file)


def with_cls(first, patches):
    """The whole sequence, (B, N + 1, ...)."""
    first = first[:, :1] if isinstance(first, torch.Tensor) else torch.full_like(patches[:, :1], first)
    return torch.cat([first, patches], 1)


def step_of(tensors, case, source, step):
    """Write what a reduction of the patches of `source` gives."""
    x, size = tensors[f"{source}.x"], tensors[f"{source}.size"]
    tensors[f"{case}.x"] = with_cls(x, step.merge(x[:, 1:]))
    tensors[f"{case}.size"] = with_cls(size, step.sizes.unsqueeze(2))
    tensors[f"{case}.assignment"] = with_cls(0, 1 + step.assignment)
    return tensors[f"{case}.x"]


def single_steps():
    """Files of single steps with 5 rows of 6 columns, width 12 and 3 heads: (tensors, cases) and tensors."""
    x, metric, size = torch.randn(2, 31, 12), torch.randn(2, 31, 4), torch.randint(1, 4, (2, 31, 1)).float()
    size[:, 0] = 1
    attn, importance = torch.randn(2, 3, 31, 31).softmax(-1), torch.randn(2, 31)
    given = {"n31.x": x, "n31.metric": metric, "n31.size": size, "n31.attn": attn}
    sizes, keys = size[:, 1:, 0], metric[:, 1:]
    rules = {"pitome.n31.energy": {"r": 5, "variant": "energy", "margin": 0.1}}
    rules |= {"tofu.n31.r4": {"r": 4}, "mctf.n31.two": {"r": 3, "tau": [1, 2, 3], "bidirection": True}}
    rules |= {"crossget.n31.ends": {"r": 6, "importance": True, "last": True}, "fpet.n31.g5x6": {}}
    a = given | {"n31.importance": importance}
    step_of(a, "pitome.n31.energy", "n31", g2tm.pitome(keys, sizes=sizes, **rules["pitome.n31.energy"]))
    means = attn.mean((1, 2))[:, 1:]
    step_of(a, "mctf.n31.two", "n31", g2tm.mctf(keys, r=3, tau=(1, 2, 3), importance=means, sizes=sizes))
    step = g2tm.crossget(keys, r=6, importance=importance[:, 1:], sizes=sizes, suffix=1)
    step_of(a, "crossget.n31.ends", "n31", step)
    step_of(a, "fpet.n31.g5x6", "n31", g2tm.fpet(keys, (5, 6), sizes=sizes))
    for prune, name in ((True, "pruned"), (False, "merged")):
        step = g2tm.tofu(keys, r=4, prune=prune, sizes=sizes)
        a[f"tofu.n31.r4.{name}"] = step_of(a, "tofu.n31.r4", "n31", step)
    del a["tofu.n31.r4.x"]

    b, of_cls = dict(given), attn[:, :, 0, 1:].mean(1)
    step_of(
        b, "diffrate.n31.p20.m11", "n31", g2tm.diffrate(x[:, 1:], importance=of_cls, kept=19, merged=10, sizes=sizes)
    )
    logits = {name: torch.linspace(end, -end, 10).requires_grad_() for name, end in (("prune", 2), ("merge", -2))}
    rates = {name: (value, torch.arange(30, 0, -3.0)) for name, value in logits.items()}  # 3 patches apart
    step, cotangent = g2tm.diffrate_training(x[:, 1:], importance=of_cls, sizes=sizes, **rates), torch.randn(2, 31)
    step_of(b, "diffrate.train.n31", "n31", step)
    b |= {"diffrate.train.n31.mask": with_cls(1.0, step.mask), "diffrate.train.n31.mask_cotangent": cotangent}
    gradients = torch.autograd.grad((step.mask * cotangent[:, 1:]).sum(), list(logits.values()))
    for (name, rate), gradient in zip(rates.items(), gradients, strict=True):
        b[f"diffrate.train.n31.{name}_logits"], b[f"diffrate.train.n31.{name}_grad"] = rate[0], gradient
        b[f"diffrate.train.n31.{name}_kept"] = 1 + g2tm.kept_tokens(*rate)
    counts = [torch.tensor([80.0, 60, 41], requires_grad=True), torch.tensor([77.0, 55, 44], requires_grad=True)]
    flops = g2tm.gigaflops(*map(list, counts), length=82, width=48, patch_size=14, classes=10)
    b |= {"diffrate.flops.gflops": flops, "diffrate.flops.width": torch.tensor(48)}
    for name, count, gradient in zip(("prune", "merge"), counts, torch.autograd.grad(flops, counts), strict=True):
        b |= {f"diffrate.flops.{name}_kept": count, f"diffrate.flops.{name}_grad": gradient}
    step = g2tm.dct(x[:, 1:], r=7)
    b["dct.n31.r7.x"] = with_cls(x, step.merge(x[:, 1:]))
    b["dct.n31.r7.restored"] = with_cls(x, step.unmerge(step.merge(x[:, 1:])))
    step_of(b, "atc.n31.k9.single", "n31", g2tm.atc(keys, clusters=9, linkage="single", sizes=sizes))
    rule = {"merge_threshold": 0.4, "prune_threshold": 0.032}
    step = g2tm.ltmp(x[:, 1:], keys, importance=means, sizes=sizes, fewest=0, **rule)
    step_of(b, "ltmp.n31.both", "n31", step)
    b |= {f"ltmp.n31.both.{name}": torch.tensor(value) for name, value in rule.items()}
    return (a, rules), b | {"ltmp.n31.both.count": 1 + step.counts}


def chain():
    """Two blocks of width 24 and 3 heads on 13 patches."""
    size = {"img_size": (8, 104), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size).eval()
    model.norm, x = torch.nn.Identity(), torch.randn(2, 14, 24)
    model.blocks.register_forward_pre_hook(lambda blocks, inputs: (x,))
    tensors = {f"chain.blocks.{name}": value for name, value in model.blocks.state_dict().items()}
    images = torch.zeros(2, 3, 8, 104)
    tensors |= {"chain.input": x, "chain.plain.x": model.forward_features(images)}
    for method, options in (("dct", {"r": [3, 2]}), ("diffrate", {"prune_kept": [12, 9], "merge_kept": [10, 8]})):
        patch.apply(model, method, **options)
        found, handles = [], []
        for block in model.blocks:
            handles.append(block.register_forward_hook(lambda m, i, output, found=found: found.append(output)))
        model.forward_features(images)
        for layer, output in enumerate(found, start=1):
            handles[layer - 1].remove()
            tensors[f"chain.{method}.block{layer}.x"] = output
            if method == "diffrate":
                size = with_cls(1.0, patch.reductions(model)[layer].sizes.unsqueeze(2))
                tensors[f"chain.{method}.block{layer}.size"] = size
        tensors |= {f"chain.{method}.{name}": torch.tensor(value) for name, value in options.items()}
        patch.remove(model)
    return tensors


def clusters():
    """ClustViT with 2 clusters, width 24, 3 heads, 3 blocks, the merge after the first, and 3×5 patches of 8 pixels."""
    size = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size).eval()
    patch.add_modules(model, "clustvit", clusters=2, cluster_width=10)
    images = torch.randn(2, 3, 24, 40).half()
    torch.nn.init.normal_(model.clusterer.net[0].weight)
    tensors = {f"vit.state.{name}": value for name, value in model.state_dict().items()} | {"vit.x": images}
    embedded = model.blocks[0](model._pos_embed(model.patch_embed(images.float())))
    tensors["vit.batch.block1"] = embedded
    patch.apply(model, "clustvit", injection_point=1, cluster_rule="batch")
    tensors["vit.batch.block3"] = model.forward_features(images.float())
    tensors["vit.batch.logits"] = patch.reduction(model).logits
    tensors["vit.batch.ids"] = tensors["vit.batch.logits"].argmax(-1)
    assert len(tensors["vit.batch.ids"].unique()) > 1
    tensors |= {
        f"seq.{name}": value for name, value in model.state_dict().items() if "cluster" in name or "expand" in name
    }
    logits = model.clusterer(embedded[:, 1:])
    step = g2tm.Clusters(embedded[:, 1:], logits.argmax(-1), 2, model.expand_mlp, torch.zeros(2, dtype=torch.bool))
    reduced = with_cls(embedded, step.merge(embedded[:, 1:]))
    mask = torch.zeros(2, step.width, dtype=torch.bool) if step.padding is None else step.padding
    tensors |= {"seq.own.x": embedded, "seq.own.logits": logits, "seq.own.ids": logits.argmax(-1)}
    tensors |= {"seq.own.reduced": reduced, "seq.own.mask": with_cls(False, mask), "seq.own.processed": reduced.sin()}
    tensors["seq.own.regenerated"] = with_cls(reduced.sin(), step.unmerge(reduced[:, 1:].sin()))
    labels = torch.randint(3, (2, 3, 5)).repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    tensors |= {"labels.map": labels, "labels.k2": g2tm.cluster_labels(labels, (8, 8), 2), "loss.logits": logits}
    loss = g2tm.clustering_loss(logits, tensors["labels.k2"])
    header = {"heads": "3", "patch_size": "8", "injection_point": "1", "loss_weight": "0.25"}
    return tensors | {"loss.value": loss, "loss.weighted": 0.25 * loss}, header


def failures(file, tensors, header=None):
    """(number of cases, what fails) of a new file."""
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, file, header)
    cases = conformance.find_cases(file)
    return len(cases), {case.name: reason for case in cases if (reason := conformance.failure(case))}


def test_files_with_other_numbers_hold_without_a_segmenter_beside_them(tmp_path):
    (a, rules), b = single_steps()
    assert failures(tmp_path / "a.safetensors", a, {"cases": json.dumps(rules)}) == (5, {})
    assert failures(tmp_path / "b.safetensors", b) == (6, {})
    found = failures(tmp_path / "c.safetensors", chain() | {"n31.attn": b["n31.attn"]})
    assert found == (3, {}) == failures(tmp_path / "c.safetensors", chain(), {"heads": "3"})
    tensors, header = clusters()
    assert failures(tmp_path / "d.safetensors", tensors, header) == (4, {})
    for name in ("clustvit", "opentome_a", "opentome_b"):
        assert conformance.find_cases(Path(shutil.copy(DATA / f"{name}.safetensors", tmp_path)))


def test_a_number_that_a_file_does_not_tell_is_named(tmp_path):
    tensors, header = clusters()
    _, found = failures(tmp_path / "d.safetensors", tensors, {"loss_weight": "0.25"})
    assert found == {"vit.batch": "the header of d.safetensors lacks heads"}  # the others follow from shapes
    _, found = failures(tmp_path / "d.safetensors", tensors, header | {"injection_point": "2"})
    assert found.keys() == {"vit.batch"}
    _, found = failures(tmp_path / "c.safetensors", chain())
    assert set(found.values()) == {"the header of c.safetensors lacks heads"}
    _, b = single_steps()
    b |= {f"diffrate.train.n31.{name}_logits": torch.randn(3) for name in ("prune", "merge")}  # 10 to 14 apart
    _, found = failures(tmp_path / "b.safetensors", b)
    assert found == {"diffrate.train.n31": "the header of b.safetensors lacks granularity"}


@torch.no_grad()
def test_a_segmenter_is_sampled_as_the_file_is(tmp_path, golden_model):
    for name in ("checkpoint.pth", "variant.yml"):
        shutil.copy(DATA / name, tmp_path)
    model, images, slide = golden_model.eval(), torch.randn(3, 3, 192, 192).half(), torch.randn(1, 3, 200, 300).half()
    tensors = {"x3": images, "pure.b3.logits": model(images.float())[..., ::4, ::4], "xslide": slide}
    probabilities = view_logits(model, slide[0].float(), True, Windows.of(192, 128), (250, 375)).softmax(0)
    tensors["pure.slide.flip1"] = probabilities[:, ::4, ::4]
    patch.apply(model, "graph", layers=[3], threshold=0.9)
    tensors["graph.l3.t0.9.none.b3.logits"] = model(images.float())[..., ::4, ::4]
    tensors["graph.l3.t0.9.none.b3.assignment"] = patch.reduction(model).assignment
    assert failures(tmp_path / "s.safetensors", tensors) == (3, {})
    tensors["xslide"] = slide[..., :200]  # squares of several sizes could have given it
    _, found = failures(tmp_path / "s.safetensors", tensors)
    assert found.keys() == {"pure.slide.flip1"}
