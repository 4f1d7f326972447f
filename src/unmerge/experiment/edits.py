"""What people do to a merge afterwards: noise, pruning, quantisation, further training.

Each edit reads a checkpoint folder and writes another one of the same files, tensors and shapes, in bfloat16. The
new folder appears under its name once it is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from unmerge.errors import MissingExtraError, UnmergeError
from unmerge.experiment.fine_tuning import encode
from unmerge.experiment.tasks import Example
from unmerge.experiment.training import IGNORED, repeatable
from unmerge.experiment.world import write_part

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
except ImportError as error:
    message = f"editing a checkpoint needs the package {error.name}: pip install 'unmerge[experiment]'"
    raise MissingExtraError(message) from error

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""A tensor's name and its values in float32, to its new values."""
Edit = Callable[[Path, Path, Sequence[Example], int], None]
"""Source folder, output folder, examples to train on, seed; an edit uses of the last two what it needs."""
Kind = Literal["fp8", "int8", "nf4"]

KEPT = ("*.json", "*.model", "*.jinja", "*.txt")
"""Configuration and tokenizer: whatever is neither weights nor the record of a merge or a training."""
RECORDS = ("training.json", "mergekit_config.yml")
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Two-dimensional weights that quantisation leaves alone."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The code book of 4-bit NormalFloat, from the appendix of QLoRA (arXiv:2305.14314)."""
NF4_BLOCK = 64
BATCH = 8
"""Examples in each optimizer step."""
MAX_LENGTH = 512
"""Tokens of an example."""


def add_noise(source: Path, output: Path, relative: float, generator: torch.Generator) -> None:
    """Add Gaussian noise to every tensor.

    Parameters
    ----------
    source, output : path
        Checkpoint folder, and the folder to write.
    relative : float
        Standard deviation of the noise over the tensor's root mean square.
    generator : torch.Generator
        Draws it, tensor by tensor in the order of their names.
    """

    def change(_: str, values: torch.Tensor) -> torch.Tensor:
        size = values.square().mean().sqrt()
        return values + relative * size * torch.randn(values.shape, generator=generator)

    _rewrite(source, output, change)


