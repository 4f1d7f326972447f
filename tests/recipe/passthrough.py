"""mergekit in this process, on documents, and what it wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.checkpoint.tensor import matrix_shape
from unmerge.testing import tiny_model, write_checkpoint


def config(layers, hidden=32, vocabulary=64, **more):
    """What transformers and mergekit need to know of a `random_model`."""
    # mergekit 0.1.5 cannot write a Qwen2 of another depth: transformers 5 refuses its configuration's layer_types.
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
        **more,
    }


def write_model(folder, tensors, dtype="BF16", **more):
    layers = len({name.split(".")[2] for name in tensors if ".layers." in name})
    return write_checkpoint(folder, tensors, dtype, config=config(layers, **more))


def random_model(seed, layers):
    """Random weights of a Mistral, which is a Qwen2 without biases."""
    model = tiny_model(np.random.default_rng(seed), layers=layers)
    return {name: weight for name, weight in model.items() if not name.endswith("bias")}


def merge(document, output: Path, **options) -> Checkpoint:
    """Run mergekit on a document."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        settings = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, **options)
        run_merge(MergeConfiguration.model_validate(document), str(output), settings)
    return open_checkpoint(output)


def bits(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor's type, shape and bytes."""
    return {
        name: (tensor.dtype.name, tensor.shape, tensor.read(0, matrix_shape(tensor.shape)[0]).tobytes())
        for name, tensor in checkpoint.tensors.items()
    }
