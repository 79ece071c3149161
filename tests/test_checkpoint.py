"""Writing, reading back, keeping and choosing checkpoints with one process; test_elastic.py has several ranks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lexmae import artifact
from lexmae.errors import InputError, RunError
from lexmae.ranks import Hosts
from lexmae.train import checkpoint, engine, statefile
from lexmae.train.statefile import Stretch

CONFIG = {"optimization": {"lr": 1e-3, "batch": 8}, "data": "shards", "stages": (1, 2)}


class Trained:
    """One rank's engine around a plain model and AdamW, as fp32 at stage 0 has them."""

    save = staticmethod(checkpoint.save)
    gather_texts = engine.Engine.gather_texts

    def __init__(self, seed: int = 0, steps: int = 1):
        torch.manual_seed(seed)
        self.module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
        self.module.register_buffer("mean", torch.rand(2))
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.deepspeed = SimpleNamespace(module=self.module, optimizer=optimizer, global_steps=0)
        self.rank, self.world, self.hosts, self.device = 0, 1, None, torch.device("cpu")
        self.hardware = SimpleNamespace(zero_stage=0, precision="fp32")
        for _ in range(steps):
            self.step()

    def step(self) -> float:
        loss = self.module(torch.rand(4, 3)).pow(2).mean()
        loss.backward()
        self.deepspeed.optimizer.step()
        self.deepspeed.optimizer.zero_grad()
        return loss.item()

    def scaler_state(self) -> dict:
        return {}

    def set_scaler_state(self, state: dict) -> None:
        assert state == {}

    def barrier(self) -> None:
        pass


def make(folder: Path, *steps: int, keep: int = 9, **facts) -> Path:
    for step in steps:
        checkpoint.save(Trained(step), folder, step, CONFIG, keep, {"objective": {}, **facts})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def alone() -> Hosts:
    return Hosts(".")


def damage(path: Path, how: str) -> None:
    """One of the ways in which disks and people damage a checkpoint."""
    file = path / statefile.file_name(0, 1)
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[:-7])
    elif how == "bit":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    elif how == "missing":
        file.unlink()
    elif how == "manifest":
        (path / artifact.MANIFEST).write_text("{", encoding="utf-8")
    elif how == "no manifest":
        (path / artifact.MANIFEST).unlink()


DAMAGES = ["truncated", "bit", "missing", "manifest", "no manifest"]

# ------------------------------------------------------------------------------------------------------ the files


def test_values_are_read_in_any_division(tmp_path):
    value, ends = torch.arange(20.0), [0, 7, 8, 20]
    for rank, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        statefile.write(tmp_path / statefile.file_name(rank, 3),
                        [Stretch("a.b|c", "weight", start, end - start), Stretch(f"r{rank}", "x", 0, 3, torch.uint8)],
                        [value[start:end], torch.tensor([rank, 2, 3], dtype=torch.uint8)])
    with statefile.Reader(tmp_path) as reader:
        assert reader.size("a.b|c", "weight") == 20 and reader.size("nobody", "weight") == 0
        for start in range(20):
            for end in range(start + 1, 21):
                assert torch.equal(reader.read("a.b|c", "weight", start, end - start), value[start:end])
        assert [reader.read(f"r{rank}", "x").tolist() for rank in range(3)] == [[0, 2, 3], [1, 2, 3], [2, 2, 3]]


def test_a_gap_between_files_is_refused(tmp_path):
    for rank, start in enumerate((0, 6)):
        statefile.write(tmp_path / statefile.file_name(rank, 2), [Stretch("w", "weight", start, 4)], [torch.ones(4)])
    with statefile.Reader(tmp_path) as reader, pytest.raises(InputError, match=r"lacks elements 4 to 10 of w \(weight"):
        reader.read("w", "weight")
    with pytest.raises(InputError, match="not a checkpoint of this version"):
        statefile.Reader(tmp_path / "absent")


def test_what_is_written_is_safetensors_and_its_checksum_is_known(tmp_path):
    from safetensors.torch import load_file

    path = tmp_path / "one.safetensors"
    digest = statefile.write(path, [Stretch("w", "k", 0, 6)], [torch.arange(6).view(2, 3)])
    assert load_file(path)["w|k|0"].tolist() == [0, 1, 2, 3, 4, 5] and artifact.checksum(path) == digest
    with pytest.raises(ValueError, match="w: 5 elements are expected, not 6"):
        statefile.write(path, [Stretch("w", "k", 0, 5)], [torch.arange(6)])


