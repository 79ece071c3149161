"""Directories that are either complete or absent: built under a temporary name, sealed by ``manifest.json``.

Every verb of the cycle reads and writes such a directory. The manifest says what kind it is, from which inputs and
with which configuration it was made, what it holds (counts, checksums), and with which versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexmae import __version__, locks, remembered
from lexmae.errors import InputError
from lexmae.renaming import atomic_file, fsync, real_place, remove, replace_directory

MANIFEST = "manifest.json"
FORMAT = 1
DOCUMENTATION = ("README.md",)
"""Files that explain an artifact. They have a checksum, but no part in its fingerprint: what is made from an artifact
does not depend on them."""
_VERSIONS = ("torch", "transformers", "tokenizers", "deepspeed", "numpy", "pyarrow")


@dataclass
class Draft:
    """An artifact in the making.

    Attributes:
        path: the temporary directory to write files into, as ``partial_path`` gives it.
        counts: numbers of what it holds, for the manifest.
        extra: further facts for the manifest (JSON values).
        known: checksums of files taken over unread from a finished artifact, by name.
        verified: of those that are hard links to files that were verified there, their states then.
        scaffold: names of files that a command needs to go on when it is stopped before the artifact is complete; they
            are removed at the very end, in this order.
    """

    path: Path
    counts: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    verified: dict[str, remembered.State] = field(default_factory=dict)
    scaffold: Sequence[str] = ()


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` of a finished artifact says.

    Attributes:
        fingerprint: sha256 over the names and checksums of all files but DOCUMENTATION: equal content, equal
            fingerprint.
        sizes: bytes of every file; empty in manifests of earlier versions.
    """

    path: Path
    kind: str
    counts: Mapping[str, Any]
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    extra: Mapping[str, Any]
    files: Mapping[str, str]
    fingerprint: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    def fact(self, name: str, kind: type, section: str = "extra", default: Any = None) -> Any:
        """One of the facts of ``extra`` (or ``counts``, ``config``), checked to be of a type.

        Raises:
            InputError: the manifest does not have it and there is no ``default``, or it is of another type.
        """
        value = getattr(self, section).get(name, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(f"{section}: '{name}' is missing or not of the type {kind.__name__}", self.path / MANIFEST)
        return value


def partial_path(path: str | Path) -> Path:
    """Where the artifact ``path`` is built before it gets its name: beside it, or beside the folder that it leads to
    where it is a symbolic link."""
    path = real_place(Path(path))
    return path.with_name(path.name + ".partial")


def exists(path: str | Path) -> bool:
    """Whether a finished artifact stands at ``path``."""
    return (Path(path) / MANIFEST).is_file()


@contextlib.contextmanager
def create(path: str | Path, kind: str, *, inputs: Mapping[str, str | Path] | None = None,
           config: Mapping[str, Any] | None = None, keep_partial: bool = False,
           overwrite: bool = False) -> Iterator[Draft]:
    """Build the artifact ``path``; it appears under that name only when the block ends without an error.

    Where ``path`` is a symbolic link it stays one, and the artifact appears where it leads.

    Args:
        inputs: name → path of what it is made from; artifacts among them are recorded with their fingerprint.
        config: the settings it is made with.
        keep_partial: leave the unfinished directory in place on an error, and start from it next time.
        overwrite: replace a finished artifact of that name, at the very end.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is off, or another process writes it.
    """
    path = Path(path)
    with locks.writing(path):
        refuse_existing(path, overwrite)
        draft = Draft(partial_path(path))
        if not keep_partial:
            remove(draft.path)
        draft.path.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
        except BaseException:
            if not keep_partial:
                shutil.rmtree(draft.path, ignore_errors=True)
            raise
        seal(draft, path, kind, inputs=inputs, config=config)


def is_taken(path: Path) -> bool:
    """Whether something is there, other than an empty directory."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def refuse_existing(path: Path, overwrite: bool = False) -> None:
    """Raise InputError where writing ``path`` would replace something that was not offered for replacement."""
    if not is_taken(path) or (overwrite and path.is_dir() and exists(path)):
        return
    hint = "" if not exists(path) else "; remove it, choose another output, or add --overwrite where offered"
    raise InputError(f"already exists{hint}", path)


def seal(draft: Draft, path: str | Path, kind: str, *, inputs: Mapping[str, str | Path] | None = None,
         config: Mapping[str, Any] | None = None) -> Manifest:
    """Write the manifest of ``draft``, flush everything to disk, give it its final name; remember it as verified."""
    path = Path(path)
    names = {str(p.relative_to(draft.path)): p for p in sorted(draft.path.rglob("*"))
             if p.is_file() and p.name != MANIFEST and str(p.relative_to(draft.path)) not in draft.scaffold}
    before = draft.verified | remembered.settled(draft.path, names.keys() - draft.known.keys())
    files = {name: draft.known.get(name) or checksum(p) for name, p in names.items()}
    record = {"lexmae": __version__, "format": FORMAT, "kind": kind, "inputs": _describe_inputs(inputs or {}),
              "config": dict(config or {}), "counts": draft.counts, "extra": draft.extra, "files": files,
              "sizes": {name: p.stat().st_size for name, p in names.items()}, "fingerprint": fingerprint(files),
              "versions": versions()}
    with open(draft.path / MANIFEST, "w", encoding="utf-8", newline="\n") as out:
        out.write(signed(record))
    for file in [*files, MANIFEST]:
        fsync(draft.path / file)
    for name in draft.scaffold:
        (draft.path / name).unlink()
    replace_directory(draft.path, path)
    remembered.keep(path, files, before, linked=True)
    return read(path, kind)


def read(path: str | Path, kind: str | None = None) -> Manifest:
    """Read the manifest of a finished artifact.

    Raises:
        InputError: nothing there, unfinished, unreadable, of another format or of another kind.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(_why_absent(path, kind), path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        counts, config, extra = (_facts(record, name, file) for name in ("counts", "config", "extra"))
        manifest = Manifest(path, record["kind"], counts, config, record["inputs"], extra, record["files"],
                            record["fingerprint"], record.get("sizes", {}))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"not a manifest: {error}", file) from error
    _check_types(manifest, file)
    if record.get("format") != FORMAT:
        raise InputError(f"has format {record.get('format')}, this version reads format {FORMAT}", file)
    if kind is not None and manifest.kind != kind:
        raise InputError(f"is of kind '{manifest.kind}', but '{kind}' is needed here", path)
    return manifest


def verify(path: str | Path) -> None:
    """Recompute every checksum of the artifact; InputError names the first file that differs or is missing."""
    manifest = read(path)
    for name in manifest.files:
        verify_file(manifest, name)


def verify_file(manifest: Manifest, name: str) -> None:
    """Recompute the checksum of a file of the artifact; InputError where it differs or the file is missing."""
    file = inside(manifest.path, name)
    if not file.is_file():
        raise InputError("is listed in the manifest but missing", file)
    if checksum(file) != manifest.files[name]:
        raise InputError("does not have the checksum that the manifest gives; it was changed or damaged", file)


def annotate(path: str | Path, extra: Mapping[str, Any], documentation: Mapping[str, str]) -> None:
    """Change what a finished artifact says about itself; its content, and so its fingerprint, stays.

    Each file is replaced as a whole. Stopped between two, verification names the file; doing it again repairs that.

    Args:
        extra: further or other facts for the manifest.
        documentation: names among DOCUMENTATION → texts.
    """
    path = Path(path)
    with locks.writing(path):
        read(path)
        record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        record["extra"].update(extra)
        before = remembered.unchanged(path, record["files"])
        for name, text in documentation.items():
            if name not in DOCUMENTATION:
                raise ValueError(f"{name} is content, not documentation")
            with atomic_file(path / name) as out:
                out.write(text)
        before |= remembered.settled(path, documentation)
        record["files"].update((name, checksum(path / name)) for name in documentation)
        record["sizes"] = {name: (path / name).stat().st_size for name in record["files"]}
        with atomic_file(path / MANIFEST) as out:
            out.write(signed(record))
        remembered.keep(path, record["files"], before)


def signed(record: Mapping[str, Any]) -> str:
    """The text of a manifest; its first entry is the checksum of the text with zeros in that place."""
    blank = {"checksum": "0" * 64}
    text = json.dumps(blank | {k: v for k, v in record.items() if k != "checksum"}, indent=1, ensure_ascii=False) + "\n"
    return text.replace("0" * 64, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), 1)


