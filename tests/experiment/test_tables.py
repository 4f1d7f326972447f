"""The tables say what the results hold, checked against pandas on results that a generator makes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from itertools import product

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from unmerge.errors import UnmergeError
from unmerge.experiment.aggregation import WAYS, choose, mean_and_std, paper_numbers
from unmerge.experiment.claims import claims
from unmerge.experiment.figures import write_figures
from unmerge.experiment.paper import facts
from unmerge.experiment.readings import ALGORITHMS, GROUPS, METHODS, read_results
from unmerge.experiment.sheets import latex_text, to_csv, to_latex, to_markdown
from unmerge.experiment.tables import _verdict, make_sheets, write_tables

SCHEMA = pa.schema(
    [
        ("seed", pa.int32()),
        ("target", pa.string()),
        ("composition", pa.int32()),
        ("group", pa.string()),
        ("method", pa.string()),
        ("coordinates", pa.string()),
        ("algorithm", pa.string()),
        ("setting", pa.string()),
        ("names", pa.list_(pa.string())),
        ("coefficients", pa.list_(pa.float64())),
        ("truth", pa.list_(pa.float64())),
        ("error", pa.float64()),
        ("heldout_error", pa.float64()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("perfect_match", pa.bool_()),
        ("sparsity", pa.int32()),
        ("coefficient_mae", pa.float64()),
        ("unexplained", pa.float64()),
        ("rounding_floor", pa.float64()),
        ("status", pa.string()),
        ("failure", pa.string()),
    ]
)
MEASURED = SCHEMA.names[11:20]
ATOMS = [task["name"] for task in facts()["tasks"] if task["in_dictionary"]]
SETTINGS = {
    "nnls": ["{}"],
    "omp": ['{"n_atoms":2,"tol":1e-06}', '{"n_atoms":8,"tol":1e-06}'],
    "ridge": ['{"lambda":1e-08}', '{"lambda":0.01}'],
    "elastic_net": ['{"l1_ratio":0.1,"lambda":1e-08}', '{"l1_ratio":0.9,"lambda":1e-08}'],
    "dot_product": ["{}"],
    "lasso": ['{"lambda":1e-08}', '{"lambda":1e-06}'],
}
PAPER_TABLES = (
    "table-1-overall",
    "table-2-nnls-by-category",
    "table-3-error-by-method",
    "table-4-error-by-category",
    "table-5-precision-recall",
    "table-6-sparsity",
)


def make_rows(seeds=(0, 1), compositions=None, settings=SETTINGS, failing=0.0, seed=5):
    """Results of an experiment that never took place; the chance of a failed run is `failing`."""
    rng = np.random.default_rng(seed)
    listed = list(enumerate(facts()["merging"]["compositions"]))
    chosen = [listed[number] for number in (0, 6, 12)] if compositions is None else listed
    rows = []
    for world, (number, composition), method, coordinates in product(seeds, chosen, METHODS, ("top_k", "all")):
        truth = np.array([(atom in composition["tasks"]) / len(composition["tasks"]) for atom in ATOMS])
        for algorithm, choices in settings.items():
            for setting in choices:
                failed = rng.random() < failing
                row = {
                    "seed": world,
                    "target": f"{number:02d}-{method}",
                    "composition": number,
                    "group": composition["group"],
                    "method": method,
                    "coordinates": coordinates,
                    "algorithm": algorithm,
                    "setting": setting,
                    "names": ATOMS,
                    "truth": truth.tolist(),
                    "status": "failed" if failed else "ok",
                    "failure": "it did not converge | at all" if failed else None,
                }
                measured = dict.fromkeys(MEASURED) if failed else measure(rng, row, truth)
                rows.append(row | measured | {"coefficients": None if failed else measured.pop("coefficients")})
    return rows


def measure(rng, row, truth):
    level = 0.08 + 0.1 * list(METHODS).index(row["method"]) + 0.25 * list(GROUPS).index(row["group"])
    level += 0.04 * list(ALGORITHMS).index(row["algorithm"])
    extra = rng.random(8) < 0.12 * list(ALGORITHMS).index(row["algorithm"])
    found = truth * rng.normal(0.95, 0.08, 8) + 0.03 * extra * rng.random(8)
    true, active = truth > 0, found > 1e-6
    hits = int((true & active).sum())
    error = float(np.clip(rng.normal(level, 0.03), 0.0, 1.0))
    return {
        "coefficients": found.tolist(),
        "error": error,
        "heldout_error": float(np.clip(error + rng.normal(0.0, 0.05), 0.0, 1.0)),
        "precision": hits / active.sum() if active.any() else 0.0,
        "recall": hits / true.sum() if true.any() else 0.0,
        "perfect_match": bool((true == active).all()),
        "sparsity": int(active.sum()),
        "coefficient_mae": float(np.abs(found - truth).mean()),
        "unexplained": error,
        "rounding_floor": error / 2,
    }


def make_training(seeds=(0, 1)):
    rng = np.random.default_rng(9)
    return [
        {
            "seed": seed,
            "task": task["name"],
            "loss_before": 2.0 + rng.random(),
            "loss_after": rng.random(),
            "relative_norm": 0.01 + 0.01 * rng.random(),
        }
        for seed, task in product(seeds, facts()["tasks"])
    ]


def save(folder, rows, training=None):
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "results.parquet")
    (folder / "training.json").write_text(json.dumps(make_training() if training is None else training))
    return folder


@pytest.fixture(scope="module")
def rows():
    return make_rows(failing=0.2)


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    return save(tmp_path_factory.mktemp("results"), rows)


@pytest.fixture(scope="module")
def sheets(folder):
    return {sheet.name: sheet for sheet in make_sheets(read_results(folder), make_training(), facts())}


def expected(rows, way, **where):
    """The chosen rows of some merges, by pandas and without anything of ours."""
    frame = pd.DataFrame(rows)
    frame = frame[(frame["coordinates"] == way.coordinates) & frame["failure"].isna()]
    for column, value in where.items():
        frame = frame[frame[column] == value]
    frame = frame.sort_values([way.chosen_by, "sparsity", "setting"], kind="stable")
    return frame.drop_duplicates(["algorithm", "seed", "target"])


def where_of(record):
    """The rows that a line of a CSV speaks of."""
    labels = {
        "algorithm": ("algorithm", ALGORITHMS),
        "merging": ("method", METHODS),
        "category": ("group", GROUPS),
    }
    found = {}
    for heading, (column, names) in labels.items():
        if heading in record:
            found[column] = next(name for name, label in names.items() if label == record[heading])
    return found


def filled_in(name, record):
    where = where_of(record)
    if name in ("table-2-nnls-by-category", "rounding"):
        where["algorithm"] = "nnls"
    if name in ("table-3-error-by-method", "table-5-precision-recall", "table-6-sparsity", "coefficients-by-method"):
        where["group"] = "known"
    return where


COMPARED = (*PAPER_TABLES, "coefficients-by-method", "coefficients-by-category", "rounding")


@pytest.mark.parametrize("name", COMPARED)
def test_every_number_is_that_of_pandas(rows, sheets, name):
    assert sheets[name].records
    for record in sheets[name].records:
        way = next(
            way for way in WAYS if (way.coordinates, way.chosen_by) == (record["coordinates"], record["chosen_by"])
        )
        where = filled_in(name, record)
        values = expected(rows, way, **where)[record["quantity"]].astype(float)
        assert record["merges"] == len(values)
        if len(values):
            assert record["mean"] == pytest.approx(values.mean(), abs=1e-12)
            assert record["std"] == pytest.approx(values.std(ddof=0), abs=1e-12)
        frame = pd.DataFrame(rows)
        inside = frame[(frame["coordinates"] == way.coordinates)]
        for column, value in where.items():
            inside = inside[inside[column] == value]
        assert record["runs_failed"] == inside["failure"].notna().sum()
        alive = inside[inside["failure"].isna()].groupby(["seed", "target"]).ngroups
        assert record["merges_failed"] == inside.groupby(["seed", "target"]).ngroups - alive


@pytest.mark.parametrize("name", PAPER_TABLES)
def test_papers_columns_are_the_papers(sheets, name):
    table = facts()["tables"]
    key = next(key for key in table if key.startswith(name[6]))
    seen = set()
    for record in sheets[name].records:
        where = {**filled_in(name, record)}
        label = ALGORITHMS[where["algorithm"]]
        quantity = record["quantity"]
        path = {
            "1": (label, quantity),
            "2": (where.get("group"), quantity),
            "3": (label, where.get("method")),
            "4": (label, where.get("group")),
            "5": (label, where.get("method")),
            "6": (label, where.get("method")),
        }[name[6]]
        given = table[key][path[0]][path[1]]
        if name[6] == "5":
            given = given[["precision", "recall"].index(quantity)]
        mean, std = given if isinstance(given, list) else (given, None)
        assert (record["paper_mean"], record["paper_std"]) == (mean, std)
        seen.add((*path, quantity))
    numbers = sum(len(line) for line in table[key].values()) * (2 if name[6] == "5" else 1)
    assert len(seen) == numbers


def test_a_setting_is_chosen_by_the_error_or_by_the_held_out_error(rows, folder):
    runs = read_results(folder)
    for way in WAYS:
        reference = expected(rows, way).set_index(["algorithm", "seed", "target"])["setting"]
        found = {
            (one.case.algorithm, one.case.seed, one.case.target): one.best.setting
            for one in choose(runs, way)
            if one.best is not None
        }
        assert found == reference.to_dict()
    by_error, held_out = ([one.best and one.best.setting for one in choose(runs, way)] for way in (WAYS[0], WAYS[1]))
    assert by_error != held_out


def test_of_equal_settings_the_sparsest_is_chosen(tmp_path):
    rows = [row for row in make_rows(seeds=(0,)) if row["algorithm"] == "ridge" and row["coordinates"] == "top_k"]
    for number, row in enumerate(rows):
        row |= {"error": 0.25, "sparsity": 5 - number % 2}
    chosen = [one.best.numbers["sparsity"] for one in choose(read_results(save(tmp_path, rows)), WAYS[0])]
    assert set(chosen) == {4.0}


def test_a_failed_run_counts_as_a_failure_and_never_as_zeros(tmp_path):
    rows = make_rows()
    for row in rows:
        if row["algorithm"] == "lasso" and row["method"] == "ties":
            # What the paper's code did: zeros in the place of a result.
            row |= {"error": 1.0, "precision": 0.0, "coefficients": [0.0] * 8, "failure": "singular"}
    sheets = {one.name: one for one in make_sheets(read_results(save(tmp_path, rows)), make_training(), facts())}
    line = next(line for line in sheets["table-3-error-by-method"].body if line[:2] == ("Lasso", "TIES"))
    assert line[3:] == ("all 2 failed",) * 4
    overall = [one for one in sheets["table-1-overall"].records if one["algorithm"] == "Lasso"]
    assert {one["merges"] for one in overall} == {18}
    assert {one["merges_failed"] for one in overall} == {6}
    assert {one["runs_failed"] for one in overall} == {12}
    assert "(6 of 24 failed)" in sheets["table-1-overall"].body[-1][3]
    assert all("singular" in line for line in sheets["failures"].body)
    verdicts = [line for line in sheets["orderings"].body if line[0].startswith("Lasso, known: error of")]
    assert verdicts[0][2].startswith("not measured")
    # The error of the cell is not pulled up by the failures' ones.
    assert max(one["mean"] for one in overall if one["quantity"] == "error") < 0.9


def test_one_failed_setting_leaves_the_others(tmp_path):
    rows = [row for row in make_rows(seeds=(0,)) if row["algorithm"] == "ridge"]
    for row in rows[::2]:
        row |= dict.fromkeys(MEASURED) | {"coefficients": None, "failure": "no"}
    choices = choose(read_results(save(tmp_path, rows)), WAYS[0])
    assert {choice.failed for choice in choices} == {1}
    assert {choice.best.setting for choice in choices} == {'{"lambda":0.01}'}


def test_a_partial_experiment_says_what_it_lacks(tmp_path):
    rows = [row for row in make_rows() if row["group"] == "mixed" and row["coordinates"] == "top_k"]
    written = write_tables(save(tmp_path, rows, training=[]), tmp_path / "tables")
    text = (tmp_path / "tables" / "table-4-error-by-category.md").read_text()
    known = next(line for line in text.splitlines() if line.startswith("| NNLS | Known"))
    assert known.split("|")[4:8] == [" no runs "] * 4
    assert len(written) == 3 * 13 + 1
    write_figures(tmp_path, tmp_path / "figures")


def test_means_do_not_depend_on_the_order_of_rows(rows, tmp_path):
    shuffled = [rows[number] for number in np.random.default_rng(1).permutation(len(rows))]
    first = write_tables(save(tmp_path / "a", rows), tmp_path / "a" / "tables")
    second = write_tables(save(tmp_path / "b", shuffled), tmp_path / "b" / "tables")
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_csv_parses_back_to_the_same_numbers(sheets):
    for sheet in sheets.values():
        parsed = list(csv.DictReader(io.StringIO(to_csv(sheet))))
        assert len(parsed) == len(sheet.records)
        for read, record in zip(parsed, sheet.records, strict=True):
            for column, value in record.items():
                if isinstance(value, int | float):
                    assert float(read[column]) == value
                else:
                    assert read[column] == ("" if value is None else value)


def test_latex_is_balanced_and_has_its_columns(sheets):
    for sheet in sheets.values():
        text = to_latex(sheet)
        bare = text.replace("\\\\", "\n").replace("\\{", "").replace("\\}", "")
        assert bare.count("{") == bare.count("}")
        assert re.sub(r"\\\$", "", text).count("$") % 2 == 0
        opened, closed = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
        assert opened == closed[::-1]
        columns = re.search(r"\\begin\{tabular\}\{([lc]+)\}", text)[1]
        assert len(columns) == len(sheet.head)
        lines = [line for line in text.splitlines() if line.endswith("\\\\")]
        assert len(lines) == len(sheet.body) + 1
        for line in lines:
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
        body = "".join(line for line in text.splitlines() if not line.startswith("%"))
        assert not re.search(r"(?<!\\)[%#]", body)
        assert text.isascii()


@pytest.mark.parametrize("text", ['{"l1_ratio":0.1}', "50 % & $5 #1 ~a ^b \\c", "a|b < c > d ± e ≤ f – g"])
def test_latex_text_leaves_no_sign_with_a_meaning(text):
    plain = latex_text(text)
    plain = re.sub(r"\\text\w+\{\}|\$\\?\w*[<>|]?\$|\\[&%$#_{}]", "", plain)
    assert not set(plain) & set("&%$#_{}~^\\")


def test_markdown_has_as_many_cells_in_each_line(sheets):
    for sheet in sheets.values():
        lines = [line for line in to_markdown(sheet).splitlines() if line.startswith("|")]
        assert len(lines) == len(sheet.body) + 2
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(sheet.head) + 1}


def test_printed_numbers_are_the_records_rounded(sheets):
    sheet = sheets["table-4-error-by-category"]
    printed = [cell for line in sheet.body for cell in line[3:]]
    for cell, record in zip(printed, sheet.records, strict=True):
        if record["mean"] is not None:
            assert cell.startswith(f"{record['mean']:.2f} ± {record['std']:.2f}")


def test_the_paper_does_not_keep_all_its_claims():
    paper = paper_numbers(facts())
    verdicts = {
        claim.text: _verdict(claim, [paper.get(quantity, (None, None))[0] for _, quantity in claim.terms])
        for claim in claims()
    }
    assert "not measured" not in verdicts.values()
    broken = {text for text, verdict in verdicts.items() if verdict != "holds"}
    # The paper says that task arithmetic has the lowest error across all algorithms; with Lasso TIES has.
    assert broken == {"Lasso, known: error of task arithmetic ≤ linear < TIES < DARE"}


def test_a_claim_is_judged_on_what_is_printed():
    claim = next(claim for claim in claims() if claim.text.startswith("NNLS, known: error of"))
    assert _verdict(claim, [0.1014, 0.1006, 0.2, 0.3]) == "holds"
    assert _verdict(claim, [0.12, 0.10, 0.2, 0.3]) == "does not hold"
    assert _verdict(claim, [0.10, 0.2001, 0.2002, 0.3]) == "does not hold"
    assert _verdict(claim, [None, 0.2001, 0.2002, 0.3]) == "not measured"


def test_training_table_counts_seeds(sheets):
    sheet = sheets["training"]
    frame = pd.DataFrame(make_training()).groupby("task")["relative_norm"].agg(["mean", "min", "max"])
    assert [record["task"] for record in sheet.records] == [task["name"] for task in facts()["tasks"]]
    for record in sheet.records:
        assert record["seeds"] == 2
        own = frame.loc[record["task"]]
        assert record["relative_norm_mean"] == pytest.approx(own["mean"])
        assert (record["relative_norm_min"], record["relative_norm_max"]) == (own["min"], own["max"])


def test_settings_chosen_add_up_to_the_merges(rows, sheets):
    frame = pd.DataFrame(sheets["settings"].records)
    for way in WAYS:
        own = frame[(frame["coordinates"] == way.coordinates) & (frame["chosen_by"] == way.chosen_by)]
        assert own["merges"].sum() == len(expected(rows, way))


def test_mean_and_std_is_the_populations():
    values = [0.1, 0.4, 0.7, 1e-9]
    assert mean_and_std(values) == pytest.approx((np.mean(values), np.std(values)))
    assert mean_and_std([0.3]) == (0.3, 0.0)
    assert math.isclose(mean_and_std([0.1] * 10)[1], 0.0, abs_tol=1e-17)


def broken_files():
    rows = make_rows(seeds=(0,))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    first = rows[0]
    return {
        "lacks the columns heldout_error": table.drop_columns(["heldout_error"]),
        "holds no rows": table.slice(0, 0),
        "times: run the experiment again": pa.Table.from_pylist([*rows, first], schema=SCHEMA),
        "method is 'slerp'": pa.Table.from_pylist([{**first, "method": "slerp"}], schema=SCHEMA),
        "algorithm is 'svd'": pa.Table.from_pylist([{**first, "algorithm": "svd"}], schema=SCHEMA),
        "group is None": pa.Table.from_pylist([{**first, "group": None}], schema=SCHEMA),
        "error is None in a run that did not fail": pa.Table.from_pylist([{**first, "error": None}], schema=SCHEMA),
        "recall is nan": pa.Table.from_pylist([{**first, "recall": math.nan}], schema=SCHEMA),
        "7 coefficients for 8 names": pa.Table.from_pylist([{**first, "coefficients": [0.0] * 7}], schema=SCHEMA),
        "is not of this experiment": table.set_column(0, "seed", pa.array(["x"] * len(rows))),
    }


@pytest.mark.parametrize("message", list(broken_files()))
def test_a_foreign_file_is_one_clear_error(tmp_path, message):
    parquet.write_table(broken_files()[message], tmp_path / "results.parquet")
    (tmp_path / "training.json").write_text("[]")
    for write in (write_tables, write_figures):
        with pytest.raises(UnmergeError, match=re.escape(message)) as caught:
            write(tmp_path, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_missing_or_unreadable_file_is_one_clear_error(tmp_path):
    with pytest.raises(UnmergeError, match=r"results\.parquet is not there: make it with unmerge experiment run"):
        write_tables(tmp_path, tmp_path / "out")
    (tmp_path / "results.parquet").write_text("seed,target\n")
    with pytest.raises(UnmergeError, match="cannot be read as Parquet"):
        write_figures(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("text", [None, "{", "[1]", '[{"seed": 0}]'])
def test_training_that_is_missing_or_foreign_is_one_clear_error(tmp_path, rows, text):
    save(tmp_path, rows)
    (tmp_path / "training.json").unlink()
    if text is not None:
        (tmp_path / "training.json").write_text(text)
    with pytest.raises(UnmergeError, match=r"training\.json is not"):
        write_tables(tmp_path, tmp_path / "out")


def test_figures_are_the_same_bytes_and_leave_matplotlib_alone(folder, tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    first = write_figures(folder, tmp_path / "a")
    mpl.rcParams["font.size"] = 20
    second = write_figures(folder / "results.parquet", tmp_path / "b")
    assert mpl.rcParams["font.size"] == 20
    mpl.rcParams.update({"font.size": before["font.size"]})
    assert sorted(path.name for path in first) == sorted(
        f"{name}.{ending}" for name in ("coefficients", "error", "precision-recall") for ending in ("png", "svg")
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"<dc:date>" not in b"".join(path.read_bytes() for path in first)


def test_files_are_named_and_gathered(folder, tmp_path):
    written = write_tables(folder, tmp_path)
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir())
    together = (tmp_path / "tables.md").read_text()
    for path in written:
        if path.suffix == ".md" and path.name != "tables.md":
            assert path.read_text() in together
    for name in PAPER_TABLES:
        for ending in ("md", "csv", "tex"):
            assert (tmp_path / f"{name}.{ending}").is_file()