def test_a_saved_engine_goes_on_as_if_nothing_had_happened(tmp_path):
    trained = Trained(steps=3)
    checkpoint.save(trained, tmp_path, 3, CONFIG, 2, {"objective": {"a": 1}, "skipped": 2})
    expected = [trained.step() for _ in range(3)]
    other = Trained(seed=9, steps=1)
    resumed = checkpoint.load(other, tmp_path / "step-3")
    assert resumed.step == 3 and resumed.facts["objective"] == {"a": 1} and resumed.facts["skipped"] == 2
    assert [other.step() for _ in range(3)] == expected  # the same random numbers too
    assert torch.equal(other.module.mean, trained.module.mean)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make(tmp_path, 1)
    other = Trained()
    other.module[0] = torch.nn.Linear(4, 5)
    other.deepspeed.optimizer = torch.optim.AdamW(other.module.parameters())
    with pytest.raises(InputError, match="made with another model: 0.weight does not have 20 weights"):
        checkpoint.load(other, tmp_path / "step-1")


def fp16_engine(**optimizer) -> engine.Engine:
    found = object.__new__(engine.Engine)
    found.deepspeed = SimpleNamespace(optimizer=SimpleNamespace(**optimizer))
    found.hardware = SimpleNamespace(precision="fp16")
    return found