def prune(source: Path, output: Path, share: float) -> None:
    """Set the smallest elements of each two-dimensional weight to zero.

    Parameters
    ----------
    source, output : path
        Checkpoint folder, and the folder to write.
    share : float
        Share of each weight's elements, between 0 and 1. Of equal elements the first go first.

    Raises
    ------
    UnmergeError
        The share is not between 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise UnmergeError(f"share is {share}: give a number between 0 and 1")

    def change(_: str, values: torch.Tensor) -> torch.Tensor:
        if values.ndim != 2:
            return values
        pruned = values.flatten()
        smallest = pruned.abs().argsort(stable=True)[: round(share * pruned.numel())]
        return pruned.index_fill(0, smallest, 0.0).reshape(values.shape)

    _rewrite(source, output, change)


def round_trip(source: Path, output: Path, kind: Kind) -> None:
    """Quantise the linear weights and write what they are read back as.

    Embeddings, the output layer, norms and biases stay as they are.

    Parameters
    ----------
    source, output : path
        Checkpoint folder, and the folder to write.
    kind : {"fp8", "int8", "nf4"}
        E4M3 floating point with one scale per tensor; 8-bit integers with one scale per output row; 4-bit
        NormalFloat with one scale per 64 elements. A scale maps the largest magnitude to the largest code.

    Raises
    ------
    UnmergeError
        The kind is none of these.

    References
    ----------
    Micikevicius et al., FP8 formats for deep learning, arXiv:2209.05433. Dettmers et al., LLM.int8(),
    arXiv:2208.07339. Dettmers et al., QLoRA, arXiv:2305.14314, whose second quantisation, of the scales, is left
    out.
    """
    if kind not in ROUNDINGS:
        raise UnmergeError(f"no rounding is named {kind}: choose from {', '.join(ROUNDINGS)}")
    rounded = ROUNDINGS[kind]
    _rewrite(source, output, lambda name, values: rounded(values) if _is_linear(name, values) else values)


def fine_tune_on(
    source: Path,
    output: Path,
    examples: Sequence[Example],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Go on training all parameters on the answers of some examples.

    Parameters
    ----------
    source, output : path
        Checkpoint folder with a tokenizer, and the folder to write.
    examples : sequence of Example
        Drawn from at random, 8 at a time.
    steps : int
        Optimizer steps.
    learning_rate : float
        AdamW's, at all steps. The parameters are trained in float32: in bfloat16, small steps would be lost.
    seed : int
        Seeds the draws.
    device : str
        torch's name of the device.
    threads : int
        CPU threads. Another number may give other bytes.

    Raises
    ------
    UnmergeError
        There are no examples.
    """
    if not examples:
        raise UnmergeError("0 examples to train on: give at least one")
    with repeatable(seed, threads) as generator:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        chat = tokenizer.chat_template is not None
        rows = [encode(tokenizer, one, chat=chat, max_length=MAX_LENGTH) for one in examples]
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        model.train()
        for _ in range(steps):
            drawn = torch.randint(len(rows), (BATCH,), generator=generator).tolist()
            optimizer.zero_grad()
            _loss(model, [rows[index] for index in drawn]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        trained = model.state_dict()
        _rewrite(source, output, lambda name, _: trained[name].cpu())


def _loss(model: torch.nn.Module, rows: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Return the mean cross-entropy per token of the answers, in nats."""
    width = max(len(ids) for ids, _ in rows)
    # Under a causal mask what stands behind a text changes nothing, so the padding may be any token.
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=model.device)
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows], device=model.device)
    return model(input_ids=inputs, labels=labels, use_cache=False).loss


def _rewrite(source: Path, output: Path, change: Change) -> None:
    """Write a checkpoint folder whose floating-point tensors are changed, in bfloat16."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UnmergeError(f"{source} holds no safetensors file: give a checkpoint folder")

    def write(folder: Path) -> None:
        for path in _companions(source):
            shutil.copyfile(path, folder / path.name)
        for path in files:
            tensors = load_file(path)
            changed = {name: _changed(name, tensors[name], change) for name in sorted(tensors)}
            save_file(changed, folder / path.name, {"format": "pt"})

    write_part(output, write)


def _companions(source: Path) -> list[Path]:
    found = {path for pattern in KEPT for path in source.glob(pattern)}
    return sorted(path for path in found if path.name not in RECORDS)


def _changed(name: str, tensor: torch.Tensor, change: Change) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return change(name, tensor.float()).to(torch.bfloat16).contiguous()


def _is_linear(name: str, values: torch.Tensor) -> bool:
    return values.ndim == 2 and not any(part in EMBEDDINGS for part in name.split("."))


def _fp8(values: torch.Tensor) -> torch.Tensor:
    scale = _scale(values.abs().max(), torch.finfo(torch.float8_e4m3fn).max)
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def _int8(values: torch.Tensor) -> torch.Tensor:
    scale = _scale(values.abs().amax(dim=1, keepdim=True), 127.0)
    return (values / scale).round() * scale


def _nf4(values: torch.Tensor) -> torch.Tensor:
    codes = torch.tensor(NF4)
    missing = -values.numel() % NF4_BLOCK
    blocks = torch.nn.functional.pad(values.flatten(), (0, missing)).reshape(-1, NF4_BLOCK)
    scale = _scale(blocks.abs().amax(dim=1, keepdim=True), 1.0)
    # The nearest code is told by the midpoints between codes.
    nearest = torch.bucketize(blocks / scale, (codes[1:] + codes[:-1]) / 2.0)
    return (codes[nearest] * scale).flatten()[: values.numel()].reshape(values.shape)


def _scale(largest: torch.Tensor, code: float) -> torch.Tensor:
    """Return what a code is to be multiplied by; 1 where all values are zero."""
    return torch.where(largest > 0.0, largest / code, 1.0)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"fp8": _fp8, "int8": _int8, "nf4": _nf4}


def _noise(relative: float, source: Path, output: Path, _: Sequence[Example], seed: int) -> None:
    add_noise(source, output, relative, torch.Generator().manual_seed(seed))


def _pruned(share: float, source: Path, output: Path, _: Sequence[Example], __: int) -> None:
    prune(source, output, share)


def _rounded(kind: Kind, source: Path, output: Path, _: Sequence[Example], __: int) -> None:
    round_trip(source, output, kind)


def _tuned(
    steps: int, learning_rate: float, source: Path, output: Path, examples: Sequence[Example], seed: int
) -> None:
    fine_tune_on(source, output, examples, steps=steps, learning_rate=learning_rate, seed=seed)


EDITS: Mapping[str, Edit] = {
    "noise-0.001": partial(_noise, 0.001),
    "noise-0.01": partial(_noise, 0.01),
    "noise-0.05": partial(_noise, 0.05),
    "prune-0.1": partial(_pruned, 0.1),
    "prune-0.3": partial(_pruned, 0.3),
    "prune-0.5": partial(_pruned, 0.5),
    "fp8": partial(_rounded, "fp8"),
    "int8": partial(_rounded, "int8"),
    "nf4": partial(_rounded, "nf4"),
    "tune-10": partial(_tuned, 10, 1e-5),
    "tune-100": partial(_tuned, 100, 1e-5),
    "tune-100-fast": partial(_tuned, 100, 1e-4),
}
"""The edits to try, by the names they are reported under."""
