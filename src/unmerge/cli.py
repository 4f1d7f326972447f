"""The command line: one command per verb, no mathematics.

Exit codes: 0 done, 1 a verification that failed, 2 bad usage or bad input (one line on stderr).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from unmerge._version import __version__
from unmerge.errors import UnmergeError
from unmerge.experiment.command import app as experiment_app

if TYPE_CHECKING:
    from unmerge.dictionary import Likeness

app = typer.Typer(
    name="unmerge",
    help="Take a merged LLM checkpoint apart: which fine-tunes are inside, with what coefficients, and how sure.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
dictionary_app = typer.Typer(
    help="Build and keep dictionaries of known fine-tunes.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(dictionary_app, name="dictionary")
app.add_typer(experiment_app, name="experiment")

_ATOM_HELP = "PEFT adapter, full checkpoint or dictionary: a path, org/name@revision, or NAME=PATH."
Base = Annotated[str, typer.Option("--base", help="The model that everything was fine-tuned from: path or Hub id.")]
Atoms = Annotated[list[str], typer.Argument(metavar="ATOM", help=_ATOM_HELP)]
Pickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read .bin weights too (needs torch; loaded with weights_only)."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Threads; all cores by default. Changes no result.")
]
State = Annotated[
    Path | None,
    typer.Option("--state", help="A folder that keeps what was accumulated: a run that was stopped goes on from it."),
]
Folder = Annotated[Path, typer.Argument(metavar="DICT", help="The dictionary's folder.")]


def main() -> None:
    """Run the command line; errors meant for users become one line and exit code 2."""
    try:
        app()
    except UnmergeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"unmerge {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def attribute(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="The merged model (or adapter): a path or org/name@revision; or @FILE, a list with one a line.",
        ),
    ],
    atoms: Atoms,
    base: Base,
    more_targets: Annotated[
        list[str] | None, typer.Option("--target", help="Another target, or @FILE; may be repeated. Needs --output.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="A folder for many targets: a JSON document for each, and results.parquet."),
    ] = None,
    solver: Annotated[str, typer.Option(help="nnls, omp, lasso, ridge, elastic_net or dot_product.")] = "nnls",
    signed: Annotated[bool, typer.Option("--signed", help="Allow negative coefficients (task negation).")] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Read every tensor whole and compare every atom; by default, large tensors that no atom changes are "
            "sampled, of large dictionaries only atoms that show in sketches are compared, and full checkpoints in "
            "dictionaries are compared in their leading directions.",
        ),
    ] = False,
    float64: Annotated[
        bool,
        typer.Option("--float64", help="Compute large tensors in float64 throughout: equal to 1e-9, not 1e-8; slower."),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Compute large tensors by torch (extra) on cuda, cuda:1, mps or cpu."),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            "--precision",
            help="Read blocks of rows at random until every interval is this narrow to either side: 0.01.",
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Read no more than this, in the same way: 200MB, 1.5GB or 5s.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="Compare the paper's top-k coordinates only (it used 1000000)."),
    ] = None,
    decoys: Annotated[
        int, typer.Option("--decoys", min=0, help="Add this many atoms that cannot be present; count the accused.")
    ] = 0,
    other_base: Annotated[
        list[str] | None,
        typer.Option("--other-base", help="Say if the target is nearer to this model than to BASE; may be repeated."),
    ] = None,
    extract: Annotated[
        Path | None,
        typer.Option("--extract", help="Write what no component explains as a PEFT adapter to this new folder."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Rank of the extracted adapter; by default, the estimated one.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show coefficients by layer and by module.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")] = False,
    state: State = None,
    backend: Annotated[
        str, typer.Option("--backend", help="Where the work is done: threads, dask or ray.")
    ] = "threads",
    address: Annotated[
        str | None,
        typer.Option("--address", help="The cluster's: tcp://scheduler:8786, head:6379. By default, a local one."),
    ] = None,
    workers: Workers = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
) -> None:
    """Say which of the known fine-tunes are inside TARGET, and with what coefficients.

    With --output, of many targets: exit code 2 if one of them could not be used; the others are answered.
    """
    # Imported here so that --help and --version answer at once.
    import unmerge
    from unmerge.report.progress import progress_bar
    from unmerge.report.terminal import print_result

    options: dict[str, Any] = {
        "base": base, "solver": solver, "signed": signed, "exact": exact, "float64": float64, "device": device,
        "precision": precision, "budget": budget, "top_k": top_k, "decoys": decoys, "other_bases": other_base or (),
        "allow_pickle": allow_pickle, "workers": workers, "state": state,
    }  # fmt: skip
    if output is not None or more_targets or target.startswith("@"):
        _refuse_with_many(output, json=json, layers=layers, extract=extract)
        targets = [name for given in (target, *(more_targets or ())) for name in _listed(given)]
        with unmerge.on_cluster(backend, address, workers=workers):
            _attribute_many(targets, atoms, options | {"output": output}, quiet=quiet)
        return
    with (
        unmerge.on_cluster(backend, address, workers=workers),
        progress_bar(Console(stderr=True), enabled=not quiet) as start,
    ):
        result = unmerge.attribute(target, atoms, **options, extract_to=extract, extract_rank=rank, start=start)
    if json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        print_result(result, Console(), layers=layers)


def _refuse_with_many(output: Path | None, *, json: bool, layers: bool, extract: Path | None) -> None:
    if output is None:
        raise UnmergeError("several targets: give a folder for the answers with --output")
    for given, name in ((json, "--json"), (layers, "--layers"), (extract is not None, "--extract")):
        if given:
            raise UnmergeError(f"{name} is for one target; with --output, documents are written to {output}")


def _listed(target: str) -> list[str]:
    from unmerge.survey import read_targets

    return read_targets(Path(target[1:])) if target.startswith("@") else [target]


def _attribute_many(targets: list[str], atoms: list[str], options: dict[str, Any], *, quiet: bool) -> None:
    import unmerge
    from unmerge.report.progress import progress_bar

    console = Console(stderr=True)

    def tell(number: int, count: int, target: str) -> None:
        if not quiet:
            console.print(f"target {number} of {count}: {target}", markup=False, highlight=False, soft_wrap=True)

    with progress_bar(console, enabled=not quiet) as start:
        answers = unmerge.attribute_many(targets, atoms, **options, tell=tell, start=start)
    for answer in answers:
        if answer.error is None:
            sys.stdout.write(f"{answer.target}: {answer.verdict}\n")
        else:
            sys.stderr.write(f"error: {answer.error}\n")
    if any(answer.error for answer in answers):
        raise typer.Exit(2)


@app.command()
def recipe(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The merged model: a path or org/name@revision.")],
    atoms: Atoms,
    base: Base,
    output: Annotated[Path, typer.Option("--output", help="Where to write the recipe, as mergekit's YAML.")],
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            help="How many seeds of random masks to test: a number, 0 for none, or 'all' (4294967296, some minutes).",
        ),
    ] = "1048576",
    state: Annotated[
        Path | None,
        typer.Option("--seed-state", help="A file that keeps how far the search for seeds is, to go on from."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")] = False,
    quiet: Quiet = False,
) -> None:
    """Recover the recipe that TARGET was merged by, and prove it by making the merge again.

    Exit code 0 if the recipe makes the target's values, 1 if it does not.
    """
    from unmerge.recipe.recovery import Search, recover, seed_count
    from unmerge.report.progress import step_bars
    from unmerge.report.recovery import print_recovery

    search = Search(seed_count(seeds), state)
    with step_bars(Console(stderr=True), enabled=not quiet) as start:
        result = recover(target, atoms, base=base, search=search, start=start)
    result.write(output)
    if json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        print_recovery(result, Console())
    raise typer.Exit(result.exit_code)


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The merged model: a path or org/name@revision.")],
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="The recipe: YAML, or a model card or folder with one. By default the one beside the weights.",
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            metavar="ATOM",
            help="Another known fine-tune, to name if it stands in a member's place; may be repeated.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="mergekit's --random-seed, for merges with random masks.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")] = False,
    quiet: Quiet = False,
) -> None:
    """Say whether a published mergekit recipe makes TARGET, and if not, which claim is wrong.

    Exit code 0: it does; 1: it does not; 2: it cannot be told, or bad input.
    """
    from unmerge.recipe.verify import verify as verify_recipe
    from unmerge.report.progress import step_bars
    from unmerge.report.verification import print_verification

    with step_bars(Console(stderr=True), enabled=not quiet) as start:
        result = verify_recipe(target, recipe_file, seed=seed, candidates=candidate or (), start=start)
    if json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        print_verification(result, Console())
    if result.exit_code:
        raise typer.Exit(result.exit_code)


@dictionary_app.command("build")
def dictionary_build(
    folder: Folder,
    atoms: Atoms,
    base: Base,
    state: State = None,
    workers: Workers = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
) -> None:
    """Build a dictionary of known fine-tunes of one base."""
    from unmerge import dictionary

    _run(dictionary.build, folder, atoms, base, state, workers, allow_pickle, quiet)
    _show(dictionary.likeness(folder, dictionary.open_base(base, allow_pickle=allow_pickle)))


@dictionary_app.command("add")
def dictionary_add(
    folder: Folder,
    atoms: Atoms,
    base: Base,
    state: State = None,
    workers: Workers = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
) -> None:
    """Add fine-tunes to a dictionary, computing only what is new."""
    from unmerge import dictionary

    names = _run(dictionary.add, folder, atoms, base, state, workers, allow_pickle, quiet)
    _show(dictionary.likeness(folder, dictionary.open_base(base, allow_pickle=allow_pickle), names))


def _run(
    verb: Callable[..., tuple[str, ...]],
    folder: Path,
    atoms: list[str],
    base: str,
    state: Path | None,
    workers: int | None,
    allow_pickle: bool,
    quiet: bool,
) -> tuple[str, ...]:
    import os

    from unmerge.report.progress import progress_bar

    with progress_bar(Console(stderr=True), enabled=not quiet) as start:
        threads = workers or os.cpu_count() or 1
        return verb(folder, atoms, base, allow_pickle=allow_pickle, workers=threads, start=start, state=state)


def _show(likeness: Likeness) -> None:
    from unmerge.report.terminal import render_dictionary

    Console().print(render_dictionary(likeness))


@dictionary_app.command("show")
def dictionary_show(
    folder: Folder,
    base: Annotated[
        str | None, typer.Option("--base", help="The base, if it is not where the dictionary says.")
    ] = None,
    allow_pickle: Pickle = False,
) -> None:
    """Show the atoms of a dictionary and how alike they are."""
    from unmerge import dictionary

    manifest = dictionary.read_manifest(folder)
    opened = dictionary.open_base(base or dictionary.manifest_base(manifest), allow_pickle=allow_pickle)
    _show(dictionary.likeness(folder, opened))


@dictionary_app.command("verify")
def dictionary_verify(
    folder: Folder,
    base: Annotated[
        str | None, typer.Option("--base", help="The base, if it is not where the dictionary says.")
    ] = None,
) -> None:
    """Check the digests of a dictionary and the fingerprint of its base; exit code 1 if one is wrong."""
    from unmerge import dictionary

    faults = dictionary.verify(folder, base)
    for fault in faults:
        sys.stdout.write(f"{fault}\n")
    if faults:
        raise typer.Exit(1)
    sys.stdout.write(f"{folder}: all digests are right\n")
