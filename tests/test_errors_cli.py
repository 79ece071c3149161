"""One-line errors, exit codes, and what a parser shows."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys

import pytest

from lexmae import artifact, cli
from lexmae.errors import InputError, Preempted, RunError


def outcome(main, capsys, argv=None) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of a command."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main, argv)
    return stop.value.code, capsys.readouterr().err.splitlines()


def failing(error: BaseException):
    """A command that raises."""
    def main(argv):
        raise error
    return main


@pytest.mark.parametrize("error, text", [
    (InputError("is odd"), "is odd"),
    (InputError("is odd", "folder/file.tsv"), "folder/file.tsv: is odd"),
    (InputError("is odd", "folder/file.tsv", 7), "folder/file.tsv:7: is odd"),
    (InputError("is odd", "file.tsv", 0), "file.tsv:0: is odd"),
])
def test_an_input_error_is_one_line_and_exit_code_2(error, text, capsys):
    assert str(error) == text
    assert outcome(failing(error), capsys) == (2, [f"error: {text}"])


def test_a_missing_file_is_named_in_one_line(tmp_path, capsys):
    def main(argv):
        open(tmp_path / "absent.txt")

    code, lines = outcome(main, capsys)
    assert code == 2 and lines == [f"error: {tmp_path / 'absent.txt'}: No such file or directory"]


@pytest.mark.parametrize("output, text", [("file/out", "file: File exists"), ("file/more/out", "file/more: Not a dir")])
def test_an_output_under_a_plain_file_is_one_line(tmp_path, capsys, output, text):
    (tmp_path / "file").touch()

    def main(argv):
        with artifact.create(tmp_path / output, "index"):
            raise AssertionError

    code, lines = outcome(main, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"error: {tmp_path / text}")


@pytest.mark.parametrize("error, code, line", [
    (RunError("cannot go on"), 1, "error: cannot go on"),
    (Preempted("stopped after step 3"), 75, "stopped after step 3"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/log.jsonl"), 1,
     "error: runs/log.jsonl: No space left on device"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "error: writing: Disk quota exceeded"),
])
def test_how_a_run_ends_early(error, code, line, capsys):
    assert outcome(failing(error), capsys) == (code, [line])


@pytest.mark.parametrize("error, text", [
    (OSError(errno.ENOSPC, "No space left on device", "folder/x"), "folder/x: No space left on device"),
    (OSError(errno.EROFS, "Read-only file system", "folder/x"), "folder/x: Read-only file system"),
    (OSError("8 requested and 0 written"), "No space left on device; what was unfinished is not there under its name"),
    (RuntimeError("I/O error: No space left on device (os error 28)"),
     "No space left on device; what was unfinished is not there under its name"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 25152 vs 25046"),
     "a file could not be written whole; is the disk full? The same command goes on from what is finished"),
], ids=["full", "read-only", "numpy", "safetensors", "torch"])
def test_what_the_disk_refuses_is_one_line(error, text, capsys):
    code = 2 if "Read-only" in text else 1
    assert outcome(failing(error), capsys) == (code, [f"error: {text}"])


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), RuntimeError("inline_container: other")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(failing(error), [])


def test_a_bar_ends_before_the_line(capsys):
    def main(argv):
        for _ in cli.progress(range(9), desc="work"):
            raise InputError("is odd")

    assert outcome(main, capsys)[1][-1] == "error: is odd"


def test_other_ranks_fail_in_silence(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert outcome(failing(InputError("is odd")), capsys) == (2, [])
    cli.say("nothing")
    assert capsys.readouterr().err == ""
    assert cli.progress(range(3)).disable


def test_main_gets_the_arguments_and_gives_the_exit_code(capsys):
    seen = []
    assert outcome(seen.append, capsys, ["--x"]) == (0, [])
    assert seen == [["--x"]]
    assert outcome(lambda argv: 5, capsys) == (5, [])


def test_interruption_has_the_shells_code(capsys):
    assert outcome(failing(KeyboardInterrupt()), capsys) == (130, ["interrupted"])


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 // 0)


def test_an_error_survives_another_process():
    error = pickle.loads(pickle.dumps(InputError("is odd", "a.tsv", 3)))
    assert (str(error), error.reason, error.path, error.line) == ("a.tsv:3: is odd", "is odd", "a.tsv", 3)


def test_help_shows_defaults_and_keeps_the_layout():
    parser = cli.make_parser("First line.\n\n  an indented example\n")
    parser.add_argument("--depth", type=int, default=512, help="how deep")
    parser.add_argument("--none", help="nothing by default")
    parser.add_argument("--flag", action="store_true", help="a switch")
    parser.add_argument("--needed", required=True, help="always given")
    text = parser.format_help()
    assert "how deep (default: 512)" in text and "\n  an indented example\n" in text
    assert text.count("(default:") == 1


def test_options_are_not_abbreviated(capsys):
    parser = cli.make_parser(None)
    parser.add_argument("--depth")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--dep", "3"])
    assert stop.value.code == 2


def test_progress_gives_every_item_and_counts(capsys):
    assert list(cli.progress(iter("abc"), total=3, desc="items")) == ["a", "b", "c"]
    assert "items" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error_message():
    program = ("from lexmae import cli\n"
               "def main(argv):\n    for i in range(200000): print(i)\n"
               "cli.run(main)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_rank_of_several_leaves_without_the_interpreters_clean_up():
    """Threads of a communication library may still run then; what was printed must have arrived all the same."""
    program = """
import atexit
from lexmae import artifact, cli
atexit.register(print, "cleaned up")
cli.run(lambda argv: print("done") or 5)
"""
    for world, lines in (("1", ["done", "cleaned up"]), ("2", ["done"])):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                              env={**os.environ, "WORLD_SIZE": world})
        assert (done.returncode, done.stdout.split("\n")[:-1]) == (5, lines)


@pytest.mark.parametrize(("environment", "expected"), [
    ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
      "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["5", "8", "1", "4"]),
    ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "MASTER_ADDR": "a",
      "MASTER_PORT": "1"}, ["9", "16", "1", "8"]),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, [None] * 4),  # a shell within a job
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3", "RANK": "0", "MASTER_ADDR": "a",
      "MASTER_PORT": "1"}, ["0", None, None, None])])
def test_ranks_of_slurm_and_openmpi_are_taken(monkeypatch, environment, expected):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cli._adopt_launcher()
    assert [os.environ.get(name) for name in names] == expected
