"""The command line as its users meet it: a process, its exit code, stdout and stderr."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Shelf
from unmerge.result import Attribution
from unmerge.testing import tiny_model, write_adapter, write_checkpoint

Run = subprocess.CompletedProcess[str]


def run(*arguments: str, cwd: Path | None = None) -> Run:
    command = [sys.executable, "-m", "unmerge", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_table_says_what_is_inside(shelf: Shelf) -> None:
    found = run("attribute", shelf.path("merge"), *shelf.paths("add", "sub", "json", "xml"), "--base", shelf.base)
    assert found.returncode == 0
    assert found.stderr == ""
    for text in ("+0.6000", "+0.3000", "add", "2 components present", "Compared 28,960 parameters"):
        assert text in found.stdout
    assert "what resembles it raises too" in " ".join(found.stdout.split())


def test_json_is_one_document_of_the_schema_and_nothing_else(shelf: Shelf) -> None:
    arguments = ("attribute", shelf.path("merge"), *shelf.paths("add", "sub"), "--base", shelf.base, "--json")
    found = run(*arguments)
    assert found.returncode == 0
    assert found.stderr == ""
    document = json.loads(found.stdout)
    assert document["schema"] == "unmerge/attribution/1"
    assert [component["name"] for component in document["components"]] == ["add", "sub"]
    assert Attribution.model_validate_json(found.stdout).to_json() + "\n" == found.stdout
    assert run(*arguments).stdout == found.stdout


def test_the_order_of_atoms_changes_no_byte(shelf: Shelf) -> None:
    names = ["add", "full", "json", "sub"]
    options = ("--base", shelf.base, "--json")
    first = run("attribute", shelf.path("merge"), *shelf.paths(*names), *options)
    second = run("attribute", shelf.path("merge"), *shelf.paths(*names[::-1]), *options, "--workers", "3")
    assert first.returncode == 0
    assert first.stdout == second.stdout


def test_signed_coefficients_on_request(shelf: Shelf) -> None:
    target = shelf.merge("negated", add=0.7, sub=-0.4)
    arguments = ("attribute", target, *shelf.paths("add", "sub"), "--base", shelf.base, "--json")
    plain, signed = (json.loads(run(*arguments, *more).stdout) for more in ((), ("--signed",)))
    assert min(component["coefficient"] for component in plain["components"]) >= 0.0
    found = {component["name"]: component["coefficient"] for component in signed["components"]}
    assert found == pytest.approx({"add": 0.7, "sub": -0.4}, abs=1e-5)


@pytest.mark.parametrize("solver", ["nnls", "omp", "lasso", "ridge", "elastic_net", "dot_product"])
def test_every_solver_runs(shelf: Shelf, solver: str) -> None:
    found = run(
        "attribute",
        shelf.path("merge"),
        *shelf.paths("add", "json"),
        "--base",
        shelf.base,
        "--solver",
        solver,
        "--json",
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["method"]["solver"] == solver


def test_layers_and_top_k(shelf: Shelf) -> None:
    found = run(
        "attribute",
        shelf.path("merge"),
        *shelf.paths("add", "json"),
        "--base",
        shelf.base,
        "--layers",
        "--top-k",
        "800",
    )
    assert found.returncode == 0, found.stderr
    for text in ("by layer", "by module", "self_attn.q_proj", "top 800 by max |d_i|"):
        assert text in found.stdout


def test_duplicate_adapters_are_told_apart_from_nothing(shelf: Shelf) -> None:
    shutil.copytree(shelf.path("add"), shelf.path("copy"))
    found = run("attribute", shelf.path("merge"), *shelf.paths("add", "copy", "json"), "--base", shelf.base)
    assert found.returncode == 0
    assert "cannot tell" in found.stdout
    assert "add, copy" in found.stdout


def test_dictionaries_are_built_shown_grown_and_verified(shelf: Shelf, tmp_path: Path) -> None:
    folder = str(tmp_path / "known")
    assert run("dictionary", "build", folder, *shelf.paths("add", "sub"), "--base", shelf.base).returncode == 0
    assert run("dictionary", "add", folder, shelf.path("json"), "--base", shelf.base).returncode == 0
    shown = run("dictionary", "show", folder)
    assert shown.returncode == 0, shown.stderr
    for text in ("add", "sub", "json", "adapter", "Coherence"):
        assert text in shown.stdout
    assert run("dictionary", "verify", folder).returncode == 0
    shutil.rmtree(Path(folder) / "gram")
    broken = run("dictionary", "verify", folder)
    assert broken.returncode == 1
    assert "atom add: its inner products are missing or changed" in broken.stdout


Spoil = Callable[[Shelf], tuple[str, list[str], str]]


def missing(shelf: Shelf) -> tuple[str, list[str], str]:
    return shelf.path("nowhere"), shelf.paths("add"), shelf.base


def missing_atom(shelf: Shelf) -> tuple[str, list[str], str]:
    return shelf.path("merge"), ["./nowhere"], shelf.base


def empty_folder(shelf: Shelf) -> tuple[str, list[str], str]:
    (shelf.folder / "empty").mkdir()
    return shelf.path("empty"), shelf.paths("add"), shelf.base


def truncated(shelf: Shelf) -> tuple[str, list[str], str]:
    file = shelf.folder / "merge" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return shelf.path("merge"), shelf.paths("add"), shelf.base


def absurd_header(shelf: Shelf) -> tuple[str, list[str], str]:
    (shelf.folder / "merge" / "model.safetensors").write_bytes(b"\xff" * 64)
    return shelf.path("merge"), shelf.paths("add"), shelf.base


def not_finite(shelf: Shelf) -> tuple[str, list[str], str]:
    weights = {**shelf.model, "model.norm.weight": np.full(32, np.nan)}
    return str(write_checkpoint(shelf.folder / "nan", weights)), shelf.paths("add"), shelf.base


def wrong_base(shelf: Shelf) -> tuple[str, list[str], str]:
    stranger = write_checkpoint(shelf.folder / "stranger", tiny_model(np.random.default_rng(1)))
    return shelf.path("merge"), shelf.paths("add"), str(stranger)


def another_depth(shelf: Shelf) -> tuple[str, list[str], str]:
    deep = write_checkpoint(shelf.folder / "deep", tiny_model(np.random.default_rng(1), layers=5))
    return shelf.path("merge"), shelf.paths("add"), str(deep)


def another_width(shelf: Shelf) -> tuple[str, list[str], str]:
    wide = write_checkpoint(shelf.folder / "wide", tiny_model(np.random.default_rng(1), hidden=64))
    return str(wide), shelf.paths("add"), shelf.base


def foreign_adapter(shelf: Shelf) -> tuple[str, list[str], str]:
    write_adapter(shelf.folder / "foreign", np.random.default_rng(1), tiny_model(np.random.default_rng(1), hidden=64))
    return shelf.path("merge"), shelf.paths("foreign"), shelf.base


def zero_adapter(shelf: Shelf) -> tuple[str, list[str], str]:
    write_adapter(shelf.folder / "zero", np.random.default_rng(1), shelf.model, size=0.0)
    return shelf.path("merge"), shelf.paths("add", "zero"), shelf.base


def same_name(shelf: Shelf) -> tuple[str, list[str], str]:
    return shelf.path("merge"), [shelf.path("add"), f"add={shelf.path('sub')}"], shelf.base


def nothing_done(shelf: Shelf) -> tuple[str, list[str], str]:
    return str(write_checkpoint(shelf.folder / "same", shelf.model)), shelf.paths("add"), shelf.base


def not_cached(shelf: Shelf) -> tuple[str, list[str], str]:
    return "some-org/some-merge", shelf.paths("add"), shelf.base


def adapter_as_base(shelf: Shelf) -> tuple[str, list[str], str]:
    return shelf.path("merge"), shelf.paths("add"), shelf.path("sub")


def dictionary_of_nothing(shelf: Shelf) -> tuple[str, list[str], str]:
    (shelf.folder / "d").mkdir()
    (shelf.folder / "d" / "manifest.json").write_text("{}")
    return shelf.path("merge"), shelf.paths("d"), shelf.base


def nested_adapter(shelf: Shelf) -> tuple[str, list[str], str]:
    shutil.copytree(shelf.path("add"), shelf.folder / "outer" / "inner")
    return shelf.path("merge"), shelf.paths("outer"), shelf.base


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, "no such file or folder"),
        (missing_atom, "no such file or folder"),
        (empty_folder, "not a model"),
        (truncated, "cut short"),
        (absurd_header, "its header claims"),
        (not_finite, "tensor 'model.norm.weight' has NaN at row 0, column 0"),
        (wrong_base, "wrong base"),
        (another_depth, "target has 2 layers, the base has 5"),
        (another_width, "another architecture or width"),
        (foreign_adapter, "an adapter of another model"),
        (zero_adapter, "zero: changes nothing"),
        (same_name, "two atoms are called 'add'"),
        (nothing_done, "the merge did nothing"),
        (not_cached, "not in the Hub cache while offline"),
        (adapter_as_base, "an adapter, not a base model"),
        (dictionary_of_nothing, "schema None; this version reads"),
        (nested_adapter, "the adapter is in a folder below it; give"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(shelf: Shelf, spoil: Spoil, message: str) -> None:
    target, atoms, base = spoil(shelf)
    before = snapshot(shelf.folder)
    for more in ((), ("--json",)):
        found = run("attribute", target, *atoms, "--base", base, *more)
        assert found.returncode == 2, found.stdout
        assert found.stdout == ""
        assert found.stderr.startswith("error: ")
        assert message in found.stderr
        assert found.stderr.count("\n") == 1
    built = run("dictionary", "build", str(shelf.folder / "made"), *atoms, target, "--base", base)
    assert built.returncode in {0, 2}
    assert built.returncode == 2 or spoil is adapter_as_base or (shelf.folder / "made" / "manifest.json").exists()
    if built.returncode == 2:
        assert snapshot(shelf.folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attribute",), "Missing argument 'TARGET'"),
        (("attribute", "x", "y"), "Missing option '--base'"),
        (("attribute", "x", "--base", "z"), "Missing argument 'ATOM'"),
        (("atribute",), "No such command 'atribute'"),
        (("attribute", "x", "y", "--base", "z", "--workers", "0"), "--workers"),
    ],
)
def test_bad_usage_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    found = run(*arguments)
    assert found.returncode == 2
    assert found.stdout == ""
    assert message in found.stderr


def test_an_unknown_solver_is_named(shelf: Shelf) -> None:
    found = run("attribute", shelf.path("merge"), shelf.path("add"), "--base", shelf.base, "--solver", "magic")
    assert found.returncode == 2
    assert found.stderr == (
        "error: unknown solver 'magic'; expected one of dot_product, elastic_net, lasso, nnls, omp, ridge\n"
    )


@pytest.mark.parametrize(
    "command", [(), ("attribute",), ("dictionary",), ("dictionary", "build"), ("dictionary", "show")]
)
def test_help(command: tuple[str, ...]) -> None:
    found = run(*command, "--help")
    assert found.returncode == 0
    assert "Usage: " in found.stdout


def test_version() -> None:
    import unmerge

    assert run("--version").stdout == f"unmerge {unmerge.__version__}\n"
