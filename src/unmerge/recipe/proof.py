"""What was recovered of a merge, and how it was proved: one document."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from unmerge._version import __version__
from unmerge.errors import RecipeError
from unmerge.recipe.comparison import Compared

SCHEMA: Literal["unmerge/recovery/1"] = "unmerge/recovery/1"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Member(_Document):
    """A model of the merge."""

    name: str = Field(description="What the user calls it.")
    reference: str = Field(description="What the recipe calls it: a path, a Hub id, MODEL+ADAPTER.")
    parameters: dict[str, str] = Field(description="Its parameters in the recipe, as text.")
    coefficient: float | None = Field(description="Its coefficient in the attribution; null where none was made.")


class Proof(_Document):
    """The merge, made again by the recipe and compared with the target."""

    kind: Literal["bits", "masks"] = Field(
        description="'bits': every value compared; 'masks': without a seed, whether some masks make every value."
    )
    tensors: int
    elements: int
    looked_at: int = Field(description="Elements in which there is something to make.")
    wrong: int = Field(description="Of these, those that the recipe does not make.")
    free: int = Field(description="Elements at a trim threshold, which the order of a sort decides.")
    share: float = Field(description="Share of `looked_at` that the recipe makes.")
    unlikely: tuple[str, ...] = Field(description="What does not go with the distribution of masks.")


class Decoded(_Document):
    """How well random masks explain the target, and how well they explain it with fine-tunes that are not in it."""

    error: float = Field(description="Energy of what decoded masks leave over the energy of the change.")
    decoy_error: float = Field(description="The same with each change's elements exchanged for others of its own.")


class Alternative(_Document):
    """Another recipe that cannot be told apart."""

    recipe: str
    share: float = Field(description="Share of the values of some tensors that it makes.")


class Range(_Document):
    """Where a number of the recipe can be without changing a bit of some tensors, all others as they are."""

    model: str | None = Field(description="Whose it is, by the user's name; null for the whole recipe's.")
    parameter: str
    value: float = Field(description="What the recipe says.")
    low: float | None = Field(description="The smallest number that was found to make the same; null: no end found.")
    high: float | None = Field(description="The largest number that was found to make the same; null: no end found.")


class Recovery(_Document):
    """The recipe of a merge."""

    schema_: Literal["unmerge/recovery/1"] = Field(default=SCHEMA, alias="schema", description="Version.")
    target: str
    base: str
    status: Literal["proven", "decoded", "partial", "nothing known"] = Field(
        description="'proven': the recipe makes the target's values; 'decoded': it does with masks that were read off "
        "the target, whose seed was not found; 'partial': it does not, something unknown is in the target; "
        "'nothing known': no known fine-tune is in it."
    )
    method: str | None = Field(description="mergekit's name; null where it cannot be told.")
    members: tuple[Member, ...]
    recipe: str | None = Field(description="mergekit's YAML.")
    tool: str | None = Field(description="The tool and version whose arithmetic makes the bits; null for copies.")
    seed: int | None = Field(description="mergekit's --random-seed, where masks are random and it was found.")
    threads: int | None = Field(description="torch's threads in the merge, as far as its bits show.")
    proof: Proof | None
    decoded: Decoded | None
    alike: tuple[Alternative, ...] = Field(description="The best recipe of each other method that is nearly as good.")
    free: tuple[str, ...] = Field(default=(), description="What else the recipe may say and make the same.")
    ranges: tuple[Range, ...] = Field(
        default=(), description="Of each single number of a proven recipe, the interval that makes the same bits."
    )
    unexplained: float | None = Field(description="The attribution's unexplained share, before inversion.")
    notices: tuple[str, ...]
    version: str = Field(default=__version__, description="Version of unmerge.")

    @property
    def exit_code(self) -> int:
        """0 if the recipe makes the target, 1 if not."""
        return 0 if self.status in {"proven", "decoded"} else 1

    def to_json(self) -> str:
        """Return the document as JSON text; the same inputs give the same bytes."""
        return self.model_dump_json(indent=2, by_alias=True)

    def write(self, path: Path) -> None:
        """Write the recipe to a file, whole or not at all; nothing where there is no recipe.

        Raises
        ------
        RecipeError
            If it cannot be written.
        """
        if self.recipe is None:
            return
        temporary = path.with_name(f".{path.name}.partial")
        try:
            temporary.write_text(self.to_file(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise RecipeError(f"{path}: cannot be written: {error.strerror or error}") from error

    def to_file(self) -> str:
        """Return the recipe as a file that mergekit runs, with what is known of it in comments.

        Empty if there is no recipe.
        """
        if self.recipe is None:
            return ""
        comments = [f"# Recovered by unmerge {self.version} from {self.target}: {self.status}."]
        if self.proof is not None:
            comments.append(f"# {summary(self.proof)}")
        if self.tool is not None and self.status == "proven":
            comments.append(f"# Arithmetic of {self.tool}.")
        if self.seed is not None:
            threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
            comments.append(f"# For the same masks: --random-seed {self.seed}, and torch with {threads}.")
        if self.status == "partial":
            comments.append("# Something that is not listed is in the target, or it was changed after the merge:")
            comments.append("# weights are what attribution says of the known part, and the method is not known.")
        return "\n".join([*comments, self.recipe])


def summary(proof: Proof) -> str:
    """Say in a sentence what was proved."""
    what = "equal, bit for bit" if proof.kind == "bits" else "what masks of these densities make"
    # Rounded down: only what is whole is called so.
    percent = math.floor(10_000.0 * proof.share) / 100.0
    text = f"{percent:.4g} % of {proof.looked_at:,} elements are {what} ({proof.tensors} tensors)"
    if proof.free:
        text += f"; {proof.free:,} elements at a trim threshold are left to the order of a sort"
    return text


def proof_of(compared: Compared) -> Proof:
    """Sum up a comparison of all tensors."""
    judgement = compared.judgement
    elements = [match.elements for match in compared.matches] + [item.elements for item in compared.explanations]
    return Proof(
        kind="masks" if compared.explanations else "bits",
        tensors=len(elements),
        elements=sum(elements),
        looked_at=judgement.looked_at,
        wrong=judgement.wrong,
        free=sum(match.free for match in compared.matches),
        share=judgement.share,
        unlikely=judgement.unlikely,
    )
