"""Many targets in one command: documents as for each alone, one table, resumable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from pyarrow import parquet

from tests.conftest import Shelf
from tests.test_cli import run, snapshot
from unmerge import attribute, attribute_many, survey
from unmerge.errors import UnmergeError
from unmerge.survey import document_name


def targets(shelf: Shelf) -> list[str]:
    return [shelf.path("merge"), shelf.path("missing"), shelf.merge("second", sub=0.4, xml=0.2)]


def test_documents_are_those_of_one_target_each_and_the_table_holds_their_numbers(shelf: Shelf, tmp_path: Path) -> None:
    atoms = shelf.paths("add", "sub", "json", "xml")
    given = targets(shelf)
    (tmp_path / "list.txt").write_text(f"# merges\n\n{given[0]}\n{given[1]}\n")
    output = tmp_path / "answers"
    arguments = ["attribute", f"@{tmp_path / 'list.txt'}", *atoms, "--base", shelf.base]
    found = run(*arguments, "--target", given[2], "--target", given[0], "--output", str(output))
    assert found.returncode == 2
    assert "target 2 of 3" in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.count("error: ") == 1
    assert [line.split(": ")[0] for line in found.stdout.splitlines()] == [given[0], given[2]]
    table = pd.read_parquet(output / "results.parquet")
    for target in (given[0], given[2]):
        document = (output / document_name(target)).read_text()
        assert document == attribute(target, atoms, base=shelf.base).to_json() + "\n"
        rows = table[table["target"] == target].set_index("component")
        for component in json.loads(document)["components"]:
            row = rows.loc[component["name"]]
            assert row["weight"] == component["weight"]
            assert [row["low"], row["high"]] == component["interval"]
            assert row["present"] == component["present"]
            assert row["p_value"] == component["evidence"]["p_value"]
    (failed,) = table[table["target"] == given[1]].to_dict("records")
    assert "no such" in failed["error"]
    assert pd.isna(failed["component"])
    metadata = json.loads(parquet.read_schema(output / "results.parquet").metadata[b"unmerge"])
    assert metadata["schema"] == "unmerge/survey/1"
    assert [atom["name"] for atom in metadata["atoms"]] == ["add", "json", "sub", "xml"]


def test_a_stopped_survey_computes_only_what_is_missing_and_ends_in_the_same_bytes(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms = shelf.paths("add", "sub")
    given = targets(shelf)
    attribute_many(given, atoms, base=shelf.base, output=tmp_path / "peace")
    real = survey.Question.explain
    explained: list[str] = []

    def stopped(question: survey.Question, goal: survey.Target, **options: object) -> object:
        if len(explained) == 1:
            raise KeyboardInterrupt
        explained.append(goal.reference.reference)
        return real(question, goal, **options)  # type: ignore[arg-type]

    def watched(question: survey.Question, goal: survey.Target, **options: object) -> object:
        explained.append(goal.reference.reference)
        return real(question, goal, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(survey.Question, "explain", stopped)
        with pytest.raises(KeyboardInterrupt):
            attribute_many(given, atoms, base=shelf.base, output=tmp_path / "killed")
    assert not (tmp_path / "killed" / "results.parquet").exists()
    (tmp_path / "killed" / f".{document_name(given[2])}.partial").write_text("half of a")
    for expected in (given[2:], []):
        explained.clear()
        with monkeypatch.context() as patch:
            patch.setattr(survey.Question, "explain", watched)
            answers = attribute_many(given, atoms, base=shelf.base, output=tmp_path / "killed")
        assert explained == expected
        assert [answer.error is None for answer in answers] == [True, False, True]
    first, second = (
        {Path(name).name: content for name, content in snapshot(tmp_path / part).items()}
        for part in ("peace", "killed")
    )
    assert first == second


def test_a_target_that_changed_or_a_damaged_document_is_answered_anew(shelf: Shelf, tmp_path: Path) -> None:
    given = targets(shelf)[::2]
    output = tmp_path / "answers"
    attribute_many(given, shelf.paths("add", "sub"), base=shelf.base, output=output)
    before = snapshot(output)
    shutil.rmtree(given[0])
    shutil.copytree(given[1], given[0])
    (output / document_name(given[1])).write_text("{")
    attribute_many(given, shelf.paths("add", "sub"), base=shelf.base, output=output)
    after = snapshot(output)
    changed = {Path(name).name for name in before if before[name] != after[name]}
    assert changed == {document_name(given[0]), "results.parquet"}


def test_another_question_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    output = tmp_path / "answers"
    attribute_many([shelf.path("merge")], shelf.paths("add"), base=shelf.base, output=output)
    before = snapshot(output)
    for atoms, options in ((["add", "sub"], {}), (["add"], {"signed": True}), (["add"], {"exact": True})):
        with pytest.raises(UnmergeError, match="answers to another question"):
            attribute_many([shelf.path("merge")], shelf.paths(*atoms), base=shelf.base, output=output, **options)
    assert snapshot(output) == before
    with pytest.raises(UnmergeError, match="already exists"):
        attribute_many([shelf.path("merge")], shelf.paths("add"), base=shelf.base, output=shelf.path("add"))


def test_several_targets_need_a_folder_and_go_without_what_is_for_one(shelf: Shelf, tmp_path: Path) -> None:
    arguments = ["attribute", shelf.path("merge"), shelf.path("add"), "--base", shelf.base]
    many = ["--target", shelf.path("second")]
    for more, text in (
        (many, "--output"),
        ([*many, "--output", str(tmp_path / "out"), "--json"], "--json is for one target"),
        (["--target", f"@{tmp_path / 'none.txt'}", "--output", str(tmp_path / "out")], "none.txt: cannot be read"),
    ):
        found = run(*arguments, *more)
        assert found.returncode == 2
        assert text in found.stderr
        assert len(found.stderr.splitlines()) == 1


def test_document_names_are_safe_and_apart() -> None:
    names = {document_name(text) for text in ("a/b", "a_b", "../a b", "org/name@main", "x" * 500, "ä/🙂", "..", "")}
    assert len(names) == 8
    for name in names:
        assert name == Path(name).name
        assert len(name.encode()) < 255
        assert not name.startswith(".")
