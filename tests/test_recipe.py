"""Reading recipes: what is composed, and which line an error names."""

from __future__ import annotations

import pytest
import yaml

from lexmae import recipe
from lexmae.config import FinetuneRecipe, PretrainRecipe
from lexmae.cycle.config import PipelineRecipe
from lexmae.errors import InputError

MINIMAL = "data: shards\noutput: out\n"


@pytest.fixture
def load(tmp_path):
    """Text of a recipe → the composed recipe; the file is recipe.yaml."""
    def read(text: str, *overrides: str, kind: type = PretrainRecipe):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return recipe.load(tmp_path / "recipe.yaml", kind, overrides)
    return read


def refusal(load, text: str, *overrides: str, kind: type = PretrainRecipe) -> tuple[int | None, str]:
    """Line and reason of the error."""
    with pytest.raises(InputError) as caught:
        load(text, *overrides, kind=kind)
    assert overrides or caught.value.path.name == "recipe.yaml"
    return caught.value.line, caught.value.reason


def test_what_is_not_said_has_its_default(load):
    assert load(MINIMAL) == PretrainRecipe(data="shards", output="out")


def test_a_partial_section_keeps_the_recipes_own_defaults(load):
    found = load(MINIMAL + "optimization:\n  lr: 1.0e-5\n", kind=FinetuneRecipe)
    assert found.optimization.lr == 1e-5
    assert (found.optimization.batch, found.optimization.epochs, found.optimization.clip) == (24, 3, 1)
    assert found.logging.every == 50
    assert load(MINIMAL + "optimization: {lr: 1.0e-5}\n").optimization.batch == 2048
    assert load(MINIMAL, "optimization.lr=1e-5", kind=FinetuneRecipe).optimization.batch == 24


@pytest.mark.parametrize("text, value", [("2e-5", 2e-5), ("2.0e-5", 2e-5), ("1", 1.0), ("'0.5'", 0.5), (".5", 0.5)])
def test_every_way_to_write_a_number(load, text, value):
    found = load(MINIMAL + f"optimization:\n  lr: {text}\n").optimization.lr
    assert found == value and type(found) is float
    assert load(MINIMAL, f"optimization.lr={text}").optimization.lr == value


def test_a_whole_number_written_as_a_float_is_one(load):
    found = load(MINIMAL + "optimization:\n  batch: 64.0\n").optimization.batch
    assert found == 64 and type(found) is int


@pytest.mark.parametrize("text, line, reason", [
    ("data: a\noutput: b\nlearning_rate: 1\n", 3,
     "learning_rate: unknown key (did you mean 'optimization.lr'?); known are data, output"),
    ("data: a\noutput: b\n\noptimization:\n  lr: 1.0\n  learning: 2\n", 6, "optimization.learning: unknown key"),
    ("data: a\noutput: b\noptimization:\n  batch: many\n", 4, "optimization.batch: a whole number is needed, not 'ma"),
    ("data: a\noutput: b\noptimization:\n  batch: 2.5\n", 4, "optimization.batch: a whole number is needed"),
    ("data: a\noutput: b\noptimization:\n  batch: true\n", 4, "optimization.batch: a whole number is needed"),
    ("data: a\noutput: b\noptimization:\n  lr: fast\n", 4, "optimization.lr: a number is needed, not 'fast'"),
    ("data: a\noutput: b\noptimization:\n  lr: no\n", 4, "optimization.lr: a number is needed"),
    ("data: a\noutput: b\noptimization:\n  lr: [1]\n", 4, "optimization.lr: a number is needed"),
    ("data: a\noutput: b\noptimization:\n  lr: .inf\n", 4, "optimization.lr: a number is needed"),
    ("data: a\noutput: b\noptimization:\n  lr: .nan\n", 4, "optimization.lr: a number is needed"),
    ("data: a\noutput: b\nmasking:\n  whole_word: 1\n", 4, "masking.whole_word: true or false is needed"),
    ("data: 7\noutput: b\n", 1, "data: text is needed, not 7"),
    ("data:\noutput: b\n", 1, "data: text is needed, not None"),
    ("data: a\noutput: b\noptimization: 3\n", 3, "optimization: a mapping of keys to values is needed"),
    ("data: a\noutput: b\nmodel:\n  size: 3\n", 4, "model.size: a mapping"),
    ("data: a\noutput: b\noptimization:\n  lr: 1.0\n  lr: 2.0\n", 5, "lr: given twice"),
    ("data: a\ndata: b\n", 2, "data: given twice"),
    ("data: a\noutput: b\noptimization:\n  warmup: 2\n", 4, "optimization.warmup: a share of the steps"),
    ("data: a\noutput: b\nmasking:\n  decoder_strategy: all\n", 4, "masking.decoder_strategy: one of"),
    ("data: a\noutput: b\nmasking:\n\n  encoder: 0.6\n", 3, "masking.decoder: an inclusive decoder mask"),
    ("data: a\noutput: b\n1: 2\n", 3, "1: unknown key"),
    ("data: a\n", None, "the key 'output' is missing"),
    ("", None, "a recipe is a mapping"),
    ("- a\n", None, "a recipe is a mapping"),
    ("data: a\noutput: [\n", 3, "not YAML"),
    ("data: a\n\toutput: b\n", 2, "not YAML"),
])
def test_an_error_names_line_and_key(load, text, line, reason):
    found = refusal(load, text)
    assert found[0] == line and found[1].startswith(reason), found


def test_a_missing_file_and_text_that_is_not_utf8(tmp_path):
    with pytest.raises(InputError, match="absent.yaml: no such recipe"):
        recipe.load(tmp_path / "absent.yaml", PretrainRecipe)
    (tmp_path / "latin.yaml").write_bytes("data: \u00e9\n".encode("latin-1"))
    with pytest.raises(InputError, match="not YAML"):
        recipe.load(tmp_path / "latin.yaml", PretrainRecipe)