def test_loss_scaling_goes_on_at_another_stage():
    """DeepSpeed has one object for it at stage 0, another at the other stages."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig

    split = fp16_engine(loss_scaler=DynamicLossScaler(2.0**16, 1000, 1, 2, False, dtype=torch.half))
    whole = fp16_engine(loss_scale_config=LossScaleConfig(torch.float16, True, 1.0, None))
    scaler = split._scaler()
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 2.0**14, 5, 3, 1
    state = json.loads(json.dumps(split.scaler_state()))
    assert state == {"cur_scale": 2.0**14, "cur_iter": 5, "last_overflow_iter": 3, "cur_hysteresis": 1}
    whole.set_scaler_state(state)
    assert whole.scaler_state() == {"cur_scale": 2.0**14, "cur_iter": 5, "last_overflow_iter": 3}
    again = fp16_engine(loss_scaler=DynamicLossScaler(2.0**16, 1000, 1, 2, False, dtype=torch.half))
    again.set_scaler_state(state)
    assert again.scaler_state() == state
    again.hardware.precision = "bf16"
    assert again.scaler_state() == {}


# ------------------------------------------------------------------------------------------------ which are kept


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, figure in ((1, 0.2), (2, 0.5), (3, None), (4, 0.5), (5, 0.1), (6, None)):
        make(tmp_path, step, keep=2, **({} if figure is None else {checkpoint.PROBE: figure}))
    assert names(tmp_path) == ["step-2", "step-5", "step-6"]
    make(tmp_path, 7, keep=2, **{checkpoint.PROBE: 0.6})
    make(tmp_path, 8, 9, keep=2)
    assert names(tmp_path) == ["step-7", "step-8", "step-9"]


def test_later_ones_are_left_to_a_run_that_went_back(tmp_path):
    make(tmp_path, 2, 4, 6, keep=3)
    make(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-3", "step-4", "step-6"]


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    make(tmp_path, 3)
    damage(tmp_path / "step-3", "bit")
    make(tmp_path, 3)
    artifact.verify(tmp_path / "step-3")
    assert names(tmp_path) == ["step-3"]


def test_what_stopped_runs_left_goes(tmp_path):
    for name in ("step-2.partial", "step-1.removed"):
        (tmp_path / name).mkdir(parents=True)
    make(tmp_path, 3)
    assert names(tmp_path) == ["step-3"]


def test_nothing_is_removed_before_the_new_one_is_read_back(tmp_path, monkeypatch):
    make(tmp_path, 1, 2, keep=2)
    write = statefile.write

    def lie(path, plan, values):
        digest = write(path, plan, values)
        with open(path, "r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"\xff")
        return digest

    monkeypatch.setattr(statefile, "write", lie)
    with pytest.raises(RunError, match=r"step-3: the checkpoint could not be written: state-00000-of-00001.safetensors "
                                       r"does not hold what was written into it; the last good one is .*step-2"):
        make(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_a_disk_that_is_full_leaves_the_last_one(tmp_path, monkeypatch):
    make(tmp_path, 1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(statefile, "_put", full)
    with pytest.raises(RunError, match="step-2: the checkpoint could not be written: No space left on device; the last "
                                       "good one is .*step-1") as failed:
        make(tmp_path, 2)
    assert failed.value.code == 1 and names(tmp_path) == ["step-1"]
    with pytest.raises(RunError, match="there is none before it"):
        make(tmp_path / "empty", 2)
    assert names(tmp_path / "empty") == []


def test_a_disk_that_is_really_full(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system of 200 KB")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        make(small, 1)
        (small / "filler").write_bytes(b"x" * 160_000)
        with pytest.raises(RunError, match=r"No space left on device; the last good one is .*step-\d+$"):
            for step in range(2, 40):
                make(small, step)
        found = checkpoint.steps(small)
        assert found and not list(small.glob("*.partial"))
        for step in found:
            artifact.verify(small / f"step-{step}")
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ------------------------------------------------------------------------------------------------------- choosing


def test_steps_are_in_order_of_number_and_finished(tmp_path):
    make(tmp_path, 10, 9, 100)
    (tmp_path / "step-200").mkdir()
    (tmp_path / "step-300.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoint.steps(tmp_path) == [9, 10, 100]
    assert checkpoint.steps(tmp_path / "absent") == []


def test_choosing(tmp_path):
    make(tmp_path, 10, 9, 100)
    assert checkpoint.candidates(tmp_path, "auto") == [tmp_path / f"step-{n}" for n in (100, 10, 9)]
    assert checkpoint.candidates(tmp_path, "9") == [tmp_path / "step-9"]
    assert checkpoint.candidates(tmp_path / "elsewhere", str(tmp_path / "step-10")) == [tmp_path / "step-10"]
    assert checkpoint.candidates(tmp_path / "elsewhere", "auto") == []
    assert checkpoint.settle(alone(), []) is None
    with pytest.raises(InputError, match="step-11: no such checkpoint"):
        checkpoint.candidates(tmp_path, "11")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path, how, capsys):
    make(tmp_path, 1, 2, 3)
    damage(tmp_path / "step-3", how)
    found = checkpoint.candidates(tmp_path, "auto")
    checkpoint.refuse_mismatch(found, CONFIG, {})
    assert checkpoint.settle(alone(), found) == tmp_path / "step-2"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "step-3" in warnings[0] and f"continuing from {tmp_path / 'step-2'}" in warnings[0]
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


@pytest.mark.parametrize("how", DAMAGES)
def test_none_that_is_whole_is_one_error(tmp_path, how):
    make(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path / f"step-{step}", how)
    found = checkpoint.candidates(tmp_path, "auto")
    checkpoint.refuse_mismatch(found, CONFIG, {})
    with pytest.raises(InputError, match="step-2.*; none of the 2 checkpoints is whole, nothing was changed"):
        checkpoint.settle(alone(), found)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_other_data_is_refused(tmp_path):
    make(tmp_path, 3, inputs={"shards": "a", "n.jsonl": "b"})
    found = [tmp_path / "step-3"]
    checkpoint.refuse_mismatch(found, CONFIG, {"shards": "a", "n.jsonl": "b"})
    with pytest.raises(InputError, match="step-3: was made with other data than n.jsonl now holds"):
        checkpoint.refuse_mismatch(found, CONFIG, {"shards": "a", "n.jsonl": "c"})
    checkpoint.refuse_mismatch([make(tmp_path, 4) / "step-4"], CONFIG, {"shards": "a"})  # it does not say
    checkpoint.refuse_mismatch(found, CONFIG, {"shards": "a", "n.jsonl": "b", "teacher": "d"})  # nor of the teacher


def test_the_best_is_that_of_the_newest_kind_of_probe(tmp_path):
    for step, figure, queries in ((1, 0.9, 5), (2, 0.3, 9), (3, 0.4, 9), (4, 0.2, 9)):
        make(tmp_path, step, **{checkpoint.PROBE: figure, checkpoint.PROBED: {"queries": queries}})
    assert checkpoint.best(tmp_path, [1, 2, 3, 4]) == 3 and checkpoint.best(tmp_path, [1]) == 1


def test_one_that_is_named_must_be_whole(tmp_path):
    make(tmp_path, 1, 2)
    damage(tmp_path / "step-2", "bit")
    with pytest.raises(InputError, match="state-00000-of-00001.safetensors: does not have the checksum"):
        checkpoint.settle(alone(), checkpoint.candidates(tmp_path, "2"))


def test_the_same_recipe_is_accepted_also_as_json_gives_it_back(tmp_path):
    make(tmp_path, 3)
    assert checkpoint.refuse_mismatch([tmp_path / "step-3"], CONFIG, {}) is None
    assert checkpoint.refuse_mismatch([tmp_path / "step-3"], json.loads(json.dumps(CONFIG)), {}) is None


@pytest.mark.parametrize("config, reason", [
    ({**CONFIG, "optimization": {"lr": 2e-3, "batch": 8}},
     "was made with optimization.lr = 0.001, the recipe now says 0.002"),
    ({**CONFIG, "new": 1}, "was made with new = None, the recipe now says 1"),
    ({**CONFIG, "stages": (1,)}, "was made with stages"),
])
def test_another_recipe_is_refused(tmp_path, config, reason):
    with pytest.raises(InputError, match=reason):
        checkpoint.refuse_mismatch([make(tmp_path, 3) / "step-3"], config, {})
