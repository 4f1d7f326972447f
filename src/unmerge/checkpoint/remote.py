"""Full models on the Hub, read a range of bytes at a time, without downloading them.

Requests go through ``huggingface_hub``, so its endpoint, token and retries apply. Configuration and index are
downloaded into its cache, as always; of the weights only headers and the rows that are asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmerge.checkpoint import adapter, reader
from unmerge.checkpoint.dtypes import DType, RawArray
from unmerge.checkpoint.header import MAX_HEADER_BYTES, UnreadTensor, locate, parse
from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.source import Source, hub_errors, hub_id
from unmerge.checkpoint.tensor import Tensor, matrix_shape
from unmerge.errors import CheckpointError, SourceError

HEADER_BYTES = 1 << 18
"""What is asked for first: most headers fit in it."""
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)$")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at a commit.

    Attributes
    ----------
    reference : str
        The model as the user gave it, for messages.
    origin : Path
        Repository and file name, for messages.
    url : str
        Where it is.
    """

    reference: str
    origin: Path
    url: str

    def read(self, start: int, stop: int) -> tuple[bytes, int]:
        """Return bytes `start` to `stop` (fewer at the end of the file), and the size of the file.

        Raises
        ------
        SourceError
            If the Hub does not answer, or not with the range that was asked for.
        """
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # re-exported without saying so
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        with hub_errors(self.reference, None):
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            response = http_backoff("GET", self.url, max_retries=3, headers=headers)
            hf_raise_for_status(response)
        total = _TOTAL.match(response.headers.get("Content-Range", ""))
        found: bytes = response.content
        if response.status_code != 206 or total is None or len(found) != min(stop, int(total[1])) - start:
            message = (
                f"{self.origin}: the Hub did not answer with the range asked for; leave out --precision and --budget"
            )
            raise SourceError(message)
        return found, int(total[1])


@dataclass(frozen=True, slots=True)
class RemoteTensor:
    """A tensor at a known place of a remote file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    origin: Path
    offset: int
    file: RemoteFile

    def read(self, start: int, stop: int) -> RawArray:
        """Fetch rows; see `Tensor.read`."""
        columns = matrix_shape(self.shape)[1]
        width = columns * self.dtype.itemsize
        if start >= stop:
            return np.empty((0, columns), self.dtype.raw)
        found, _ = self.file.read(self.offset + start * width, self.offset + stop * width)
        if len(found) != (stop - start) * width:
            raise CheckpointError(f"{self.origin}: cut short: tensor {self.name!r} ends before its header says")
        return np.frombuffer(found, self.dtype.raw).reshape(stop - start, columns)


def open_remote(reference: str) -> tuple[Checkpoint, Source] | None:
    """Open a full model on the Hub; reads its headers.

    Returns
    -------
    tuple of Checkpoint and Source, or None
        None for what is better read as usual: local paths, adapters, what has no safetensors, and all while offline.

    Raises
    ------
    SourceError
        As `unmerge.checkpoint.source.resolve`.
    CheckpointError
        If a file is damaged, or the weights are quantised.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url

    found = hub_id(reference)
    if found is None or constants.HF_HUB_OFFLINE:
        return None
    repo, revision = found
    with hub_errors(reference, revision):
        info = HfApi().model_info(repo, revision=revision)
        names = {sibling.rfilename for sibling in info.siblings or ()}
        if adapter.CONFIG in names or not names & {reader.INDEX, reader.SINGLE}:
            return None
        small = {name: Path(hf_hub_download(repo, name, revision=info.sha)) for name in _small(names)}
    index = reader.INDEX in names
    weights = reader.read_weight_map(small[reader.INDEX]) if index else {}
    files = sorted(set(weights.values())) if index else [reader.SINGLE]
    tensors: dict[str, Tensor] = {}
    unread: list[UnreadTensor] = []
    for name in files:
        file = RemoteFile(reference, Path(repo) / name, hf_hub_url(repo, name, revision=info.sha))
        there, other = _read_header(file)
        tensors.update({key: value for key, value in there.items() if not index or weights.get(key) == name})
        unread.extend(other)
    absent = sorted(weights.keys() - tensors.keys() - {item.name for item in unread})
    if absent:
        raise CheckpointError(f"{repo}: its {reader.INDEX} is stale: no file holds {absent[0]!r}")
    config = reader.read_json(small["config.json"]) if "config.json" in small else {}
    checkpoint = Checkpoint(Path(repo), dict(sorted(tensors.items())), config, tuple(unread))
    reader.refuse_quantised(checkpoint)
    return checkpoint, Source(reference, Path(repo), info.sha)


def _small(names: set[str]) -> list[str]:
    return sorted({"config.json", reader.INDEX} & names)


def _read_header(file: RemoteFile) -> tuple[dict[str, Tensor], list[UnreadTensor]]:
    start, size = file.read(0, HEADER_BYTES)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{file.origin}: not a safetensors file: its header claims {length:,} bytes of {size:,}")
    if 8 + length > len(start):
        start, _ = file.read(0, 8 + length)
    found, unread = locate(parse(start[8 : 8 + length], file.origin), 8 + length, size, file.origin)
    tensors: dict[str, Tensor] = {
        name: RemoteTensor(name, item.dtype, item.shape, file.origin, item.offset, file) for name, item in found.items()
    }
    return tensors, unread
