"""Token tables against plain lists; tokenisation against the tokenizer's own call; training of a WordPiece."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lexmae.data import tokenizer as tok
from lexmae.data import tokens
from lexmae.data.tokens import TableWriter, TokenTable
from lexmae.errors import InputError

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Café naïve façade; ÅNGSTRÖM 你好 world — it's 3.14 o'clock!",
    "A passage that spells [SEP] and [CLS] and [MASK] and [PAD] and </s> <s> <mask> <pad> out.",
    "short",
    "",
    "word " * 60,
    "supercalifragilisticexpialidocious " * 9,
    "\u2028 line \x85 and \u00a0 blanks \u200b",
]
TITLES = ["Foxes", "", "A [SEP] title", "  ", "Only a title", "long title " * 20, "T", "Blank s"]


def wordpiece():
    """A BERT tokenizer trained on the texts."""
    return tok.train(lambda: TEXTS * 3, 400)


def byte_bpe(names: dict[str, str]) -> Tokenizer:
    """A byte-level BPE trained on the texts, with the given special tokens."""
    backend = Tokenizer(models.BPE(unk_token=names["unk"]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(names.values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return backend


def roberta():
    """`<s> title </s></s> text </s>`, no segment ids."""
    from transformers import RobertaTokenizer

    names = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    content = json.loads(byte_bpe(names).to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in content["merges"]]
    return RobertaTokenizer(vocab=content["vocab"], merges=merges)


def xlm_roberta():
    """Unigram pieces with `▁`, RoBERTa's layout."""
    from transformers import XLMRobertaTokenizer

    characters = sorted(set("".join(TEXTS)) - set(" \n"))
    vocab = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")] + [("▁", -3.0)]
    vocab += [(character, -6.0) for character in characters] + [("▁word", -4.0), ("▁the", -4.0), ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab)


def modernbert():
    """Byte-level BPE in BERT's layout, without segment ids."""
    from transformers import PreTrainedTokenizerFast

    names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    backend = byte_bpe(names)
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": text for name, text in names.items()})  # fmt: skip


