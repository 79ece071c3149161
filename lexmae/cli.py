"""What every command shares: a parser that shows defaults, one-line errors with exit code 2, a progress bar."""

from __future__ import annotations

import argparse
import errno
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from tqdm import tqdm

from lexmae.errors import InputError, Preempted, RunError

# Environment of a launcher: rank, number of ranks, rank and number of ranks on this host, number of hosts.
_LAUNCHERS = [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
               "OMPI_COMM_WORLD_LOCAL_SIZE", ""),
              ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", "SLURM_NNODES")]
_FULL = (errno.ENOSPC, errno.EDQUOT)  # no room on the disk
_WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_NO_ROOM = os.strerror(errno.ENOSPC)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and appends ``(default: …)`` where there is a default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False) or action.required:
            return action.help or ""
        return super()._get_help_string(action) or ""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser whose ``--help`` shows defaults and keeps the layout of ``description``."""
    return argparse.ArgumentParser(description=description, formatter_class=_Formatter, allow_abbrev=False)


def run(main: Callable[..., int | None], argv: list[str] | None = None) -> NoReturn:
    """Run a command's ``main(argv)`` and exit: 0, its own code, 1 where it cannot go on (a full disk), 2 for bad input,
    75 for a run that was asked to stop and may be continued, 130 for Ctrl-C."""
    _adopt_launcher()
    try:
        code = main(argv)
    except InputError as error:
        _complain(str(error))
        code = 2
    except Preempted as stop:
        say(str(stop))
        code = stop.code
    except RunError as error:
        _complain(str(error))
        code = error.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        found = _of_the_system(error)
        if found is None:
            raise
        code, reason = found
        _complain(reason)
    _leave(code or 0)


def _of_the_system(error: Exception) -> tuple[int, str] | None:
    """Exit code and line for what files and disks refuse: 2 for a path that is wrong, 1 where there is no room."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in _FULL:
            return 1, f"{where or 'writing: '}{error.strerror or _NO_ROOM}"
        if error.errno == errno.EROFS or isinstance(error, _WRONG_PATH):
            return 2, f"{where}{error.strerror or error}"
    text = str(error)
    if _NO_ROOM in text or isinstance(error, OSError) and re.search(r"requested and \d+ written", text):
        return 1, f"{_NO_ROOM}; what was unfinished is not there under its name"  # of other libraries, numpy
    if "inline_container" in text and re.search(r"unexpected pos|failed writing", text):  # torch.save
        return 1, "a file could not be written whole; is the disk full? The same command goes on from what is finished"
    return None


def _adopt_launcher() -> None:
    """Take rank and number of ranks from SLURM or OpenMPI, where one of them started this process as one of several.

    They are told from a shell within a job by MASTER_ADDR and MASTER_PORT, which the user gives.
    """
    if "RANK" in os.environ or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    for rank, world, local_rank, local_size, nodes in _LAUNCHERS:
        if rank in os.environ and world in os.environ:
            ranks = int(os.environ[world])
            own = os.environ.get(local_size) or str(ranks // max(1, int(os.environ.get(nodes, "1"))))
            os.environ.update(RANK=os.environ[rank], WORLD_SIZE=str(ranks), LOCAL_RANK=os.environ[local_rank],
                              LOCAL_SIZE=own)
            return


def _leave(code: int) -> NoReturn:
    """Exit; a rank of several leaves without the interpreter's clean-up.

    DeepSpeed keeps process groups whose native threads outlive ``destroy_process_group``. One that asks for Python
    while the interpreter is being taken down aborts the process ("terminate called without an active exception"),
    after everything has been written.
    """
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _complain(reason: str) -> None:
    """The one line; every rank of a machine finds the same fault, so its first speaks for all.

    On several machines each may have a fault of its own: those without rank 0 say their name.
    """
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the line has one of its own
    if is_main_rank():
        print(f"error: {reason}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK") == "0":
        print(f"error: on {socket.gethostname()}: {reason}", file=sys.stderr)


def is_main_rank() -> bool:
    """Whether this process is the only one or rank 0 of a distributed run."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """One line of progress on stderr, from rank 0 only."""
    if is_main_rank():
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()


_hidden = False


def hide_progress() -> None:
    """No progress bars from here on: for a server, whose every request would draw some."""
    global _hidden
    _hidden = True


def progress(iterable: Iterable | None = None, *, total: int | None = None, desc: str = "", unit: str = "it",
             disable: bool = False, initial: int = 0) -> tqdm:
    """A progress bar with rate and time left on stderr; silent on ranks other than 0.

    Without a terminal it prints a line every 30 seconds instead of redrawing.
    """
    interval = 0.2 if sys.stderr.isatty() else 30.0
    disable = disable or _hidden or not is_main_rank()
    return tqdm(iterable, total=total, desc=desc, unit=unit, disable=disable, initial=initial,
                mininterval=interval, dynamic_ncols=True, smoothing=0.1)
