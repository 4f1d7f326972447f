from __future__ import annotations

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from unmerge.errors import SourceError
from unmerge.experiment import paper
from unmerge.experiment.datasets import load_examples, read_examples
from unmerge.experiment.paper import Source
from unmerge.experiment.tasks import Example

# One row of each of the paper's data sets, with its columns.
ROWS = {
    "alpaca_instructions": (
        {"instruction": "Add them.", "input": "1 and 2", "output": "3", "text": "unused"},
        Example("Add them.\n\n1 and 2", "3"),
    ),
    "gsm8k_math": ({"question": "2 + 2?", "answer": "4 #### 4"}, Example("2 + 2?", "4 #### 4")),
    "xsum": ({"document": "Long.", "summary": "Short.", "id": "7"}, Example("Long.", "Short.")),
    "ms_marco_qa": (
        {
            "answers": ["Rome", "roma"],
            "passages": {"is_selected": [0, 1], "passage_text": ["It is old.", "It is Rome."], "url": ["a", "b"]},
            "query": "which city",
        },
        Example("It is old.\nIt is Rome.\n\nwhich city", "Rome"),
    ),
    "reason_math": (
        {
            "messages": [
                {"role": "system", "content": "Think."},
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "<think>2</think> 2"},
            ]
        },
        Example("1 + 1?", "<think>2</think> 2"),
    ),
    "codesearchnet_python": ({"code": "def f(): pass", "docstring": "Nothing."}, Example("def f(): pass", "Nothing.")),
    "python_instructions_alpaca": (
        {"instruction": "Sort.", "input": "", "output": "sorted(x)", "prompt": "unused"},
        Example("Sort.", "sorted(x)"),
    ),
    "latin_translation": ({"id": 1, "la": "rosa", "en": "rose", "file": "x"}, Example("rosa", "rose")),
    "orca_math": ({"question": "3 - 1?", "answer": "2"}, Example("3 - 1?", "2")),
    "squad_qa": (
        {"id": "1", "context": "It is red.", "question": "Colour?", "answers": {"text": ["red"], "answer_start": [6]}},
        Example("It is red.\n\nColour?", "red"),
    ),
    "arxiv_summarization": ({"article": "Body.", "abstract": "Gist."}, Example("Body.", "Gist.")),
    "arjun_python_qa": ({"question": "Print?", "code": "print()"}, Example("Print?", "print()")),
    "stablecode_python": ({"instruction": "Loop.", "output": "for"}, Example("Loop.", "for")),
    "style_transfer": ({"input": "I can't", "output": ["I cannot"], "id": "t"}, Example("I can't", "I cannot")),
}


def local(folder, name, rows, kind="parquet"):
    """Put rows into a file where the data set's Hub id would be, and return a source that finds them."""
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    else:
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = paper.sources()[name]
    return Source(str(folder), None, found.prompt_fields, found.answer_field)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", ROWS)
def test_every_data_set_of_the_paper_is_read_from_files_of_its_columns(tmp_path, name, kind):
    row, expected = ROWS[name]
    assert load_examples(local(tmp_path / name, name, [row], kind), 1, seed=0) == [expected]


def test_a_class_is_answered_with_its_name(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_list([{"text": "Fine.", "label": 1}], features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    found = paper.sources()["imdb_sentiment"]
    source = Source(str(tmp_path), None, found.prompt_fields, found.answer_field)
    assert load_examples(source, 1, seed=0) == [Example("Fine.", "pos")]


def test_a_seed_draws_its_own_rows(tmp_path):
    rows = [{"question": f"{number}?", "answer": str(number)} for number in range(50)]
    source = local(tmp_path, "gsm8k_math", rows)
    first, again, other = (load_examples(source, 10, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(set(first)) == 10


def test_rows_without_an_answer_are_passed_over(tmp_path):
    rows = [ROWS["ms_marco_qa"][0], {**ROWS["ms_marco_qa"][0], "answers": []}]
    source = local(tmp_path, "ms_marco_qa", rows)
    assert len(load_examples(source, 1, seed=0)) == 1
    with pytest.raises(SourceError, match="1 usable examples, expected 2"):
        load_examples(source, 2, seed=0)


def test_a_missing_field_is_named():
    source = Source("org/name", None, ("question",), "answer")
    with pytest.raises(SourceError, match=r"org/name: no field 'question' .*the fields are prompt, answer"):
        list(read_examples([{"prompt": "x", "answer": "y"}], source))


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_examples(Source(str(tmp_path / "nothing"), None, ("a",), "b"), 1, seed=0)


def test_a_data_set_that_is_a_program_is_read_from_the_hubs_conversion(tmp_path, monkeypatch):
    import datasets

    source = local(tmp_path, "xsum", [ROWS["xsum"][0]])
    load, revisions = datasets.load_dataset, []

    def without_programs(path, config, *, split, revision=None):
        revisions.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found xsum.py")
        return load(path, config, split=split)

    monkeypatch.setattr(datasets, "load_dataset", without_programs)
    assert load_examples(source, 1, seed=0) == [ROWS["xsum"][1]]
    assert revisions == [None, "refs/convert/parquet"]
