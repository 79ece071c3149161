"""Collections published as Hugging Face datasets, in the convention of BeIR: streamed, never stored whole.

`owner/name` has the configurations `corpus` (`_id`, `title`, `text`) and `queries` (`_id`, `text`); the
judgements are the dataset `owner/name-qrels` (`query-id`, `corpus-id`, `score`), one split each. Errors count
rows from 1 as lines.
"""

from __future__ import annotations

from collections.abc import Iterator

from lexmae.data.corpus import ALL, Corpus
from lexmae.data.lines import check_id
from lexmae.data.qrels import Judgement, first_judgements
from lexmae.errors import InputError


class HubDataset(Corpus):
    """A dataset by name (or by the path of a dataset folder)."""

    def __init__(self, source: str) -> None:
        super().__init__(str(source))
        self._qrels: dict | None = None

    def splits(self) -> list[str]:
        """Splits of the judgements, or "all" where there are none."""
        return sorted(self._judgement_sets()) or [ALL]

    def judgements(self, split: str) -> Iterator[Judgement] | None:
        """Judgements of a split, streamed."""
        self._known(split)
        rows = self._judgement_sets().get(split)
        return None if rows is None else self._read_judgements(split, rows)

    def _read_judgements(self, split: str, rows) -> Iterator[Judgement]:
        place = f"{self.source}-qrels/{split}"
        for line, row in enumerate(rows, 1):
            qid = check_id(row.get("query-id"), "query-id", place, line)
            docid = check_id(row.get("corpus-id"), "corpus-id", place, line)
            score = row.get("score")
            if isinstance(score, bool) or not isinstance(score, (int, float)) or int(score) != score:
                raise InputError(f"score {score!r} is not a whole number", path=place, line=line)
            yield Judgement(qid, docid, int(score), place, line)

    def _judgement_sets(self) -> dict:
        if self._qrels is None:
            self._qrels = _load(f"{self.source}-qrels", None, optional=True)
        return self._qrels

    def _passage_rows(self):
        place = f"{self.source}/corpus"
        for line, row in enumerate(self._rows("corpus"), 1):
            yield place, line, row.get("_id"), row.get("title"), row.get("text")

    def _query_rows(self, split: str):
        place = f"{self.source}/queries"
        for line, row in enumerate(self._rows("queries"), 1):
            yield place, line, row.get("_id"), row.get("text")

    def _judged(self, split: str) -> dict[str, Judgement] | None:
        return first_judgements(self.judgements(split))

    def _rows(self, part: str) -> Iterator[dict]:
        """Rows of a configuration: of its split of the same name, or of its only split."""
        splits = _load(self.source, part)
        if part not in splits and len(splits) != 1:
            raise InputError(
                f"configuration {part!r} has the splits {', '.join(splits)}; which is meant?",
                path=self.source,
            )
        return iter(splits[part] if part in splits else next(iter(splits.values())))


def _load(name: str, part: str | None, optional: bool = False) -> dict:
    """Splits {name: rows} of a dataset, streamed; {} for an optional one that does not exist."""
    import datasets

    try:
        return dict(datasets.load_dataset(name, part, streaming=True))
    except datasets.exceptions.DatasetNotFoundError:
        if optional:
            return {}
        raise InputError("no such folder, and no such dataset on the hub", path=name) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"no such folder, and the dataset{f' ({part})' if part else ''} cannot be loaded: {reason}", path=name
        ) from error
