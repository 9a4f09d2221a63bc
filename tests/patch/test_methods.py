"""The table of methods: options, registration, and methods that a user registers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import patch
from g2tm import Grouping
from patch.method import COMMON, METHODS, Choice, ModelShape, Number, Option, check_layers, complete, register
from patch.methods.common import check_tokens, scheduled_r, tokens_left
from segm.model.factory import create_segmenter
from tests.helpers import different_images

SHAPE = ModelShape(12, (4, 4))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone afterwards."""
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)


def refused(allowed, function, *args, **kwargs):
    """A ValueError of one line that says what is allowed."""
    with pytest.raises(ValueError, match=allowed) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_numbers():
    share = Number(0, 1)
    for value in (0, 1, 0.5, np.float32(0.5), np.int64(1)):
        assert share.check(value) == value and type(share.check(value)) in (int, float)
    for value in (-0.1, 1.1, math.nan, math.inf, "0.5", "auto", None, True, [0.5], 0.5j, torch.tensor(0.5)):
        refused("give a number from 0 to 1$", share.check, value)
    count = Number(1, integer=True)
    assert count.check(3) == count.check(np.int64(3)) == 3
    for value in (0, 2.0, 2.5, False):
        refused("give an integer from 1$", count.check, value)
    assert Number(high=3).allowed == "a number up to 3" and Number().allowed == "a number"
    named = Number(-1, 1, words=("adaptive", "tau"))
    assert named.check("tau") == "tau" and named.check(0.5) == 0.5
    refused("from -1 to 1 or adaptive or tau", named.check, "auto")


def test_numbers_that_are_typed():
    assert Number().parse("0.5") == 0.5 and Number().parse("1e-3") == 1e-3 and Number().parse("-2") == -2.0
    assert Number(integer=True).parse("+3") == 3
    either = Number(0, integer=None)
    assert (either.parse("8"), type(either.parse("8"))) == (8, int)
    assert (either.parse("1.0"), type(either.parse("1.0"))) == (1.0, float)
    typed = Number(-1, 1, words=("tau",), read=("auto",))
    assert typed.parse("auto") == "auto" and typed.parse("tau") == "tau" and typed.parse("-0.5") == -0.5
    for text in ("2", "", "none", "nan", "0,5", "Auto"):
        refused("give a number from -1 to 1 or tau or auto$", typed.parse, text)
    refused("give a number from -1 to 1 or tau$", typed.check, "auto")  # which only a command line turns into one
    for text in ("2.5", "²", "0x1"):
        refused("give an integer$", Number(integer=True).parse, text)


def test_choices():
    choice = Choice(("code", "paper"))
    assert choice.check("code") == choice.parse("code") == "code"
    for value in ("Code", "", None, 1, ["code"]):
        refused("choose code or paper$", choice.check, value)
    assert Choice((True, False)).check(False) is False and Choice((True, False)).parse("true") is True
    for value in (0, 1, "true", None, torch.ones(2)):
        refused("choose true or false$", Choice((True, False)).check, value)
    refused("new, odd: an option of type .*int, float", register, "new", lambda step: None, odd=Option("word", ""))


def test_options_of_one_and_of_several_values():
    one, any_number, pair = (Option(1, "", type=Number(0, integer=True), many=many) for many in (False, True, 2))
    assert one.check("n", 3) == 3 and any_number.check("n", 3) == 3
    assert any_number.check("n", (3, 4)) == [3, 4] and any_number.check("n", [3]) == [3]
    assert pair.check("n", [3, 4]) == (3, 4)
    refused(r"n \[3\]: give an integer from 0", one.check, "n", [3])
    refused(r"n \[\]: give one value or several, each an integer from 0", any_number.check, "n", [])
    refused(r"n \[3, -1\]: give an integer from 0", any_number.check, "n", [3, -1])
    for value in (3, [3], (1, 2, 3), [], "34"):
        refused("give 2 values, each an integer from 0", pair.check, "n", value)
    refused("n 'a'", any_number.check, "n", "a")


