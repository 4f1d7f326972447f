"""Fine-tune a LoRA adapter on (prompt, answer) examples: the same code for the small base and for the paper's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from unmerge.checkpoint.tensor import values
from unmerge.dictionary import combine, open_atom, open_base
from unmerge.errors import MissingExtraError, UnmergeError
from unmerge.experiment.presets import Training
from unmerge.experiment.tasks import Example
from unmerge.experiment.training import IGNORED, TrainingRecord, repeatable

try:
    import peft
    import torch
    import transformers
    from torch.nn.functional import cross_entropy
except ImportError as error:
    message = f"training needs the package {error.name}: pip install 'unmerge[experiment]'"
    raise MissingExtraError(message) from error

Encoded = tuple[list[int], list[int]]
"""Token ids and labels of one example, of one length; only answers are labelled."""


def fine_tune(
    base: Path,
    train: Sequence[Example],
    tests: Sequence[Example],
    output: Path,
    *,
    training: Training,
    seed: int,
    device: str = "cpu",
    threads: int = 1,
    snapshots: Mapping[int, Path] | None = None,
) -> TrainingRecord:
    """Train a LoRA adapter on the answers to prompts and write it as a PEFT adapter folder.

    Parameters
    ----------
    base : path
        Checkpoint folder with a tokenizer.
    train, tests : sequence of Example
        What is trained on, and what the losses are measured on.
    output : path
        Folder to write: ``adapter_config.json`` and ``adapter_model.safetensors``.
    training : Training
        Hyper-parameters.
    seed : int
        Seeds the adapter's initial weights, its dropout and the order of the examples.
    device : str
        torch's name of the device.
    threads : int
        CPU threads. Another number may give other bytes.
    snapshots : mapping of int to path, optional
        Folders to write the adapter to after that many epochs: earlier checkpoints of the same run.

    Returns
    -------
    TrainingRecord
        Its losses are in nats per token of the test answers.

    Raises
    ------
    UnmergeError
        There is nothing to train or to test on.
    """
    if not train or not tests:
        raise UnmergeError(f"{len(train)} examples to train on and {len(tests)} to test on: give at least one of each")
    start = time.perf_counter()
    with repeatable(seed, threads) as generator:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        rows = [encode(tokenizer, one, chat=training.chat, max_length=training.max_length) for one in train]
        held_out = [encode(tokenizer, one, chat=training.chat, max_length=training.max_length) for one in tests]
        model = _adapted(base, training).to(device)
        before = _held_out_loss(model, held_out, training)
        # PEFT holds them in a set, whose order differs from one process to the next.
        model.peft_config["default"].target_modules = sorted(training.target_modules)
        wanted = snapshots or {}
        for epoch in _train(model, rows, training, generator):
            if epoch in wanted:
                _save(model, wanted[epoch])
        after = _held_out_loss(model, held_out, training)
        _save(model, output)
    return TrainingRecord(before, after, relative_norm(output, base), time.perf_counter() - start)


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase, example: Example, *, chat: bool, max_length: int
) -> Encoded:
    """Return token ids and labels of one example, at most `max_length` of each.

    Too long a prompt is cut at its end, inside the chat template; an answer gets half of the length at most.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        With a chat template if `chat`.
    example : Example
        A prompt and its answer.
    chat : bool
        Put the prompt into the chat template; otherwise it follows the first token and ends in a newline.
    max_length : int
        Tokens.
    """
    answer = [*_ids(tokenizer, example.answer), tokenizer.eos_token_id][: max_length // 2]
    prompt = _prompt(tokenizer, example.prompt, chat=chat)
    excess = len(prompt) + len(answer) - max_length
    if excess > 0:
        kept = _ids(tokenizer, example.prompt)[: -excess or None]
        # Text that was cut between tokens may be encoded into more of them again.
        prompt = _prompt(tokenizer, tokenizer.decode(kept), chat=chat)[: max_length - len(answer)]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def _ids(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prompt(tokenizer: transformers.PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    if not chat:
        return [tokenizer.bos_token_id, *_ids(tokenizer, text + "\n")]
    messages = [{"role": "user", "content": text}]
    return _ids(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _save(model: torch.nn.Module, output: Path) -> None:
    # Embeddings are not trained; left to itself PEFT would ask the Hub about them.
    model.save_pretrained(output, save_embedding_layers=False)


def _adapted(base: Path, training: Training) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, training.dtype))
    # The adapter names its base by folder name: a path of this machine would be of no use elsewhere.
    model.name_or_path = model.config.name_or_path = base.name
    config = peft.LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=list(training.target_modules),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def _collate(rows: Sequence[Encoded], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels padded on the right, shape (rows, longest)."""
    width = max(len(ids) for ids, _ in rows)
    # Under a causal mask what stands behind a text changes nothing, so the padding may be any token.
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return inputs.to(device), labels.to(device)


def _loss(model: torch.nn.Module, rows: Sequence[Encoded], training: Training, reduction: str) -> torch.Tensor:
    device = next(model.parameters()).device
    inputs, labels = _collate(rows, device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.dtype == "bfloat16"):
        logits = model(input_ids=inputs, use_cache=False).logits
    flat = logits[:, :-1].float().flatten(0, 1)
    return cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction)


def _held_out_loss(model: torch.nn.Module, rows: Sequence[Encoded], training: Training) -> float:
    model.eval()
    with torch.no_grad():
        total = sum(float(_loss(model, part, training, "sum")) for part in _chunks(rows, training.batch))
    model.train()
    return total / sum(label != IGNORED for _, labels in rows for label in labels)


def _chunks(rows: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _train(
    model: torch.nn.Module, rows: Sequence[Encoded], training: Training, generator: torch.Generator
) -> Iterator[int]:
    """Train, and yield the number of epochs done after each."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    per_step = training.batch * training.accumulation
    steps = training.epochs * -(-len(rows) // per_step)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    warmup = min(training.warmup_steps, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))
    )
    for epoch in range(training.epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for step in _chunks([rows[index] for index in order], per_step):
            for part in _chunks(step, training.batch):
                loss = _loss(model, part, training, "mean") * (len(part) / len(step))
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        yield epoch + 1


def relative_norm(adapter: Path, base: Path) -> float:
    """Return the Frobenius norm of an adapter's change over that of the base's tensors it touches.

    Nothing is multiplied out and one block of rows is read at a time, whatever the size of the base.

    Parameters
    ----------
    adapter, base : path
        PEFT adapter folder and checkpoint folder.
    """
    origin = open_base(str(base))
    atom = open_atom(str(adapter), origin, name="adapter")
    change = combine(origin, [atom]).total_gram[0, 0]
    weights = (values(origin.checkpoint.tensors[name]) for name in atom.vector.deltas)
    return float(np.sqrt(change / sum(float(np.vdot(tensor, tensor)) for tensor in weights)))
