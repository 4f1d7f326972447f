"""The worlds of an experiment: its base, and for every seed its adapters and full checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unmerge.experiment import layout
from unmerge.experiment.datasets import load_examples
from unmerge.experiment.fine_tuning import fine_tune
from unmerge.experiment.layout import Place, write_json
from unmerge.experiment.presets import Preset
from unmerge.experiment.tasks import TASKS, Example
from unmerge.experiment.training import TrainingRecord, draw_examples, merge_adapter, train_base
from unmerge.experiment.world import part_seed, read_record, write_part

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""Of the small base's tokenizer."""


def base_folder(preset: Preset, output: Path) -> Path:
    """Return the base's checkpoint folder; a base on the Hub is downloaded once.

    Parameters
    ----------
    preset : Preset
        Says what the base is.
    output : path
        The experiment's folder, which holds a base of its own training.
    """
    if preset.base is None:
        return output / "base"
    if Path(preset.base).exists():
        return Path(preset.base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(preset.base))


def train_base_part(job: tuple[Preset, Path]) -> None:
    """Train the small base of an experiment in its folder."""
    from transformers import AutoTokenizer

    preset, output = job
    # The seeds share it: they are worlds of adapters, as in the paper, not of base models.
    seed = part_seed(0, "base")
    options = {"threads": preset.threads, **preset.base_options}

    def write(folder: Path) -> TrainingRecord:
        record = train_base(folder, seed=seed, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        return record

    write_part(output / "base", write)


def examples(preset: Preset, task: str, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the examples of a task to train on and to test on, drawn for one seed.

    Raises
    ------
    UnmergeError
        The data set cannot be read.
    """
    train = round(preset.examples * preset.train_fraction)
    if preset.sources is None:
        return draw_examples(TASKS[task], part_seed(seed, "examples"), train, preset.examples - train)
    found = load_examples(preset.sources[task], preset.examples, seed=seed)
    return found[:train], found[train:]


def train_part(preset: Preset, base: Path, place: Place, task: str) -> None:
    """Train the adapter of a task in the world of a seed."""
    train, tests = examples(preset, task, place.seed)
    # One seed for all adapters of a world, as when one script is run once per task: they start from the same
    # matrices, so the changes of related tasks overlap instead of being orthogonal by chance.
    seed = part_seed(place.seed, "adapters")
    write_part(
        place.adapter(task),
        lambda output: fine_tune(
            base,
            train,
            tests,
            output,
            training=preset.training,
            seed=seed,
            device=preset.device,
            threads=preset.threads,
        ),
    )


def merge_part(base: Path, place: Place, task: str) -> None:
    """Merge the adapter of a task into its base and keep the full bfloat16 checkpoint."""
    write_part(place.checkpoint(task), lambda output: merge_adapter(base, place.adapter(task), output))


def write_training(output: Path, seeds: Sequence[int], tasks: Sequence[str]) -> None:
    """Write how every adapter's training went, by seed and task."""
    rows = []
    for seed in seeds:
        for task in tasks:
            if not Place(output, seed).adapter(task).exists():
                continue
            record = read_record(Place(output, seed).adapter(task))
            rows.append(
                {
                    "seed": seed,
                    "task": task,
                    "loss_before": record.loss_before,
                    "loss_after": record.loss_after,
                    "relative_norm": record.relative_norm,
                }
            )
    write_json(output / layout.TRAINING, rows)
