"""Directories and files that are complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from lexmae import artifact, locks, renaming
from lexmae.errors import InputError


def write(path, content: dict[str, str], kind: str = "shards", **options):
    """An artifact with these files."""
    with artifact.create(path, kind, **options) as draft:
        for name, text in content.items():
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.path / name).write_text(text)
        draft.counts["files"] = len(content)
        draft.extra["note"] = "ä"
    return artifact.read(path)


def test_a_finished_artifact_says_what_it_is(tmp_path):
    source = write(tmp_path / "source", {"x": "1"})
    made = write(tmp_path / "a", {"one": "1", "deep/two": "2"}, "model", config={"k": [1, None]},
                 inputs={"source": source.path, "file": "elsewhere.tsv"})
    assert made.kind == "model" and made.counts == {"files": 2} and made.extra == {"note": "ä"}
    assert made.config == {"k": [1, None]}
    assert made.inputs == {"source": {"path": str(source.path), "fingerprint": source.fingerprint},
                           "file": {"path": "elsewhere.tsv"}}
    assert made.files == {"one": hashlib.sha256(b"1").hexdigest(), "deep/two": hashlib.sha256(b"2").hexdigest()}
    record = json.loads((made.path / "manifest.json").read_text(encoding="utf-8"))
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert artifact.exists(made.path) and sorted(os.listdir(tmp_path)) == ["a", "source"]


def test_equal_content_has_an_equal_fingerprint(tmp_path):
    first = write(tmp_path / "1", {"a": "x", "b": "y"}, config={"c": 1})
    assert write(tmp_path / "2", {"b": "y", "a": "x"}, config={"c": 2}).fingerprint == first.fingerprint
    assert write(tmp_path / "3", {"a": "y", "b": "x"}).fingerprint != first.fingerprint
    assert write(tmp_path / "4", {"a": "x", "c": "y"}).fingerprint != first.fingerprint


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), artifact.create(tmp_path / "a", "shards") as draft:
        (draft.path / "half").write_text("x")
        raise error()
    assert os.listdir(tmp_path) == []


def test_an_unfinished_directory_is_begun_anew_or_continued(tmp_path):
    partial = tmp_path / "a.partial"
    for keep in (False, True):
        partial.mkdir(exist_ok=True)
        (partial / "old").write_text("1")
        with artifact.create(tmp_path / "a", "vectors", keep_partial=keep, overwrite=True) as draft:
            assert draft.path == partial and (partial / "old").exists() == keep
            (draft.path / "new").write_text("2")
        assert ("old" in artifact.read(tmp_path / "a").files) == keep and not partial.exists()


def test_keep_partial_keeps_what_there_is(tmp_path):
    with pytest.raises(ValueError), artifact.create(tmp_path / "a", "vectors", keep_partial=True) as draft:
        (draft.path / "part").write_text("x")
        raise ValueError
    assert (tmp_path / "a.partial" / "part").read_text() == "x" and not (tmp_path / "a").exists()
    with pytest.raises(InputError, match="an unfinished one is at .*a.partial"):
        artifact.read(tmp_path / "a")


def test_nothing_is_replaced_unasked(tmp_path):
    write(tmp_path / "a", {"x": "old"})
    with pytest.raises(InputError, match="already exists"):
        write(tmp_path / "a", {"x": "new"})
    assert (tmp_path / "a" / "x").read_text() == "old"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(InputError, match="already exists"):
            write(tmp_path / name, {"x": "1"}, overwrite=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"


def test_overwriting_happens_at_the_very_end(tmp_path):
    write(tmp_path / "a", {"x": "old", "gone": ""})
    with pytest.raises(ValueError), artifact.create(tmp_path / "a", "shards", overwrite=True):
        raise ValueError
    assert (tmp_path / "a" / "x").read_text() == "old"
    with artifact.create(tmp_path / "a", "shards", overwrite=True) as draft:
        assert (tmp_path / "a" / "x").read_text() == "old"
        (draft.path / "x").write_text("new")
    assert set(artifact.read(tmp_path / "a").files) == {"x"} and (tmp_path / "a" / "x").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_stays_one_and_the_artifact_appears_where_it_leads(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr("lexmae.renaming._exchange", lambda *_: False)
    (tmp_path / "disk").mkdir()
    link, real = tmp_path / "a", tmp_path / "disk" / "real"
    link.symlink_to(real)  # where nothing is yet
    assert locks.lock_file(link) == locks.lock_file(real)
    for number in range(3):
        with artifact.create(link, "shards", overwrite=number > 0) as draft:
            assert draft.path == artifact.partial_path(link) == real.with_name("real.partial")
            (draft.path / "x").write_text(str(number))
            assert locks.lock_file(link) == locks.lock_file(real), "whichever is named"
        assert link.is_symlink() and (real / "x").read_text() == str(number) and artifact.read(link)
    assert sorted(os.listdir(tmp_path)) == ["a", "disk"] and os.listdir(tmp_path / "disk") == ["real"]


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    write(tmp_path / "real", {"x": "1"})
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("real")
    for name in ("link", "absent", "file"):
        renaming.remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["real"] and (tmp_path / "real" / "x").is_file()
    renaming.remove(tmp_path / "real")
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "a").mkdir()
    assert write(tmp_path / "a", {"x": "1"}).files.keys() == {"x"}


def test_reading_says_what_is_wrong(tmp_path):
    made = write(tmp_path / "a", {"x": "1"}, "model")
    assert artifact.read(made.path, "model") == made
    with pytest.raises(InputError, match="is of kind 'model', but 'index' is needed"):
        artifact.read(made.path, "index")
    with pytest.raises(InputError, match="no such index artifact"):
        artifact.read(tmp_path / "absent", "index")
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="not a finished index"):
        artifact.read(tmp_path / "plain", "index")
    with pytest.raises(InputError, match="is not a directory"):
        artifact.read(made.path / "x")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"kind": "model"}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    made = write(tmp_path / "a", {"x": "1"}, "model")
    (made.path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="not a manifest"):
        artifact.read(made.path)


def test_another_format_is_refused(tmp_path):
    made = write(tmp_path / "a", {"x": "1"})
    file = made.path / "manifest.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="format 2"):
        artifact.read(made.path)


def test_verification_finds_one_changed_byte_and_a_missing_file(tmp_path):
    made = write(tmp_path / "a", {"x": "content", "deep/y": "more"})
    artifact.verify(made.path)
    (made.path / "deep" / "y").write_text("mere")
    with pytest.raises(InputError, match="deep/y: does not have the checksum"):
        artifact.verify(made.path)
    (made.path / "deep" / "y").unlink()
    with pytest.raises(InputError, match="deep/y: is listed in the manifest but missing"):
        artifact.verify(made.path)


def test_a_killed_writer_leaves_no_final_name(tmp_path):
    program = ("import sys, time\nfrom lexmae import artifact\n"
               "with artifact.create(sys.argv[1], 'shards') as draft:\n"
               "    (draft.path / 'half').write_text('x')\n    print('written', flush=True)\n    time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "a").exists() and (tmp_path / "a.partial").is_dir()
    assert write(tmp_path / "a", {"x": "1"}).files.keys() == {"x"}
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "run.trec"
    with artifact.atomic_file(path) as out:
        out.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == "é\n".encode()
    with artifact.atomic_file(path, "wb") as out:
        out.write(b"\0")
    assert path.read_bytes() == b"\0" and os.listdir(path.parent) == ["run.trec"]


def test_an_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "run.trec"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), artifact.atomic_file(path) as out:
        out.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["run.trec"]


def test_files_get_the_permissions_that_the_user_gives_new_files(tmp_path):
    old = os.umask(0o027)
    try:
        with artifact.atomic_file(tmp_path / "file"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_versions_do_not_import_what_they_name():
    program = ("import sys\nfrom lexmae import artifact\nfound = artifact.versions()\n"
               "assert 'torch' in found and 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True)
