"""What a verification found: one document with a versioned schema.

Field descriptions are the documentation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from unmerge._version import __version__

Verdict = Literal["pass", "fail", "cannot tell"]
"""The recipe makes the weights, it does not, or it cannot be told."""
SCHEMA: Literal["unmerge/verification/1"] = "unmerge/verification/1"
EXIT_CODES = {"pass": 0, "fail": 1, "cannot tell": 2}
"""The command line's exit code for each verdict."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WrongClaim(_Document):
    """A claim of the recipe that is wrong."""

    claim: str = Field(description="A parameter's name, 'member', 'method', 'dtype', 'base', 'seed' or 'tensors'.")
    text: str = Field(description="In words.")
    says: str = Field(description="What the recipe says.")
    found: str = Field(description="What the weights say.")
    restored: float | None = Field(
        description="The share of elements that the recipe makes once this is changed; null if nothing was changed."
    )


class TensorDifference(_Document):
    """A tensor that the recipe does not make."""

    name: str
    elements: int
    looked_at: int = Field(description="Elements in which there is something to make; a sample for random masks.")
    wrong: int = Field(description="Of these, those that the recipe does not make.")
    largest: float | None = Field(
        description="The largest difference in spacings of the stored type; null for random masks."
    )


class Masks(_Document):
    """How the random masks of one model look."""

    model: str
    claimed: float = Field(description="Mean probability of being kept that the recipe says.")
    kept: float = Field(description="The share that was kept, estimated.")
    surprise: float = Field(description="Standard deviations between the two.")
    size: float = Field(description="What kept changes are multiplied by, over what the recipe says.")
    size_error: float = Field(description="Standard deviation that chance gives it.")


class Counts(_Document):
    """What was compared."""

    tensors: int
    elements: int
    looked_at: int = Field(description="Elements in which the recipe has something to decide.")
    wrong: int = Field(description="Of these, those that it does not make.")
    free: int = Field(description="Elements that it leaves to the order in which equal elements are sorted.")


class NotCompared(_Document):
    """A tensor that was not compared."""

    name: str
    reason: str


class Verification(_Document):
    """Whether a recipe makes a target."""

    schema_: Literal["unmerge/verification/1"] = Field(default=SCHEMA, alias="schema", description="Version.")
    target: str
    recipe: str = Field(description="The file that the recipe was read from.")
    method: str = Field(description="The recipe's merge method.")
    verdict: Verdict
    reason: str = Field(description="The verdict's reason, in a sentence.")
    wrong_claims: tuple[WrongClaim, ...] = Field(description="Empty unless the verdict is 'fail'.")
    counts: Counts | None = Field(description="Null if nothing could be compared.")
    differences: tuple[TensorDifference, ...] = Field(description="The first tensors that differ.")
    masks: tuple[Masks, ...] = Field(description="Empty unless masks are random and no seed was given.")
    not_compared: tuple[NotCompared, ...]
    notices: tuple[str, ...] = Field(description="What a user should know.")
    version: str = Field(default=__version__, description="Version of unmerge.")

    @property
    def exit_code(self) -> int:
        """0 for pass, 1 for fail, 2 for cannot tell."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> str:
        """Return the document as JSON text; the same inputs give the same bytes."""
        return self.model_dump_json(indent=2, by_alias=True)
