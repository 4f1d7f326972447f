"""References to models: a folder, a file, or a Hub repository, resolved to local files.

The Hub is read through ``huggingface_hub``, so its cache, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and ``HF_TOKEN``
work as everywhere. Only configuration and safetensors files are downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unmerge.checkpoint import adapter, reader
from unmerge.errors import SourceError

_HUB = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")
_ATOM_NAME = re.compile(r"[\w.+-]+$")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model was found.

    Attributes
    ----------
    reference : str
        As the user gave it, without the ``NAME=`` of an atom.
    path : Path
        The local folder or file.
    commit : str or None
        The Hub commit that the reference was resolved to; None for local files.
    """

    reference: str
    path: Path
    commit: str | None = None

    @property
    def default_name(self) -> str:
        """The folder's, file's or repository's own name."""
        if self.commit is not None:
            match = _HUB.match(self.reference)
            return (match["repo"] if match else self.reference).rsplit("/", 1)[-1]
        resolved = self.path.resolve()
        return resolved.stem if resolved.is_file() else resolved.name


def split_name(reference: str) -> tuple[str | None, str]:
    """Split ``NAME=PATH`` into (name, path); the name is None where none was given."""
    name, sign, rest = reference.partition("=")
    if sign and rest and _ATOM_NAME.match(name) and not Path(reference).exists():
        return name, rest
    return None, reference


def resolve(reference: str, *, cached: bool = False, allow_pickle: bool = False) -> Source:
    """Find the files of a reference, downloading what is needed from the Hub.

    Parameters
    ----------
    reference : str
        A folder, a file, ``org/name``, ``org/name@revision`` or ``hf://org/name@revision``. What exists
        locally is never looked for on the Hub.
    cached : bool
        Take a repository from the Hub's cache, and download nothing.
    allow_pickle : bool
        Download ``.bin`` weights where a repository has no safetensors.

    Raises
    ------
    SourceError
        If nothing is there: the message says whether the path is missing, or the repository is unknown,
        gated, or not cached while offline.
    """
    found = hub_id(reference)
    if found is None:
        return Source(reference, Path(reference).expanduser())
    folder, commit = _download(reference, *found, cached=cached, allow_pickle=allow_pickle)
    return Source(reference, folder, commit)


def hub_id(reference: str) -> tuple[str, str | None] | None:
    """Return the repository and the revision that a reference names on the Hub; None for a path that exists.

    Raises
    ------
    SourceError
        If it is neither.
    """
    if Path(reference).expanduser().exists():
        return None
    match = _HUB.match(reference)
    if not match or reference.startswith(("./", "../", "/", "~")):
        message = f"{reference}: no such file or folder, and not a Hub id (org/name or org/name@revision)"
        raise SourceError(message)
    return match["repo"], match["revision"]


def _download(reference: str, repo: str, revision: str | None, *, cached: bool, allow_pickle: bool) -> tuple[Path, str]:
    from huggingface_hub import constants, snapshot_download

    with hub_errors(reference, revision):
        if cached or constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            return folder, folder.name
        return _download_online(repo, revision, allow_pickle=allow_pickle)


@contextmanager
def hub_errors(reference: str, revision: str | None) -> Iterator[None]:
    """Turn what goes wrong with the Hub into one line.

    Raises
    ------
    SourceError
        In place of the client's errors.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever httpx it was built on

    try:
        yield
    except hub.GatedRepoError as error:
        message = (
            f"{reference}: a gated repository: ask for access on its page, then log in with `hf auth login` "
            "or set HF_TOKEN"
        )
        raise SourceError(message) from error
    except hub.RevisionNotFoundError as error:
        raise SourceError(f"{reference}: the repository has no revision {revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        message = (
            f"{reference}: no such local path, and no such repository on the Hub (or it is private: "
            "log in with `hf auth login` or set HF_TOKEN)"
        )
        raise SourceError(message) from error
    except hub.LocalEntryNotFoundError as error:
        message = (
            f"{reference}: no such local path, and not in the Hub cache while offline; download it first "
            "(or unset HF_HUB_OFFLINE)"
        )
        raise SourceError(message) from error
    except (hub.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"{reference}: no such local path, and the Hub did not answer: {reason}") from error


def _download_online(repo: str, revision: str | None, *, allow_pickle: bool) -> tuple[Path, str]:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repo, revision=revision)
    files = {sibling.rfilename for sibling in info.siblings or ()}
    folder: Path | None = None
    # The first file is asked for by the given revision, so that the cache can resolve it offline later; the
    # rest by the commit that it turned out to be, so that all files are of one commit.
    commit = ""
    for name in _needed_files(files, allow_pickle=allow_pickle):
        folder = Path(hf_hub_download(repo, name, revision=commit or revision)).parent
        commit = folder.name
    if reader.INDEX in files and adapter.CONFIG not in files and folder is not None:
        for shard in sorted(set(reader.read_weight_map(folder / reader.INDEX).values()) & files):
            hf_hub_download(repo, shard, revision=commit)
    if folder is None:
        raise SourceError(f"{repo}: {_nothing_usable(files)}")
    return folder, commit


def _nothing_usable(files: set[str]) -> str:
    pickles = sorted(name for name in files if name.startswith("pytorch_model") and name.endswith(".bin"))
    if pickles:
        return (
            f"the repository has only pickle weights ({pickles[0]}), which can run code when loaded; pass "
            "--allow-pickle to read them with weights_only"
        )
    return f"the repository has no safetensors weights and no {adapter.CONFIG}"


def _needed_files(files: set[str], *, allow_pickle: bool) -> list[str]:
    """Choose what to download first: configuration and weights, not the copies in other formats."""
    if adapter.CONFIG in files:
        weights = adapter.WEIGHTS if adapter.WEIGHTS in files else adapter.PICKLED_WEIGHTS
        wanted = {adapter.CONFIG, weights if allow_pickle or weights == adapter.WEIGHTS else adapter.CONFIG}
        return sorted(wanted & files)
    if reader.INDEX in files:
        return sorted({"config.json", reader.INDEX} & files)
    if reader.SINGLE in files:
        return sorted({"config.json", reader.SINGLE} & files)
    top = {name for name in files if "/" not in name}
    weights_files = {name for name in top if name.endswith(".safetensors")}
    if not weights_files and allow_pickle:
        weights_files = {name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")}
    return sorted(weights_files | ({"config.json"} & files)) if weights_files else []