def test_the_type_of_an_option_is_that_of_its_default():
    assert Option(1, "").check("n", 2) == 2 and Option(0.5, "").check("n", 2) == 2
    refused("integer", Option(1, "").check, "n", 0.5)
    assert Option(None, "", type=int).check("n", 2) == 2
    refused("int, float, Number or Choice", Option("word", "").check, "n", "word")


def completed(name, shape, given):
    return complete(patch.find(name), shape, given)


def test_check_layers():
    assert check_layers(None, 3) == (1, 2, 3) and check_layers(2, 3) == (2,)
    assert check_layers(range(1, 4, 2), 3) == (1, 3) and check_layers([np.int64(2)], 3) == (2,)
    assert check_layers([0, 3], 3, first=0) == (0, 3)
    for layers in ([], [0], [4], [True], [1.0], ["1"]):
        refused("layers 1 to 3", check_layers, layers, 3)
    for layers in ([2, 1], [2, 2]):
        refused("once, in ascending order", check_layers, layers, 3)


def test_what_is_not_given_is_the_default():
    for name, method in METHODS.items():
        options = complete(method, SHAPE, {})
        assert set(options) == set(method.options)
        assert complete(method, SHAPE, dict.fromkeys(method.options)) == options or name == "algm"
        assert complete(method, SHAPE, options) == options  # they may be given back
        assert options == patch.check(name, SHAPE.depth, SHAPE.grid)
        assert all(layer in range(1, 13) for layer in options["layers"])
    # No window is a value of its own.
    for window in (None, (0, 0), [0, 0]):
        assert patch.check("algm", 12, (4, 4), window=window)["window"] is None
    assert patch.check("algm", 12, (4, 4))["window"] == (2, 2)


def test_messages_name_the_option_the_value_and_what_is_allowed():
    for name, given, message in (
        ("graph", {"threshold": 2}, "threshold 2: give a number from -1 to 1"),
        ("graph", {"attention": "prop"}, "attention 'prop': choose none or proportional or inverse"),
        ("graph", {"layers": [13]}, r"layers \[13\]: the encoder has layers 1 to 12"),
        ("graph", {"rr": 1, "q": 2}, "graph takes no q, rr: its options are layers, attention, batch, threshold"),
        ("algm", {"window": (2, 2, 2)}, r"window \(2, 2, 2\): give 2 values, each an integer from 0"),
        ("algm", {"window": 2}, "window 2: give 2 values"),
        ("clustvit", {"injection_point": 2, "layers": [3]}, "injection_point 2 and layers .3. name the same place"),
        ("tome", {"r": "8"}, "r '8': give an integer from 0"),
        ("tome", {"r": (1, 2, 3)}, r"r \[1, 2, 3\]: give one number from 0 for each of the 12 layers"),
        ("tome", {"r": (8, 2)}, r"r \[8, 2\]: give one number from 0 for each of the 12 layers"),
        ("nosuch", {}, "unknown method 'nosuch': choose one of keymatch, graph, algm"),
    ):
        refused(message, completed, name, SHAPE, given)
    refused("merges by default in layers .*name other layers", completed, "algm", ModelShape(3, (4, 4)), {})


def test_pure_leaves_a_model_as_it_is_and_says_so(caplog):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    before = type(model)
    with caplog.at_level("INFO", logger="patch"):
        assert patch.apply(model, "pure") is model and type(model) is before and not patch.is_patched(model)
    assert [one.getMessage() for one in caplog.records] == ["pure: nothing merges, the model stays as it is"]
    assert patch.check("pure", 12, (4, 4), layers=None) == {} and patch.remove(model) is model
    refused("takes no r, tokens: name a method", patch.check, "pure", 12, (4, 4), r=3, tokens=0.5)
    refused("takes no threshold", lambda: patch.apply(model, "pure", threshold=0.5))
    patch.apply(model, "mpm", layers=2)
    refused("patched with mpm: for pure call patch.remove", patch.apply, model, "pure")


