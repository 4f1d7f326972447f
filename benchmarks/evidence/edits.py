"""What edits of the merged model do to the evidence."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.bench import Bench
from benchmarks.evidence.material import PRESET, task_of
from benchmarks.evidence.mixes import Mix, edited_mixes
from benchmarks.evidence.report import Report, Table, number, percent
from benchmarks.evidence.rows import Row, describe
from benchmarks.evidence.scoring import coverage, mean_width, score, split, undecided
from unmerge.experiment.tasks import TASKS, Example
from unmerge.experiment.world import part_seed

ABOUT = """\
Four merges of two atoms and a stranger at weights of 0.2 to 0.5, one of each method, taken apart as they are and
after every edit of the merged model: Gaussian noise of 0.1 to 5 % of a tensor's root mean square, pruning of 10 to
50 % of the smallest weights, rounding to other types and back, and 10 or 100 steps of further training on another
task at learning rates of 1e-5 and, `fast`, 1e-4. Intervals are compared with the weights before the edit. No limit
is set."""
EXAMPLES = 128
_UNEDITED = "unedited"


def plan(seed: int) -> list[Mix]:
    """Return the targets."""
    from unmerge.experiment.edits import EDITS

    return edited_mixes(list(EDITS), seed)


def measure(bench: Bench, mix: Mix, merged: Path) -> Row:
    """Edit one target and take it apart."""
    from unmerge.experiment.edits import EDITS

    words = {"edit": mix.edit or _UNEDITED}
    if mix.edit is None:
        return describe(mix, bench.examine(merged, mix), words=words)
    _add_tokenizer(bench.material.base, merged)
    with tempfile.TemporaryDirectory(prefix="evidence-") as name:
        edited = Path(name) / "edited"
        EDITS[mix.edit](merged, edited, examples_for(mix), mix.seed)
        return describe(mix, bench.examine(edited, mix), words=words)


def _add_tokenizer(base: Path, merged: Path) -> None:
    """Copy what further training needs and the merge left out."""
    for path in base.iterdir():
        if path.name != "model.safetensors" and not (merged / path.name).exists():
            shutil.copyfile(path, merged / path.name)


def examples_for(mix: Mix) -> list[Example]:
    """Draw examples to train on further, of a task that is neither in the merge nor in the dictionary."""
    from unmerge.experiment.training import draw_examples

    taken = {task_of(name) for name in (*mix.weights, *mix.dictionary)}
    task = next(task for task in PRESET.tasks if task not in taken)
    return draw_examples(TASKS[task], part_seed(mix.seed, "further training"), EXAMPLES, 0)[0]


def report(rows: Sequence[Row]) -> Report:
    """Report recall, accusations and coverage after each edit."""
    cells = []
    for edit in dict.fromkeys(row.words["edit"] for row in rows):
        own = [row for row in rows if row.words["edit"] == edit]
        found = score(own)
        inside, outside = split(own)
        cells.append(
            (
                edit,
                str(len(own)),
                percent(found.recall),
                percent(found.accused),
                str(undecided([*inside, *outside])),
                percent(coverage(inside)),
                number(mean_width(inside)),
            )
        )
    header = ("edit", "targets", "recall", "absent accused", "cannot tell", "intervals that hold", "mean width")
    return Report("Edits", ABOUT, [Table("After each edit of the merged model.", header, cells)], [])
