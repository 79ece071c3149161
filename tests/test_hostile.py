"""Hostile bytes for every reader, code in model folders, and names that lead out of a folder."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lexmae import artifact, checked, recipe
from lexmae.config import PretrainRecipe
from lexmae.data import tokenizer
from lexmae.data.negatives import read_negatives
from lexmae.data.pickles import load_plain
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone

ROOT = Path(__file__).parents[1]
EXAMPLES = 25  # of each reader; tests/faults/fuzz.py runs millions


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, hostile.Target]:
    return {target.name: target for target in hostile.targets(tmp_path_factory.mktemp("hostile"))}


NAMES = """beir:corpus.jsonl beir:queries.jsonl beir:qrels/train.tsv marco:collection.tsv marco:queries.train.tsv
    marco:qrels.train.tsv qrels negatives negatives.pkl run hostfile pretrain.yaml finetune.yaml pipeline.yaml
    ds_config.json manifest.json shards:manifest.json shards:docs-00000.arrow shards:lookup-docs.arrow
    shards:vocabulary.json shards:word_starts.npy shards:qrels/train.tsv shards:queries-train-00000.arrow
    draws:manifest.json draws:source0-ends.npy draws:source0-rows.npy draws:trained-ends.npy vectors:manifest.json
    vectors:vocabulary.json vectors:part-00000-00000.arrow
    dense:manifest.json dense:ids.arrow dense:matrix.npy""".split()
_PIECES = st.one_of(st.binary(max_size=12), st.sampled_from([
    b"\n", b"\t", b"{", b"[", b'"', b"null", b"1e999", b"-1", b"9" * 20, b"\xff\xff\xff\x7f", b"\x00" * 8, b"../../x",
    b"*a", b"&a ", b"\\ud800", b"true", b"\x1f\x8b", b"[" * 2000]))


@st.composite
def mutated(draw, seeds: list[bytes]) -> bytes:
    """Arbitrary bytes, or a valid file after a few changes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at, length, piece = draw(st.integers(0, len(data))), draw(st.integers(0, 8)), draw(_PIECES)
        how = draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
        if how == "cut":
            del data[at:]
        else:
            data[at:at + (0 if how == "insert" else len(piece) if how == "replace" else length)] = (
                b"" if how == "delete" else piece)
    return bytes(data)


def test_every_reader_is_listed(targets):
    assert {name for name in targets if not name.startswith("index:")} == set(NAMES)
    assert sum(name.startswith("index:") for name in targets) >= 4


def test_valid_files_are_read(targets):
    for target in targets.values():
        for seed in target.seeds:
            error = target.run(seed)
            if target.name not in ("manifest.json", "pretrain.yaml"):  # whose files are missing; a bomb is no recipe
                assert error is None, (target.name, error)


@pytest.mark.parametrize("name", [*NAMES, "index"])
def test_the_outcome_is_a_result_or_an_input_error(targets, name):
    chosen = [target for key, target in targets.items() if key == name or key.startswith(f"{name}:")]

    @settings(max_examples=EXAMPLES, deadline=20000, database=None, derandomize=True,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(st.data())
    def check(data):
        target = data.draw(st.sampled_from(chosen))
        target.run(data.draw(mutated(target.seeds)))

    check()


# ------------------------------------------------------------------------------------------------- single attacks


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../x", "..", ".", "", "a//b", "..\\x", "a\0b",
                                  "a\nb"])
