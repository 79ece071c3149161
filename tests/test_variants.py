"""Every variant of pre-training (SPEC §1) for every backbone, against Hugging Face's models put together by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import judgements, passages, queries
from test_shards import FAMILIES as TOKENIZERS
from tiny_models import SIZES, SPECIAL, VOCAB, batch, masked, tiny
from transformers import AutoModelForMaskedLM

from lexmae.config import BottleneckConfig, MaskingConfig
from lexmae.data import tokenizer as tok
from lexmae.data.batches import PretrainBatch, PretrainData, TextBatch
from lexmae.data.corpus import write_beir
from lexmae.data.masking import IGNORE
from lexmae.data.shards import Shards, prepare
from lexmae.model import lexicon
from lexmae.model.encoder import SparseEncoder
from lexmae.model.pretrainer import Pretrainer
from lexmae.train.objectives import PretrainObjective

ALL = sorted(SIZES)


def example(pad: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of a pre-trainer's forward, with a padding id of choice; the true ids are `ids`."""
    inputs = batch(seed, pad=pad)
    enc_ids, enc_labels = masked(inputs, seed, 0.3)
    dec_ids, dec_labels = masked(inputs, seed + 1, 0.5)
    return {**inputs, "ids": inputs["input_ids"], "input_ids": enc_ids, "enc_labels": enc_labels,
            "dec_input_ids": dec_ids, "dec_labels": dec_labels}  # fmt: skip


def arguments(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if name != "ids"}


