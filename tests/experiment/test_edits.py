from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from unmerge.errors import UnmergeError
from unmerge.experiment.edits import EDITS, NF4, add_noise, fine_tune_on, prune, round_trip
from unmerge.experiment.fine_tuning import _held_out_loss, encode
from unmerge.experiment.presets import PRESETS
from unmerge.experiment.tasks import TASKS
from unmerge.experiment.training import draw_examples
from unmerge.testing import tiny_model, write_checkpoint

LINEAR = "model.layers.0.mlp.down_proj.weight"
# Rounding to bfloat16, relative to each element: half a unit in the eighth bit.
HALF_ULP = 2.0**-8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = tiny_model(np.random.default_rng(0), hidden=48)
    model["model.layers.1.mlp.up_proj.weight"] *= np.exp(np.random.default_rng(1).standard_normal((144, 1)))
    model["model.layers.1.mlp.down_proj.weight"][:] = 0.0
    folder = write_checkpoint(tmp_path_factory.mktemp("edits") / "source", model, shards=2)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "mergekit_config.yml").write_text("models: []", encoding="utf-8")
    (folder / "training.json").write_text("{}", encoding="utf-8")
    return folder


def tensors(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def pairs(source, output):
    """Every tensor before and after, in float64."""
    before, after = tensors(source), tensors(output)
    return {name: (before[name].double(), after[name].double()) for name in before}


def edit(name, source, output, examples=()):
    EDITS[name](source, output, examples, 0)
    return output


OFFLINE = [name for name in EDITS if not name.startswith("tune")]


@pytest.mark.parametrize("name", OFFLINE)
def test_files_names_shapes_and_types_stay(source, tmp_path, name):
    output = edit(name, source, tmp_path / "output")
    before, after = tensors(source), tensors(output)
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert all(torch.isfinite(value).all() for value in after.values())
    records = {"mergekit_config.yml", "training.json"}
    assert {path.name for path in output.iterdir()} == {path.name for path in source.iterdir()} - records
    assert (output / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("name", OFFLINE)
def test_the_same_bytes_twice(source, tmp_path, name):
    first, again = edit(name, source, tmp_path / "a"), edit(name, source, tmp_path / "b")
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize("relative", [0.02, 0.2])
def test_noise_is_as_large_as_asked(source, tmp_path, relative):
    add_noise(source, tmp_path / "output", relative, torch.Generator().manual_seed(0))
    for before, after in pairs(source, tmp_path / "output").values():
        wanted = relative * float(before.square().mean().sqrt())
        found = float((after - before).square().mean().sqrt())
        # 5 standard deviations of an estimate from so many elements.
        chance = 5.0 * wanted / np.sqrt(2.0 * before.numel())
        assert found == pytest.approx(wanted, abs=chance + HALF_ULP * float(after.abs().max()))


def test_other_noise_is_of_another_seed(source, tmp_path):
    EDITS["noise-0.05"](source, tmp_path / "a", (), 0)
    EDITS["noise-0.05"](source, tmp_path / "b", (), 1)
    assert not torch.equal(tensors(tmp_path / "a")[LINEAR], tensors(tmp_path / "b")[LINEAR])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_smallest_elements_are_pruned(source, tmp_path, share):
    prune(source, tmp_path / "output", share)
    for before, after in pairs(source, tmp_path / "output").values():
        gone = (after == 0.0) & (before != 0.0)
        assert torch.equal(after[~gone], before[~gone])
        if before.ndim != 2:
            assert not gone.any()
        elif before.any():
            zeros = max(round(share * before.numel()), int((before == 0.0).sum()))
            assert int((after == 0.0).sum()) == zeros
            removed, kept = before[gone].abs().tolist(), before[after != 0.0].abs().tolist()
            assert max(removed, default=0.0) <= min(kept, default=np.inf)


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_only_linear_weights_are_quantised(source, tmp_path, kind):
    round_trip(source, tmp_path / "output", kind)
    for name, (before, after) in pairs(source, tmp_path / "output").items():
        linear = before.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
        assert torch.equal(before, after) != (linear and bool(before.any()))


def linear_weights(source, output):
    return [
        (before, after)
        for name, (before, after) in pairs(source, output).items()
        if "proj.weight" in name and before.any()
    ]


def nearest(values, codes):
    """The nearest code to each value, by looking at all of them."""
    return codes[(values[..., None] - codes).abs().argmin(dim=-1)]


def test_fp8_is_the_nearest_of_its_256_codes(source, tmp_path):
    round_trip(source, tmp_path / "output", "fp8")
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = codes[torch.isfinite(codes)].unique()
    assert codes.max() == 448.0
    for before, after in linear_weights(source, tmp_path / "output"):
        scale = before.abs().max() / 448.0
        distance = (before - after).abs()
        best = (before - scale * nearest(before / scale, codes)).abs()
        assert (distance <= best + HALF_ULP * after.abs() + 1e-12).all()
        # Three bits after the leading one.
        assert (distance <= 2.0**-4 * before.abs() + scale * 2.0**-10 + HALF_ULP * after.abs()).all()


def test_int8_errs_by_half_a_step_of_its_row(source, tmp_path):
    round_trip(source, tmp_path / "output", "int8")
    for before, after in linear_weights(source, tmp_path / "output"):
        step = before.abs().amax(dim=1, keepdim=True) / 127.0
        codes = after / step
        assert ((before - after).abs() <= step * 0.50001 + HALF_ULP * after.abs()).all()
        assert ((codes - codes.round()).abs() <= HALF_ULP * codes.abs() + 1e-5).all()
        assert codes.abs().max() <= 127.0 * (1.0 + HALF_ULP)


def test_nf4_is_the_nearest_code_of_each_block(source, tmp_path):
    round_trip(source, tmp_path / "output", "nf4")
    codes = torch.tensor(NF4, dtype=torch.float64)
    for before, after in linear_weights(source, tmp_path / "output"):
        blocks = before.flatten().split(64)
        wanted = torch.cat([nearest(block / block.abs().max(), codes) * block.abs().max() for block in blocks])
        assert torch.allclose(after.flatten(), wanted, rtol=HALF_ULP, atol=0.0)


def test_the_nf4_code_book_has_the_quantiles_of_the_normal_distribution():
    offset = (1.0 - 1.0 / 30.0 + 1.0 - 1.0 / 32.0) / 2.0
    upper = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    lower = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    wanted = np.sort(np.concatenate([lower, [0.0], upper])) / upper.max()
    assert pytest.approx(wanted, abs=1e-6) == NF4


def test_the_last_block_may_be_short(tmp_path):
    weights = {"a.weight": 0.05 * np.random.default_rng(0).standard_normal((5, 13))}
    source = write_checkpoint(tmp_path / "source", weights)
    round_trip(source, tmp_path / "output", "nf4")
    before, after = pairs(source, tmp_path / "output")["a.weight"]
    assert after[-1, -1] == before[-1, -1]


def test_what_is_not_floating_point_stays(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "source").mkdir()
    save_file({"a": torch.ones(2, 2), "b": torch.arange(3)}, tmp_path / "source" / "model.safetensors")
    edit("noise-0.05", tmp_path / "source", tmp_path / "output")
    after = tensors(tmp_path / "output")
    assert after["a"].dtype == torch.bfloat16
    assert after["b"].tolist() == [0, 1, 2]


def loss(model, examples):
    import transformers

    training = PRESETS["micro"].training
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = [encode(tokenizer, one, chat=False, max_length=training.max_length) for one in examples]
    return _held_out_loss(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), rows, training)


def test_training_on_examples_changes_everything_and_lowers_their_loss(tiny_world, tmp_path):
    examples, _ = draw_examples(TASKS["imdb_sentiment"], 0, 8, 1)
    for name in ("a", "b"):
        fine_tune_on(tiny_world.base, tmp_path / name, examples, steps=20, learning_rate=1e-2, seed=1)
    assert loss(tmp_path / "a", examples) < loss(tiny_world.base, examples) - 0.1
    before, after = tensors(tiny_world.base), tensors(tmp_path / "a")
    assert list(after) == list(before)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert not any(torch.equal(after[name], before[name]) for name in before if name.endswith("proj.weight"))
    first, again = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == json.loads(
        (tiny_world.base / "config.json").read_text()
    )


def test_fewer_and_smaller_steps_change_less(tiny_world, tmp_path):
    examples, _ = draw_examples(TASKS["imdb_sentiment"], 0, 8, 1)
    changes = []
    for name in ("tune-10", "tune-100", "tune-100-fast"):
        edit(name, tiny_world.base, tmp_path / name, examples)
        changes.append(sum(float((a - b).square().sum()) for a, b in pairs(tiny_world.base, tmp_path / name).values()))
    assert 0.0 < changes[0] < changes[1] < changes[2]


def test_bad_arguments(source, tmp_path):
    with pytest.raises(UnmergeError, match="0 examples"):
        fine_tune_on(source, tmp_path / "output", [], steps=1, learning_rate=1.0, seed=0)
    with pytest.raises(UnmergeError, match="no rounding is named int3: choose from fp8, int8, nf4"):
        round_trip(source, tmp_path / "output", "int3")
    with pytest.raises(UnmergeError, match="share is 30"):
        prune(source, tmp_path / "output", 30)
    with pytest.raises(UnmergeError, match="holds no safetensors file"):
        prune(tmp_path, tmp_path / "output", 0.3)
    assert not (tmp_path / "output").exists()
