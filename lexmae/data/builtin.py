"""The built-in corpus: English text that every installation already has, the docstrings of its own packages.

A passage is one documented module, class or function: its id is the qualified name, its title the words of
that name (so that every analyser and tokenizer sees them), its text the docstring without the summary. The
summary is the query that the passage answers. Nothing is shipped or downloaded: sources are read with `ast`
from the machine's own installation (no package is imported), so each text stays under the licence of its
package. The result depends only on the installed versions, never on hash seeds or directory order.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import re
import sysconfig
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from inspect import cleandoc
from pathlib import Path

import numpy as np

from lexmae import cli
from lexmae.data.corpus import Passage, Query, write_beir
from lexmae.errors import InputError

STDLIB = "the standard library"
PACKAGES = (
    STDLIB, "bm25s", "click", "datasets", "deepspeed", "dill", "filelock", "fsspec", "huggingface_hub",
    "jinja2", "llvmlite", "mpmath", "multiprocess", "networkx", "numba", "numpy", "packaging", "pandas",
    "psutil", "pyarrow", "pydantic", "safetensors", "scipy", "sympy", "tokenizers", "torch", "tqdm",
    "transformers", "typer", "yaml",
)  # fmt: skip
SKIPPED = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "_testing", "idlelib",
    "lib2to3", "pydoc_data", "ensurepip", "turtledemo", "_vendor", "_vendored", "externals", "_external",
    "third_party",
}  # fmt: skip
MIN_BODY_WORDS, MAX_BODY_WORDS = 20, 50  # words of a passage's text
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 4, 30
DOCTEST_LINES = 3  # lines kept of each run of interpreter lines
DEV_PERCENT = 10  # share of the modules, chosen by the hash of their names
BODY_OVERLAP, QUERY_OVERLAP = 0.4, 0.7  # Jaccard similarities from which two texts count as near-duplicates
_COMMON = "a an and are as at be by for from if in into is it its of on or that the this to with"
_STOP_WORDS = frozenset(_COMMON.split())
_SIGNATURE = re.compile(r"^[\w.*]+\s*\(.*\)\s*(->.*)?$", re.DOTALL)
_BOILERPLATE = re.compile(
    r"(see|alias|deprecated|same as|refer to|internal|todo|copyright|licen[cs]e|author|usage|tests?|note|"
    r"warning|examples?|base class|args|arguments|parameters|this (class|function|method) is deprecated)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\bal)[.!?](?=\s+[A-Z(\[\"']|\s*$)"
)
_MARKUP = tuple((re.compile(pattern, re.MULTILINE), kept) for pattern, kept in (
    (r"^\s*\.\. (versionadded|versionchanged|deprecated|seealso|index|currentmodule|_[^:\n]*)::?.*$", ""),
    (r"^\s*\.\. [\w-]+::", " "),  # other directives keep their content
    (r"^\s*:r?type\b[^:\n]*:.*$", ""),
    (r"^\s*[-=~^*#+_\"`.]{3,}\s*$", ""),  # underlines and rulers
    (r":(?:\w+:)?\w+:`([^`<]*?)\s*<[^`>]*>`", r"\1"),  # :role:`text <target>`
    (r":(?:\w+:)?\w+:`[~!]?([^`]*)`", r"\1"),  # :role:`target`
    (r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1"),  # `text <link>`_
    (r"\[[`~]*([^\]`\n]+)`*\]\([^)\n]*\)", r"\1"),  # [text](link)
    (r"\[[`~]+([^\]`\n]+)`+\]", r"\1"),  # [`name`]
    (r"^\s*:\w+\s+([\w*, ]+):", r"\1:"),  # :param name:
    (r"</?[a-zA-Z][^<>\n]*>", " "),
    (r"https?://\S+", " "),
    (r"\{\w+\}", " "),  # a placeholder that the package fills at import
    (r"`+|\*\*|\\(?=[_*`])|\[\d+\]_", ""),
))  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One documented object; `module` is the unit of the split; `query` is "" if the summary is none."""

    module: str
    name: str
    query: str
    text: str


def build(output: str | Path, max_passages: int | None = None) -> None:
    """Write the corpus as a BEIR folder with the splits `train` and `dev`; InputError if the folder exists.

    With `max_passages` only the passages whose names hash lowest are kept, so judged passages and distractors
    (those without a query) keep their shares. Whole modules, not passages, are divided between the splits.
    """
    documents = select(_read_packages(), max_passages)
    qrels: dict = {"train": {}, "dev": {}}  # split -> query -> passage -> 1
    for document in documents:
        if document.query:
            qrels[split_of(document.module)][f"q:{document.name}"] = {document.name: 1}
    passages = [Passage(d.name, words_of(d.name), d.text) for d in documents]
    write_beir(output, passages, [Query(f"q:{d.name}", d.query) for d in documents if d.query], qrels)
    counts = ", ".join(f"{len(judged)} {split} queries" for split, judged in qrels.items())
    cli.say(f"{output}: {len(documents)} passages, {counts}")


