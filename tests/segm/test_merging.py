"""A method's options: table, flags, variant.yml and back."""

import random
import re
import sys
from types import SimpleNamespace

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

import patch
from patch import Choice, Number, Option
from segm import test, train
from segm.merging import (
    MergingCommand,
    apply,
    build_model,
    choose,
    learned_parts,
    of_model,
    parse,
    read_variant,
    to_variant,
)
from segm.model.factory import create_segmenter
from tests.helpers import by_speed

DEPTH, GRID = 6, (12, 12)


@pytest.fixture
def toy():
    """A registered method with options of every type."""
    options = {
        "count": Option(3, "Tokens per group.", flag="--toy-count", key="toy_count"),
        "quick": Option(False, "Whether it hurries."),
        "kinds": Option("a", "Kinds.", type=Choice(("a", "b", "c")), many=True),
        "zoom": Option((1.0, 2.0), "Zooms.", type=float, many=2, none=(0.0, 0.0)),
        "level": Option(0.5, "Level.", type=Number(0, 1, words=("high",)), flag=("--level", "--levels"), many=True),
        "mode": Option("on", "Mode.", type=Choice(("on", "off")), flag={"--on": "on", "--off": "off"}),
    }
    yield patch.register("toy", lambda step: None, attention="proportional", **options)
    del patch.METHODS["toy"]


@pytest.fixture
def restored():
    """Methods that a file registers are gone afterwards."""
    methods, modules = dict(patch.METHODS), set(sys.modules)
    yield
    patch.METHODS.clear()
    patch.METHODS.update(methods)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


OWN = """
import patch
patch.register("own", lambda step: None, strength=patch.Option(0.5, "Strength.", flag="--strength"))
"""


def test_a_file_of_the_users_registers_methods(restored, tmp_path, call):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    words = ["--patch-type", "own", "--strength", "0.7", f"--plugin={file}"]
    assert "--strength" in call(test, "--plugin", file, "--patch-type", "own", "--help")
    assert parse(words) == parse([*words, "--plugin", str(file)]) == {"patch_type": "own", "strength": 0.7}

    del patch.METHODS["own"]
    with pytest.raises(ValueError, match=r"unknown method 'own'.*--plugin"):
        choose({}, {"patch_type": "own"})


def test_files_that_register_nothing_are_refused(restored, tmp_path, shapes_run, refused):
    (tmp_path / "late.py").write_text(f"{OWN}class Fault(Exception): pass\nraise Fault('at last')")
    (tmp_path / "words.txt").write_text(OWN)
    for name, allowed in (("late.py", "Fault: at last"), ("words.txt", "ends in .py"), ("none.py", "that is there")):
        said = refused(test, shapes_run, "--plugin", tmp_path / name, "--patch-type", "own")
        assert name in said and allowed in said, said
        assert "own" not in patch.METHODS
    (tmp_path / "recipe.yml").write_text("plugin: [late.py]")
    assert "in the command line" in refused(train, "--config", tmp_path / "recipe.yml", "--log-dir", tmp_path / "new")


def random_value(option, rng):
    """A value of an option as its table allows it."""
    kind = option.kind

    def one():
        if isinstance(kind, Choice) or (kind.words and rng.random() < 0.3):
            return rng.choice(kind.words)
        low, high = max(kind.low, -9), min(kind.high, 9)
        if kind.integer or (kind.integer is None and rng.random() < 0.5):
            return rng.randint(int(low), int(high))
        return round(rng.uniform(low, min(high, 1)), 3)

    if option.none is not None and rng.random() < 0.3:
        return None
    if option.many is False:
        return one()
    if option.many is True:
        return one() if rng.random() < 0.5 else [one() for _ in range(rng.randint(2, DEPTH))]
    return tuple(one() for _ in range(option.many))


def random_options(method, rng, count):
    """Random options that the method allows: what is given, and all in force."""
    for _ in range(count):
        table = method.options.items()
        given = {name: random_value(option, rng) for name, option in table if rng.random() < 0.5}
        if "layers" in given:
            given["layers"] = sorted(rng.sample(range(1, DEPTH + 1), rng.choice((1, 1, 2, 3))))
        if isinstance(given.get("r"), list):
            given["r"] = [rng.randint(0, 9) for _ in range(DEPTH)]
        try:
            yield given, patch.check(method.name, DEPTH, GRID, **given)
        except ValueError:
            continue


