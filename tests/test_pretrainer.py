from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import SIZES, SPECIAL, VOCAB, batch, masked, tiny
from torch import nn
from transformers import BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLayer, BertLMPredictionHead

from lexmae.errors import InputError
from lexmae.model import backbone, lexicon
from lexmae.model.pretrainer import Pretrainer

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "pretrain_bert.npz"


def example(seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of a pre-trainer's forward."""
    inputs = batch(seed)
    enc_ids, enc_labels = masked(inputs, seed, 0.3)
    dec_ids, dec_labels = masked(inputs, seed + 1, 0.5)
    return {
        **inputs, "input_ids": enc_ids, "enc_labels": enc_labels, "dec_input_ids": dec_ids, "dec_labels": dec_labels,
    }


def mean_loss(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return out["enc_loss_sum"] / out["enc_count"] + out["dec_loss_sum"] / out["dec_count"]


# ----------------------------------------------------------------------- the rules once more, plainly, for BERT


class Oracle(nn.Module):
    """SPEC §1 written out with Hugging Face's own parts, all logits in memory."""

    def __init__(self, lm: BertForMaskedLM, n_layers: int, source: str):
        super().__init__()
        self.lm, self.source = lm, source
        self.decoder_heads = nn.ModuleList(BertLayer(lm.config) for _ in range(n_layers))
        self.decoder_cls = BertLMPredictionHead(lm.config)

    def forward(self, a: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {k: a[k] for k in ("attention_mask", "token_type_ids")}
        output = self.lm(input_ids=a["input_ids"], **kept, output_hidden_states=True)
        scores = output.logits
        enc_loss = F.cross_entropy(scores.reshape(-1, VOCAB), a["enc_labels"].reshape(-1))
        table = self.lm.bert.embeddings.word_embeddings.weight
        pooled = (scores + torch.where(a["text_mask"], 0.0, -1e9).unsqueeze(-1)).amax(dim=1)
        if self.source == "logits":
            vector = pooled.softmax(-1) @ table.detach()
        elif self.source == "saturated":
            weights = (1 + pooled.clamp(min=0)).log()
            vector = (weights / weights.sum(-1, keepdim=True)) @ table.detach()
        elif self.source == "cls":
            vector = output.hidden_states[-1][:, 0]
        else:
            vector = self.lm.bert.embeddings(a["dec_input_ids"], a["token_type_ids"])[:, 0]
        states = self.lm.bert.embeddings(a["dec_input_ids"], a["token_type_ids"]).clone()
        states[:, 0] = vector
        bias = torch.where(a["attention_mask"].bool(), 0.0, -1e9)[:, None, None, :]
        for layer in self.decoder_heads:
            states = layer(states, bias)
        dec_logits = self.decoder_cls.transform(states) @ table.t() + self.decoder_cls.bias
        dec_loss = F.cross_entropy(dec_logits.reshape(-1, VOCAB), a["dec_labels"].reshape(-1))
        return {"enc_loss": enc_loss, "dec_loss": dec_loss, "bottleneck": vector, "dec_logits": dec_logits}


def to_decoder(name: str) -> str:
    """Names of the oracle and of the golden file -> names within a `Pretrainer`."""
    if name.startswith("decoder_heads."):
        return name.replace("decoder_heads.", "decoder.layers.bert.encoder.layer.")
    if name.startswith("decoder_cls."):
        inner = name.removeprefix("decoder_cls.").removeprefix("predictions.")
        return f"decoder.layers.cls.predictions.{inner}"
    return name if name.startswith("lm.") else f"lm.{name}"


@pytest.mark.parametrize("source", lexicon.SOURCES)
@pytest.mark.parametrize("head", ["reference", "chunked"])
def test_bert_agrees_with_the_rules_written_out(source, head):
    lm = tiny("bert")
    model = Pretrainer(lm, n_decoder_layers=2, bottleneck=source, head=head).eval()
    oracle = Oracle(lm, 2, source).eval()
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in oracle.named_parameters():
        if name.startswith("decoder_") and not name.startswith("decoder_cls.decoder."):
            own[to_decoder(name)].data.copy_(parameter.data.normal_(std=0.3))
    arguments = example()
    expected = oracle(arguments)
    (expected["enc_loss"] + expected["dec_loss"]).backward()
    wanted = {to_decoder(n): p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    oracle.zero_grad(set_to_none=True)

    out = model(**arguments)
    torch.testing.assert_close(out["enc_loss_sum"] / out["enc_count"], expected["enc_loss"])
    torch.testing.assert_close(out["dec_loss_sum"] / out["dec_count"], expected["dec_loss"])
    torch.testing.assert_close(out["bottleneck"], expected["bottleneck"])
    mean_loss(out).backward()
    assert len(wanted) == len(list(model.parameters()))
    for name, gradient in wanted.items():
        torch.testing.assert_close(own[name].grad, gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------- golden numbers


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_file():
        pytest.skip(f"no golden numbers at {GOLDEN}")
    with np.load(GOLDEN) as stored:
        return {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}


def golden_model(golden: dict, head: str) -> Pretrainer:
    cls, sep, pad, mask = golden["special"].tolist()
    size = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    lm = backbone.create_masked_lm("bert", 200, {"cls": cls, "sep": sep, "pad": pad, "mask": mask}, size)
    model = Pretrainer(lm, n_decoder_layers=2, head=head).eval()
    own = dict(model.named_parameters(remove_duplicate=False))
    loaded = set()
    for name, value in golden.items():
        if name.startswith("weight/"):
            parameter = own[to_decoder(name.removeprefix("weight/"))]
            parameter.data.copy_(value)
            loaded.add(id(parameter))
    assert loaded == {id(p) for p in model.parameters()}
    return model


def golden_arguments(golden: dict) -> dict[str, torch.Tensor]:
    cls, sep, pad, _ = golden["special"].tolist()
    text = ~torch.isin(golden["input_ids"], torch.tensor([cls, sep, pad]))
    return {
        "input_ids": golden["enc_input_ids"], "attention_mask": golden["attention_mask"], "text_mask": text,
        "token_type_ids": torch.zeros_like(golden["input_ids"]), "enc_labels": golden["enc_labels"],
        "dec_input_ids": golden["dec_input_ids"], "dec_labels": golden["dec_labels"],
    }


@pytest.mark.parametrize("head", ["reference", "chunked"])
def test_golden_losses_bottleneck_and_gradients(golden, head):
    model = golden_model(golden, head)
    out = model(**golden_arguments(golden))
    near = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close((out["enc_loss_sum"] / out["enc_count"]).double(), golden["enc_loss"].double(), **near)
    torch.testing.assert_close((out["dec_loss_sum"] / out["dec_count"]).double(), golden["dec_loss"].double(), **near)
    torch.testing.assert_close(out["bottleneck"], golden["bottleneck"], **near)
    mean_loss(out).backward()
    own = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name in golden if name.startswith("grad/")]
    assert len(names) == len(list(model.parameters()))
    for name in names:
        torch.testing.assert_close(own[to_decoder(name.removeprefix("grad/"))].grad, golden[name], **near)


def test_golden_logits(golden):
    model = golden_model(golden, "auto")
    a = golden_arguments(golden)
    hidden = backbone.hidden_states(model.lm, a["input_ids"], a["attention_mask"], a["token_type_ids"])
    weight, bias = backbone.output_matrix(model.lm)
    enc_logits = F.linear(backbone.transform(model.lm, hidden), weight, bias)
    embedded = backbone.embed(model.lm, a["dec_input_ids"], a["token_type_ids"])
    embedded = torch.cat([golden["bottleneck"].unsqueeze(1), embedded[:, 1:]], dim=1)
    decoded = model.decoder.transform(model.decoder(embedded, a["attention_mask"]))
    dec_logits = F.linear(decoded, weight, model.decoder.bias)
    seen = a["attention_mask"].bool()
    torch.testing.assert_close(enc_logits[seen], golden["enc_logits"][seen], atol=1e-4, rtol=0)
    torch.testing.assert_close(dec_logits[seen], golden["dec_logits"][seen], atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------- every backbone


@pytest.mark.parametrize("architecture", sorted(SIZES))
@pytest.mark.parametrize("source", lexicon.SOURCES)
def test_every_parameter_gets_a_gradient(architecture, source):
    model = Pretrainer(tiny(architecture), bottleneck=source)
    mean_loss(model(**example())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@pytest.mark.parametrize("architecture", sorted(SIZES))
def test_decoder_reads_the_bottleneck_and_trains_the_encoder(architecture):
    """The decoder's loss reaches the encoder's last layer through the lexicon, and not when the bottleneck is off."""
    last = {"distilbert": "layer.2.ffn.lin2.weight", "modernbert": "layers.2.mlp.Wo.weight"}
    for source, reached in (("logits", True), ("saturated", True), ("cls", True), ("off", False)):
        model = Pretrainer(tiny(architecture), bottleneck=source).eval()
        name = last.get(architecture, "layer.2.output.dense.weight")
        parameter = next(p for n, p in model.lm.named_parameters() if n.endswith(name))
        (gradient,) = torch.autograd.grad(model(**example())["dec_loss_sum"], parameter, allow_unused=True)
        assert (gradient is not None and gradient.abs().sum() > 0) == reached


def test_sums_counts_and_correct_predictions():
    model, arguments = Pretrainer(tiny("bert")).eval(), example()
    out = model(**arguments)
    shown = {k: arguments[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    logits, labels = model.lm(**shown).logits, arguments["enc_labels"]
    chosen = labels != -100
    loss = F.cross_entropy(logits[chosen], labels[chosen], reduction="sum")
    torch.testing.assert_close(out["enc_loss_sum"], loss)
    assert out["enc_count"] == chosen.sum()
    assert out["enc_correct"] == (logits[chosen].argmax(-1) == labels[chosen]).sum()
    for name in ("loss_sum", "count", "correct"):
        assert out[f"enc_{name}"].dtype == out[f"dec_{name}"].dtype == torch.float32
        assert out[f"enc_{name}"].shape == out[f"dec_{name}"].shape == ()


def test_split_batches_add_up_to_the_whole():
    """Sums over micro-batches divided by global counts are the losses of the whole batch, gradients included."""
    model, arguments = Pretrainer(tiny("bert")).eval(), example()
    whole = model(**arguments)
    mean_loss(whole).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for row in range(3):
        part = model(**{k: v[row : row + 1] for k, v in arguments.items()})
        (part["enc_loss_sum"] / whole["enc_count"] + part["dec_loss_sum"] / whole["dec_count"]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-3)


def test_nothing_labelled_and_no_text_stay_finite():
    model, arguments = Pretrainer(tiny("bert")), example()
    arguments["enc_labels"] = torch.full_like(arguments["enc_labels"], -100)
    arguments["text_mask"] = torch.zeros_like(arguments["text_mask"])
    out = model(**arguments)
    assert out["enc_loss_sum"] == out["enc_count"] == out["enc_correct"] == 0
    assert out["bottleneck"].isfinite().all()
    (out["enc_loss_sum"] + out["dec_loss_sum"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_losses_are_float32_and_near(dtype):
    model, arguments = Pretrainer(tiny("bert")).eval(), example()
    exact = model(**arguments)
    with torch.autocast("cpu", dtype=dtype):
        out = model(**arguments)
    assert out["enc_loss_sum"].dtype == out["dec_loss_sum"].dtype == out["bottleneck"].dtype == torch.float32
    torch.testing.assert_close(mean_loss(out), mean_loss(exact), atol=0.1, rtol=0.02)
    mean_loss(out).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_training_lowers_both_losses():
    model, arguments = Pretrainer(tiny("bert", scale=0.02)), example()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        out = model(**arguments)
        losses.append([(out[f"{s}_loss_sum"] / out[f"{s}_count"]).item() for s in ("enc", "dec")])
        mean_loss(out).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1][0] < 0.5 * losses[0][0] and losses[-1][1] < 0.5 * losses[0][1]


def test_it_is_a_function_of_the_seed():
    def build():
        torch.manual_seed(5)
        lm = backbone.create_masked_lm("bert", VOCAB, SPECIAL, SIZES["bert"])
        return Pretrainer(lm).state_dict()

    one, other = build(), build()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_exported_part_is_the_backbone():
    lm = tiny("bert")
    model = Pretrainer(lm)
    assert model.lm is lm
    exported = {id(p) for p in model.lm.parameters()}
    assert not any(id(p) in exported for p in model.decoder.parameters())


def test_unknown_bottleneck():
    with pytest.raises(InputError, match="saturated"):
        Pretrainer(tiny("bert"), bottleneck="max")
