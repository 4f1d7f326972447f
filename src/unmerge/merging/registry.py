"""The merge methods by name, one table for each tool's conventions.

The same name means different mathematics in different tools: DARE divides by the density in PEFT, and restores the sum
of absolute values in mergekit.
"""

from __future__ import annotations

from unmerge.merging.arcee_fusion import ARCEE_FUSION
from unmerge.merging.karcher import KARCHER
from unmerge.merging.linear import LINEAR, LINEAR_TO_0_1_4
from unmerge.merging.method import MergeMethod
from unmerge.merging.model_stock import MODEL_STOCK
from unmerge.merging.multislerp import MULTISLERP
from unmerge.merging.nearswap import NEARSWAP
from unmerge.merging.nuslerp import NUSLERP
from unmerge.merging.passthrough import PASSTHROUGH
from unmerge.merging.peft import COMBINATIONS, Combination
from unmerge.merging.ram import RAM, RAMPLUS_TL
from unmerge.merging.sce import SCE
from unmerge.merging.slerp import SLERP
from unmerge.merging.task_arithmetic import TASK_ARITHMETIC_METHODS

_OTHERS = (
    ARCEE_FUSION,
    KARCHER,
    LINEAR,
    MODEL_STOCK,
    MULTISLERP,
    NEARSWAP,
    NUSLERP,
    PASSTHROUGH,
    RAM,
    RAMPLUS_TL,
    SCE,
    SLERP,
)
MERGEKIT: dict[str, MergeMethod] = {**TASK_ARITHMETIC_METHODS, **{method.name: method for method in _OTHERS}}
"""mergekit 0.1.5's methods by the name that a recipe gives them."""
MERGEKIT_TO_0_1_4: dict[str, MergeMethod] = {**MERGEKIT, "linear": LINEAR_TO_0_1_4}
"""The same up to version 0.1.4: of what changed since, ``linear`` is modelled."""
PEFT: dict[str, Combination] = dict(COMBINATIONS)
"""PEFT 0.21's combinations of adapters by ``combination_type``."""