def test_a_number_per_layer_as_a_list_or_a_tuple():
    for several in ([2] * 12, (2,) * 12, (0,) * 12):
        assert patch.check("tome", 12, (4, 4), r=several)["r"] == [*several]
        assert [scheduled_r(several, None, layer, 12) for layer in (1, 12)] == [several[0]] * 2
    for pair, inflection in (((8, 0.5), 0.5), ((8, -1), -1), ((8, 0), 0), ((8, np.float32(0.5)), 0.5)):
        found = patch.check("tome", 12, (4, 4), r=pair)
        assert (found["r"], found["r_inflection"]) == (8, inflection)
    assert patch.check("tome", 2, (4, 4), r=(3, 2))["r"] == [3, 2]
    for several in ([8, 0.25], (8, 0.25)):
        options = patch.check("graph", 12, (4, 4), tokens=several[:1])
        assert options["tokens"] == [8]
        algm = patch.check("algm", 12, (4, 4), tokens=several)
        assert algm["tokens"] == [8, 0.25]
        check_tokens(algm | {"tokens": several}, SHAPE)
        steps = (SimpleNamespace(options=algm | {"tokens": several}, layer=layer, grid=(4, 4)) for layer in (1, 5))
        assert [tokens_left(step) for step in steps] == [8, 4]
        refused(
            "give one number, or one for each of the 1 merging layers", check_tokens, algm | {"layers": (1,)}, SHAPE
        )


def test_register_refuses_what_is_wrong():
    def merge(step):
        return None

    for allowed, name, options in (
        ("'graph' is registered already", "graph", {}),
        ("'pure' is registered already", "pure", {}),
        ("attention, block, before", "new", {"place": "behind"}),
        ("new is enabled by own, which is none of its options", "new", {"enabled_by": "own"}),
        ("spare as an Option", "new", {"spare": 0.5}),
        ("tome has an option r of another kind", "new", {"r": Option(0.5, "share")}),
        ("graph has an option threshold of another", "new", {"threshold": Option(0.5, "", type=Number(0, 1))}),
        ("algm has an option window of another", "new", {"window": Option((2, 2), "", type=Number(0, integer=True))}),
    ):
        refused(allowed, register, name, merge, **options)
        assert "new" not in METHODS
    register("new", merge, r=Option(3, "other words", type=Number(0, integer=True), many=True), layers=(1,))
    assert patch.check("new", 12, (4, 4))["r"] == 3 and patch.find("new").merge is merge


def test_common_options_may_have_other_defaults():
    register("new", lambda step: None, layers=lambda shape: (shape.depth,), attention="inverse", batch="uniform")
    found = patch.check("new", 7, (4, 4))
    assert found == {"layers": (7,), "attention": "inverse", "batch": "uniform"}
    assert COMMON["attention"].default == "none"
    assert not patch.find("new").takes("threshold") and patch.find("new").takes("layers")


@torch.inference_mode()
def test_pitome_keeps_a_share_of_the_tokens(small_net):
    model = create_segmenter(small_net).eval()
    patch.apply(model, "pitome", keep=0.75, variant="paper")
    model(torch.randn(2, 3, 32, 32))
    assert [steps.lengths for steps in patch.reductions(model).values()] == [(12, 12), (9, 9), (6, 6)]


def test_what_is_static():
    found = {name for name, method in METHODS.items() if method.is_static(patch.check(name, 12, (4, 4)))}
    assert found == METHODS.keys() - {"graph", "algm", "mpm", "ltmp", "clustvit"}
    assert patch.find("graph").is_static(patch.check("graph", 12, (4, 4), tokens=3))


def first_tokens(step, kept):
    """All tokens from a place on go into the one before it."""
    n_images, n_tokens = step.x.shape[:2]
    assignment = torch.arange(n_tokens).clamp(max=kept - 1).expand(n_images, -1)
    return Grouping.of_length(assignment, min(kept, n_tokens), step.sizes)


