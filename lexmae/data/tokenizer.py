"""The tokenizer: loading, training, and turning texts into ids. The only file of `data` that uses
transformers.

The tokenizer's own post-processor places the special tokens, so `[CLS] title [SEP] passage [SEP]` becomes
`<s> title </s></s> passage </s>` for RoBERTa. Special tokens that are spelled out in a text stay plain text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lexmae.checked import LOADING_ERRORS
from lexmae.errors import InputError, one_line

MISSING_TITLE = "-"


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens. `bos` and `eos` equal `cls` and `sep` where the tokenizer has no others."""

    cls: int
    sep: int
    pad: int
    mask: int
    unk: int
    bos: int
    eos: int

    @property
    def structural(self) -> tuple[int, ...]:
        """The ids that are never text. The unknown token is text: it stands for a word."""
        return tuple(sorted({self.cls, self.sep, self.pad, self.mask, self.bos, self.eos}))


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids: `values` holds all rows one after another; the other arrays are per row.

    first_lengths: length of the first segment, its special tokens included. truncated: bool, tokens were cut.
    """

    values: np.ndarray
    lengths: np.ndarray
    first_lengths: np.ndarray
    truncated: np.ndarray


class TextEncoder:
    """Encodes texts in batches with the threads of the `tokenizers` library; the result depends on no thread.

    Attributes:
        pair_template: ids of the special tokens before, between and behind the two texts of a row of `pairs`.
        first_specials: how many of them belong to its first segment.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError("this tokenizer has no fast version (tokenizer.json)", path=_name(tokenizer))
        self.tokenizer = tokenizer
        self._backend = type(backend).from_str(backend.to_str())  # a copy: its settings are changed here
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.special = special_ids(tokenizer)
        self.vocab_size = max(len(tokenizer), *(value + 1 for value in self.special.structural))
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.token_type_ids = "token_type_ids" in tokenizer.model_input_names
        self._template()

    def pairs(self, titles: list[str], texts: list[str], max_length: int) -> Encoded:
        """Rows `[CLS] title [SEP] text [SEP]`; a blank title becomes `-`; the longer of the two is cut first.
        """
        titles = [title if title.strip() else MISSING_TITLE for title in titles]
        return self._encode(list(zip(titles, texts, strict=True)), max_length, self._pair_specials)

    def singles(self, texts: list[str], max_length: int) -> Encoded:
        """Rows `[CLS] text [SEP]`."""
        return self._encode(texts, max_length, self._single_specials)

    def plain(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts one after another, uncut and without special tokens, and the length of each."""
        self._backend.no_truncation()
        rows = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter(itertools.chain.from_iterable(rows), np.uint32, int(lengths.sum()))
        values[self._is_special[values]] = self.special.unk
        return values, lengths

    def check_length(self, max_length: int, what: str) -> None:
        """InputError for a length that leaves no room for text or that the tokenizer's model cannot read."""
        least = self._pair_specials + 2
        if not least <= max_length < 1 << 16:
            raise InputError(f"{what} {max_length}: must be between {least} and 65535")
        if max_length > self.tokenizer.model_max_length:
            limit = self.tokenizer.model_max_length
            raise InputError(f"{what} {max_length}: the tokenizer is made for at most {limit} tokens")

    def _encode(self, texts: list, max_length: int, specials: int) -> Encoded:
        self._backend.enable_truncation(max_length, strategy="longest_first", direction="right")
        encodings = self._backend.encode_batch_fast(texts)
        rows = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter(itertools.chain.from_iterable(rows), np.uint32, int(lengths.sum()))
        special = self._is_special[values]
        ends = np.cumsum(lengths)
        owner = np.repeat(np.arange(len(rows)), lengths)
        counts = np.bincount(owner[special], minlength=len(rows))
        for row in np.flatnonzero(
            counts != specials
        ).tolist():  # a tokenizer that reads "</s>" in spite of us
            place = slice(ends[row] - lengths[row], ends[row])
            text = np.asarray(encodings[row].special_tokens_mask) == 0
            values[place][text & special[place]] = self.special.unk
            special[place] &= ~text
        truncated = lengths == max_length
        truncated[truncated] = [bool(encodings[row].overflowing) for row in np.flatnonzero(truncated)]
        first = lengths if specials == self._single_specials else self._first_lengths(special, lengths)
        return Encoded(values, lengths, first, truncated)

    def _first_lengths(self, special: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """From where the template's tokens are: the first segment ends with its last one before the second.
        """
        places = np.flatnonzero(special).reshape(len(lengths), self._pair_specials)
        last = places[:, self.first_specials - 1]
        return last + 1 - (np.cumsum(lengths) - lengths)

    def _template(self) -> None:
        """Learn from two probes which special tokens the post-processor adds, and which belong to the first
        text.
        """
        single = self._backend.encode("a")
        pair = self._backend.encode("a", "a")
        mask = np.asarray(pair.special_tokens_mask)
        order = [i for i, kind in enumerate(pair.sequence_ids) if kind is not None]
        middle = [i for i, kind in enumerate(pair.sequence_ids) if kind is None and order[0] < i < order[-1]]
        if not middle or not mask[0]:
            raise InputError(
                "this tokenizer does not join two texts with special tokens", path=_name(self.tokenizer)
            )
        self._single_specials, self._pair_specials = sum(single.special_tokens_mask), int(mask.sum())
        before = int(mask[: order[0]].sum())
        typed = sum(pair.type_ids[i] == pair.type_ids[order[0]] for i in middle)
        self.first_specials = before + (typed if self.token_type_ids else 1)
        ids = np.asarray(pair.ids)
        self.pair_template = ids[: order[0]], ids[middle], ids[order[-1] + 1 :]
        self._is_special = np.zeros(max(self.vocab_size, max(pair.ids) + 1), bool)
        self._is_special[np.asarray(pair.ids)[mask == 1]] = True
        self._is_special[list(self.special.structural)] = True


def special_ids(tokenizer: Any) -> SpecialIds:
    """The special ids of a tokenizer; InputError where one that masked language models need is missing."""
    got = {
        name: getattr(tokenizer, f"{name}_token_id")
        for name in ("cls", "sep", "pad", "mask", "unk", "bos", "eos")
    }
    for name, other in (("cls", "bos"), ("sep", "eos"), ("bos", "cls"), ("eos", "sep")):
        if got[name] is None:
            got[name] = got[other]
    missing = [name for name, value in got.items() if value is None]
    if missing:
        raise InputError(f"the tokenizer has no {missing[0]} token", path=_name(tokenizer))
    return SpecialIds(**got)


def load(name: str | Path) -> Any:
    """A tokenizer by folder or hub name."""
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists() | (folder / "tokenizer.json").exists():
        raise InputError("no tokenizer in this folder (tokenizer.json, tokenizer_config.json)", path=folder)
    if not folder.is_dir() and (folder.is_absolute() or folder.exists()):
        raise InputError("no such folder with a tokenizer", path=folder)
    try:
        found = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise InputError(f"cannot load a tokenizer: {one_line(error)}", path=name) from error
    for key in ("is_local", "local_files_only"):  # how it was loaded is no part of what it is
        found.init_kwargs.pop(key, None)
    return found


def train(texts: Callable[[], Iterable[str]], entries: int, max_length: int = 512) -> Any:
    """Train a lower-casing WordPiece of at most `entries` entries; the same texts always give the same one.

    The library numbers the continuing characters (`##a`) in the order of a hash table that differs from run
    to run, and breaks ties by number. So they are collected first, and given to the trainer in sorted order.

    Args:
        texts: returns a fresh pass over the texts each time it is called.
        max_length: the longest sequence that the tokenizer claims to be for.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if not 64 <= entries <= 1 << 20:
        raise InputError(f"a vocabulary of {entries} entries: must be between 64 and {1 << 20}")
    plain = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    plain.normalizer = normalizers.BertNormalizer(lowercase=True)
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def entries_of(size: int, known: list[str]) -> dict[str, int]:
        """Vocabulary {entry: id} of a WordPiece of this size whose first entries are `known`."""
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=2, special_tokens=known, initial_alphabet=alphabet,
            limit_alphabet=len(alphabet), continuing_subword_prefix="##", show_progress=False,
        )  # fmt: skip
        plain.train_from_iterator(texts(), trainer)
        return plain.get_vocab(with_added_tokens=False)

    kept = _alphabet(texts(), plain.normalizer, min(1000, entries // 4))
    alphabet = sorted({*kept, MISSING_TITLE})
    continuing = sorted(
        entry for entry in entries_of(0, special) if entry.startswith("##") and len(entry) == 3
    )
    vocab = entries_of(entries, special + alphabet + continuing)
    return BertTokenizer(vocab=vocab, do_lower_case=True, model_max_length=max_length)


def limit_threads(workers: int | None) -> None:
    """Tokenise with this many threads (None: all cores); effective before the process first tokenises."""
    if workers is not None:
        if workers < 1:
            raise InputError(f"{workers} workers: at least 1 is needed")
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers == 1 else "true"


def fingerprint(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does: the same after saving and loading it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "mask", "unk")}
    text = json.dumps([content, special], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def vocabulary(tokenizer: Any, size: int) -> list[str]:
    """The token strings by id; an id that the tokenizer does not use is named after its number."""
    names = [f"[unused-id-{index}]" for index in range(size)]
    for entry, index in tokenizer.get_vocab().items():
        if index < size:
            names[index] = entry
    return names


def word_starts(tokenizer: Any) -> np.ndarray:
    """Whether each entry begins a word, bool [V]; all of them where the tokenizer does not tell."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    prefix = content["model"].get("continuing_subword_prefix")
    parts = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    mark = "Ġ" if "ByteLevel" in parts else "▁" if "Metaspace" in parts else None
    size = max(len(tokenizer), *(value + 1 for value in special_ids(tokenizer).structural))
    starts = np.ones(size, bool)
    for entry, index in tokenizer.get_vocab().items():
        if content["model"].get("type") == "WordPiece" or (prefix and mark is None):
            starts[index] = not entry.startswith(prefix or "##")
        elif mark is not None:
            starts[index] = entry.startswith(mark)
    starts[list(special_ids(tokenizer).structural)] = True
    return starts


def _alphabet(texts: Iterable[str], normalizer: Any, limit: int) -> list[str]:
    """The most frequent characters of the normalised texts, sorted; ties go to the lower code point."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    kept = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    return sorted(kept[:limit])


def _name(tokenizer: Any) -> str | None:
    return getattr(tokenizer, "name_or_path", None) or None
