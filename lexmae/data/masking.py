"""Encoder and decoder masks of LexMAE (SPEC §1): pure functions of token ids and keyed random numbers.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lexmae.config import MaskingConfig
from lexmae.data.randomness import KeyedRandom

IGNORE = -100  # label of a position that takes no part in the loss
_LONGEST_WORD = 6  # pieces; longer words are left alone by whole-word masking
# Streams of random numbers: what is drawn, times 2 for encoder and decoder.
_CHOOSE, _ACTION, _TOKEN = 0, 2, 4


class Masked(NamedTuple):
    """ids [B, L] with some tokens replaced, labels [B, L] with the true id there and IGNORE elsewhere."""

    ids: np.ndarray
    labels: np.ndarray


def encoder_positions(text_mask: np.ndarray, share: float, random: KeyedRandom,
                      word_ids: np.ndarray | None = None) -> np.ndarray:
    """bool [B, L]: exactly ceil(share · n) of the n text tokens of each sequence, chosen at random.

    Args:
        text_mask: bool [B, L], true at text tokens (neither special nor padding).
        word_ids: int [B, L], which word each token belongs to, increasing along a sequence; given, whole words are
            chosen until the budget is met, and words of more than six pieces are left alone.
    """
    noise = random.uniform(_CHOOSE, text_mask.shape[1])  # [B, L]
    budget = np.ceil(share * text_mask.sum(1) - 1e-9).astype(np.int64)  # [B]
    if word_ids is None:
        rank = np.argsort(np.argsort(np.where(text_mask, noise, 2.0), axis=1, kind="stable"), axis=1, kind="stable")
        return (rank < budget[:, None]) & text_mask
    return _whole_words(text_mask, word_ids, noise, budget)


def _whole_words(text_mask: np.ndarray, word_ids: np.ndarray, noise: np.ndarray, budget: np.ndarray) -> np.ndarray:
    chosen = np.zeros_like(text_mask)
    for row in range(len(text_mask)):
        words, first, pieces = np.unique(word_ids[row][text_mask[row]], return_index=True, return_counts=True)
        order = np.argsort(noise[row][text_mask[row]][first], kind="stable")
        order = order[pieces[order] <= _LONGEST_WORD]
        before = np.cumsum(pieces[order]) - pieces[order]  # tokens chosen before each word
        taken = words[order[before < budget[row]]]
        chosen[row] = np.isin(word_ids[row], taken) & text_mask[row]
    return chosen


def decoder_positions(text_mask: np.ndarray, encoder: np.ndarray, config: MaskingConfig,
                      random: KeyedRandom) -> np.ndarray:
    """bool [B, L]: positions masked for the decoder; ``encoder`` are the encoder's. Strategies as in SPEC §1."""
    alpha, beta = config.encoder, config.decoder
    noise = random.uniform(_CHOOSE + 1, text_mask.shape[1])
    if config.decoder_strategy == "inclusive":
        return text_mask & (encoder | (noise < (beta - alpha) / (1 - alpha)))
    if config.decoder_strategy == "exclusive":
        return text_mask & ~encoder & (noise < beta / (1 - alpha))
    return text_mask & (noise < beta)


def replace(ids: np.ndarray, positions: np.ndarray, mask_id: int, plain_ids: np.ndarray, random: KeyedRandom,
            decoder: bool) -> Masked:
    """At the positions: 80 % the mask token, 10 % a random token of ``plain_ids``, 10 % as it was.

    Args:
        ids: int [B, L], the unmasked batch.
        plain_ids: the ids that a random token is drawn from (the vocabulary without special tokens).
        decoder: which of two independent sets of draws to use.
    """
    length = ids.shape[1]
    action = random.uniform(_ACTION + decoder, length)
    drawn = plain_ids[(random.uniform(_TOKEN + decoder, length) * len(plain_ids)).astype(np.int64)]
    replaced = np.where(action < 0.8, mask_id, np.where(action < 0.9, drawn, ids))
    return Masked(np.where(positions, replaced, ids), np.where(positions, ids, IGNORE))


def mask_pair(ids: np.ndarray, text_mask: np.ndarray, mask_id: int, plain_ids: np.ndarray, config: MaskingConfig,
              random: KeyedRandom, word_ids: np.ndarray | None = None) -> tuple[Masked, Masked]:
    """The encoder's and the decoder's masked batch, both made from the unmasked ``ids``."""
    encoder = encoder_positions(text_mask, config.encoder, random, word_ids)
    decoder = decoder_positions(text_mask, encoder, config, random)
    return (replace(ids, encoder, mask_id, plain_ids, random, decoder=False),
            replace(ids, decoder, mask_id, plain_ids, random, decoder=True))