def test_yaml_that_makes_objects_is_refused(load):
    assert "not YAML" in refusal(load, "data: !!python/object/apply:os.getcwd []\noutput: b\n")[1]


def test_overrides_on_nested_keys(load):
    found = load(MINIMAL + "masking: {encoder: 0.2}\n", "masking.decoder=0.4", "masking.whole_word=true",
                 "model.size={hidden_size: 8}", "model.init=scratch", "output=a=b", "optimization.steps=7")
    assert (found.masking.encoder, found.masking.decoder, found.masking.whole_word) == (0.2, 0.4, True)
    assert found.model.size == {"hidden_size": 8} and found.output == "a=b" and found.optimization.steps == 7
    assert load(MINIMAL, "model.init=scratch", "model.size.hidden_size=8").model.size == {"hidden_size": 8}
    assert load(MINIMAL + "optimization: {steps: 4}\n", "optimization.steps=null").optimization.steps is None


PIPELINE = """\
input: builtin
work: out
prepare: {train_tokenizer: 300}
stages:
  - {name: one, recipe: one.yaml}
  - name: two
    recipe: two.yaml
    init: one
"""


@pytest.mark.parametrize("text", ["a #1", "a: b", "true", "12", "null", "", "- x", "[a", "@x", "a'b: \"c\" \\n", "ü #2",
                                  "two\nlines", " x", "{x}", "x" * 200 + " # " + "y " * 100])
def test_a_text_is_read_as_it_was_written_whatever_is_in_it(load, text):
    written = recipe.setting("output", text)
    assert load(MINIMAL, written).output == text and written.startswith("output=") and "\n" not in written


@pytest.mark.parametrize("text", ["runs/toy/shards", "off", "/data/a b/c", "some/model-uncased", "a#1", "it's", "x=y"])
def test_a_text_that_yaml_reads_as_it_is_stays_plain(load, text):
    assert recipe.setting("output", text) == f"output={text}"
    assert load(MINIMAL, f"output={text}").output == text


def test_lists_and_their_positions(load):
    found = load(PIPELINE, "stages.1.mine_depth=9", "stages.0.recipe=other.yaml", kind=PipelineRecipe)
    assert [(s.name, s.recipe, s.init, s.mine_depth) for s in found.stages] == [
        ("one", "other.yaml", "pretrain", 512), ("two", "two.yaml", "one", 9)]
    assert load(PIPELINE, "stages=[]", kind=PipelineRecipe).stages == ()
    replaced = load(PIPELINE, "stages.1={name: three, recipe: x}", kind=PipelineRecipe).stages
    assert [stage.name for stage in replaced] == ["one", "three"]


@pytest.mark.parametrize("overrides, reason", [
    (["stages.2.name=x"], "2 is not a position below 2"),
    (["stages.one.name=x"], "one is not a position below 2"),
    (["stages.0.name.deeper=x"], "stages.0.name: text is needed"),
    (["stages=[a]", "stages.0.name=x"], "stages.0: the key 'recipe' is missing"),
    (["stages=[a]", "stages.0.name.deeper=x"], "stages.0.name: text is needed"),
    (["stages=[a]"], "stages.0: a mapping"),
    (["evaluation.hits=many"], "evaluation.hits: a whole number is needed"),
    (["evaluation"], "--set evaluation: key=value is needed"),
    (["=3"], "--set =3: key=value is needed"),
    (["work=[1"], "--set work=[1: the value is not YAML"),
    (["works=x"], "works: unknown key"),
    (["work="], "work: text is needed"),
])
def test_an_override_that_does_not_fit(load, overrides, reason):
    assert reason in refusal(load, PIPELINE, *overrides, kind=PipelineRecipe)[1]


def test_an_override_is_not_blamed_on_a_line(load):
    text = MINIMAL + "optimization:\n  lr: 1.0\n"
    assert refusal(load, text, "optimization.lr=fast")[0] is None
    assert refusal(load, text, "optimization={lr: fast}")[0] is None


def test_errors_within_a_list_name_its_line(load):
    assert refusal(load, PIPELINE + "    depth: 3\n", kind=PipelineRecipe)[0] == 9
    assert refusal(load, PIPELINE.replace("recipe: two.yaml", "mine_depth: 3"), kind=PipelineRecipe) == (
        6, "stages.1: the key 'recipe' is missing")
    line, reason = refusal(load, PIPELINE.replace("init: one", "init: three"), kind=PipelineRecipe)
    assert line == 4 and "two starts from 'three'" in reason
    assert refusal(load, PIPELINE.replace("{train_tokenizer: 300}", "{}"), kind=PipelineRecipe)[0] == 3


def test_what_is_dumped_is_read_again(load, tmp_path):
    found = load(PIPELINE, "evaluation.top_k_docs=128", kind=PipelineRecipe)
    assert load(recipe.dump(found), kind=PipelineRecipe) == found
    text = recipe.dump(load(MINIMAL, "optimization.lr=2e-5", kind=FinetuneRecipe))
    assert yaml.safe_load(text)["optimization"]["lr"] == 2e-5
    assert load(text, kind=FinetuneRecipe).optimization.lr == 2e-5


@pytest.mark.parametrize("word", ["off", "on", "yes", "no"])
def test_words_that_older_yaml_takes_for_booleans_are_words(load, word):
    assert load(f"data: {word}\noutput: o\n").data == word
    assert load("data: d\noutput: o\n", f"data={word}").data == word


def test_the_bottleneck_is_switched_off_by_the_word(load):
    assert load("data: d\noutput: o\nbottleneck: {source: off}\n").bottleneck.source == "off"