def select(documents: Iterable[Document], max_passages: int | None = None) -> list[Document]:
    """Drop repeated names, near-duplicate texts and ambiguous queries; keep `max_passages`; sort by name.

    Of near-duplicate texts the one with the shortest name stays. A query that nearly equals another passage's
    is ambiguous: both passages stay and neither keeps its query.
    """
    by_name: dict[str, Document] = {}
    for document in documents:
        by_name.setdefault(document.name, document)
    unique = sorted(by_name.values(), key=lambda d: (len(d.name), d.name))
    dropped: set[int] = set()
    for earlier, later in near_pairs([_shingles(d.text, 3) for d in unique], BODY_OVERLAP):
        if earlier not in dropped:
            dropped.add(later)
    kept = [d for i, d in enumerate(unique) if i not in dropped]
    if max_passages is not None:
        kept = sorted(kept, key=lambda d: _stable_hash(d.name))[:max_passages]
    asked = [d for d in kept if d.query]
    pairs = near_pairs([_shingles(d.query, 1) for d in asked], QUERY_OVERLAP)
    ambiguous = {asked[i].name for pair in pairs for i in pair}
    kept = [replace(d, query="") if d.name in ambiguous else d for d in kept]
    return sorted(kept, key=lambda d: d.name)


def split_of(module: str) -> str:
    """`dev` for about a tenth of the modules, `train` for the others, by the hash of the module's name."""
    return "dev" if _stable_hash(module) % 100 < DEV_PERCENT else "train"


def module_files(package: str) -> Iterator[tuple[str, Path]]:
    """(module name, file) of every Python source of an installed package, sorted; nothing if it is absent."""
    if package == STDLIB:
        root, prefix = Path(sysconfig.get_paths()["stdlib"]), ()
    else:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        if spec is None or not spec.submodule_search_locations:
            return
        root, prefix = Path(next(iter(spec.submodule_search_locations))), (package,)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # files named modular_* are what transformers generates its modeling_* files from
        if not SKIPPED.intersection(parts) and not parts[-1].startswith(("test_", "modular_")):
            name = ".".join((*prefix, *parts)).removesuffix(".__init__")
            if name != "__init__":
                yield name, path


def read_documents(module: str, path: Path) -> Iterator[Document]:
    """The documents of one source file; none where Python cannot read it."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            docstrings = list(_docstrings(ast.parse(source), module))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # a template, a source of another Python version, or one without read permission
    for name, raw in docstrings:
        document = parse(module, name, raw)
        if document is not None:
            yield document


def parse(module: str, name: str, docstring: str) -> Document | None:
    """The document that a docstring makes, or None where it has too little text.

    Components of the name that start with an underscore are left out of it. A leading signature is removed;
    the first sentence of the first paragraph is the query, and is also taken out of the rest.
    """
    paragraphs = re.split(r"\n[ \t]*\n", cleandoc(docstring).strip())
    while paragraphs and _SIGNATURE.match(paragraphs[0].strip()):
        paragraphs.pop(0)
    if not paragraphs:
        return None
    first, rest = clean(paragraphs[0]), clean(_bound_doctests("\n\n".join(paragraphs[1:])))
    end = _SENTENCE_END.search(first)
    query, remainder = (first[: end.start()], first[end.end() :]) if end else (first, "")
    text = _without(f"{remainder} {rest}".strip(), query)
    words = text.split()
    public = ".".join(part for part in name.split(".") if not part.startswith("_"))
    if not public or sum(any(c.isalpha() for c in word) for word in words) < MIN_BODY_WORDS:
        return None
    return Document(module, public, query if _usable(query) else "", " ".join(words[:MAX_BODY_WORDS]))


def words_of(name: str) -> str:
    """Words of a qualified name: `torch.nn.LayerNorm.extra_repr` gives `torch nn Layer Norm extra repr`."""
    return " ".join(re.sub(r"[._]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).split())


def clean(text: str) -> str:
    """ReST, Sphinx and Markdown markup taken out of a text, and its white space collapsed."""
    for pattern, kept in _MARKUP:
        text = pattern.sub(kept, text)
    return " ".join(text.split())


def near_pairs(sets: Sequence[frozenset[int]], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of sets whose Jaccard similarity reaches `threshold`, in order of the later one.

    Candidates come from MinHash signatures in 16 bands of 3 rows (Broder 1997; Leskovec et al., Mining of
    Massive Datasets, 3.4): a pair at similarity 0.5 is found with probability 0.88, at 0.7 with 0.999.
    Candidates are verified on the sets themselves. Empty sets have no pairs.
    """
    random = np.random.default_rng(0)
    factors = random.integers(1, 2**63, 48, dtype=np.uint64) | np.uint64(1)
    offsets = random.integers(0, 2**63, 48, dtype=np.uint64)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for later, items in enumerate(sets):
        if not items:
            continue
        hashes = np.fromiter(items, np.uint64, len(items))
        signature = (hashes[:, None] * factors + offsets).min(0).reshape(16, 3)
        keys = [(band, row.tobytes()) for band, row in enumerate(signature)]
        for earlier in sorted({i for key in keys for i in buckets[key]}):
            common = len(items & sets[earlier])
            if common >= threshold * (len(items) + len(sets[earlier]) - common):
                yield earlier, later
        for key in keys:
            buckets[key].append(later)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="BEIR folder to write")
    parser.add_argument("--max-passages", type=int, help="keep at most this many passages")
    args = parser.parse_args(argv)
    if args.max_passages is not None and args.max_passages < 1:
        raise InputError(f"--max-passages is {args.max_passages}; it must be at least 1")
    build(args.output, args.max_passages)


