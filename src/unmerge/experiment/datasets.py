"""Read (prompt, answer) examples out of the rows of the paper's data sets, on the Hub or in local files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from unmerge.errors import MissingExtraError, SourceError
from unmerge.experiment.paper import Source
from unmerge.experiment.tasks import Example

CHAT = "messages"
CONVERTED = "refs/convert/parquet"
"""The branch on which the Hub keeps every data set as Parquet files."""
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def load_examples(source: Source, count: int, *, seed: int) -> list[Example]:
    """Draw examples from the train split of a data set.

    Parameters
    ----------
    source : Source
        Where it is: a Hub id, or a local folder of Parquet or JSON lines files.
    count : int
        Examples to draw. Rows without a prompt or an answer are passed over.
    seed : int
        Seeds the order of the rows.

    Raises
    ------
    SourceError
        The data set cannot be read, lacks a field, or has too few usable rows.
    MissingExtraError
        The package ``datasets`` is not installed.
    """
    rows = _load(source).shuffle(seed=seed)
    found = list(islice(read_examples(rows, source, _labels(rows, source)), count))
    if len(found) < count:
        raise SourceError(f"{source.dataset}: {len(found)} usable examples, expected {count}; use fewer")
    return found


def _load(source: Source) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("data sets need the package datasets: pip install 'unmerge[experiment]'") from error
    try:
        try:
            return datasets.load_dataset(source.dataset, source.config, split="train")
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Data sets that are still programs (xsum) have been converted by the Hub, on a branch of their own.
            return datasets.load_dataset(source.dataset, source.config, split="train", revision=CONVERTED)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"{source.dataset}: cannot be loaded: {reason}") from error


def _labels(rows: Any, source: Source) -> Sequence[str] | None:
    """Return the names of the classes, where the answer is a class label (0 and 1 mean nothing to a model)."""
    names = getattr(rows.features.get(source.answer_field), "names", None)
    return None if names is None else list(names)


def read_examples(
    rows: Iterator[Mapping[str, Any]] | Any,
    source: Source,
    labels: Sequence[str] | None = None,
) -> Iterator[Example]:
    """Yield the example of each row that has a prompt and an answer.

    Parameters
    ----------
    rows : iterable of mapping
        Rows of a data set.
    source : Source
        The fields to read. A chat (a list of messages in the field ``messages``) gives its first question and
        the reply to it.
    labels : sequence of str, optional
        Words for an answer that is a number of a class.

    Raises
    ------
    SourceError
        A row lacks a field.
    """
    for row in rows:
        if source.answer_field == CHAT:
            example = _first_exchange(field(row, CHAT, source.dataset))
        else:
            parts = (_text(field(row, name, source.dataset)) for name in source.prompt_fields)
            answer = field(row, source.answer_field, source.dataset)
            if labels is not None and isinstance(answer, int):
                answer = labels[answer] if answer >= 0 else None
            example = Example("\n\n".join(part for part in parts if part), _text(answer))
        if example.prompt and example.answer:
            yield example


def field(row: Mapping[str, Any], path: str, dataset: str) -> Any:
    """Return what is at a path such as ``answers.text[0]``; None if a list on the way is too short.

    Raises
    ------
    SourceError
        There is no such field; the message names those that there are.
    """
    value: Any = row
    for name, index in _STEP.findall(path):
        if index:
            value = value[int(index)] if len(value) > int(index) else None
        elif name in value:
            value = value[name]
        else:
            raise SourceError(f"{dataset}: no field {name!r} (of {path}); the fields are {', '.join(value)}")
        if value is None:
            return None
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return "\n".join(_text(one) for one in value)
    return str(value).strip()


def _first_exchange(messages: Sequence[Mapping[str, Any]] | None) -> Example:
    """Return the first question of a chat and the reply to it, under either of the two usual spellings."""
    prompt = ""
    for message in messages or ():
        role = message.get("role", message.get("from"))
        content = _text(message.get("content", message.get("value")))
        if role in {"user", "human"} and not prompt:
            prompt = content
        elif role in {"assistant", "gpt"} and prompt:
            return Example(prompt, content)
    return Example("", "")
