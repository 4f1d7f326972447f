"""A merge as mergekit's YAML writes it: read, checked, and written again.

The file may come from anywhere: its size is bounded, nothing in it is run, and what mergekit would refuse is refused.
What mergekit ignores (unknown keys) is ignored. The schema is that of mergekit 0.1.5, ``mergekit.config``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmerge.errors import RecipeError

CONFIG = "mergekit_config.yml"
"""What mergekit calls the recipe that it writes beside the weights."""
CARD = "README.md"
"""The model card, which may hold the recipe in a ``yaml`` block."""
MAX_RECIPE_BYTES = 1_000_000
"""Larger files are refused: a recipe has a few kilobytes."""

STORAGE_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
"""The safetensors name of each type that torch merges in, by torch's name."""
_BLOCK = re.compile(r"^[ \t]*```[ \t]*ya?ml[ \t]*\r?\n(?P<text>.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)

Scalar = bool | int | float | str
"""What a parameter may be; strings may be numbers, as ``1e-3`` is in YAML 1.1."""
Gradient = tuple[Scalar, ...]
"""Values at evenly spaced depths, from the first layer of a slice to its last."""


@dataclass(frozen=True, slots=True)
class Conditional:
    """A value for the tensors whose name contains a text.

    Attributes
    ----------
    value : scalar or tuple of scalar
    filter : str or None
        The text; None or ``"*"`` is every tensor.
    """

    value: Scalar | Gradient
    filter: str | None = None


Setting = Scalar | Gradient | tuple[Conditional, ...]
"""What a parameter is set to."""
Settings = Mapping[str, Setting]
"""Parameters by name."""


@dataclass(frozen=True, slots=True, order=True)
class ModelReference:
    """A model, or a model and a LoRA adapter on it: ``path@revision+path@revision``.

    Attributes
    ----------
    path : str
        A folder or a Hub id.
    revision : str or None
    adapter : str or None
        The adapter's folder or Hub id.
    adapter_revision : str or None
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def __str__(self) -> str:
        return self.model if self.adapter is None else f"{self.model}+{_joined(self.adapter, self.adapter_revision)}"

    @property
    def model(self) -> str:
        """The reference without its adapter."""
        return _joined(self.path, self.revision)


def _joined(path: str, revision: str | None) -> str:
    return path if revision is None else f"{path}@{revision}"


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A model of a merge of whole models."""

    model: ModelReference
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SliceInput:
    """Some layers of a model: from `first`, up to and without `stop`."""

    model: ModelReference
    first: int
    stop: int
    parameters: Settings = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers these are."""
        return self.stop - self.first


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output, made of as many layers of each source."""

    sources: tuple[SliceInput, ...]
    base_model: ModelReference | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge.

    Attributes
    ----------
    merge_method : str
        mergekit's name of it.
    base_model : ModelReference or None
    models : tuple of ModelInput
        For merges of whole models.
    slices : tuple of Slice
        For merges of ranges of layers. Exactly one of the two is not empty.
    parameters : mapping
        What holds for the whole merge.
    dtype : str or None
        What tensors are cast to when they are loaded: a torch name; None leaves them as they are.
    out_dtype : str or None
        What results are cast to when they are stored.
    tokenizer_source : str or None
    tokenizer : mapping or None
        mergekit's newer spelling of the tokenizer's source, with rules for single tokens.
    chat_template : str or None
    """

    merge_method: str
    base_model: ModelReference | None = None
    models: tuple[ModelInput, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: Mapping[str, Any] | None = None
    chat_template: str | None = None

    @property
    def references(self) -> tuple[ModelReference, ...]:
        """Every model that is named, once, in the order of the file; the base last, where only it is named there."""
        named = [item.model for item in self.models]
        for part in self.slices:
            named += [source.model for source in part.sources]
            named += [part.base_model] if part.base_model else []
        named += [self.base_model] if self.base_model else []
        return tuple(dict.fromkeys(named))

    @property
    def aligns_vocabularies(self) -> bool:
        """Whether rows of embeddings are moved to a tokenizer's order before they are merged."""
        return bool(self.tokenizer_source) or self.tokenizer is not None


def storage_type(dtype: str | None) -> str | None:
    """Return the safetensors name of a torch dtype's name: ``BF16`` for ``bfloat16`` or ``torch.bfloat16``."""
    return None if not dtype else STORAGE_TYPES[dtype.removeprefix("torch.")]


def torch_type(storage: str) -> str:
    """Return the torch name of a safetensors type: ``bfloat16`` for ``BF16``."""
    return next(name for name, known in STORAGE_TYPES.items() if known == storage)


def find_recipe(path: Path) -> Path | None:
    """Return the file of a folder that holds its recipe (or the file itself), None where there is none.

    ``mergekit_config.yml`` comes before the model card.
    """
    if path.is_dir():
        found = (path / name for name in (CONFIG, CARD))
        return next((file for file in found if file.is_file() and _texts(file)), None)
    return path if path.is_file() else None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file, from a model card, or from a folder with one of them.

    Parameters
    ----------
    path : Path
        ``.yml`` or ``.yaml``; ``.md`` with a ``yaml`` block that has a ``merge_method``; or a folder with
        ``mergekit_config.yml`` or such a ``README.md``.

    Raises
    ------
    RecipeError
        If there is none, there are several, or what is there is not a merge that mergekit would accept.
    """
    if not path.exists():
        raise RecipeError(f"{path}: no such file or folder; expected a recipe, or a folder or model card with one")
    file = find_recipe(path)
    if file is None:
        message = f"{path}: no recipe: expected {CONFIG}, or a {CARD} with a yaml block that has a merge_method"
        raise RecipeError(message)
    texts = _texts(file)
    if len(texts) != 1:
        message = f"{file}: it holds {len(texts)} recipes; expected one: save the one you mean to a file of its own"
        raise RecipeError(message)
    return parse_recipe(texts[0], str(file))


def parse_recipe(text: str, label: str = "recipe") -> Recipe:
    """Parse a recipe.

    Parameters
    ----------
    text : str
        YAML, one document.
    label : str
        What messages call it.

    Raises
    ------
    RecipeError
        If it is not a merge that mergekit would accept, or one by ``modules``, which is not supported.
    """
    return _Reader(label).recipe(_load(text, label))


def _texts(file: Path) -> list[str]:
    """Return the different recipes in a file, as text: the file itself, or the blocks of a card."""
    text = _read_text(file)
    if file.suffix.lower() != ".md":
        return [text]
    blocks = (match["text"] for match in _BLOCK.finditer(text))
    return list(dict.fromkeys(block for block in blocks if re.search(r"^\s*merge_method\s*:", block, re.MULTILINE)))


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            content = handle.read(MAX_RECIPE_BYTES + 1)
        if len(content) > MAX_RECIPE_BYTES:
            raise RecipeError(f"{file}: refused: a recipe of more than {MAX_RECIPE_BYTES:,} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not a text in UTF-8") from error


def _load(text: str, label: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"{label}: not valid YAML: {reason[:200]}") from error


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the parts of one document; messages begin with its label."""

    label: str

    def recipe(self, document: Any) -> Recipe:
        if not isinstance(document, dict):
            raise self._error(f"expected a mapping with merge_method, found {_kind(document)}")
        self._check_shape(document)
        base = document.get("base_model")
        recipe = Recipe(
            merge_method=self._text(document.get("merge_method"), "merge_method"),
            base_model=None if base is None else self._model(base, "base_model"),
            models=tuple(self._model_input(item) for item in self._list(document.get("models"), "models")),
            slices=tuple(self._slice(item) for item in self._list(document.get("slices"), "slices")),
            parameters=self._settings(document.get("parameters"), "parameters"),
            dtype=self._dtype(document.get("dtype"), "dtype"),
            out_dtype=self._dtype(document.get("out_dtype"), "out_dtype"),
            tokenizer_source=self._tokenizer_source(document.get("tokenizer_source")),
            tokenizer=self._tokenizer(document.get("tokenizer")),
            chat_template=self._optional_text(document.get("chat_template"), "chat_template"),
        )
        if recipe.tokenizer_source and recipe.tokenizer is not None:
            raise self._error("both tokenizer_source and tokenizer; mergekit takes one of them")
        return recipe

    def _error(self, problem: str) -> RecipeError:
        return RecipeError(f"{self.label}: {problem}")

    def _check_shape(self, document: Mapping[str, Any]) -> None:
        if "merge_method" not in document:
            raise self._error("no merge_method: not a mergekit recipe")
        given = [key for key in ("models", "slices", "modules") if document.get(key)]
        if len(given) != 1:
            what = " and ".join(given) if given else "none of them"
            raise self._error(f"expected exactly one of models, slices and modules, found {what}")
        if given == ["modules"]:
            raise self._error("a merge by modules, which is not supported: expected models or slices")

    def _model_input(self, item: Any) -> ModelInput:
        entry = self._entry(item, "models")
        return ModelInput(self._model(entry.get("model"), "model"), self._settings(entry.get("parameters"), "models"))

    def _slice(self, item: Any) -> Slice:
        entry = self._entry(item, "slices")
        sources = tuple(self._source(source) for source in self._list(entry.get("sources"), "sources"))
        if not sources:
            raise self._error("a slice without sources")
        if len({source.layers for source in sources}) > 1:
            counts = ", ".join(str(source.layers) for source in sources)
            raise self._error(f"the sources of a slice must have as many layers; found {counts}")
        base = entry.get("base_model")
        return Slice(
            sources,
            None if base is None else self._model(base, "base_model"),
            self._settings(entry.get("parameters"), "slices"),
        )

    def _source(self, item: Any) -> SliceInput:
        entry = self._entry(item, "sources")
        first, stop = self._layers(entry.get("layer_range"))
        model = self._model(entry.get("model"), "model")
        return SliceInput(model, first, stop, self._settings(entry.get("parameters"), "sources"))

    def _layers(self, value: Any) -> tuple[int, int]:
        numbers = value if isinstance(value, list) else []
        if len(numbers) != 2 or any(type(item) is not int for item in numbers) or not 0 <= numbers[0] < numbers[1]:
            raise self._error("a source needs a layer_range of two layer numbers, the first below the second")
        return numbers[0], numbers[1]

    def _entry(self, item: Any, where: str) -> dict[str, Any]:
        if not isinstance(item, dict):
            raise self._error(f"an entry of {where} must be a mapping, found {_kind(item)}")
        return item

    def _list(self, value: Any, where: str) -> Sequence[Any]:
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self._error(f"{where} must be a list, found {_kind(value)}")
        return value

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value:
            raise self._error(f"{where} must be a text, found {_kind(value)}")
        return value

    def _optional_text(self, value: Any, where: str) -> str | None:
        return None if value is None else self._text(value, where)

    def _mapping(self, value: Any, where: str) -> Mapping[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._error(f"{where} must be a mapping, found {_kind(value)}")
        return value

    def _tokenizer(self, value: Any) -> Mapping[str, Any] | None:
        given = self._mapping(value, "tokenizer")
        return None if given is None else {"source": "union", **given}

    def _dtype(self, value: Any, where: str) -> str | None:
        if not value:
            return None
        text = self._text(value, where)
        if text.removeprefix("torch.") not in STORAGE_TYPES:
            raise self._error(f"{where} is {text!r}; expected one of {', '.join(STORAGE_TYPES)}")
        return text

    def _tokenizer_source(self, value: Any) -> str | None:
        return None if value is None else str(self._model(value, "tokenizer_source"))

    def _model(self, value: Any, where: str) -> ModelReference:
        if isinstance(value, dict):
            if value.get("override_architecture") is not None:
                raise self._error(f"{where} has an override_architecture, which is not supported")
            model = self._path(value.get("model"), where)
            return ModelReference(*model, *(self._path(value["lora"], where) if value.get("lora") else (None, None)))
        parts = self._text(value, where).split("+")
        if len(parts) > 2 or not all(parts):
            raise self._error(f"{where} is {value!r}; expected MODEL or MODEL+ADAPTER")
        model = self._path(parts[0], where)
        return ModelReference(*model, *(self._path(parts[1], where) if len(parts) == 2 else (None, None)))

    def _path(self, value: Any, where: str) -> tuple[str, str | None]:
        if isinstance(value, dict):
            revision = value.get("revision")
            return self._text(value.get("path"), where), None if revision is None else self._text(revision, where)
        path, at, revision = self._text(value, where).partition("@")
        if "@" in revision or not path or (at and not revision):
            raise self._error(f"{where} is {value!r}; expected PATH or PATH@REVISION")
        return path, revision or None

    def _settings(self, value: Any, where: str) -> dict[str, Setting]:
        entries = self._mapping(value, f"the parameters of {where}") or {}
        return {
            str(name): self._setting(setting, str(name)) for name, setting in entries.items() if setting is not None
        }

    def _setting(self, value: Any, name: str) -> Setting:
        if isinstance(value, dict):
            return (self._conditional(value, name),)
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return tuple(self._conditional(item, name) for item in value)
        return self._value(value, name)

    def _conditional(self, item: Any, name: str) -> Conditional:
        if not isinstance(item, dict) or item.get("value") is None:
            raise self._error(f"parameter {name}: expected entries of filter and value")
        return Conditional(
            self._value(item["value"], name), self._optional_text(item.get("filter") or None, f"the filter of {name}")
        )

    def _value(self, value: Any, name: str) -> Scalar | Gradient:
        if isinstance(value, list):
            return tuple(self._scalar(item, name) for item in value)
        return self._scalar(value, name)

    def _scalar(self, value: Any, name: str) -> Scalar:
        if not isinstance(value, bool | int | float | str):
            raise self._error(f"parameter {name}: expected a number, true, false, or a list, found {_kind(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(f"parameter {name} is not a finite number")
        return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML that mergekit accepts; the same recipe gives the same text."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes lists of scalars on one line."""

        def represent_list(self, data: Any) -> yaml.SequenceNode:
            flow = not any(isinstance(item, dict | list) for item in data)
            return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)

        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
            return True

    Dumper.add_representer(list, Dumper.represent_list)
    return yaml.dump(_document(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _document(recipe: Recipe) -> dict[str, Any]:
    return _given(
        merge_method=recipe.merge_method,
        base_model=_text_or_none(recipe.base_model),
        models=[_given(model=str(item.model), parameters=_plain(item.parameters)) for item in recipe.models],
        slices=[_slice_document(part) for part in recipe.slices],
        parameters=_plain(recipe.parameters),
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
        tokenizer_source=recipe.tokenizer_source,
        tokenizer=None if recipe.tokenizer is None else dict(recipe.tokenizer),
        chat_template=recipe.chat_template,
    )


def _slice_document(part: Slice) -> dict[str, Any]:
    sources = [
        _given(model=str(source.model), layer_range=[source.first, source.stop], parameters=_plain(source.parameters))
        for source in part.sources
    ]
    return _given(sources=sources, base_model=_text_or_none(part.base_model), parameters=_plain(part.parameters))


def _text_or_none(reference: ModelReference | None) -> str | None:
    return None if reference is None else str(reference)


def _given(**entries: Any) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None and value not in ([], {})}


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: _plain_setting(setting) for name, setting in settings.items()}


def _plain_setting(setting: Setting) -> Any:
    if not isinstance(setting, tuple):
        return setting
    return [_plain_item(item) for item in setting]


def _plain_item(item: Scalar | Conditional) -> Any:
    if not isinstance(item, Conditional):
        return item
    value = list(item.value) if isinstance(item.value, tuple) else item.value
    return {"value": value} if item.filter is None else {"filter": item.filter, "value": value}
