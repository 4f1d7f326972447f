"""Train a small base and LoRA adapters on it, and merge an adapter into a full checkpoint.

Everything is real and small: a Qwen2 checkpoint in bfloat16 with a character tokenizer, PEFT adapter folders,
full checkpoints by PEFT's own merge. A fixed number of threads and explicit seeds make the bytes repeatable
on one machine.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from unmerge.errors import MissingExtraError
from unmerge.experiment.tasks import MAX_LENGTH, Example, Task, base_corpus

try:
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy
except ImportError as error:
    message = f"training needs the package {error.name}: pip install 'unmerge[experiment]'"
    raise MissingExtraError(message) from error

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The modules the paper's adapters change."""

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
CHARACTERS = ("Ċ", "Ġ", *map(chr, range(33, 127)))
"""Printable ASCII; byte-level tokenizers write the newline and the space as these two letters."""
IGNORED = -100

INITIAL_SCALE = 0.1
"""Standard deviation of the base's initial weights. Adam's steps have a fixed size, so with large weights an
adapter of a small model is as small beside them as one of a large model is: about 2 % in norm."""


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What one training run did.

    Attributes
    ----------
    loss_before, loss_after : float
        Mean cross-entropy per predicted character on held-out texts, in nats.
    relative_norm : float or None
        Frobenius norm of the change over that of the tensors it touches; None for a base.
    seconds : float
        Wall time of the whole run.
    """

    loss_before: float
    loss_after: float
    relative_norm: float | None
    seconds: float


@contextmanager
def repeatable(seed: int, threads: int) -> Iterator[torch.Generator]:
    """Fix torch's seed and threads, hide loading bars, and put all of it back afterwards."""
    bars, previous = transformers.logging.is_progress_bar_enabled(), torch.get_num_threads()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT asks transformers by a name that transformers has given up.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            yield torch.Generator().manual_seed(seed)
    finally:
        torch.set_num_threads(previous)
        if bars:
            transformers.logging.enable_progress_bar()


def character_tokenizer() -> transformers.Qwen2Tokenizer:
    """Return Qwen2's own tokenizer with one token per printable ASCII character and no merges.

    Any other class would be read back as this one, with its pre-tokenizer, because the model is a Qwen2.
    """
    tokens = (*SPECIAL_TOKENS.values(), *CHARACTERS)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], **SPECIAL_TOKENS)