def test_names_in_manifests_stay_inside(tmp_path, name):
    folder = tmp_path / "made"
    with artifact.create(folder, "vectors") as draft:
        (draft.path / "part").write_text("x", encoding="utf-8")
    (tmp_path / "x").write_text("secret", encoding="utf-8")
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    record["files"][name] = artifact.checksum(tmp_path / "x")
    (folder / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    for reading in (artifact.read, artifact.verify):
        with pytest.raises(InputError, match="does not stay inside this folder"):
            reading(folder)


@pytest.mark.parametrize("split", ["../../secret", "/etc/passwd", "tr*", "..", 7])
def test_splits_are_names_of_files(shards_dir, tmp_path, split, monkeypatch):
    monkeypatch.setenv("LEXMAE_VERIFY", "off")
    record = json.loads((shards_dir / "manifest.json").read_text(encoding="utf-8"))
    record["extra"]["splits"] = [split]
    (tmp_path / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="is no name of a file|does not stay inside"):
        Shards.open(tmp_path)


def test_a_fact_that_is_missing_or_of_another_type_is_named(tmp_path):
    with artifact.create(tmp_path / "made", "shards") as draft:
        draft.extra["splits"] = "train"
    manifest = artifact.read(tmp_path / "made")
    with pytest.raises(InputError, match="manifest.json: extra: 'vocab_size' is missing"):
        manifest.extra["vocab_size"]
    with pytest.raises(InputError, match="extra: 'splits' is missing or not of the type list"):
        manifest.fact("splits", list)
    assert manifest.extra.get("vocab_size") is None
    assert pickle.loads(pickle.dumps(manifest.extra)) == manifest.extra


class Attack:
    """An object whose unpickling calls a function."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_run_no_code(tmp_path):
    for protocol in range(6):
        path = tmp_path / "n.pkl"
        path.write_bytes(pickle.dumps({"q": [Attack(tmp_path / "ran")]}, protocol))
        with pytest.raises(InputError, match="only dict, list, tuple, int, float and str are admitted"):
            list(read_negatives(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("far", [b"r\xff\xff\xff\x7f", b"p2000000000\n", b"\x8e" + b"\xff" * 4 + bytes(4)],
                         ids=["LONG_BINPUT", "PUT", "BINBYTES8"])
def test_a_few_bytes_cannot_ask_for_gigabytes(tmp_path, far):
    """The unpickler would take 32 GB for a far place in its memo."""
    path, before = tmp_path / "n.pkl", resource.getrlimit(resource.RLIMIT_AS)
    path.write_bytes(b"}" + far + b"X\x01\x00\x00\x00q](X\x01\x00\x00\x00de" + b"s.")
    with pytest.raises(InputError, match="not an admissible pickle"):
        load_plain(path)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_usual_pickles(tmp_path):
    path = tmp_path / "n.pkl"
    table = {str(i): [(str(j), j / 7) for j in range(i, i + 3)] for i in range(20000)}
    for protocol in range(6):
        path.write_bytes(pickle.dumps(table, protocol))
        assert load_plain(path) == table


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_model_folders_run_no_code(tmp_path, model_dir, where, monkeypatch):
    """A folder that brings its own Python, as remote code of a hub does."""
    import shutil

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    file = folder / ("config.json" if where == "config" else "tokenizer_config.json")
    values = json.loads(file.read_text(encoding="utf-8"))
    if where == "config":
        values |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForMaskedLM": "evil.Evil"}}
    else:
        values |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    file.write_text(json.dumps(values), encoding="utf-8")
    try:
        (backbone.load_masked_lm if where == "config" else tokenizer.load)(str(folder))
    except InputError:
        pass
    assert not (tmp_path / "ran").exists()


def test_nothing_trusts_remote_code_or_unpickles_freely():
    for path in (ROOT / "lexmae").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text and "weights_only=False" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert "yaml.load(" not in text and "allow_pickle=True" not in text, path


def test_checkpoints_run_no_code(tmp_path):
    """They hold tensors and JSON: a pickle in the place of a file is not opened, nor is one of nonsense."""
    from lexmae.train import statefile

    path = tmp_path / statefile.file_name(0, 1)
    plan = [statefile.Stretch("w", "weight", 0, 4)]
    statefile.write(path, plan, [torch.arange(4.0)])
    whole = path.read_bytes()
    torch.save({"a": Attack(tmp_path / "ran")}, path)
    contents = [path.read_bytes(), whole[:20], whole[:-3], b"", b"\xff" * 64,
                whole.replace(b"w|weight|0", b"w|weight|x"), whole.replace(b'"F32"', b'"Q99"')]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a file of a checkpoint"):
            statefile.Reader(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("data: a\noutput: b\nlernrate: 1\n", "lernrate: unknown key (did you mean 'optimization.lr'?); known are"),
    ("data: a\noutput: b\nzzz: 1\n", "zzz: unknown key; known are"),
    ("data: a\noutput: b\noptimization:\n  lernrate: 1\n", "optimization.lernrate: unknown key (did you mean 'lr'?)"),
    ("data: a\noutput: b\noptimisation:\n  lr: 1\n", "optimisation: unknown key (did you mean 'optimization'?)"),
    ("data: a\noutput: b\nmicro_batch: 1\n", "micro_batch: unknown key (did you mean 'optimization.micro_batch'?)"),
    ("data: a\noutput: b\noptimization: {lr: fast}\n", "optimization.lr: a number is needed, not 'fast'"),
    ("data: [a]\noutput: b\n", "data: text is needed, not ['a']"),
    ('data: "a\\0b"\noutput: b\n', "data: text is needed, not 'a\\x00b'"),
    ("data: a\noutput: &x [*x]\n", "nested too deeply, or an alias stands inside what it names"),
    ("x: 2001-99-99\n", "not YAML"),
    ("\n".join(["a0: &a0 [x,x,x,x]"] + [f"a{i}: &a{i} [{','.join(4 * [f'*a{i - 1}'])}]" for i in range(1, 30)]),
     "has more than 100000 entries once its aliases are written out"),
])
def test_wrong_recipes_name_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as found:
        recipe.load(path, PretrainRecipe)
    assert message in str(found.value)


def test_lines_are_bounded(tmp_path, monkeypatch):
    from lexmae.data import lines

    monkeypatch.setattr(lines, "_LONGEST", 1 << 20)
    path = tmp_path / "long"
    path.write_bytes(b"short\n" + b"x" * (1 << 20))
    with pytest.raises(InputError, match="long:2: longer than 1 MiB"):
        list(lines.read_lines(path))


def test_arrays(tmp_path):
    for array in (np.arange(3), np.zeros(0, np.int64), np.zeros((0, 3)), np.ones((2, 2), np.uint8)):
        np.save(tmp_path / "a.npy", array)
        found = checked.read_array(tmp_path / "a.npy", array.dtype, array.ndim)
        assert found.shape == array.shape and (found == array).all() and type(found) is np.ndarray
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (999999999999,), }".ljust(
        117) + b"\n"
    (tmp_path / "a.npy").write_bytes(header + bytes(16))
    with pytest.raises(InputError, match="is not as long as an array of"):
        checked.read_array(tmp_path / "a.npy", np.int64)
    (tmp_path / "a.npy").write_bytes(header.replace(b"(999999999999,)", b"(2 " + b"0" * 80 + b"x"))  # in no time
    with pytest.raises(InputError, match="not an array in C order"):
        checked.read_array(tmp_path / "a.npy", np.int64)
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not an array"):
        checked.read_array(tmp_path / "a.npy", object)
    with pytest.raises(InputError, match="is missing"):
        checked.read_array(tmp_path / "absent.npy", np.int64)


@pytest.mark.parametrize(("offsets", "good"), [([0, 2, 2, 5], True), ([0, 3, 2, 5], False), ([1, 5], False),
                                               ([0, 4], False), ([], False), ([0, 6], False), ([0, -1, 5], False)])
def test_offsets(offsets, good):
    array = np.array(offsets, np.int64)
    if good:
        assert checked.check_offsets(array, 5, "x") is array
    else:
        with pytest.raises(InputError, match="do not ascend from 0 to 5"):
            checked.check_offsets(array, 5, "x")


def test_names_of_columns_that_are_no_text(targets):
    """Found by the fuzzer: pyarrow reads such a file and fails when it is asked for the names."""
    for name in ("vectors:part-00000-00000.arrow", "shards:docs-00000.arrow", "dense:ids.arrow"):
        column = {"vectors": b"weights", "shards": b"tokens", "dense": b"id\0"}[name.partition(":")[0]]
        data = targets[name].seeds[0]
        assert column in data
        error = targets[name].run(data.replace(column, b"\xed" + column[1:]))
        assert error is not None and "Arrow file" in str(error)