FAMILIES = {"bert": wordpiece, "roberta": roberta, "xlm-roberta": xlm_roberta, "modernbert": modernbert}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Each kind of tokenizer."""
    return FAMILIES[request.param]()


def split_rows(found: tok.Encoded) -> list[list[int]]:
    """Encoded rows as lists."""
    return [row.tolist() for row in np.split(found.values, np.cumsum(found.lengths)[:-1])]


@pytest.mark.parametrize("max_length", [12, 33, 144])
def test_pairs_agree_with_the_tokenizer_itself(family, max_length):
    titles = [title if title.strip() else "-" for title in TITLES]
    options = dict(truncation="longest_first", split_special_tokens=True)
    given = family(titles, TEXTS, max_length=max_length, return_special_tokens_mask=True, **options)
    special = tok.special_ids(family)
    expected = [[special.unk if not fixed and token in special.structural else token
                 for token, fixed in zip(row, mask, strict=True)]
                for row, mask in zip(given["input_ids"], given["special_tokens_mask"], strict=True)]  # fmt: skip
    found = tok.TextEncoder(family).pairs(TITLES, TEXTS, max_length)
    assert split_rows(found) == expected
    whole = [len(row) for row in family(titles, TEXTS, split_special_tokens=True)["input_ids"]]
    assert found.truncated.tolist() == [length > max_length for length in whole]
    counts = {sum(token in special.structural for token in row) for row in split_rows(found)}
    assert len(counts) == 1  # the template's special tokens and none that a text spells out


def test_first_segment_is_the_title_alone(family):
    found = tok.TextEncoder(family).pairs(TITLES, TEXTS, 900)
    for row, first, title in zip(split_rows(found), found.first_lengths, TITLES, strict=True):
        alone = family([title if title.strip() else "-"], split_special_tokens=True)["input_ids"][0]
        assert row[:first] == alone


def test_first_length_is_where_segment_ids_change():
    tokenizer = wordpiece()
    found = tok.TextEncoder(tokenizer).pairs(TITLES, TEXTS, 40)
    titles = [title if title.strip() else "-" for title in TITLES]
    types = tokenizer(titles, TEXTS, truncation="longest_first", max_length=40, split_special_tokens=True)
    assert found.first_lengths.tolist() == [row.count(0) for row in types["token_type_ids"]]


def test_singles_agree_with_the_tokenizer_itself(family):
    texts = [text for text in TEXTS if "[SEP]" not in text]
    expected = family(texts, truncation=True, max_length=10, split_special_tokens=True)["input_ids"]
    found = tok.TextEncoder(family).singles(texts, 10)
    assert split_rows(found) == expected
    assert found.first_lengths.tolist() == found.lengths.tolist()


def test_special_token_in_text_becomes_unknown():
    """A word-level tokenizer splits at blanks, so that a spelled-out [SEP] is an entry of its vocabulary."""
    from transformers import PreTrainedTokenizerFast

    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    vocab = {word: i for i, word in enumerate([*names.values(), "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{k}_token": v for k, v in names.items()})
    found = tok.TextEncoder(wrapped).pairs(["a [SEP] b", "a"], ["[MASK] [CLS] a", "b [PAD]"], 20)
    assert split_rows(found) == [[2, 5, 1, 6, 3, 1, 1, 5, 3], [2, 5, 3, 6, 1, 3]]
    assert found.first_lengths.tolist() == [5, 3]


def test_special_ids_and_lengths(family):
    special = tok.special_ids(family)
    assert special.unk not in special.structural and special.mask in special.structural
    encoder = tok.TextEncoder(family)
    encoder.check_length(64, "length")
    for wrong in (4, 1 << 16):
        with pytest.raises(InputError, match=f"length {wrong}: must be between"):
            encoder.check_length(wrong, "length")


def test_unusable_tokenizers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(InputError, match="has no cls token"):
        tok.TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    with pytest.raises(InputError, match="no tokenizer in this folder"):
        tok.load(tmp_path)
    with pytest.raises(InputError, match="no such folder with a tokenizer"):
        tok.load(tmp_path / "absent")


def test_fingerprint_survives_saving(family, tmp_path):
    family.save_pretrained(str(tmp_path / "t"))
    loaded = tok.load(tmp_path / "t")
    assert tok.fingerprint(loaded) == tok.fingerprint(family)
    loaded(["text"], truncation=True, max_length=8, padding=True)  # settings of a call are no part of it
    assert tok.fingerprint(loaded) == tok.fingerprint(family)
    assert tok.fingerprint(wordpiece()) == tok.fingerprint(wordpiece())
    assert len({tok.fingerprint(make()) for make in FAMILIES.values()}) == len(FAMILIES)


def test_word_starts():
    tokenizer = wordpiece()
    starts = tok.word_starts(tokenizer)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert starts.tolist() == [not name.startswith("##") for name in names] and 0 < starts.sum() < len(starts)
    other = roberta()
    starts, ids = tok.word_starts(other), other(" quick fox", add_special_tokens=False)["input_ids"]
    words = other.decode(np.asarray(ids)[starts[ids]]).split()
    assert [word[0] for word in words] == ["q", "f"]
    assert starts[list(tok.special_ids(other).structural)].all()


def test_trained_wordpiece():
    tokenizer = wordpiece()
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    row = tokenizer("The DOG", "café")
    assert tokenizer.decode(row["input_ids"]) == "[CLS] the dog [SEP] cafe [SEP]"
    first = row["input_ids"].index(3) + 1
    assert row["token_type_ids"] == [0] * first + [1] * (len(row["input_ids"]) - first)
    assert len(tok.train(lambda: ["tiny text"], 5000)) < 40
    with pytest.raises(InputError, match="must be between 64"):
        tok.train(lambda: TEXTS, 10)


@pytest.mark.slow
def test_training_does_not_depend_on_the_process():
    code = (
        "import sys; from lexmae.data import tokenizer as t; t.limit_threads(int(sys.argv[1]));"
        "words = ['%s%s' % (a, b) for a in 'abcdefghij' for b in 'klmnopqrst'];"
        "print(t.fingerprint(t.train(lambda: [' '.join(words[i:] + words[:i]) for i in range(0, 100, 3)], 120)))"
    )
    seen = {subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True).stdout
            for n in (1, 2, 2)}  # fmt: skip
    assert len(seen) == 1


def rows_of(count: int, seed: int = 0) -> tuple[list[str], list[list[int]], list[int]]:
    """Ids, tokens (row 3 is empty) and first lengths."""
    random = np.random.default_rng(seed)
    lists = [random.integers(0, 60000, random.integers(1, 20)).tolist() if i != 3 else [] for i in range(count)]
    return [f"d{i}é" if i % 2 else str(i * 7) for i in range(count)], lists, [len(row) // 2 for row in lists]


def write(folder, count=50, shard_rows=8, chunk=13, dtype=np.uint16) -> TokenTable:
    """A table of `rows_of(count)`, appended in chunks."""
    ids, lists, first = rows_of(count)
    writer = TableWriter(folder, "docs", dtype, shard_rows)
    for i in range(0, count, chunk):
        part = slice(i, i + chunk)
        values = np.asarray([token for row in lists[part] for token in row], np.uint32)
        writer.append(ids[part], values, np.asarray([len(row) for row in lists[part]]), np.asarray(first[part]))
    writer.close()
    return TokenTable(folder, "docs")


@pytest.mark.parametrize("shard_rows", [1, 8, 500])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_table_holds_what_was_written(tmp_path, shard_rows, dtype):
    table = write(tmp_path, shard_rows=shard_rows, dtype=dtype)
    ids, lists, first = rows_of(50)
    assert len(table) == 50 and table.ids() == ids and table.ids([4, 3]) == [ids[4], ids[3]]
    assert table.lengths.dtype == np.int32 and table.lengths.tolist() == [len(row) for row in lists]
    assert [table.tokens(i).tolist() for i in range(50)] == lists and table.tokens(0).dtype == dtype
    assert [table.first_length(i) for i in range(50)] == first and [table.id(i) for i in range(50)] == ids
    assert len(list(tmp_path.glob("docs-*.arrow"))) == -(-50 // shard_rows)


def test_tokens_are_views_of_the_file(tmp_path):
    table = write(tmp_path)
    row = table.tokens(5)
    assert type(row) is np.ndarray and not row.flags.owndata and not row.flags.writeable
    again = table.tokens(5)
    assert row.__array_interface__["data"] == again.__array_interface__["data"]


def test_arrow_files_are_readable_by_others(tmp_path):
    write(tmp_path, shard_rows=500)
    table = pa.ipc.open_file(str(tmp_path / "docs-00000.arrow")).read_all()
    ids, lists, first = rows_of(50)
    assert table.to_pydict() == {"id": ids, "tokens": lists, "first_length": first}


def test_pad_batch(tmp_path):
    table, (_, lists, first) = write(tmp_path), rows_of(50)
    rows = [49, 3, 0, 17, 0, 8]
    batch = table.pad_batch(rows, pad_id=0)
    width = max(len(lists[row]) for row in rows)
    assert batch.ids.tolist() == [lists[row] + [0] * (width - len(lists[row])) for row in rows]
    assert batch.lengths.tolist() == [len(lists[row]) for row in rows]
    assert batch.first_lengths.tolist() == [first[row] for row in rows]
    assert {array.dtype for array in (batch.ids, batch.lengths, batch.first_lengths)} == {np.dtype(np.int64)}
    assert table.pad_batch([3, 1], pad_id=7).ids[0].tolist() == [7] * len(lists[1])
    assert table.pad_batch([], 0).ids.shape == (0, 0)
    for wrong in ([50], [-1]):
        with pytest.raises(IndexError):
            table.pad_batch(wrong, 0)
    with pytest.raises(IndexError):
        table.tokens(-1)


def test_rows_by_id(tmp_path):
    table, (ids, _, _) = write(tmp_path), rows_of(50)
    order = np.random.default_rng(1).permutation(50)
    assert table.rows([ids[i] for i in order]).tolist() == order.tolist()
    assert table.rows(ids * 3).tolist() == list(range(50)) * 3
    assert table.rows([]).tolist() == [] and table.rows([]).dtype == np.int64
    assert table.contains(["0", "nothing", "", "d1é", "d1e"]).tolist() == [True, False, False, True, False]
    with pytest.raises(InputError, match="unknown document 'absent'"):
        table.rows(["0", "absent", "x"])


@pytest.mark.parametrize("kinds", [1, 3])
def test_equal_hashes_are_told_apart(tmp_path, monkeypatch, kinds):
    monkeypatch.setattr(tokens, "hash_ids", lambda names: np.asarray([len(n) % kinds for n in names], np.uint64))
    table, (ids, _, _) = write(tmp_path), rows_of(50)
    assert table.rows(ids).tolist() == list(range(50))
    assert not table.contains(["absent", "d50é", ""]).any()


def test_large_rows_open_a_new_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_SHARD_TOKENS", 40)
    table, (ids, lists, _) = write(tmp_path, shard_rows=500), rows_of(50)
    assert table.ids() == ids and [table.tokens(i).tolist() for i in range(50)] == lists
    assert all(pa.ipc.open_file(str(f)).read_all()["tokens"].combine_chunks().flatten().nbytes <= 80
               for f in tmp_path.glob("docs-*.arrow"))  # fmt: skip


def _child(table: TokenTable, row: int) -> tuple[list[int], str, int]:
    return table.tokens(row).tolist(), table.id(row), int(table.rows([table.id(row)])[0])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_table_in_other_processes(tmp_path, method):
    table, (ids, lists, _) = write(tmp_path), rows_of(50)
    assert table.lengths[0] == len(lists[0])
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.starmap(_child, [(table, 9), (table, 48)]) == [(lists[i], ids[i], i) for i in (9, 48)]
    assert len(pickle.dumps(table)) < 500


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="no token files docs-"):
        TokenTable(tmp_path, "docs")
    table = write(tmp_path)
    (tmp_path / "lookup-docs.arrow").unlink()
    with pytest.raises(InputError, match="lookup-docs.arrow: is missing"):
        table.rows(["0"])
    file = tmp_path / "docs-00001.arrow"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match="docs-00001.arrow: not a complete Arrow file"):
        TokenTable(tmp_path, "docs")


def test_document_frequency_counts_rows_that_hold_a_token(tiny_shards):
    table = tiny_shards.docs
    expected = np.zeros(tiny_shards.vocab_size, int)
    for row in range(len(table)):
        expected[np.unique(table.tokens(row))] += 1
    assert table.document_frequency(tiny_shards.vocab_size, chunk=7).tolist() == expected.tolist()
