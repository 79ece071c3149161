"""Masks of encoder and decoder against the rules of SPEC §1, counted over many sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lexmae.config import MaskingConfig
from lexmae.data import masking
from lexmae.data.batches import PretrainData
from lexmae.data.masking import IGNORE
from lexmae.data.randomness import KeyedRandom

MASK_ID, VOCAB = 4, 50
PLAIN = np.arange(5, VOCAB)
B, L = 600, 40


@pytest.fixture(scope="module")
def texts() -> tuple[np.ndarray, np.ndarray]:
    """ids and text_mask [B, L]: `[CLS] … [SEP] … [SEP] [PAD]…` with 1 to 36 text tokens."""
    random = np.random.default_rng(0)
    ids = random.integers(5, VOCAB, (B, L))
    text = np.zeros((B, L), bool)
    for row in range(B):
        length = int(random.integers(4, L + 1))
        text[row, 1:length - 1] = True
        text[row, int(random.integers(1, length - 2))] = False
        ids[row, length:] = 0
    ids[~text & (ids != 0)] = 3
    ids[:, 0] = 2
    return ids, text


def random_for(count: int = B, seed: int = 42) -> KeyedRandom:
    return KeyedRandom(seed, np.arange(count))


def close(hits: int, trials: int, share: float) -> bool:
    """Whether a binomial count lies within 4.5 standard deviations of its mean."""
    return abs(hits - trials * share) <= 4.5 * math.sqrt(trials * share * (1 - share)) + 1


@pytest.mark.parametrize("share", [0.15, 0.30, 0.5, 0.99])
def test_the_encoder_masks_exactly_its_share_of_each_text(texts, share):
    ids, text = texts
    chosen = masking.encoder_positions(text, share, random_for())
    expected = [math.ceil(round(share * n, 9)) for n in text.sum(1)]
    assert chosen.sum(1).tolist() == expected
    assert not (chosen & ~text).any()


def test_a_sequence_without_text_has_no_masks():
    text = np.zeros((3, 7), bool)
    for strategy in ("inclusive", "exclusive", "random"):
        encoder, decoder = masking.mask_pair(np.full((3, 7), 9), text, MASK_ID, PLAIN,
                                             MaskingConfig(decoder_strategy=strategy), random_for(3))
        assert (encoder.labels == IGNORE).all() and (decoder.labels == IGNORE).all()
        assert (encoder.ids == 9).all() and (decoder.ids == 9).all()


def test_every_text_position_is_as_likely_as_another():
    text = np.ones((4000, 10), bool)
    chosen = masking.encoder_positions(text, 0.3, random_for(4000))
    assert all(close(hits, 4000, 0.3) for hits in chosen.sum(0))
    both = (chosen[:, 2] & chosen[:, 7]).sum()  # 3 of 10 without replacement
    assert close(int(both), 4000, 3 / 10 * 2 / 9)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_chosen_are_replaced_80_10_10(texts, decoder):
    ids, text = texts
    masked = masking.replace(ids, text, MASK_ID, PLAIN, random_for(), decoder)
    assert np.array_equal(masked.labels, np.where(text, ids, IGNORE))
    assert np.array_equal(masked.ids[~text], ids[~text])
    new, old = masked.ids[text], ids[text]
    n = len(new)
    hidden = int((new == MASK_ID).sum())
    changed = new[(new != MASK_ID) & (new != old)]
    assert close(hidden, n, 0.8)
    assert close(len(changed), n, 0.1 * (1 - 1 / len(PLAIN)))  # a random token may be the token itself
    assert close(n - hidden - len(changed), n, 0.1 + 0.1 / len(PLAIN))
    assert set(changed) <= set(PLAIN.tolist()) and len(set(changed)) == len(PLAIN)


def test_random_tokens_are_drawn_from_the_plain_ids_alone():
    ids, positions = np.full((500, 20), 49), np.ones((500, 20), bool)
    plain = np.array([7, 11, 13])
    masked = masking.replace(ids, positions, MASK_ID, plain, random_for(500), False)
    counts = [int((masked.ids == token).sum()) for token in plain]
    assert set(np.unique(masked.ids)) == {MASK_ID, 49, *plain.tolist()}
    assert all(close(count, 10000, 0.1 / 3) for count in counts)


def pair(texts, seed: int = 42, **settings) -> tuple[masking.Masked, masking.Masked]:
    return masking.mask_pair(*texts, MASK_ID, PLAIN, MaskingConfig(**settings), random_for(seed=seed))


def test_inclusive_holds_the_encoders_and_has_its_share():
    text = np.ones((3000, 20), bool)
    random = random_for(3000)
    config = MaskingConfig(encoder=0.3, decoder=0.5)
    encoder = masking.encoder_positions(text, 0.3, random)
    decoder = masking.decoder_positions(text, encoder, config, random)
    assert not (encoder & ~decoder).any()
    others = ~encoder
    assert close(int((decoder & others).sum()), int(others.sum()), 0.2 / 0.7)
    assert abs(decoder.mean() - 0.5) < 0.01  # 20 · 0.3 is a whole number, so that the overall share is β


def test_exclusive_shares_nothing_with_the_encoder():
    text = np.ones((3000, 20), bool)
    random = random_for(3000)
    config = MaskingConfig(encoder=0.3, decoder=0.4, decoder_strategy="exclusive")
    encoder = masking.encoder_positions(text, 0.3, random)
    decoder = masking.decoder_positions(text, encoder, config, random)
    assert not (encoder & decoder).any()
    assert close(int(decoder.sum()), int((~encoder).sum()), 0.4 / 0.7)


def test_exclusive_with_all_that_is_left_masks_everything():
    text = np.ones((50, 10), bool)
    random = random_for(50)
    encoder = masking.encoder_positions(text, 0.3, random)
    decoder = masking.decoder_positions(text, encoder, MaskingConfig(0.3, 0.7, "exclusive"), random)
    assert np.array_equal(decoder, ~encoder)


def test_random_does_not_look_at_the_encoder():
    text = np.ones((3000, 20), bool)
    random = random_for(3000)
    encoder = masking.encoder_positions(text, 0.3, random)
    decoder = masking.decoder_positions(text, encoder, MaskingConfig(decoder_strategy="random"), random)
    assert close(int(decoder.sum()), decoder.size, 0.5)
    assert close(int((decoder & encoder).sum()), int(encoder.sum()), 0.5)


@pytest.mark.parametrize("strategy", ["inclusive", "exclusive", "random"])
def test_both_masks_are_made_from_the_unmasked_text(texts, strategy):
    ids, text = texts
    for masked in pair(texts, decoder_strategy=strategy):
        chosen = masked.labels != IGNORE
        assert not (chosen & ~text).any()
        assert np.array_equal(masked.labels[chosen], ids[chosen])
        assert np.array_equal(masked.ids[~chosen], ids[~chosen])


def test_the_decoder_draws_afresh(texts):
    """Where both mask a position, what stands there is drawn independently: both hidden in 64 % of the cases."""
    encoder, decoder = pair(texts)
    common = encoder.labels != IGNORE
    assert (decoder.labels[common] != IGNORE).all()
    both = (encoder.ids[common] == MASK_ID) & (decoder.ids[common] == MASK_ID)
    assert close(int(both.sum()), int(common.sum()), 0.64)


def test_another_seed_gives_other_masks(texts):
    assert not np.array_equal(pair(texts, 1)[0].labels, pair(texts, 2)[0].labels)


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    """Word number of each of 30 tokens of 400 texts: words of 1 to 9 pieces."""
    random = np.random.default_rng(1)
    rows = []
    for _ in range(400):
        sizes = random.choice([1, 1, 1, 2, 3, 6, 7, 9], 40)
        rows.append(np.repeat(np.arange(40), sizes)[:30])
    return np.stack(rows)


def test_whole_words_are_masked_as_a_whole_until_the_budget_is_met(words):
    text = np.ones(words.shape, bool)
    chosen = masking.encoder_positions(text, 0.3, random_for(400), words)
    for row, picked in zip(words, chosen, strict=True):
        sizes = {word: int((row == word).sum()) for word in np.unique(row)}
        taken = {word for word in sizes if picked[row == word].any()}
        assert all(picked[row == word].all() and sizes[word] <= 6 for word in taken)
        fit = sum(size for size in sizes.values() if size <= 6)
        total = sum(sizes[word] for word in taken)
        assert total >= min(9, fit)  # 0.3 of 30 tokens
        if total > 9:  # the last word alone passed the budget
            assert any(total - sizes[word] < 9 for word in taken)


def test_whole_words_leave_special_tokens_alone(words):
    text = np.ones(words.shape, bool)
    text[:, [0, 12, 29]] = False
    chosen = masking.encoder_positions(text, 0.3, random_for(400), words)
    assert not (chosen & ~text).any() and chosen.any(1).mean() > 0.9


def test_a_text_of_one_long_word_is_left_alone():
    text = np.ones((2, 7), bool)
    assert not masking.encoder_positions(text, 0.3, random_for(2), np.zeros((2, 7), int)).any()


def test_every_word_is_as_likely_as_another_of_its_length():
    row = np.repeat(np.arange(10), 2)
    chosen = masking.encoder_positions(np.ones((3000, 20), bool), 0.3, random_for(3000), np.tile(row, (3000, 1)))
    assert (chosen.sum(1) == 6).all()
    assert all(close(hits, 3000, 0.3) for hits in chosen[:, ::2].sum(0))


# ------------------------------------------------------------------------------------ masks of real batches


def by_example(data: PretrainData, steps: int) -> dict[bytes, tuple]:
    """What was made of each text: its unmasked ids → masked ids and labels without padding."""
    found = {}
    for step in range(steps):
        for batch in data(step):
            for row in range(len(batch.enc_labels)):
                n = int(batch.text.attention_mask[row].sum())
                parts = [t[row, :n].numpy() for t in (batch.text.input_ids, batch.enc_labels, batch.dec_input_ids,
                                                      batch.dec_labels)]
                true = np.where(parts[1] != IGNORE, parts[1], parts[0])
                assert np.array_equal(np.where(parts[3] != IGNORE, parts[3], parts[2]), true)
                found[true.tobytes()] = tuple(part.tobytes() for part in parts)
    return found


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_of_a_text_do_not_depend_on_batch_micro_batch_or_rank(tiny_shards, whole_word):
    config = MaskingConfig(whole_word=whole_word)
    whole = by_example(PretrainData(tiny_shards, config, seed=3, batch=40, micro_batch=40), 1)
    small = by_example(PretrainData(tiny_shards, config, seed=3, batch=8, micro_batch=2), 5)
    split = {}
    for rank in range(4):
        split |= by_example(PretrainData(tiny_shards, config, seed=3, batch=40, micro_batch=5, rank=rank, world=4), 1)
    assert len(whole) > 35 and whole == small == split


def test_whole_words_of_a_wordpiece(tiny_shards):
    """A masked piece has its neighbours of the same word masked, unless the word has more than six."""
    starts = tiny_shards.word_starts()
    batches = PretrainData(tiny_shards, MaskingConfig(whole_word=True), seed=1, batch=41, micro_batch=41)(0)
    pieces = longer = 0
    for labels, ids, text in zip(batches[0].enc_labels.numpy(), batches[0].text.input_ids.numpy(),
                                 batches[0].text.text_mask.numpy(), strict=True):
        true = np.where(labels != IGNORE, labels, ids)
        word: list[int] = []
        for place in [*np.flatnonzero(text), None]:
            if word and (place is None or starts[true[place]] or place != word[-1] + 1):
                picked = labels[word] != IGNORE
                assert picked.all() or not picked.any()
                assert len(word) <= 6 or not picked.any()
                pieces, longer = pieces + (len(word) > 1 and picked.all()), longer + (len(word) > 6)
                word = []
            if place is not None:
                word.append(int(place))
    assert pieces > 10 and longer > 0