def words_of(method, given):
    """Options as a user types them."""
    words = ["--patch-type", method.name]
    for name, value in given.items():
        option = method.options[name]
        value = option.none if value is None else value
        values = value if isinstance(value, list | tuple) else [value]
        flag = option.flag or "--" + name.replace("_", "-")
        if isinstance(flag, dict):
            words += [switch for switch, meaning in flag.items() if meaning == value]
            continue
        if isinstance(flag, tuple):
            flag = flag[len(values) > 1]
        words += [flag, *(str(one).lower() for one in values)]
    return words


@pytest.mark.parametrize("count", by_speed([40, 200], quick=[40]))
def test_options_survive_flags_and_variant_file(count, toy):
    rng = random.Random(0)
    for method in patch.METHODS.values():
        seen = 0
        for given, full in random_options(method, rng, count):
            seen += 1
            saved = yaml.safe_load(yaml.safe_dump(to_variant(method.name, full)))
            typed = parse(words_of(method, given))
            for name, options in (read_variant(saved), choose({}, saved), choose(typed), choose(typed, saved)):
                assert name == method.name
                assert patch.check(name, DEPTH, GRID, **options) == full, (given, options)
        assert seen > count // 7, method.name


def test_a_variant_has_the_released_keys():
    for words, expected in (
        ("graph --selected-layer 3", {"selected_layer": 3, "threshold": 0.88, "batch_mode": "ragged"}),
        ("algm --merging-window-size 0 0", {"selected_layers": [1, 5], "merging_window_size": [0, 0]}),
        ("algm --gbm-threshold 0.7", {"gbm_threshold": 0.7, "merging_window_size": [2, 2], "attention": "none"}),
        ("tome --r 8 --r-inflection -1", {"r": 8, "r_inflection": -1.0, "attention": "proportional"}),
        ("tome --selected-layers 2 4", {"threshold": None, "selected_layers": [2, 4]}),
    ):
        method, options = choose(parse(["--patch-type", *words.split()]))
        saved = to_variant(method, patch.check(method, DEPTH, GRID, **options))
        assert saved["patch_type"] == method and saved.items() >= expected.items()
    assert to_variant("pure", {}) == {"patch_type": "pure", "threshold": None, "selected_layer": None}


def test_released_variants_are_understood():
    algm = {"patch_type": "algm", "selected_layers": [1, 5], "merging_window_size": [2, 2], "threshold": 0.88}
    for saved, expected in (
        ({}, ("pure", {})),
        ({"patch_type": None}, ("pure", {})),
        ({"patch_type": "pure", "selected_layer": None, "threshold": None}, ("pure", {})),
        ({"patch_type": "graph", "selected_layer": 2}, ("graph", {"attention": "none", "layers": 2})),
        (algm, ("algm", {"attention": "none", "layers": [1, 5], "window": (2, 2), "threshold": 0.88})),
        ({"patch_type": "tome", "r": 8}, ("tome", {"attention": "none", "r": 8})),  # whatever the method's default
        ({"patch_type": "tome", "attention": "inverse"}, ("tome", {"attention": "inverse"})),
    ):
        assert read_variant(saved) == expected


def test_damaged_variants_are_refused_in_one_line(toy):
    damaged = ("abc", 2.5, -1, True, [], [1, 2, 3], ["a"], {"a": 1})
    for method in patch.METHODS.values():
        for name, option in method.options.items():
            for key in option.key if isinstance(option.key, tuple) else (option.key or name,):
                refused = 0
                for value in damaged:
                    try:
                        chosen = read_variant({"patch_type": method.name, key: value})[1]
                        patch.check(method.name, DEPTH, GRID, **chosen)
                    except ValueError as error:
                        refused += 1
                        assert "\n" not in str(error)
                assert refused >= 4, (method.name, key)


def test_what_was_saved_counts_for_the_same_method_alone():
    saved = {"patch_type": "graph", "selected_layer": 3, "threshold": 0.7, "attention": "inverse"}
    kept = {"layers": 3, "threshold": 0.7, "attention": "inverse"}
    for words, expected in (
        ("", ("graph", kept)),
        ("--patch-type graph --no-prop-attn", ("graph", kept | {"attention": "none"})),
        ("--selected-layers 1 --threshold 0.9", ("graph", kept | {"layers": 1, "threshold": 0.9})),
        ("--patch-type algm", ("algm", {})),
        ("--patch-type pure", ("pure", {})),
    ):
        assert choose(parse(words.split()), saved) == expected


