"""Which tensor of a model answers to which of its base.

The policy is explicit and its outcome is a report: a tensor is compared whole, compared in its common rows, or
listed as not compared with the reason. A model of another architecture is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product

from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.tensor import Tensor, matrix_shape
from unmerge.errors import AlignmentError

HEAD = "lm_head.weight"
_PREFIXES = ("model.language_model.", "language_model.", "base_model.model.", "_orig_mod.", "module.",
             "transformer.", "model.")  # fmt: skip
_VOCABULARY = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|lm_head|embed_out)\.weight$"
)
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(?P<layer>\d+)\.(?P<module>.+)$")
"""What a tensor's name says of its layer's number and of its module."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor that was not compared, or not wholly.

    Attributes
    ----------
    name : str
        The tensor's name as the model that holds it stores it.
    model : str
        Which model holds it: ``"base"`` or the label of the other.
    reason : str
        Why it was not compared.
    """

    name: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A tensor of the base and the tensor that answers to it; they have the same columns."""

    base: Tensor
    other: Tensor

    @property
    def rows(self) -> int:
        """The number of rows that both have."""
        return min(matrix_shape(self.base.shape)[0], matrix_shape(self.other.shape)[0])


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """How a model answers to its base.

    Attributes
    ----------
    pairs : mapping
        Base tensor name to the pair of tensors; sorted by name.
    skipped : tuple of Skipped
        What was not compared.
    notices : tuple of str
        What was done to make the names meet.
    """

    pairs: Mapping[str, Pair]
    skipped: tuple[Skipped, ...] = ()
    notices: tuple[str, ...] = ()


def align(base: Checkpoint, other: Checkpoint, label: str) -> Alignment:
    """Pair the tensors of a full model with those of its base.

    Parameters
    ----------
    base, other : Checkpoint
        The two models.
    label : str
        What messages call `other`: ``"target"`` or the name of an atom.

    Raises
    ------
    AlignmentError
        If depth, width or naming differ beyond what the policy allows; the message names the tensor and
        the two shapes.
    """
    renamed, notices = rename(base.tensors.keys(), other.tensors.keys())
    theirs = {renamed[name]: other.tensors[name] for name in other.tensors}
    ours = dict(base.tensors)
    skipped = _settle_head(ours, theirs, base, other, label)
    _check_names(ours, theirs, label)
    pairs: dict[str, Pair] = {}
    for name in sorted(ours.keys() & theirs.keys()):
        pairs[name] = Pair(ours[name], theirs[name])
        skipped.extend(_check_shapes(name, pairs[name], label))
    skipped.extend(Skipped(name, "base", f"{label} has no such tensor") for name in sorted(ours.keys() - pairs.keys()))
    skipped.extend(
        Skipped(theirs[name].name, label, "the base has no such tensor")
        for name in sorted(theirs.keys() - pairs.keys())
    )
    skipped.extend(Skipped(item.name, "base", f"stored as {item.dtype}") for item in base.unread)
    skipped.extend(Skipped(item.name, label, f"stored as {item.dtype}") for item in other.unread)
    return Alignment(pairs, tuple(skipped), notices)