def inside(folder: str | Path, name: str) -> Path:
    """The path of ``name`` in ``folder``, for a name that a manifest or another file gives.

    Raises:
        InputError: it is absolute, leads out of the folder, or is no name of a file.
    """
    parts = name.replace("\\", "/").split("/")
    if "" in parts or "." in parts or ".." in parts or any(ord(letter) < 32 for letter in name):
        raise InputError(f"the name {name!r} does not stay inside this folder", folder)
    return Path(folder) / name


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence results, without importing them."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class _Facts(dict):
    """Facts of a manifest; asking for one that it does not have is an InputError."""

    def __init__(self, values: Mapping[str, Any], section: str, file: Path):
        super().__init__(values)
        self._section, self._file = section, file

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self._section}: '{key}' is missing", self._file)

    def __reduce__(self):
        return _Facts, (dict(self), self._section, self._file)


def _facts(record: Mapping[str, Any], section: str, file: Path) -> Any:
    values = record[section]
    return _Facts(values, section, file) if isinstance(values, dict) else values


def _check_types(manifest: Manifest, file: Path) -> None:
    for name in ("counts", "config", "inputs", "extra", "files", "sizes"):
        if not isinstance(getattr(manifest, name), Mapping):
            raise InputError(f"not a manifest: {name} is not an object", file)
    for name in ("kind", "fingerprint"):
        if not isinstance(getattr(manifest, name), str):
            raise InputError(f"not a manifest: {name} is not text", file)
    for name, digest in manifest.files.items():
        inside(manifest.path, name)
        if not isinstance(digest, str):
            raise InputError(f"not a manifest: the checksum of {name} is not text", file)