def test_wrong_options_are_refused_in_one_line(refused):
    file = SimpleNamespace(main=MergingCommand("any", callback=lambda merging: choose(merging)))
    for words, hints in (
        ("--patch-type graph --prop-attn --iprop-attn", ["--prop-attn and --iprop-attn"]),
        ("--prop-attn --no-prop-attn", ["--prop-attn and --no-prop-attn"]),
        ("--patch-type graph --selected-layer 1 --selected-layers 2", ["--selected-layer and --selected-layers"]),
        ("--patch-type graph --r 3", ["--r", "graph", "--threshold"]),
        ("--patch-type tome --threshold 0.5", ["--threshold", "tome", "--r-inflection"]),
        ("--threshold 0.9", ["--threshold", "--patch-type", "graph"]),
        ("--patch-type pure --prop-attn", ["--prop-attn", "nothing merges"]),
        ("--patch-type graph --threshold auto", ["--threshold auto", "train.py", "--from"]),
        ("--patch-type graph --threshold 1.5", ["--threshold", "1.5", "-1 to 1"]),
        ("--patch-type tome --r x", ["--r"]),
        ("--patch-type tome --r 1.5", ["--r", "an integer from 0"]),
        ("--patch-type algm --merging-window-size 2", ["--merging-window-size", "2"]),
        ("--patch-type graph --batch-mode other", ["other", "ragged or uniform"]),
        ("--patch-type nosuch", ["nosuch", "pure", "graph"]),
    ):
        message = refused(file, *words.split())
        assert all(hint in message for hint in hints), message
        with pytest.raises(ValueError, match=r".") as error:
            choose(parse(words.split()))
        assert "\n" not in str(error.value)


