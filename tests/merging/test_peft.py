"""Every combination against PEFT's own ``add_weighted_adapter``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from tests.merging.in_torch import HALVES_AND_SINGLE, TYPES, array, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.draws import TorchDraws
from unmerge.merging.peft import CHANGES, COMBINATIONS, Factors, Module, draws_of_new_layers

SHAPES = {"first": (64, 96), "second": (96, 64)}
"""(rows, columns) of the two linear modules."""
WEIGHTS = (0.7, -0.3, 1.1)
SEED = 7
FACTORWISE = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
BY_SVD = tuple(sorted(CHANGES))
PRUNING = {name for name in COMBINATIONS if any(part in name for part in ("prune", "ties", "dare"))}


class Linears(torch.nn.Module):
    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        for name, (rows, columns) in SHAPES.items():
            self.add_module(name, Conv1D(rows, columns) if transposed else torch.nn.Linear(columns, rows, bias=False))


@pytest.fixture(autouse=True)
def one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def adapted(name: str, ranks: Sequence[int] = (4, 4, 4), *, transposed: bool = False, **config: Any) -> Any:
    """A model with adapters whose factors are random."""
    torch.manual_seed(0)
    model: Any = Linears(transposed=transposed).to(TYPES[name])
    for index, rank in enumerate(ranks):
        told = LoraConfig(
            r=rank, lora_alpha=3 * index + 5, target_modules=list(SHAPES), fan_in_fan_out=transposed, **config
        )
        if index == 0:
            model = get_peft_model(model, told, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(index), told, autocast_adapter_dtype=False)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = (0.05 * torch.randn(parameter.shape)).to(parameter.dtype)
    return model.base_model


def combine(model: Any, kind: str, weights: Sequence[float] = WEIGHTS, **told: Any) -> None:
    torch.manual_seed(SEED)
    names = [str(index) for index in range(len(weights))]
    model.add_weighted_adapter(names, list(weights), "new", combination_type=kind, **told)


def modules(model: Any, weights: Sequence[float] = WEIGHTS, **told: Any) -> Iterator[tuple[Any, Module]]:
    """PEFT's layers, and ours of the same factors; masks are drawn from one stream, module after module."""
    draws = TorchDraws(SEED)
    draws.skip(draws_of_new_layers(list(SHAPES.values()), model.peft_config["new"].r))
    for name in SHAPES:
        layer = model.model.get_submodule(name)
        held = tuple(
            Factors(array(layer.lora_A[key].weight.data), array(layer.lora_B[key].weight.data), layer.scaling[key])
            for key in map(str, range(len(weights)))
        )
        yield layer, Module(name, held, tuple(weights), draws=draws, transposed=layer.fan_in_fan_out, **told)


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("kind", FACTORWISE)
@pytest.mark.parametrize("density", [0.5, 0.31, 0.01])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_factors_are_pefts_to_the_bit(name: str, kind: str, density: float, majority: Any) -> None:
    model = adapted(name)
    combine(model, kind, density=density, majority_sign_method=majority)
    for layer, module in modules(model, density=density, majority=majority):
        A, B = COMBINATIONS[kind](module, Arithmetic(name))
        assert same_bits(A, array(layer.lora_A["new"].weight.data)).all()
        assert same_bits(B, array(layer.lora_B["new"].weight.data)).all()
        assert layer.scaling["new"] == 1


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
def test_cat_is_pefts_to_the_bit_for_all_ranks(name: str) -> None:
    model = adapted(name, ranks=(4, 2, 6))
    combine(model, "cat")
    for layer, module in modules(model):
        A, B = COMBINATIONS["cat"](module, Arithmetic(name))
        assert same_bits(A, array(layer.lora_A["new"].weight.data)).all()
        assert same_bits(B, array(layer.lora_B["new"].weight.data)).all()
        expected = sum(w * f.scaling * f.B @ f.A for w, f in zip(WEIGHTS, module.adapters, strict=True))
        assert np.allclose(B @ A, expected, rtol=0, atol=(2e-7 if name == "F32" else 5e-3) * np.abs(expected).max())


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("kind", BY_SVD)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_decomposed_is_what_peft_decomposes(
    name: str, kind: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposed = []
    svd = torch.linalg.svd

    def spy(change: torch.Tensor, **options: Any) -> Any:
        decomposed.append(array(change.detach()))
        return svd(change, **options)

    model = adapted(name, transposed=transposed)
    monkeypatch.setattr(torch.linalg, "svd", spy)
    density = 0.4 if kind in PRUNING else None
    combine(model, kind, density=density)
    for (_, module), theirs in zip(modules(model, density=density), decomposed, strict=True):
        ours = CHANGES[kind](module, Arithmetic(name))
        # A product of factors that is one unit apart may change its place with a neighbour at the threshold.
        assert np.mean(np.abs(ours - theirs) <= 2.0**-21 * np.abs(theirs).max()) >= 0.999
        assert np.mean(ours == theirs) >= (0.5 if name == "F32" else 0.999)


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("kind", BY_SVD)
@pytest.mark.parametrize("told", [{}, {"svd_rank": 6}])
def test_decomposed_factors_are_pefts_but_for_signs(name: str, kind: str, told: dict[str, int]) -> None:
    model = adapted(name, ranks=(4, 2, 3))
    density = 0.4 if kind in PRUNING else None
    combine(model, kind, density=density, **told)
    for layer, module in modules(model, density=density, rank=told.get("svd_rank")):
        A, B = COMBINATIONS[kind](module, Arithmetic(name))
        theirs = array(layer.lora_A["new"].weight.data), array(layer.lora_B["new"].weight.data)
        assert (A.shape, B.shape) == (theirs[0].shape, theirs[1].shape)
        assert layer.lora_A["new"].weight.dtype == torch.float32
        signs = np.sign(np.sum(A * theirs[0], axis=1))
        assert np.allclose(signs[:, None] * A, theirs[0], rtol=0, atol=3e-4)
        assert np.allclose(signs * B, theirs[1], rtol=0, atol=3e-4 * np.abs(theirs[1]).max())
        assert np.allclose(A @ A.T, np.eye(len(A)), atol=1e-5)


def test_clamped_factors_are_pefts_where_the_signs_are() -> None:
    model = adapted("F32")
    combine(model, "svd", svd_clamp=0.9)
    agreeing = 0
    for layer, module in modules(model, clamp=0.9):
        A, B = COMBINATIONS["svd"](module, Arithmetic("F32"))
        theirs = array(layer.lora_A["new"].weight.data)
        assert np.abs(A).max() == np.abs(B).max()
        if np.all(np.sum(A * theirs, axis=1) > 0):
            agreeing += 1
            assert np.allclose(A, theirs, atol=1e-5)
            assert np.allclose(B, array(layer.lora_B["new"].weight.data), atol=1e-5)
    assert agreeing > 0


def test_one_adapter_alone_is_combined_linearly_and_keeps_its_change() -> None:
    model = adapted("F32")
    combine(model, "svd", weights=(0.7,))
    for layer, module in modules(model, weights=(0.7,)):
        A, B = COMBINATIONS["linear"](module, Arithmetic("F32"))
        assert same_bits(A, array(layer.lora_A["new"].weight.data)).all()
        (held,) = module.adapters
        assert np.allclose(B @ A, 0.7 * held.scaling * held.B @ held.A, atol=1e-7)


def test_a_root_of_the_rank_is_the_new_scaling_where_the_first_adapter_has_it() -> None:
    model = adapted("F32", use_rslora=True)
    combine(model, "linear")
    assert [layer.scaling["new"] for layer, _ in modules(model)] == [2, 2]


def test_a_density_of_one_prunes_nothing_and_draws_nothing() -> None:
    model = adapted("F32")
    combine(model, "dare_ties", density=1.0)
    for layer, module in modules(model, density=1.0):
        A, _ = COMBINATIONS["dare_ties"](module, Arithmetic("F32"))
        assert same_bits(A, array(layer.lora_A["new"].weight.data)).all()
        assert same_bits(COMBINATIONS["ties"](module, Arithmetic("F32"))[0], A).all()


def test_what_cannot_be_combined_is_said() -> None:
    arithmetic = Arithmetic("F32")
    one, two = (Factors(np.ones((r, 3), np.float32), np.ones((2, r), np.float32), 1.0) for r in (1, 2))
    with pytest.raises(RecipeError, match=r"m: adapters of ranks 1, 2 cannot be added up factor by factor: use cat or"):
        COMBINATIONS["linear"](Module("m", (one, two), (1.0, 1.0)), arithmetic)
    with pytest.raises(RecipeError, match=r"m: this combination prunes, and its density is None: give 0 to 1"):
        COMBINATIONS["ties"](Module("m", (one, one), (1.0, 1.0)), arithmetic)
    with pytest.raises(RecipeError, match=r"m: random masks need draws, and there are none: give a seed"):
        COMBINATIONS["dare_linear"](Module("m", (one, one), (1.0, 1.0), density=0.5), arithmetic)
    with pytest.raises(RecipeError, match=r"m: a density of 0 keeps nothing at random"):
        COMBINATIONS["dare_linear"](Module("m", (one, one), (1.0, 1.0), density=0.0), arithmetic)