def build(architecture: str, source: str, layers: int, pad: int = 0, **options) -> Pretrainer:
    """A pre-trainer whose decoder's weights are large enough to matter, dropout off."""
    special = {**SPECIAL, "pad": pad, "unk": 1 - pad}
    model = Pretrainer(tiny(architecture, special=special), layers, source, **options).eval()
    for name, parameter in model.decoder.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def by_hand(
    model: Pretrainer, architecture: str, source: str, layers: int, a: dict, normalize: bool = False
) -> dict[str, torch.Tensor]:
    """The losses of SPEC §1 from whole models of Hugging Face: the encoder's, and one of as many layers as the decoder
    has, with the decoder's weights, the encoder's word embeddings, and what it reads put in behind its embeddings."""
    lm = model.lm
    kept = {"attention_mask": a["attention_mask"]} | (
        {"token_type_ids": a["token_type_ids"]} if architecture == "bert" else {})
    output = lm(input_ids=a["input_ids"], **kept, output_hidden_states=True)
    table = lm.get_input_embeddings().weight
    found = {"enc": F.cross_entropy(output.logits.flatten(0, 1), a["enc_labels"].flatten())}
    pooled = (output.logits + torch.where(a["text_mask"], 0.0, -1e9).unsqueeze(-1)).amax(dim=1)
    segments = {"token_type_ids": a["token_type_ids"]} if architecture == "bert" else {}
    states = lm.base_model.embeddings(input_ids=a["dec_input_ids"], **segments).clone()
    if source == "logits":
        states[:, 0] = pooled.softmax(-1) @ table.detach()
    elif source == "saturated":
        weights = (1 + pooled.clamp(min=0)).log()
        states[:, 0] = (weights / weights.sum(-1, keepdim=True)) @ table.detach()
    elif source == "cls":
        states[:, 0] = output.hidden_states[-1][:, 0]
    if normalize:
        centred = states[:, 0] - states[:, 0].mean(-1, keepdim=True)
        states[:, 0] = centred / centred.std(-1, correction=0, keepdim=True)
    config = copy.deepcopy(lm.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    small = AutoModelForMaskedLM.from_config(config).eval()
    missing, unexpected = small.load_state_dict(model.decoder.layers.state_dict(), strict=False)
    assert not unexpected and all("embed" in name or name.endswith(("decoder.weight", "projector.weight", "bias"))
                                  for name in missing), missing
    small.get_input_embeddings().weight = small.get_output_embeddings().weight = table
    small.get_output_embeddings().bias = model.decoder.bias
    small.base_model.embeddings.register_forward_hook(lambda module, inputs, out: states)
    logits = small(input_ids=a["dec_input_ids"], attention_mask=a["attention_mask"]).logits
    found["dec"] = F.cross_entropy(logits.flatten(0, 1), a["dec_labels"].flatten())
    terms = []
    for row, text in enumerate(a["text_mask"]):
        tokens = a["ids"][row][text].tolist()
        terms.append(-sum(pooled[row].log_softmax(-1)[token] for token in set(tokens)) / len(tokens))
    found["bow"] = torch.stack(terms).mean()
    return found


def losses(model: Pretrainer, a: dict) -> dict[str, torch.Tensor]:
    out = model(**arguments(a))
    found = {side: out[f"{side}_loss_sum"] / out[f"{side}_count"] for side in ("enc", "dec")}
    return found | ({"bow": out["bow_loss_sum"] / len(a["ids"])} if "bow_loss_sum" in out else {})


CASES = [(source, 2, 0) for source in lexicon.SOURCES] + [("logits", 1, 0), ("cls", 1, 1), ("saturated", 2, 1)]


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("source, layers, pad, normalize", [(*case, False) for case in CASES]
                         + [("logits", 2, 0, True), ("saturated", 1, 0, True)])
def test_losses_and_gradients_by_hand(architecture, source, layers, pad, normalize):
    options = {"bag_of_words": True, "normalize": normalize}
    model, a = build(architecture, source, layers, pad, **options), example(pad)
    expected = by_hand(model, architecture, source, layers, a, normalize)
    sum(expected.values()).backward()
    wanted = {name: p.grad.clone() for name, p in model.lm.named_parameters()}
    model.zero_grad(set_to_none=True)
    found = losses(model, a)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    sum(found.values()).backward()
    for name, parameter in model.lm.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("architecture", ALL)
def test_variants_differ(architecture):
    """What the comparison above rests on: sources, layers and normalisation give losses of their own."""
    models = [build(architecture, *case) for case in CASES if case[2] == 0]
    models.append(build(architecture, "logits", 2, normalize=True))
    assert len({round(losses(model, example())["dec"].item(), 4) for model in models}) == len(models) == 6


@pytest.mark.parametrize("architecture", ALL)
def test_without_labels_it_is_the_lexicon_encoder(architecture):
    for source in ("logits", "off"):
        model, inputs = build(architecture, source, 1), batch(7)
        torch.testing.assert_close(model(**inputs), SparseEncoder(model.lm)(**inputs))


# -------------------------------------------------------------------------------------------- the bag of words


def test_the_bag_of_words_loss_by_hand():
    """Three texts over four entries: one token twice, two tokens, none."""
    pooled = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    ids = torch.tensor([[0, 1, 1], [0, 3, 2], [0, 0, 0]])
    text = torch.tensor([[False, True, True], [True, True, False], [False, False, False]])
    loss = lexicon.bag_of_words_loss(pooled, ids, text)
    total = np.log(np.exp([2.0, 0, 0, 1]).sum())
    assert loss.item() == pytest.approx(np.log(4) / 2 + (2 * total - 3) / 2)
    loss.backward()
    share = np.exp([2.0, 0, 0, 1]) / np.exp([2.0, 0, 0, 1]).sum()
    assert pooled.grad[0].tolist() == pytest.approx([1 / 8, 1 / 8 - 1 / 2, 1 / 8, 1 / 8])
    assert pooled.grad[1].tolist() == pytest.approx((share - np.array([1, 0, 0, 1]) / 2).tolist())
    assert not pooled.grad[2].any()


def test_it_sees_the_text_before_masking():
    """The masked positions count with their true tokens, and [MASK] is no word of any text."""
    model, a = build("bert", "logits", 1, bag_of_words=True), example()
    before = losses(model, a)["bow"]
    changed = {**a, "enc_labels": torch.where(a["enc_labels"] == IGNORE, IGNORE, (a["enc_labels"] + 7) % VOCAB)}
    assert losses(model, changed)["bow"] != before
    assert (a["input_ids"] == SPECIAL["mask"]).any()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("weights", [(0.7, 1.3, 0.4), (1.0, 1.0, 0.0), (0.0, 2.0, 1.0)])
def test_micro_batches_and_ranks_sum_to_the_loss_of_the_batch(size, weights):
    """Means over the global batch, whatever its division: texts of unequal length, weights of all three losses."""
    config = BottleneckConfig(encoder_weight=weights[0], decoder_weight=weights[1], bow_weight=weights[2])
    model, a = build("bert", "logits", 1, bag_of_words=weights[2] > 0), example()
    objective, whole = PretrainObjective(config), losses(model, a)
    wanted = sum(weight * whole.get(name, 0) for weight, name in zip(weights, ("enc", "dec", "bow"), strict=True))
    wanted.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    parts = [micro(a, slice(start, start + size)) for start in range(0, 3, size)]
    totals = [float(sum(n)) for n in zip(*(objective.counts([part]) for part in parts), strict=True)]
    assert len(totals) == (3 if weights[2] else 2) and (not weights[2] or totals[2] == 3)
    sums: dict[str, float] = {}
    for part in parts:
        loss, metrics = objective.loss(model, part, totals, 0, 10)
        loss.backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    assert sums["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert ("loss_bow" in sums) == (weights[2] > 0)
    if weights[2]:
        assert sums["loss_bow"] == pytest.approx(whole["bow"].item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def micro(a: dict, rows: slice):
    text = TextBatch(*(a[name][rows] for name in ("input_ids", "attention_mask", "text_mask", "token_type_ids")))
    enc, dec = a["enc_labels"][rows], a["dec_labels"][rows]
    return PretrainBatch(text, enc, a["dec_input_ids"][rows], dec, int((enc != IGNORE).sum()),
                         int((dec != IGNORE).sum()))


# ------------------------------------------------------------------------- masks of every kind of tokenizer


@pytest.fixture(scope="module", params=TOKENIZERS)
def shards(request, tmp_path_factory) -> Shards:
    """The shared collection with each kind of tokenizer; RoBERTa's and XLM-RoBERTa's padding id is not 0."""
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZERS[request.param]().save_pretrained(str(folder / "t"))
    write_beir(folder / "beir", passages(), queries(), judgements())
    prepare(folder / "beir", folder / "s", tokenizer=str(folder / "t"), max_length=40, query_length=20)
    return Shards.open(folder / "s")


def test_words_begin_where_blanks_stand(shards):
    tokenizer = tok.load(shards.tokenizer_dir)
    for text in (" quick fox", " word sleeps over the dog"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert shards.word_starts()[ids].sum() == len(text.split()) <= len(ids)


@pytest.mark.parametrize("strategy", ["inclusive", "exclusive", "random"])
@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_keep_to_the_text_of_every_tokenizer(shards, strategy, whole_word):
    config = MaskingConfig(decoder_strategy=strategy, whole_word=whole_word)
    batches = PretrainData(shards, config, seed=2, batch=41, micro_batch=41)(0)
    (found,), special = batches, shards.special
    enc, dec = found.enc_labels != IGNORE, found.dec_labels != IGNORE
    true = torch.where(enc, found.enc_labels, found.text.input_ids)
    structural = torch.isin(true, torch.tensor(special.structural))
    padding = ~found.text.attention_mask.bool()
    assert (true[padding] == special.pad).all() and (true == special.pad).sum() == padding.sum()
    assert torch.equal(found.text.text_mask, ~structural) and not (enc & structural).any()
    assert not (dec & structural).any() and torch.equal(found.dec_labels[dec], true[dec])
    relation = {"inclusive": not (enc & ~dec).any(), "exclusive": not (enc & dec).any(),
                "random": (enc & dec).any() and (enc & ~dec).any()}  # fmt: skip
    assert relation[strategy]
    text = found.text.text_mask
    if not whole_word:
        assert enc.sum(1).tolist() == [-(-3 * n // 10) for n in text.sum(1).tolist()]
        return
    starts = torch.from_numpy(shards.word_starts())[true] | ~text
    words = starts.cumsum(1)
    several = 0
    for row in range(len(true)):
        for word in words[row][text[row]].unique():
            own = text[row] & (words[row] == word)
            assert enc[row][own].all() or not enc[row][own].any()
            assert own.sum() <= 6 or not enc[row][own].any()
            several += bool(own.sum() > 1 and enc[row][own].all())
    assert several > 3