def help_of(command, *words):
    """Lines of --help, as wide as a terminal of 80 columns."""
    result = CliRunner().invoke(command, [*words, "--help"], terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_help_has_a_line_for_every_method(toy):
    for command in (test.main, train.main):
        lines = help_of(command)
        text = " ".join(" ".join(lines).split())
        assert "add --patch-type NAME --help" in text and "--prop-attn" not in text and "--toy-count" not in text
        for method in patch.METHODS.values():
            assert [" ".join(line.split()) for line in lines].count(f"{method.name} {method.summary}".strip()) == 1


def test_help_of_the_built_in_methods_fits_on_a_screen():
    assert len(help_of(test.main)) <= 40
    assert all(re.fullmatch(r"[A-Z].{,55}\.", method.summary) for method in patch.METHODS.values())


def test_help_shows_the_options_of_the_chosen_method_with_its_defaults(toy):
    expected = {
        "tome": [
            "--selected-layer, --selected-layers INTEGER... Layers in which to merge, counted from 1. [default: all]",
            "--prop-attn, --no-prop-attn, --iprop-attn Weight",
            "[default: --prop-attn]",
            "--r INTEGER... Number of tokens that each layer removes; or one number per layer, as in 16 8 8 0. "
            "[default: 8]",
        ],
        "algm": ["[default: 1 5 of 12 layers]", "[default: uniform in training, else ragged]", "[default: 2 2]"],
        "toy": [
            "--toy-count INTEGER Tokens per group. [default: 3]",
            "--quick true|false Whether it hurries. [default: false]",
            "--kinds a|b|c... Kinds. [default: a]",
            "--zoom NUMBER... Zooms. [default: 1.0 2.0]",
            "--level, --levels NUMBER|high... Level. [default: 0.5]",
            "--on, --off Mode. [default: --on]",
        ],
    }
    for command in (test.main, train.main):
        own = len(help_of(command, "--patch-type", "pure")) - len(patch.METHODS)
        for name, parts in expected.items():
            chosen = help_of(command, "--patch-type", name)
            assert chosen == help_of(command, f"--patch-type={name}") and len(chosen) > own
            assert chosen == CliRunner().invoke(command, ["--help", "--patch-type", name]).output.splitlines()
            text = " ".join(" ".join(chosen).split())
            assert f"Options of {name} (" in text and "--linkage" not in text
            assert [part for part in parts if part not in text] == []
    assert any(
        line.startswith("Options of graph (") for line in help_of(train.main, "--config", "ade20k_512_tiny_graph")
    )


def test_options_of_all_methods_have_a_sentence_and_a_default():
    for method in patch.METHODS.values():
        lines = help_of(test.main, "--patch-type", method.name)
        text = " ".join(" ".join(lines).partition(f"Options of {method.name} (")[2].split())
        assert text.count("[default: ") == len(method.options)
        assert "[default: ]" not in text and "[default: None]" not in text
        for option in method.options.values():
            assert re.fullmatch(r"[A-Z].*\.", option.help), option.help


def test_flags_that_help_hides_are_accepted_and_suggested(refused):
    assert parse(["--r", "4"]) == {"r": 4}
    assert "--selected-layers" in refused(test, "runs/any", "--selected-layerz", "1")


def test_options_by_keyword_are_checked_like_flags():
    with pytest.raises(ValueError, match="nosuch: graph takes --selected-layer"):
        choose({"patch_type": "graph", "nosuch": 3})


def test_a_flag_has_one_meaning(toy):
    """One that a command has itself is refused with a line, not with a warning or a wrong value."""
    command = MergingCommand("any", params=[click.Option(["--toy-count"])], callback=lambda merging, toy_count: None)
    result = CliRunner().invoke(command, [])
    assert result.exit_code != 0 and "--toy-count" in result.output


def test_options_without_a_type_are_refused_when_the_method_is_registered():
    with pytest.raises(ValueError, match=r"bad, text: .*Choice"):
        patch.register("bad", lambda step: None, text=Option("a", "A text."))
    assert "bad" not in patch.METHODS


def test_a_recipe_gives_defaults(toy):
    command = MergingCommand("any", callback=lambda merging: None)
    other = {"patch_type": "toy", "quick": True, "kinds": ["a", "b"], "toy_count": 4, "zoom": [1, 0.5]}
    merging = command.make_context("any", [], default_map=other).params["merging"]
    assert merging == {"patch_type": "toy", "quick": True, "kinds": ["a", "b"], "count": 4, "zoom": (1.0, 0.5)}
    recipe = {"patch_type": "graph", "selected_layers": [1], "threshold": 0.9, "prop_attn": True, "iprop_attn": False}
    for words, expected in (
        ("", {"patch_type": "graph", "layers": 1, "threshold": 0.9, "attention": "proportional"}),
        ("--patch-type graph --selected-layer 2 --no-prop-attn", {"layers": 2, "threshold": 0.9, "attention": "none"}),
        ("--patch-type algm", {"patch_type": "algm"}),
        ("--patch-type tome --r 2", {"patch_type": "tome", "r": 2}),
        ("--patch-type pure", {"patch_type": "pure"}),
    ):
        merging = command.make_context("any", words.split(), default_map=recipe).params["merging"]
        assert merging == {"patch_type": "graph"} | expected


def test_models_are_patched_with_what_was_chosen(small_net):
    model = create_segmenter(small_net)
    assert apply(model, "pure", {}) is model and of_model(model)["patch_type"] == "pure"
    chosen = choose(parse(["--patch-type", "tome", "--r", "1", "2", "0"]))
    saved = of_model(apply(model, *chosen))
    assert saved["patch_type"] == "tome" and saved["r"] == [1, 2, 0] and read_variant(saved)[0] == "tome"


def test_learned_parts_are_built_where_net_kwargs_ask_for_them(small_net):
    assert learned_parts("pure", {}) is None and learned_parts("graph", {"threshold": 0.5}) is None
    reduction = learned_parts("dtem", {"r": 2})
    assert reduction["name"] == "dtem"
    model = build_model(small_net | {"reduction": reduction})
    assert patch.has_modules(model.encoder, "dtem")
    more = model.state_dict().keys() - build_model(small_net).state_dict().keys()
    assert any("metric_layer" in key for key in more)
    assert torch.isfinite(apply(model, "dtem", {"r": 2}).eval()(torch.randn(1, 3, 32, 32))).all()
    for wrong in ({"name": "nosuch"}, {"name": "graph"}, {"name": "dtem", "other": 1}, {"width": 3}, "dtem", ["dtem"]):
        with pytest.raises(ValueError, match=r"nosuch|net_kwargs"):
            build_model(small_net | {"reduction": wrong})