def rename(base_names: Collection[str], names: Collection[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Bring the names of another model to the base's spelling.

    Wrappers add or drop a prefix (``model.``, ``language_model.``) and PEFT inserts ``base_layer``. The
    one change of prefix under which most names meet is used.

    Returns
    -------
    renamed : dict
        New spelling by stored name.
    notices : tuple of str
        What was changed, empty if nothing.
    """
    notices = []
    plain = {name: name.replace(".base_layer.", ".") for name in names}
    if any(name != new for name, new in plain.items()):
        notices.append("names contain '.base_layer.', as a model saved inside a PEFT wrapper; it was dropped")
    known = set(base_names)
    strip, add = _best_swap(plain.values(), known)
    if strip or add:
        notices.append(f"names were matched after replacing the prefix {strip!r} by {add!r}")
    swapped = {name: _swap(new, strip, add) for name, new in plain.items()}
    # A name that the swap takes away from the base's spelling keeps its own (lm_head has no prefix).
    renamed = {
        name: (plain[name] if plain[name] in known and new not in known else new) for name, new in swapped.items()
    }
    return renamed, tuple(notices)


def _best_swap(names: Collection[str], known: set[str]) -> tuple[str, str]:
    """Return the first change of prefix, from none on, under which most names are known."""
    if _hits(names, known, "", "") == len(names):
        return "", ""
    prefixes = ("", *_PREFIXES)
    return max(product(prefixes, prefixes), key=lambda swap: _hits(names, known, *swap))


def _swap(name: str, strip: str, add: str) -> str:
    return add + name.removeprefix(strip) if name.startswith(strip) else name


def _hits(names: Collection[str], known: set[str], strip: str, add: str) -> int:
    return sum(_swap(name, strip, add) in known or name in known for name in names)


def has_vocabulary_rows(name: str) -> bool:
    """Tell whether the rows of this tensor are tokens, so that models may have different numbers of them."""
    return bool(_VOCABULARY.search(name))


def _settle_head(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], base: Checkpoint, other: Checkpoint, label: str
) -> list[Skipped]:
    """Make tied and untied output layers comparable; changes `ours` and `theirs` in place."""
    skipped: list[Skipped] = []
    if other.ties_embeddings and HEAD in theirs and _embedding(theirs):
        del theirs[HEAD]
        skipped.append(Skipped(HEAD, label, "tied to the input embedding (tie_word_embeddings); counted once"))
    if base.ties_embeddings and HEAD in ours and _embedding(ours):
        del ours[HEAD]
        skipped.append(Skipped(HEAD, "base", "tied to the input embedding (tie_word_embeddings); counted once"))
    for mine, yours in ((ours, theirs), (theirs, ours)):
        embedding = _embedding(mine)
        if HEAD in yours and HEAD not in mine and embedding:
            mine[HEAD] = mine[embedding]
    return skipped


def _embedding(tensors: Mapping[str, Tensor]) -> str | None:
    names = (name for name in tensors if has_vocabulary_rows(name) and name != HEAD and "embed_out" not in name)
    return next(names, None)


def _check_names(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], label: str) -> None:
    common = ours.keys() & theirs.keys()
    depths = layer_count(ours), layer_count(theirs)
    if common and depths[0] != depths[1]:
        message = f"{label} has {depths[1]} layers, the base has {depths[0]}: not a merge of fine-tunes of this base"
        raise AlignmentError(message)
    if 2 * len(common) < len(ours):
        example = next(iter(sorted(theirs.keys() - common)), "none")
        message = (
            f"{label} shares only {len(common)} of the base's {len(ours)} tensor names "
            f"(it has, for one, {example!r}): another architecture, or not the base of this model"
        )
        raise AlignmentError(message)


def layer_count(names: Collection[str]) -> int:
    """Return the number of different layer indices in tensor names."""
    return len({match["layer"] for name in names if (match := LAYER.search(name))})


def _check_shapes(name: str, pair: Pair, label: str) -> list[Skipped]:
    mine, yours = pair.base.shape, pair.other.shape
    if mine == yours:
        return []
    if not has_vocabulary_rows(name) or mine[1:] != yours[1:]:
        message = (
            f"{label}: tensor {name!r} has shape {list(yours)}, the base's has {list(mine)}: "
            "another architecture or width"
        )
        raise AlignmentError(message)
    return extra_rows(name, label, mine, yours)


def extra_rows(name: str, label: str, mine: tuple[int, ...], yours: tuple[int, ...]) -> list[Skipped]:
    """Tell the rows that only one of two tensors of the same columns has: the base's `mine`, the model's `yours`."""
    common = min(mine[0], yours[0])
    return [
        Skipped(name, model, f"{rows - common} rows beyond the {common} that both have (resized vocabulary)")
        for model, rows in (("base", mine[0]), (label, yours[0]))
        if rows > common
    ]
