"""Which tensors meet, which are told, which models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmerge.alignment import Alignment, align
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.errors import AlignmentError
from unmerge.testing import tiny_model, write_checkpoint

RNG = np.random.default_rng(0)
MODEL = tiny_model(RNG, layers=2, hidden=16, vocabulary=24)


def aligned(tmp_path: Path, base: dict[str, Any], other: dict[str, Any], /, **configs: Any) -> Alignment:
    first = write_checkpoint(tmp_path / "base", base, config=configs.get("base"))
    second = write_checkpoint(tmp_path / "other", other, config=configs.get("other"))
    return align(open_checkpoint(first), open_checkpoint(second), "target")


def without(model: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name not in names}


def test_equal_names_meet(tmp_path: Path) -> None:
    result = aligned(tmp_path, MODEL, MODEL)
    assert list(result.pairs) == sorted(MODEL)
    assert result.skipped == ()
    assert result.notices == ()


@pytest.mark.parametrize("prefix", ["model.language_model.", "base_model.model.model.", "module.model.", ""])
def test_prefixes_are_matched_and_told(tmp_path: Path, prefix: str) -> None:
    other = {
        (prefix + name.removeprefix("model.") if name.startswith("model.") else name): value
        for name, value in MODEL.items()
    }
    result = aligned(tmp_path, MODEL, other)
    assert list(result.pairs) == sorted(MODEL)
    assert "prefix" in result.notices[0]


def test_models_saved_inside_peft_wrappers_meet(tmp_path: Path) -> None:
    other = {name.replace("q_proj.", "q_proj.base_layer."): value for name, value in MODEL.items()}
    result = aligned(tmp_path, MODEL, other)
    assert list(result.pairs) == sorted(MODEL)
    assert "base_layer" in result.notices[0]


@pytest.mark.parametrize("rows", [20, 30])
def test_resized_vocabularies_share_their_common_rows(tmp_path: Path, rows: int) -> None:
    other = dict(MODEL)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        other[name] = RNG.standard_normal((rows, 16))
    result = aligned(tmp_path, MODEL, other)
    assert result.pairs["lm_head.weight"].rows == min(rows, 24)
    told = {(item.name, item.model) for item in result.skipped}
    larger = "target" if rows > 24 else "base"
    assert told == {("model.embed_tokens.weight", larger), ("lm_head.weight", larger)}
    assert f"{abs(rows - 24)} rows beyond the {min(rows, 24)} that both have" in result.skipped[0].reason


def test_tensors_of_one_side_are_told(tmp_path: Path) -> None:
    base = without(MODEL, "model.layers.0.self_attn.q_proj.bias")
    other = without(MODEL, "model.norm.weight")
    result = aligned(tmp_path, base, other)
    assert [(item.name, item.model) for item in result.skipped] == [
        ("model.norm.weight", "base"),
        ("model.layers.0.self_attn.q_proj.bias", "target"),
    ]


TIED = {"tie_word_embeddings": True}


class TestOutputLayer:
    def test_a_duplicate_of_a_tied_embedding_counts_once(self, tmp_path: Path) -> None:
        result = aligned(tmp_path, without(MODEL, "lm_head.weight"), MODEL, base=TIED, other=TIED)
        assert "lm_head.weight" not in result.pairs
        assert "counted once" in result.skipped[0].reason

    def test_an_untied_head_is_compared_with_the_embedding_it_came_from(self, tmp_path: Path) -> None:
        result = aligned(tmp_path, without(MODEL, "lm_head.weight"), MODEL, base=TIED)
        assert result.pairs["lm_head.weight"].base.name == "model.embed_tokens.weight"
        assert result.skipped == ()

    def test_a_head_that_the_target_lost_is_its_embedding(self, tmp_path: Path) -> None:
        result = aligned(tmp_path, MODEL, without(MODEL, "lm_head.weight"), other=TIED)
        assert result.pairs["lm_head.weight"].other.name == "model.embed_tokens.weight"


def test_another_depth_is_refused(tmp_path: Path) -> None:
    deep = tiny_model(RNG, layers=3, hidden=16, vocabulary=24)
    with pytest.raises(AlignmentError, match="target has 3 layers, the base has 2"):
        aligned(tmp_path, MODEL, deep)


def test_another_width_is_refused_with_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    other = {**MODEL, "model.layers.1.mlp.up_proj.weight": np.ones((56, 16))}
    with pytest.raises(
        AlignmentError,
        match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has shape \[56, 16\], the base's has \[48, 16\]",
    ):
        aligned(tmp_path, MODEL, other)


def test_a_vocabulary_of_another_width_is_refused(tmp_path: Path) -> None:
    other = {**MODEL, "lm_head.weight": np.ones((24, 8))}
    with pytest.raises(AlignmentError, match="another architecture or width"):
        aligned(tmp_path, MODEL, other)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    other = {f"transformer.block_{i}.w": np.ones((2, 2)) for i in range(10)}
    with pytest.raises(AlignmentError, match=r"shares only 0 of the base's \d+ tensor names"):
        aligned(tmp_path, MODEL, other)