def models(small_net, prepare=lambda encoder: None):
    """A Segmenter and two ViTs of 16 patches."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    names = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3")
    for model in (create_segmenter(small_net), *(timm.create_model(name, **size) for name in names)):
        prepare(getattr(model, "encoder", model))
        yield model.eval()


@torch.inference_mode()
def test_a_method_with_an_option_acts_at_every_place(small_net):
    for place, layers in (("attention", [1, 3]), ("block", [0, 2, 3]), ("before", [1, 3])):
        steps = []

        def merge(step, steps=steps):
            steps.append(step)
            return first_tokens(step, step.options["spare"] - len(steps))

        register(f"at {place}", merge, place=place, spare=Option(8, "tokens kept", flag="--keep-tokens"))
        for model in models(small_net):
            steps.clear()
            images = different_images(2)
            shape = model(images).shape
            patch.apply(model, f"at {place}", layers=layers, spare=9, attention="proportional")
            assert model(images).shape == shape
            assert [step.layer for step in steps] == layers and steps[0].depth == 3
            assert [step.x.shape[1] for step in steps] == [16, *range(8, 9 - len(layers), -1)]
            assert steps[0].sizes is None and all(step.sizes.sum(1).tolist() == [16, 16] for step in steps[1:])
            assert all(step.sizes.shape == step.x.shape[:2] for step in steps[1:])
            assert {step.grid for step in steps} == {(4, 4)} and {step.native_grid for step in steps} == {(4, 4)}
            blocks = getattr(model, "encoder", model).blocks
            assert [step.block for step in steps] == [blocks[max(layer, 1) - 1] for layer in layers]
            assert patch.reduction(model).lengths == (9 - len(layers),) * 2 and patch.options(model)["spare"] == 9


@torch.no_grad()
def residual_stream(model, images):
    """(place, layer) -> tokens of an unpatched model."""
    stream, handles = {}, []

    def note(place, layer, register):
        def hook(module, inputs, output=None):
            stream[place, layer] = inputs[0] if output is None else output

        handles.append(register(hook))

    for layer, block in enumerate(getattr(model, "encoder", model).blocks, start=1):
        note("before", layer, block.register_forward_pre_hook)
        note("attention", layer, block.norm2.register_forward_pre_hook)
        note("block", layer, block.register_forward_hook)
    model(images)
    for handle in handles:
        handle.remove()
    return stream | {("block", 0): stream["before", 1]}


@torch.inference_mode()
def test_places_are_where_they_say(small_net):
    """Against the residual stream of the unpatched model."""
    seen = {}

    def look(place):
        def merge(step):
            seen[place, step.layer] = step.x, step.n_prefix
            return Grouping.identity(step.x)

        register(f"look {place}", merge, place=place)

    for place in ("attention", "block", "before"):
        look(place)
    for model in models(small_net):
        images = different_images(2)
        expected = residual_stream(model, images)
        for place in ("attention", "block", "before"):
            patch.apply(model, f"look {place}", layers=list(range(0 if place == "block" else 1, 4)))
            model(images)
            patch.remove(model)
        assert seen.keys() == expected.keys()
        for at, (tokens, n_prefix) in seen.items():
            torch.testing.assert_close(tokens, expected[at][:, n_prefix:], atol=1e-5, rtol=1e-5, msg=str(at))


@torch.inference_mode()
def test_a_method_gets_what_it_asks_for(small_net):
    """Of the patch tokens alone, the same whether attention is looked at while it runs or formed beside it."""
    asked = ("input", "normed", "keys", "cls_attention", "received_attention")
    for place in ("attention", "block"):
        seen = []

        def merge(step, seen=seen):
            seen.append({name: getattr(step, name) for name in asked})
            return first_tokens(step, 10 - 2 * step.layer)

        register(f"asks {place}", merge, place=place)
        for model in models(small_net):
            patch.apply(model, f"asks {place}", layers=[1, 2], attention="proportional")
            images, blocks = different_images(2), getattr(model, "encoder", model).blocks
            seen.clear()
            model(images)
            for block in blocks:
                block.attn.fused_attn = False
            model(images)
            for fused, explicit, n_tokens in zip(seen[:2], seen[2:], (16, 8), strict=True):
                torch.testing.assert_close(fused, explicit, atol=1e-5, rtol=1e-5)
                assert {tuple(value.shape[:2]) for value in fused.values()} == {(2, n_tokens)}
                assert fused["keys"].shape[2] == 16 and fused["normed"].shape[2] == 32


def test_in_front_of_a_block_nothing_has_attended(small_net):
    register("too early", lambda step: first_tokens(step, step.keys.shape[1]), place="before", layers=(1,))
    model = patch.apply(create_segmenter(small_net), "too early")
    with pytest.raises(ValueError, match="layer 1: before the block nothing has attended yet"):
        model(different_images(2))


def test_a_method_may_merge_nothing(small_net):
    register("nothing", lambda step: None)
    for model in models(small_net):
        images = different_images(2)
        expected = model(images)
        assert torch.equal(patch.apply(model, "nothing")(images), expected) and patch.reduction(model) is None


@torch.inference_mode()
def test_needs_of_packed_images_are_in_rows(small_net):
    """The first merge leaves different numbers of tokens."""
    steps = []

    def merge(step):
        steps.append(step)
        if step.layer > 1:
            return first_tokens(step, 2)
        lengths = [3, 9]
        assignment = torch.stack([torch.arange(16).clamp(max=length - 1) for length in lengths])
        return Grouping(assignment, torch.tensor(lengths), lengths)

    register("two lengths", merge, layers=(1, 2))
    for model in models(small_net):
        images = different_images(2)
        patch.apply(model, "two lengths")
        model(images)
        step = steps[-1]
        assert step.padding is not None and step.sizes.count_nonzero(1).tolist() == [3, 9]
        packed = step.keys, step.normed
        handle = getattr(model, "encoder", model).blocks[1].register_forward_hook(lambda m, i, o: None)
        model(images)
        handle.remove()
        assert steps[-1] is not step
        for one, other in zip(packed, (steps[-1].keys, steps[-1].normed), strict=True):
            for image, length in enumerate((3, 9)):
                torch.testing.assert_close(one[image, :length], other[image, :length])


def test_a_method_with_a_learned_module(small_net):
    """Built into the encoder; only what is switched on is used, and it learns."""

    def add(encoder, blocks, width=4):
        for block in blocks:
            block.judge = nn.Linear(32, width)
        return {"width": width}

    def merge(step):
        return first_tokens(step, 10)

    def soften(step):
        weights = step.block.judge(step.normed).mean(-1).sigmoid()
        return Grouping.identity(step.x).then(Weighted(weights))

    class Weighted:
        """Multiplies every token by a learned number."""

        padding = None

        def __init__(self, weights):
            self.weights, self.sizes = weights, torch.ones_like(weights).detach()
            self.lengths = (weights.shape[1],) * len(weights)
            self.counts = torch.tensor(self.lengths)

        def merge(self, x):
            return x * self.weights.unsqueeze(-1)

        def unmerge(self, y, scores=False):
            return y

        def then(self, second):
            from g2tm import Chain

            return Chain(self, second)

    register("judged", merge, modules=add, training_form=soften, layers=(1, 2), width=Option(4, "of the judges"))
    for model in models(small_net, lambda encoder: patch.add_modules(encoder, "judged", width=3)):
        encoder = getattr(model, "encoder", model)
        assert encoder.blocks[0].judge.weight.shape == (3, 32) and patch.has_modules(encoder, "judged")
        keys = list(model.state_dict())
        patch.apply(model, "judged")
        assert patch.options(model)["width"] == 3
        assert list(model.state_dict()) == keys
        model(different_images(2))
        assert patch.reduction(model).lengths == (10, 10)
        model.train()(different_images(2)).square().sum().backward()
        assert patch.reduction(model).lengths == (16, 16)
        grads = [block.judge.weight.grad for block in encoder.blocks]
        assert grads[0].any() and grads[1].any() and grads[2] is None
    with pytest.raises(ValueError, match=r"add_modules\(encoder, 'judged'\)"):
        patch.apply(create_segmenter(small_net), "judged")


def test_prepare_and_check_of_a_method():
    def prepare(given):
        return {key: 2 * value if key == "spare" else value for key, value in given.items()}

    def check(options, shape):
        if options["spare"] > shape.grid[0]:
            raise ValueError(f"spare {options['spare']}: there are {shape.grid[0]} rows")

    register("rows", lambda step: None, prepare=prepare, check=check, spare=Option(1, "rows"))
    assert patch.check("rows", 3, (4, 4), spare=2)["spare"] == 4 and patch.check("rows", 3, (4, 4))["spare"] == 1
    refused("there are 4 rows", patch.check, "rows", 3, (4, 4), spare=3)
