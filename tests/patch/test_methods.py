"""The table of methods: options, registration, and methods that a user registers."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import patch
from g2tm import Grouping
from patch.method import COMMON, METHODS, Choice, Number, Option, Target, check_layers, register, resolve
from segm.model.factory import create_segmenter
from tests.helpers import different_images

TARGET = Target(12, (4, 4))


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
        found, options = resolve(name, TARGET, {})
        assert found is method and set(options) == set(method.options)
        assert resolve(name, TARGET, dict.fromkeys(method.options))[1] == options or name == "algm"
        assert resolve(name, TARGET, options)[1] == options  # they may be given back
        assert options == patch.check(name, TARGET.depth, TARGET.grid)
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
        ("tome", {"r": "8"}, "r '8': give an integer from 0"),
        ("tome", {"r": (1, 2, 3)}, r"r \(1, 2, 3\): give a pair"),
        ("nosuch", {}, "unknown method 'nosuch': choose one of graph, algm"),
    ):
        refused(message, resolve, name, TARGET, given)
    refused("merges by default in layers .*name other layers", resolve, "algm", Target(3, (4, 4)), {})


def test_register_refuses_what_is_wrong():
    def merge(step):
        return None

    for allowed, name, options in (
        ("'graph' is registered already", "graph", {}),
        ("'pure' is registered already", "pure", {}),
        ("attention, block, before, ahead", "new", {"place": "behind"}),
        ("new needs maps: a method may need input, normed, keys, row, means", "new", {"needs": ["keys", "maps"]}),
        ("new needs keys: in front of a layer", "new", {"needs": ["keys"], "place": "before"}),
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
    register("new", lambda step: None, layers=lambda target: (target.depth,), attention="inverse", batch="uniform")
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
            assert all(step.tokens.shape[1] == step.prefix + step.x.shape[1] for step in steps)
            assert all(step.sequence["sizes"].shape == step.tokens.shape[:2] for step in steps[1:])
            assert {step.grid for step in steps} == {(4, 4)} and steps[0].normed is steps[0].keys is None
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
            seen[place, step.layer] = step.tokens
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
        for at, tokens in seen.items():
            torch.testing.assert_close(tokens, expected[at], atol=1e-5, rtol=1e-5, msg=str(at))


@torch.inference_mode()
def test_a_method_gets_what_it_needs(small_net):
    for place in ("attention", "block"):
        for needs in (["keys"], ["normed"], ["keys", "normed"]):
            name, steps = f"{place} {needs}", []

            def merge(step, steps=steps):
                steps.append(step)
                return first_tokens(step, 10 - 2 * len(steps))

            register(name, merge, place=place, needs=needs)
            for model in models(small_net):
                block = getattr(model, "encoder", model).blocks[1]
                steps.clear()
                inputs = []
                patch.apply(model, name, layers=[1, 2])
                for watched in (False, True):  # keys are seen in attention, or formed beside it
                    if watched:
                        block.norm1.register_forward_hook(lambda m, i, output, inputs=inputs: inputs.append(output))
                        steps.clear()
                    model(different_images(2))
                    for step in steps:
                        assert (step.keys is not None) == ("keys" in needs)
                        assert (step.normed is not None) == ("normed" in needs)
                        for found, width in ((step.keys, 16), (step.normed, 32)):
                            length = step.prefix + step.x.shape[1]
                            assert found is None or found.shape == (2, length, width)
                if "normed" in needs:
                    torch.testing.assert_close(steps[1].normed, inputs[-1])
            with pytest.raises(ValueError, match="1 to 3"):
                patch.apply(create_segmenter(small_net), name, layers=[0])


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

    register("two lengths", merge, needs=["keys", "normed"], layers=(1, 2))
    for model in models(small_net):
        images = different_images(2)
        patch.apply(model, "two lengths")
        model(images)
        step = steps[-1]
        assert step.padded and step.sizes.count_nonzero(1).tolist() == [3, 9]
        packed = step.keys, step.normed
        handle = getattr(model, "encoder", model).blocks[1].register_forward_hook(lambda m, i, o: None)
        model(images)
        handle.remove()
        assert steps[-1] is not step
        for one, other in zip(packed, (steps[-1].keys, steps[-1].normed), strict=True):
            for image, length in enumerate((3, 9)):
                torch.testing.assert_close(one[image, : step.prefix + length], other[image, : step.prefix + length])


def test_a_method_with_a_learned_module(small_net):
    """Built into the encoder; only what is switched on is used, and it learns."""

    def add(encoder, blocks, width=4):
        for block in blocks:
            block.judge = nn.Linear(32, width)

    def merge(step):
        return first_tokens(step, 10)

    def soften(step):
        weights = step.block.judge(step.normed)[:, step.prefix :].mean(-1).sigmoid()
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

    register("judged", merge, needs=["normed"], modules=add, soft=soften, layers=(1, 2))
    for model in models(small_net, lambda encoder: patch.add_modules(encoder, "judged", width=3)):
        encoder = getattr(model, "encoder", model)
        assert encoder.blocks[0].judge.weight.shape == (3, 32) and patch.has_modules(encoder, "judged")
        keys = list(model.state_dict())
        patch.apply(model, "judged")
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

    def check(options, target):
        if options["spare"] > target.grid[0]:
            raise ValueError(f"spare {options['spare']}: there are {target.grid[0]} rows")

    register("rows", lambda step: None, prepare=prepare, check=check, spare=Option(1, "rows"))
    assert patch.check("rows", 3, (4, 4), spare=2)["spare"] == 4 and patch.check("rows", 3, (4, 4))["spare"] == 1
    refused("there are 4 rows", patch.check, "rows", 3, (4, 4), spare=3)