def _corpus_windows(
    tokenizer: transformers.Qwen2Tokenizer, rng: np.random.Generator, count: int, length: int
) -> torch.Tensor:
    """Join corpus texts into one stream and cut it; returns token ids, shape (count, length)."""
    ids: list[int] = []
    for text in base_corpus(rng):
        ids += [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * length:
            break
    return torch.tensor(ids[: count * length]).reshape(count, length)


def _answer_batch(
    tokenizer: transformers.Qwen2Tokenizer, examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded token ids and labels, shape (examples, length); only answers are labelled."""
    width = MAX_LENGTH + 2
    inputs = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        prompt = [tokenizer.bos_token_id, *tokenizer(example.prompt + "\n")["input_ids"]]
        answer = [*tokenizer(example.answer)["input_ids"], tokenizer.eos_token_id]
        end = len(prompt) + len(answer)
        inputs[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    used = int((inputs != tokenizer.pad_token_id).sum(dim=1).max())
    return inputs[:, :used], labels[:, :used]


def _loss(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Texts are padded on the right under a causal mask, so no attention mask is needed.
    logits = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _held_out_loss(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        value = float(_loss(model, inputs, labels))
    model.train()
    return value


def _schedule(steps: int) -> Callable[[int], float]:
    """Return the learning-rate factor of a step: a short warm-up, then a straight line to zero."""
    warmup = max(1, steps // 20)
    return lambda step: min((step + 1) / warmup, (steps - step) / steps)


def _train(
    model: torch.nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps))
    for _ in range(steps):
        rows = torch.randint(len(inputs), (batch,), generator=generator)
        loss = _loss(model, inputs[rows], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()


def train_base(
    output: Path,
    *,
    seed: int,
    steps: int = 260,
    batch: int = 16,
    learning_rate: float = 3e-3,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 6,
    intermediate: int = 704,
    threads: int = 1,
) -> TrainingRecord:
    """Pre-train a small Qwen2 on the mixed corpus and write it as a bfloat16 checkpoint folder.

    Parameters
    ----------
    output : path
        Folder to write: config, safetensors weights, tokenizer.
    seed : int
        Seeds the corpus, the initial weights and the batches.
    steps, batch : int
        Optimizer steps, and windows of 64 characters in each.
    learning_rate : float
        AdamW's, at its highest.
    hidden, layers, heads, intermediate : int
        The architecture; two query heads share one key-value head.
    threads : int
        CPU threads. Another number gives other bytes. Two take half the time on an idle machine; on a busy
        one they wait for each other at every operation, and took ten times as long.

    Returns
    -------
    TrainingRecord
        Its losses are over all characters of held-out windows.
    """
    start = time.perf_counter()
    with repeatable(seed, threads) as generator:
        tokenizer = character_tokenizer()
        config = transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=2 * MAX_LENGTH,
            initializer_range=INITIAL_SCALE,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = transformers.Qwen2ForCausalLM(config)
        windows = _corpus_windows(tokenizer, np.random.default_rng(seed), 64 + steps * batch, MAX_LENGTH)
        held_out, windows = windows[:64], windows[64:]
        before = _held_out_loss(model, held_out, held_out)
        _train(
            model,
            windows,
            windows,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            generator=generator,
        )
        after = _held_out_loss(model, held_out, held_out)
        model.to(torch.bfloat16).save_pretrained(output)
        tokenizer.save_pretrained(output)
    return TrainingRecord(before, after, None, time.perf_counter() - start)


def draw_examples(task: Task, seed: int, train: int, held_out: int) -> tuple[list[Example], list[Example]]:
    """Return training and held-out examples; none of the held-out ones is trained on."""
    rng = np.random.default_rng(seed)
    tests = list(dict.fromkeys(task.example(rng) for _ in range(held_out)))
    excluded = set(tests)
    drawn = (task.example(rng) for _ in range(1000 * train))
    return list(islice((one for one in drawn if one not in excluded), train)), tests


def train_adapter(
    base: Path,
    task: Task,
    output: Path,
    *,
    seed: int,
    rank: int = 8,
    alpha: int = 16,
    target_modules: Sequence[str] = ATTENTION,
    examples: int = 512,
    steps: int = 60,
    batch: int = 16,
    learning_rate: float = 5e-4,
    threads: int = 1,
) -> TrainingRecord:
    """Fine-tune a LoRA adapter of the base on one task and write it as a PEFT adapter folder.

    Parameters
    ----------
    base : path
        Checkpoint folder that `train_base` wrote.
    task : Task
        Draws the examples; the loss is on their answers only.
    output : path
        Folder to write: ``adapter_config.json`` and ``adapter_model.safetensors``.
    seed : int
        Seeds the examples, the adapter's initial weights and the batches.
    rank, alpha : int
        The change is ``alpha / rank * B @ A``.
    target_modules : sequence of str
        The linear modules that get an adapter.
    examples, steps, batch : int
        Training examples, optimizer steps, examples in each.
    learning_rate : float
        AdamW's, at its highest.
    threads : int
        CPU threads. Another number may give other bytes.

    Returns
    -------
    TrainingRecord
        Its losses are over the answers of examples that were not trained on.
    """
    start = time.perf_counter()
    with repeatable(seed, threads) as generator:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        train, tests = draw_examples(task, seed, examples, 64)
        held_out = _answer_batch(tokenizer, tests)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(target_modules),
            task_type="CAUSAL_LM",
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        # The adapter names its base by folder name: a path of this machine would be of no use elsewhere.
        model.name_or_path = model.config.name_or_path = base.name
        model = peft.get_peft_model(model, config)
        before = _held_out_loss(model, *held_out)
        _train(
            model,
            *_answer_batch(tokenizer, train),
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            generator=generator,
        )
        after = _held_out_loss(model, *held_out)
        # PEFT holds them in a set, whose order differs from one process to the next.
        model.peft_config["default"].target_modules = sorted(target_modules)
        # Embeddings are not trained; left to itself PEFT would ask the Hub about them.
        model.save_pretrained(output, save_embedding_layers=False)
    norm = relative_delta_norm(output, base)
    return TrainingRecord(before, after, norm, time.perf_counter() - start)


def _delta_parts(adapter: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name of each base tensor that the adapter changes, and its dense change in float32."""
    config = peft.LoraConfig.from_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            B = tensors[name.replace(".lora_A.", ".lora_B.")]
            stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            yield f"{stem}.weight", config.lora_alpha / config.r * B.float() @ A.float()


def relative_delta_norm(adapter: Path, base: Path) -> float:
    """Return the Frobenius norm of an adapter's change over that of the base's tensors it touches.

    Parameters
    ----------
    adapter : path
        PEFT LoRA folder.
    base : path
        Checkpoint folder with one safetensors file.
    """
    weights = load_file(base / "model.safetensors")
    change = norm = 0.0
    for name, delta in _delta_parts(adapter):
        change += float(delta.square().sum())
        norm += float(weights[name].float().square().sum())
    return float(np.sqrt(change / norm))


def merge_adapter(base: Path, adapter: Path, output: Path) -> None:
    """Merge an adapter into its base by PEFT and write the full bfloat16 checkpoint with its tokenizer.

    Parameters
    ----------
    base, adapter : path
        Checkpoint folder and PEFT adapter folder.
    output : path
        Folder to write.
    """
    with repeatable(0, 1):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(output)
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(output)