def _why_absent(path: Path, kind: str | None) -> str:
    what = f"{kind} artifact" if kind else "artifact"
    if not path.exists():
        unfinished = f" (an unfinished one is at {partial_path(path)})" if partial_path(path).exists() else ""
        return f"no such {what}{unfinished}"
    if not path.is_dir():
        return f"is not a directory, a {what} is needed"
    return f"has no {MANIFEST}: not a finished {what}"


def _describe_inputs(inputs: Mapping[str, str | Path]) -> dict[str, dict[str, str]]:
    described = {}
    for name, source in inputs.items():
        described[name] = {"path": str(source)}
        if exists(source):
            described[name]["fingerprint"] = read(source).fingerprint
    return described


def fingerprint(files: Mapping[str, str]) -> str:
    """What a manifest gives as fingerprint for these checksums by name."""
    lines = [f"{name} {digest}" for name, digest in sorted(files.items()) if name not in DOCUMENTATION]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content_of(path: str | Path) -> str | None:
    """What tells the content of a folder from another: its fingerprint if it is an artifact, or else one that is made
    of its files, hidden ones left out. None where no such folder is there, such as for a hub name."""
    path = Path(path)
    if exists(path):
        return read(path).fingerprint
    files = {str(file.relative_to(path)): checksum(file) for file in path.rglob("*")
             if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)}
    return fingerprint(files) if files else None


def checksum(path: str | Path) -> str:
    """sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
