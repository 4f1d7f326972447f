"""What the experiment runs on: a model and data of this project's own, or the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unmerge.experiment import paper
from unmerge.experiment.paper import Composition, Source


@dataclass(frozen=True, slots=True)
class Training:
    """How one adapter is trained.

    Attributes
    ----------
    rank, alpha : int
        The change is ``alpha / rank * B @ A``.
    dropout : float
        On the adapter's inputs while training.
    target_modules : tuple of str
        The linear modules that get an adapter.
    learning_rate : float
        AdamW's, at its highest; it rises over `warmup_steps` and falls to zero in a straight line.
    epochs, batch, accumulation, warmup_steps : int
        An optimizer step sees ``batch * accumulation`` examples.
    max_length : int
        Tokens of prompt and answer together, at most; a longer prompt is cut at its end.
    dtype : str
        ``bfloat16`` holds the base in it and computes with autocast; ``float32`` computes in single precision.
    chat : bool
        Put the prompt into the tokenizer's chat template.
    """

    rank: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    learning_rate: float
    epochs: int
    batch: int
    accumulation: int
    warmup_steps: int
    max_length: int
    dtype: Literal["bfloat16", "float32"]
    chat: bool


@dataclass(frozen=True, slots=True)
class Preset:
    """One experiment.

    Attributes
    ----------
    name : str
        What the command line calls it.
    base : str or None
        Hub id or folder of the base; None trains a small one.
    base_options : mapping
        Options of `unmerge.experiment.training.train_base` that differ from their defaults.
    sources : mapping of str to Source, or None
        Data sets by task; None generates `unmerge.experiment.tasks.TASKS`.
    training : Training
        Of every adapter.
    examples : int
        Per task.
    train_fraction : float
        Share of the examples to train on; the losses are over the others.
    tasks, dictionary : tuple of str
        Tasks to train, and those whose adapters are the atoms.
    compositions : tuple of Composition
        What to merge.
    methods : mapping of str to mapping
        mergekit's methods and their options.
    top_k : int
        The paper's number of coordinates, over all tensors.
    device : str
        torch's name of the device to train on.
    workers : int
        Processes that train and merge.
    threads : int
        CPU threads in each.
    keep_checkpoints : bool
        Whether the full checkpoints stay on disk when a seed is done.
    """

    name: str
    base: str | None
    base_options: Mapping[str, Any]
    sources: Mapping[str, Source] | None
    training: Training
    examples: int
    train_fraction: float
    tasks: tuple[str, ...]
    dictionary: tuple[str, ...]
    compositions: tuple[Composition, ...]
    methods: Mapping[str, Mapping[str, Any]]
    top_k: int
    device: str
    workers: int
    threads: int
    keep_checkpoints: bool


def _paper_training() -> Training:
    found = paper.facts()["training"]
    return Training(
        rank=found["lora_rank"],
        alpha=found["lora_alpha"],
        dropout=found["lora_dropout"],
        target_modules=tuple(found["target_modules"]),
        learning_rate=found["learning_rate"],
        epochs=found["epochs"],
        batch=found["batch_size"],
        accumulation=found["gradient_accumulation"],
        warmup_steps=found["warmup_steps"],
        max_length=found["max_length"],
        dtype=found["dtype"],
        chat=True,
    )


def _qwen() -> Preset:
    training = paper.facts()["training"]
    return Preset(
        name="qwen2.5-7b",
        base=training["base_model"],
        base_options={},
        sources=paper.sources(),
        training=_paper_training(),
        examples=training["examples_per_task"],
        train_fraction=training["train_fraction"],
        tasks=paper.tasks(),
        dictionary=paper.dictionary(),
        compositions=paper.compositions(),
        methods=paper.facts()["merging"]["methods"],
        top_k=1_000_000,
        device="cuda",
        workers=1,
        threads=8,
        keep_checkpoints=False,
    )


def _micro() -> Preset:
    return Preset(
        name="micro",
        base=None,
        # Wide enough that task vectors do not overlap by the smallness of the model alone: at 192 columns NNLS
        # gives absent atoms of TIES merges up to 0.0125 in the paper's coordinates, over its cut of 0.01.
        base_options={"hidden": 320, "intermediate": 960, "heads": 10, "steps": 250},
        sources=None,
        # The paper's learning rate makes the change about 1 % of the weights here too. Learning to answer in the
        # template, which the base has never seen, is common to all adapters: without it their task vectors are
        # orthogonal (no cosine over 0.06), and a mixed merge is easier than the paper's.
        training=Training(
            rank=8,
            alpha=16,
            dropout=0.05,
            target_modules=tuple(paper.facts()["training"]["target_modules"]),
            learning_rate=2e-4,
            epochs=3,
            batch=16,
            accumulation=1,
            warmup_steps=3,
            max_length=128,
            dtype="float32",
            chat=True,
        ),
        examples=356,
        train_fraction=0.9,
        tasks=paper.tasks(),
        dictionary=paper.dictionary(),
        compositions=paper.compositions(),
        methods=paper.facts()["merging"]["methods"],
        # 30 % of the 1,228,800 parameters compared; the paper takes 0.12 % of 822 million. The noise that DARE and
        # TIES leave in a coefficient falls with the root of the number of coordinates, not with their share: the
        # paper's share would be 1,475 here, and absent atoms would pass the paper's cut.
        top_k=368_640,
        device="cpu",
        workers=2,
        threads=1,
        keep_checkpoints=True,
    )


PRESETS: dict[str, Preset] = {preset.name: preset for preset in (_micro(), _qwen())}
"""The presets by name."""