def _read_packages() -> list[Document]:
    """Every document of the installed packages of the list; the absent packages are reported."""
    gc.disable()  # syntax trees are many objects without cycles: parsing takes half the time
    try:
        missing, documents = [], []
        for package in cli.progress(PACKAGES, desc="docstrings", unit="package"):
            files = list(module_files(package))
            if not files:
                missing.append(package)
            for module, path in files:
                documents.extend(read_documents(module, path))
        if missing:
            cli.say(f"not installed, left out: {', '.join(missing)}")
    finally:
        gc.enable()
    return documents


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module, of its public classes and functions, and those attached by calls."""
    yield from _nested(tree, module)
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        function = getattr(call.func, "id", getattr(call.func, "attr", "")) if call else ""
        if function in ("add_newdoc", "add_docstr") and len(call.args) >= 2:
            yield from _attached(call, module)


def _nested(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield name, docstring
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        documented = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and not child.name.startswith("_"):
            yield from _nested(child, f"{name}.{child.name}")


def _attached(call: ast.Call, module: str) -> Iterator[tuple[str, str]]:
    """Documents of `add_newdoc(place, name, text | (member, text) | [(member, text), ...])`,
    `add_newdoc(name, text)` and `add_docstr(object, text)`."""
    *names, last = call.args[:3]
    parts = [n.value if isinstance(n, ast.Constant) else ast.unparse(n) for n in names]
    tuples = [n for n in (last, *getattr(last, "elts", [])) if isinstance(n, ast.Tuple)]
    pairs = [n.elts for n in tuples if len(n.elts) == 2]
    if len(names) == 1 and isinstance(names[0], ast.Constant):
        parts.insert(0, module)
    for member, text in pairs or [(None, last)]:
        literal = _literal(text)
        if literal:
            yield ".".join(str(p) for p in (*parts, *([_literal(member)] if member else []))), literal


def _literal(node: ast.expr) -> str:
    """The constant parts of a string expression: a literal, `+`, `%`, an f-string or a call of `.format`."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp):
        return _literal(node.left) + (_literal(node.right) if isinstance(node.op, ast.Add) else "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _literal(node.func.value)
    return "".join(_literal(part) for part in node.values) if isinstance(node, ast.JoinedStr) else ""


def _bound_doctests(text: str) -> str:
    """The text with at most DOCTEST_LINES lines of every run of interpreter lines and every fenced block."""
    lines, run, fenced = [], 0, False
    for line in text.splitlines():
        code = line.lstrip()
        fence = code.startswith("```") and code.count("```") == 1
        run = run + 1 if fenced or fence or code.startswith((">>>", "...", "In [")) else 0
        fenced ^= fence
        if run <= DOCTEST_LINES:
            lines.append(line)
    return "\n".join(lines)


def _usable(query: str) -> bool:
    """Whether a summary reads as a sentence of its own rather than as boilerplate, a heading or code."""
    words = [word for word in query.split() if any(c.isalpha() for c in word)]
    letters = sum(c.isalpha() or c.isspace() for c in query)
    if len(words) < MIN_QUERY_WORDS or len(query.split()) > MAX_QUERY_WORDS or letters < 0.8 * len(query):
        return False
    return query[0].isalpha() and not _BOILERPLATE.match(query) and len(_shingles(query, 1)) >= 3


def _without(text: str, sentence: str) -> str:
    """The text without any repetition of the sentence, whatever its case, punctuation and white space."""
    words = re.findall(r"\w+", sentence)
    normal = " ".join(re.findall(r"\w+", text)).lower()
    if len(words) < MIN_QUERY_WORDS or " ".join(words).lower() not in normal:
        return text
    repeated = re.compile(r"\b" + r"\W+".join(map(re.escape, words)) + r"\b[.!?]?", re.IGNORECASE)
    return " ".join(repeated.sub(" ", text).split())


def _shingles(text: str, length: int) -> frozenset[int]:
    """Hashes of the runs of `length` words without digits; single words lose stop words and the plural s."""
    words = re.findall(r"[a-z]+", text.lower())
    if length == 1:
        words = [word.rstrip("s") for word in words if word not in _STOP_WORDS]
    runs = (" ".join(words[i : i + length]) for i in range(max(len(words) - length + 1, 1 if words else 0)))
    return frozenset(zlib.crc32(run.encode()) for run in runs)


def _stable_hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


if __name__ == "__main__":
    cli.run(main)
