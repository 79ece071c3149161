"""Artifacts are checked when they are first used, as far as ``--verify`` says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from launching import reseal, run

from lexmae import artifact, cli, remembered, verification
from lexmae.config import NegativesConfig
from lexmae.data import negative_rows
from lexmae.data.draws import NegativeLists
from lexmae.data.negatives import write_negatives
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.retrieval import engines, updates
from lexmae.retrieval.dense import DenseVectors
from lexmae.retrieval.vectors import SparseVectors


@pytest.fixture
def made(tmp_path, shards_dir, model_dir) -> dict[str, tuple[Path, Callable]]:
    """An artifact of every kind, and what opens it."""
    shutil.copytree(shards_dir, tmp_path / "shards")
    shutil.copytree(model_dir, tmp_path / "model")
    write_negatives(tmp_path / "n.jsonl", [("t0", ["d1", "d2", "d5"], None), ("t1", ["d7"], None)])
    config = NegativesConfig(str(tmp_path / "n.jsonl"))
    negative_rows.build(Shards.open(shards_dir), "train", config, tmp_path / "negatives")
    SparseVectors(["a", "b"], np.array([0, 2, 3]), np.array([0, 1, 1], np.int32), np.array([5, 4, 3], np.uint16),
                  ["x", "y"], {"side": "docs"}).save(tmp_path / "vectors")
    DenseVectors(["a", "b"], np.ones((2, 3), np.float32), {"side": "docs"}).save(tmp_path / "dense")
    engines.build(tmp_path / "vectors", "exact", tmp_path / "index")
    shards = Shards.open(shards_dir)
    readers = {"shards": Shards.open, "model": lambda path: shards.refuse_other_tokenizer(path, "model"),
               "negatives": NegativeLists, "vectors": SparseVectors.open, "dense": DenseVectors.open,
               "index": engines.open_index}
    return {name: (tmp_path / name, reader) for name, reader in readers.items()}


KINDS = ["shards", "model", "negatives", "vectors", "dense", "index"]
LARGEST = {"shards": "docs-00000.arrow", "model": "model.safetensors", "negatives": "source0-rows.npy",
           "vectors": "part-00000-00000.arrow", "dense": "matrix.npy", "index": "segment-0000/postings.npy"}


def flip(file: Path, at: int) -> None:
    """Change the lowest bit of a byte; negative places count from the end."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def refused(reader: Callable, path: Path, file: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        reader(path)
    assert str(error.value).startswith(f"{path / file}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_level_sees(made, kind, monkeypatch):
    path, reader = made[kind]
    for level in verification.LEVELS:
        monkeypatch.setenv(verification.VARIABLE, level)
        reader(path)
    whole = (path / LARGEST[kind]).read_bytes()
    flip(path / LARGEST[kind], {"model": -1, "dense": -4, "negatives": -4, "index": -4}.get(kind, len(whole) // 2))
    monkeypatch.setenv(verification.VARIABLE, "full")
    refused(reader, path, LARGEST[kind], "does not have the checksum that the manifest gives")
    (path / LARGEST[kind]).write_bytes(whole[:-1])
    for level in ("full", "fast"):
        monkeypatch.setenv(verification.VARIABLE, level)
        refused(reader, path, LARGEST[kind], rf"has {len(whole) - 1} bytes, the manifest says {len(whole)}")
    (path / LARGEST[kind]).unlink()
    refused(reader, path, LARGEST[kind], "is listed in the manifest but missing")
    (path / LARGEST[kind]).write_bytes(whole)
    reader(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["fast", "full"])
def test_the_manifest_vouches_for_itself(made, kind, level, monkeypatch):
    path, reader = made[kind]
    monkeypatch.setenv(verification.VARIABLE, level)
    file = path / artifact.MANIFEST
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"counts": {', '"counts": { '), encoding="utf-8")
    refused(reader, path, artifact.MANIFEST, "does not have the checksum that it gives itself")
    record = json.loads(text)
    record["files"][LARGEST[kind]] = "0" * 64
    file.write_text(artifact.signed(record), encoding="utf-8")
    refused(reader, path, artifact.MANIFEST, "the fingerprint is not that of the checksums")
    del record["sizes"]
    file.write_text(artifact.signed(record), encoding="utf-8")
    refused(reader, path, artifact.MANIFEST, "does not have the checksum that it gives itself")


def test_manifests_of_earlier_versions_are_read(made, monkeypatch):
    path, reader = made["vectors"]
    record = json.loads((path / artifact.MANIFEST).read_text(encoding="utf-8"))
    for name in ("sizes", "checksum"):
        del record[name]
    (path / artifact.MANIFEST).write_text(json.dumps(record), encoding="utf-8")
    for level in verification.LEVELS:
        monkeypatch.setenv(verification.VARIABLE, level)
        reader(path)


def test_a_header_is_seen_by_fast(made):
    path, reader = made["shards"]
    flip(path / "word_starts.npy", 3)
    refused(reader, path, "word_starts.npy", "not an array in C order")
    path, reader = made["model"]
    flip(path / "model.safetensors", 9)
    refused(reader, path, "model.safetensors", "not a safetensors file, or a damaged one|is not as long as its tensors")


@pytest.mark.parametrize("name", ["part-00000-00009.arrow", "more/x.npy"])
def test_a_file_that_does_not_belong_there(made, name):
    path, reader = made["vectors"]
    (path / name).parent.mkdir(exist_ok=True)
    shutil.copy(path / LARGEST["vectors"], path / name)
    refused(reader, path, name, "is not listed in the manifest")


def test_tokens_out_of_the_vocabulary_are_found_by_full(made, monkeypatch):
    """A folder that is consistent in itself, from a program that made a mistake."""
    path, reader = made["shards"]
    file = path / "docs-00001.arrow"
    with pa.OSFile(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    tokens = table["tokens"].to_pylist()
    tokens[3][1] = 5000
    column = pa.array(tokens, table.schema.field("tokens").type)
    table = table.set_column(1, table.schema.field("tokens"), column).combine_chunks()
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    reseal(path)
    reader(path)
    monkeypatch.setenv(verification.VARIABLE, "full")
    with pytest.raises(InputError, match=r"document 'd19' holds the token 5000, but the vocabulary has \d+ entries"):
        reader(path)


def test_an_artifact_is_checked_once_in_a_process_unless_it_changes(made, monkeypatch):
    path, reader = made["vectors"]
    monkeypatch.setenv(verification.VARIABLE, "full")
    read, checksum = [], artifact.checksum
    monkeypatch.setattr(artifact, "checksum", lambda file: read.append(file) or checksum(file))
    reader(path)
    first = len(read)
    reader(path)
    assert first == len(read) == 2
    os.utime(path / LARGEST["vectors"])
    reader(path)
    assert len(read) == 4


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files whose checksums are computed."""
    names, checksum = [], artifact.checksum
    monkeypatch.setattr(artifact, "checksum", lambda file: names.append(Path(file).name) or checksum(file))
    return names


def another_process() -> None:
    """What this one has checked is forgotten; what the user has verified is not."""
    verification._known.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_first_use_verifies_checksums_and_later_ones_do_not(made, kind, read):
    """Of a copy with a flipped bit behind a header, of a good one, and of a file changed later."""
    path, reader = made[kind]
    shutil.copytree(path, path.with_name("copy"))
    path, file = path.with_name("copy"), path.with_name("copy") / LARGEST[kind]
    whole = file.read_bytes()
    at = {"model": -1, "dense": -4, "negatives": -4, "index": -4}.get(kind, len(whole) // 2)
    flip(file, at)
    for _ in range(2):
        another_process()
        refused(reader, path, LARGEST[kind], "does not have the checksum that the manifest gives")
        assert read[-1] == file.name
    shutil.rmtree(path)
    shutil.copytree(made[kind][0], path)
    read.clear()
    reader(path)
    assert sorted(read) == sorted(Path(name).name for name in artifact.read(path).files)
    read.clear()
    another_process()
    reader(path)
    assert read == []
    status = file.stat()
    flip(file, at)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as tools do that keep times
    refused(reader, path, LARGEST[kind], "does not have the checksum that the manifest gives")
    assert read == [file.name]
    file.write_bytes(whole)
    read.clear()
    reader(path)
    assert read == [file.name]


def test_what_full_finds_is_not_forgotten(made, monkeypatch):
    """A disk has lost a bit: the file's state is as it was."""
    path, reader = made["negatives"]
    flip(path / LARGEST["negatives"], -4)
    files = artifact.read(path).files
    remembered.keep(path, files, remembered.settled(path, files))
    reader(path)
    monkeypatch.setenv(verification.VARIABLE, "full")
    refused(reader, path, LARGEST["negatives"], "does not have the checksum that the manifest gives")
    monkeypatch.setenv(verification.VARIABLE, "fast")
    another_process()
    refused(reader, path, LARGEST["negatives"], "does not have the checksum that the manifest gives")


def test_a_command_that_is_stopped_has_not_read_in_vain(tmp_path, made, monkeypatch):
    path, reader = made["index"]
    shutil.copytree(path, tmp_path / "copy")
    count, checksum, read = len(artifact.read(path).files), artifact.checksum, []

    def interrupted(file: Path) -> str:
        read.append(file)
        if len(read) == 3:
            raise KeyboardInterrupt
        return checksum(file)

    monkeypatch.setattr(artifact, "checksum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader(tmp_path / "copy")
    reader(tmp_path / "copy")
    assert len(read) == count + 1


def test_what_is_written_here_is_verified(tmp_path, made, read):
    path, reader = made["index"]
    SparseVectors(["c"], np.array([0, 1]), np.array([1], np.int32), np.array([7], np.uint16), ["x", "y"],
                  {"side": "docs"}).save(tmp_path / "more")
    (tmp_path / "gone").write_text("a\n")
    for change in (lambda: updates.add(path, tmp_path / "more"), lambda: updates.delete(path, tmp_path / "gone")):
        change()
        read.clear()
        another_process()
        reader(path)
        assert read == []
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError):
        reader(path)
    reader(tmp_path / "elsewhere")  # of another name, it is another artifact
    assert len(read) == len(artifact.read(tmp_path / "elsewhere").files)


def test_links_to_unverified_files_are_not_verified(tmp_path, made, monkeypatch):
    """An update with ``--verify off`` takes over what was damaged before."""
    path, reader = made["index"]
    flip(path / LARGEST["index"], -4)
    (tmp_path / "gone").write_text("a\n")
    monkeypatch.setenv(verification.VARIABLE, "off")
    updates.delete(path, tmp_path / "gone")
    monkeypatch.setenv(verification.VARIABLE, "fast")
    refused(reader, path, LARGEST["index"], "does not have the checksum that the manifest gives")


def test_what_is_said_later_keeps_what_is_verified(tmp_path, read):
    with artifact.create(tmp_path / "x", "vectors") as draft:
        (draft.path / "y").write_text("content")
    artifact.annotate(tmp_path / "x", {}, {"README.md": "text"})
    read.clear()
    verification.opened(tmp_path / "x")
    assert read == []
    (tmp_path / "x" / "README.md").write_text("TEXT")
    with pytest.raises(InputError, match="README.md: does not have the checksum"):
        verification.opened(tmp_path / "x")


@pytest.mark.parametrize("cache", ["a file", "no home", "nonsense", "other path"])
def test_without_a_usable_cache_every_process_verifies(tmp_path, cache, made, read, monkeypatch):
    path, reader = made["vectors"]
    if cache == "a file":
        (tmp_path / "cache").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    elif cache == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setattr(remembered, "_write", lambda file, record: None)
        record = remembered._record(path)
        record.write_text("[" * 100_000 if cache == "nonsense" else record.read_text().replace("vectors", "victors"))
    for _ in range(2):
        another_process()
        read.clear()
        reader(path), reader(path)
        assert len(read) == 2


def test_records_are_few_and_unread_ones_go_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "LIMIT", 3)
    for name in "abcde":
        with artifact.create(tmp_path / name, "vectors") as draft:
            (draft.path / "y").write_text(name)
        assert remembered.unchanged(tmp_path / "a", artifact.read(tmp_path / "a").files)
    assert len(list((tmp_path / "cache" / "lexmae" / "verified").iterdir())) == 3
    found = {name for name in "abcde" if remembered.unchanged(tmp_path / name, artifact.read(tmp_path / name).files)}
    assert found == {"a", "d", "e"}


def test_a_change_right_after_writing_is_seen(tmp_path):
    """Even within a step of the file system's clock."""
    for number in range(20):
        with artifact.create(tmp_path / f"{number}", "vectors") as draft:
            (draft.path / "y").write_text("a")
        (tmp_path / f"{number}" / "y").write_text("b")
        with pytest.raises(InputError, match="does not have the checksum"):
            verification.opened(tmp_path / f"{number}")


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("a")
    monkeypatch.setattr(remembered.time, "sleep", lambda seconds: None)
    before = remembered.settled(tmp_path, ["x"])
    (tmp_path / "x").write_text("ab")
    remembered.keep(tmp_path, {"x": "0"}, before)
    assert remembered.unchanged(tmp_path, {"x": "0"}) == {}


def test_a_link_and_its_target_are_one_artifact(tmp_path, made, read):
    path, reader = made["vectors"]
    (tmp_path / "link").symlink_to(path)
    another_process()
    read.clear()
    reader(tmp_path / "link")
    assert read == []


def test_machines_with_one_home_have_records_of_their_own(made, read, monkeypatch):
    path, reader = made["vectors"]
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    another_process()
    read.clear()
    reader(path)
    assert len(read) == 2


def test_one_rank_of_a_host_checks(made, monkeypatch):
    path, reader = made["negatives"]
    flip(path / LARGEST["negatives"], -4)
    monkeypatch.setenv("RANK", "3")
    reader(path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    refused(reader, path, LARGEST["negatives"], "does not have the checksum")


def test_an_artifact_that_is_replaced_meanwhile_is_checked_again(made, monkeypatch):
    path, _ = made["vectors"]
    check, calls = verification._check, []

    def slow(manifest: artifact.Manifest, level: str) -> None:
        calls.append(manifest)
        if len(calls) == 1:
            with artifact.create(path, "vectors", overwrite=True) as draft:
                (draft.path / "x").write_text("new")
        check(manifest, level)

    monkeypatch.setattr(verification, "_check", slow)
    assert list(verification.verify(path).files) == ["x"] and len(calls) == 2


def test_the_option_and_the_environment(monkeypatch, capsys):
    monkeypatch.delenv(verification.VARIABLE, raising=False)
    assert verification.level() == "fast"
    parser = cli.make_parser("x")
    verification.add_option(parser)
    assert vars(parser.parse_args([])) == {} and verification.level() == "fast"
    assert vars(parser.parse_args(["--verify", "full"])) == {} and verification.level() == "full"
    monkeypatch.setenv(verification.VARIABLE, "most")
    with pytest.raises(InputError, match="LEXMAE_VERIFY is 'most'; known are full, fast, off"):
        verification.level()
    with pytest.raises(SystemExit):
        parser.parse_args(["--verify", "most"])


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ["tools/index.py", "--vectors", "vectors", "--output", "o"],
    ["tools/export.py", "--vectors", "vectors", "--format", "csr", "--output", "o"],
    ["tools/search.py", "--index", "index", "--queries", "vectors", "--output", "o"],
    ["tools/encode.py", "--model", "model", "--data", "shards", "--side", "docs", "--output", "o"],
    ["tools/mine.py", "--bm25", "shards", "--split", "dev", "--run-output", "o"]], ids=lambda c: c[0])
def test_commands_name_the_file(made, tmp_path, command):
    kind = command[2]
    file = tmp_path / kind / LARGEST[kind]
    flip(file, -4 if kind in ("index", "model") else file.stat().st_size // 2)
    named = [str(tmp_path / part) if part in (*KINDS, "o") else part for part in command]
    error, = run(named, code=2).splitlines()[-1:]
    assert error == f"error: {file}: does not have the checksum that the manifest gives; it was changed or damaged"
