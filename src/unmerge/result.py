"""The result of an attribution: one document with a versioned schema.

Field descriptions are the documentation; the JSON Schema in the docs is generated from here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA: Literal["unmerge/attribution/1"] = "unmerge/attribution/1"


class _Model(BaseModel):
    # Validators are built when they are first needed, not at start-up.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class ModelReference(_Model):
    """A model as it was given and as it was found."""

    reference: str = Field(description="As the user gave it.")
    commit: str | None = Field(description="Hub commit it was resolved to; null for local files.")
    digest: str = Field(
        description="SHA-256 over names, shapes and weights, whatever the layout: sampled weights of a checkpoint, all "
        "of an adapter, or one run of each of its tensors if only a sample was to be read; the commit in place of "
        "weights if a Hub model was not downloaded."
    )
    kind: Literal["checkpoint", "adapter"] = Field(description="Full model, or PEFT adapter.")


class Evidence(_Model):
    """Why a component is called present or not."""

    reason: str = Field(description="The verdict's reason in words.")
    p_value: float | None = Field(
        description="Probability of signs as strong as these if the component is absent; null if it was not tested. "
        "'present' needs 0.001 over the number of atoms."
    )
    detectable: float | None = Field(
        description="The smallest weight that the test would have found, with probability 0.95."
    )
    group: tuple[str, ...] = Field(description="Other atoms so alike (cosine 0.95) that they are versions of one.")
    one_of_group: bool = Field(
        description="Whether it or an atom of its group is present, and it cannot be told which."
    )
    energy_share: float = Field(
        description="Energy of coefficient times task vector over the energy of the whole change; shares of "
        "correlated components do not add up."
    )


class LayerWeight(_Model):
    """A component's weight in one layer."""

    layer: int
    weight: float
    error: float = Field(description="Standard error.")


class Component(_Model):
    """One atom of the dictionary and what was found of it."""

    name: str
    coefficient: float = Field(description="The solver's: how much of the target looks like this fine-tune.")
    weight: float | None = Field(
        description="Estimate of how many times the fine-tune's own change is in the target, without what others "
        "that resemble it contribute; null if it was not tested."
    )
    interval: tuple[float, float] | None = Field(
        description="95 % interval of the weight (of the coefficient where there is no weight); null if unknown."
    )
    present: bool | None = Field(description="Whether the fine-tune itself is in the target; null: cannot tell.")
    evidence: Evidence
    profile: str | None = Field(description="How its weight varies over the layers; null if it is not present.")
    by_layer: tuple[LayerWeight, ...] = Field(description="Its weight in each layer; empty if it was not tested.")
    source: ModelReference
    relative_norm: float = Field(description="Norm of the atom's change over that of the target's change.")


class Unexplained(_Model):
    """What no present component explains."""

    share: float = Field(
        description="Energy that the present components leave over the energy of the target's change; what all "
        "coefficients leave if nothing was tested."
    )
    rounding_floor: float = Field(
        description="The share that rounding alone would leave of a merge of the present components."
    )
    rounding: str | None = Field(
        description="How such a merge was made if that is its floor: 'applied at once', 'from checkpoints' or 'in "
        "storage arithmetic'; null if it was not simulated: then the floor is ulp^2 / 12 per parameter."
    )
    relative_norm: float = Field(
        description="Norm of what is beyond rounding over the norm of the base's weights in the same tensors."
    )
    kind: Literal["nothing", "low rank", "full rank"] | None = Field(
        description="What kind of change it is: 'low rank' as one or a few LoRA fine-tunes leave it, 'full rank' as "
        "training of all weights, sparsified merging or noise do; null if it was not looked at."
    )
    rank: int = Field(description="Its rank, about, if it is low; else 0.")
    untouched_share: float = Field(
        description="The part of `share` that lies in tensors no atom changes; estimated where sampled."
    )
    untouched_error: float = Field(description="Standard error of `untouched_share` from sampling; 0 if exact.")


class BaseCoefficient(_Model):
    """How many times the base's own weights are in the target."""

    coefficient: float = Field(description="1 for a merge whose weights leave the base as it is.")
    error: float = Field(description="Standard error.")
    removed: bool = Field(description="Whether its difference from 1 was taken out before the attribution.")


class Decoys(_Model):
    """Atoms that cannot be present, added as a check."""

    tested: int
    accused: tuple[str, ...] = Field(description="Names of those that were called present; none should be.")


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
    verdict: str = Field(description="The answer in a sentence.")
    components: tuple[Component, ...] = Field(description="By coefficient, largest magnitude first.")
    unexplained: Unexplained
    base_coefficient: BaseCoefficient | None = Field(description="Null if it was not estimated.")
    decoys: Decoys | None = Field(description="Null if none were added.")
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
