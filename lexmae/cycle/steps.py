"""What a plan is made of: commands, and what they measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """Something that every stage is measured on.

    Attributes:
        name: in the results; empty for the pipeline's own split.
        folder: below a stage's folder, where what is measured lies.
        text: the collection.
        shards: its shards.
        split: its queries.
    """

    name: str
    folder: str
    text: Path
    shards: Path
    split: str

    @property
    def infix(self) -> str:
        """What it adds to the names of steps."""
        return f"-{self.name}" if self.name else ""

    @property
    def qrels(self) -> Path:
        """Its judgements, as the shards keep them."""
        return self.shards / "qrels" / f"{self.split}.tsv"

    @property
    def file(self) -> str:
        """What it adds to the names of files beside those of the pipeline's own split."""
        return "" if self.folder or not self.name else f"-{self.split}"


@dataclass
class Step:
    """One command of the cycle.

    Attributes:
        name: what ``--until`` takes.
        command: script and arguments.
        output: what it makes, a file or a folder.
        inputs: files and folders whose content decides whether it has to run again.
        settings: further content that decides so.
        trains: whether it runs on all ranks through the deepspeed launcher.
        resumes: whether unfinished output is kept for it to go on with.
        machine: stretches of the command that may change without anything being made anew: where a recipe lies, which
            `settings` hold, and how the machine computes.
    """

    name: str
    command: list[str]
    output: Path
    inputs: list[Path] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trains: bool = False
    resumes: bool = False
    machine: tuple[list[str], ...] = ()

    @property
    def counted(self) -> list[str]:
        """The command without those stretches."""
        left = list(self.command)
        for part in filter(None, self.machine):
            start = next(i for i in range(len(left)) if left[i:i + len(part)] == part)
            del left[start:start + len(part)]
        return left
