"""The result of an attribution: one document with a versioned schema.

Field descriptions are the documentation; the JSON Schema in the docs is generated from here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA: Literal["unmerge/attribution/1"] = "unmerge/attribution/1"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelReference(_Model):
    """A model as it was given and as it was found."""

    reference: str = Field(description="As the user gave it.")
    commit: str | None = Field(description="Hub commit it was resolved to; null for local files.")
    digest: str = Field(description="SHA-256 over names, shapes and sampled weights; layout-independent.")
    kind: Literal["checkpoint", "adapter"] = Field(description="Full model, or PEFT adapter.")


class Evidence(_Model):
    """Why a component is called present or not."""

    rule: str = Field(description="The rule in words.")
    energy_share: float = Field(
        description="Energy of coefficient times task vector over the energy of the whole change; shares of "
        "correlated components do not add up."
    )


class Component(_Model):
    """One atom of the dictionary and what was found of it."""

    name: str
    coefficient: float = Field(description="How many times the fine-tune's change is in the target.")
    interval: tuple[float, float] | None = Field(
        description="95 % interval of the coefficient (delete-one-group jackknife over tensors); null if "
        "there are too few tensors, or the atom cannot be told apart."
    )
    present: bool | None = Field(description="Whether it is in the target; null: cannot tell.")
    evidence: Evidence
    source: ModelReference
    relative_norm: float = Field(description="Norm of the atom's change over that of the target's change.")


class Unexplained(_Model):
    """What no atom explains."""

    share: float = Field(description="Energy of the residual over the energy of the target's change.")
    rounding_floor: float = Field(
        description="The share that storage rounding of the target alone accounts for, about: ulp^2 / 12 per "
        "parameter of the tensors that changed; an over-estimate where changes are far below an ulp."
    )
    untouched_share: float = Field(
        description="The part of `share` that lies in tensors no atom changes; estimated where sampled."
    )
    untouched_error: float = Field(description="Standard error of `untouched_share` from sampling; 0 if exact.")


class Method(_Model):
    """How the coefficients were computed."""

    solver: str
    signed: bool = Field(description="Whether negative coefficients were allowed.")
    coordinates: str = Field(description="Which parameters were compared.")
    parameters: int = Field(description="Parameters in the tensors that were compared.")
    parameters_read: int = Field(description="Parameters that were read; fewer where tensors were sampled.")
    status: str = Field(description="'converged', or what was wrong with the problem.")
    message: str = Field(description="Advice that goes with the status; empty if all is well.")
    groups: tuple[tuple[str, ...], ...] = Field(description="Atoms that cannot be told apart.")
    thread_memory: int = Field(description="Bytes that one thread held at most, known before the pass.")
    version: str = Field(description="Version of unmerge.")


class Metrics(_Model):
    """The paper's measures (section 3.6)."""

    reconstruction_error: float = Field(description="1 - max(0, cos)^2 between target and reconstruction.")
    cosine: float = Field(description="Cosine between target and reconstruction; 0 for an empty answer.")
    sparsity: int = Field(description="Components with |coefficient| over 1e-6.")


class Profile(_Model):
    """The same regression on a part of the model."""

    part: str = Field(description="A layer's number, a module's name, or 'other'.")
    coefficients: dict[str, float] = Field(description="By atom; atoms that do not change the part are absent.")
    energy_share: float = Field(description="The part's share of the energy of the target's change.")
    unexplained: float | None = Field(description="Unexplained share within the part; null if it is unchanged.")


class TensorReport(_Model):
    """One compared tensor."""

    name: str
    parameters: int
    read: int = Field(description="Parameters read; fewer than `parameters` if sampled.")
    energy_share: float = Field(description="Its share of the energy of the target's change.")
    unexplained: float | None = Field(description="Unexplained share within it, at the overall coefficients.")
    touched: bool = Field(description="Whether an atom changes it.")


class NotCompared(_Model):
    """A tensor, or rows of one, that was not compared."""

    name: str
    model: str = Field(description="'base', 'target', or the atom's name: who holds it.")
    reason: str


class Attribution(_Model):
    """What a target is made of."""

    schema_: Literal["unmerge/attribution/1"] = Field(default=SCHEMA, alias="schema", description="Version.")
    target: ModelReference
    base: ModelReference
    components: tuple[Component, ...] = Field(description="By coefficient, largest magnitude first.")
    unexplained: Unexplained
    method: Method
    metrics: Metrics
    layers: tuple[Profile, ...]
    modules: tuple[Profile, ...]
    tensors: tuple[TensorReport, ...]
    not_compared: tuple[NotCompared, ...]
    notices: tuple[str, ...] = Field(description="What a user should know about the files.")

    def to_json(self) -> str:
        """Return the document as JSON text; the same inputs give the same bytes."""
        return self.model_dump_json(indent=2, by_alias=True)
