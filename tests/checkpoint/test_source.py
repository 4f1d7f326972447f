"""References to files, folders and a Hub that is served on loopback to the real client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hub import COMMIT, Hub, serve
from unmerge.checkpoint.source import resolve, split_name
from unmerge.errors import SourceError
from unmerge.result import Attribution
from unmerge.testing import tiny_model, write_adapter, write_checkpoint


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a/b", (None, "a/b")),
        ("math=a/b@main", ("math", "a/b@main")),
        ("my.math-1+2=/x/y", ("my.math-1+2", "/x/y")),
        ("a/b=c", (None, "a/b=c")),
        ("=c", (None, "=c")),
        ("c=", (None, "c=")),
    ],
)
def test_names_are_split_from_references(given: str, expected: tuple[str | None, str]) -> None:
    assert split_name(given) == expected


def test_a_folder_called_with_an_equals_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4").mkdir()
    assert split_name("lr=1e-4") == (None, "lr=1e-4")


@pytest.mark.parametrize("reference", ["./a/b", "/no/such/model", "../x", "name", "a/b/c", "~/none", "a b/c"])
def test_missing_paths_never_reach_the_hub(reference: str) -> None:
    with pytest.raises(SourceError, match="no such file or folder, and not a Hub id"):
        resolve(reference)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Hub, str, Path]]:
    rng = np.random.default_rng(0)
    model = tiny_model(rng)
    served = Hub(tmp_path / "hub")
    write_checkpoint(served.root / "org" / "base", model, shards=2)
    change = write_adapter(served.root / "org" / "math", rng, model)
    write_adapter(served.root / "org" / "code", rng, model)
    merged = {name: value + 0.4 * change.get(name, 0.0) for name, value in model.items()}
    write_checkpoint(served.root / "org" / "merge", merged, "F32")
    for unneeded in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "README.md"):
        (served.root / "org" / "merge" / unneeded).write_bytes(b"not needed")
    with serve(served) as endpoint:
        yield served, endpoint, tmp_path


def run(hub: tuple[Hub, str, Path], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "PROXY" not in key.upper()}
    home = {"HF_ENDPOINT": hub[1], "HF_HOME": str(hub[2] / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "unmerge", *arguments]
    return subprocess.run(
        command, env={**kept, **home, **environment}, capture_output=True, text=True, check=False, cwd=hub[2]
    )


def attribute(hub: tuple[Hub, str, Path], target: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(hub, "attribute", target, "org/math", "org/code@v1", "--base", "org/base", "--json", **environment)


def test_hub_models_are_resolved_to_a_commit_and_only_needed_files_are_fetched(hub: Any) -> None:
    first = attribute(hub, "org/merge@main", HF_TOKEN="hf_secret")  # noqa: S106 - a made-up one
    assert first.returncode == 0, first.stderr
    result = Attribution.model_validate_json(first.stdout)
    assert result.components[0].name == "math"
    assert result.components[0].coefficient == pytest.approx(0.4, abs=1e-3)
    assert result.target.commit == result.base.commit == result.components[0].source.commit == COMMIT
    assert result.target.reference == "org/merge@main"
    fetched = {request.rsplit("/", 1)[-1] for request in hub[0].requests if request.startswith("GET /org/merge")}
    assert fetched == {"config.json", "model.safetensors"}
    assert "Bearer hf_secret" in hub[0].tokens

    hub[0].requests.clear()
    offline = attribute(hub, "org/merge", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert hub[0].requests == []
    again = Attribution.model_validate_json(offline.stdout)
    assert again.components == tuple(item.model_copy(update={"source": item.source}) for item in result.components)


@pytest.mark.parametrize(
    ("target", "environment", "message"),
    [
        ("org/none", {}, "no such local path, and no such repository on the Hub"),
        ("org/merge@nope", {}, "the repository has no revision 'nope'"),
        ("org/merge", {"HF_HUB_OFFLINE": "1"}, "not in the Hub cache while offline"),
        ("org/merge", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub did not answer"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub: Any, target: str, environment: dict[str, str], message: str) -> None:
    found = run(
        hub, "attribute", target, str(hub[0].root / "org/math"), "--base", str(hub[0].root / "org/base"), **environment
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert message in found.stderr
    assert found.stderr.startswith(f"error: {target}: ")
    assert found.stderr.count("\n") == 1


def test_gated_repositories_say_how_to_get_in(hub: Any) -> None:
    hub[0].gated.add("org/merge")
    found = attribute(hub, "org/merge")
    assert found.returncode == 2
    assert "error: org/merge: a gated repository: ask for access on its page, then log in" in found.stderr
    assert found.stderr.count("\n") == 1


def test_repositories_without_safetensors_say_so(hub: Any) -> None:
    folder = hub[0].root / "org" / "old"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    found = attribute(hub, "org/old")
    assert found.returncode == 2
    assert "org/old: the repository has only pickle weights (pytorch_model.bin)" in found.stderr


def test_a_shard_that_leaves_the_folder_is_not_fetched(hub: Any) -> None:
    index = hub[0].root / "org" / "base" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../org/math/adapter_model.safetensors"}}')
    found = attribute(hub, "org/merge")
    assert found.returncode == 2
    assert "leaves the folder" in found.stderr


def sampled(hub: Any, target: str, base: str = "base", **environment: str) -> subprocess.CompletedProcess[str]:
    atoms = [str(hub[0].root / "org" / name) for name in ("math", "code")]
    path = str(hub[0].root / "org" / base)
    return run(hub, "attribute", target, *atoms, "--base", path, "--precision", "0.01", "--json", **environment)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_sample_of_a_hub_model_fetches_ranges_and_not_the_model(hub: Any, shards: int) -> None:
    rng = np.random.default_rng(0)
    model = tiny_model(rng, vocabulary=40_000)
    write_checkpoint(hub[0].root / "org" / "wide", model)
    change = write_adapter(hub[0].root / "org" / "math", rng, model)
    merged = {name: value + 0.4 * change.get(name, 0.0) for name, value in model.items()}
    folder = write_checkpoint(hub[0].root / "org" / "large", merged, shards=shards)
    found = sampled(hub, "org/large", "wide", HF_TOKEN="hf_secret")  # noqa: S106 - a made-up one
    assert found.returncode == 0, found.stderr
    result = Attribution.model_validate_json(found.stdout)
    assert result.target.commit == COMMIT
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0 < hub[0].ranged < stored // 2
    assert not list((hub[2] / "home").rglob("*.safetensors"))
    assert hub[0].tokens == {"Bearer hf_secret"}
    local = Attribution.model_validate_json(sampled(hub, str(folder), "wide").stdout)
    assert result.components == local.components
    assert result.unexplained == local.unexplained


def test_a_hub_without_ranges_is_told(hub: Any) -> None:
    hub[0].ranges = False
    found = sampled(hub, "org/merge")
    assert found.returncode == 2
    assert found.stderr.startswith(
        "error: org/merge/model.safetensors: the Hub did not answer with the range asked for"
    )
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(("target", "message"), [("org/none", "no such repository"), ("org/merge@nope", "no revision")])
def test_a_sample_of_what_cannot_be_had_is_one_line(hub: Any, target: str, message: str) -> None:
    found = sampled(hub, target)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.startswith(f"error: {target}: ")
    assert found.stderr.count("\n") == 1


def test_a_damaged_header_on_the_hub_is_told(hub: Any) -> None:
    (hub[0].root / "org" / "merge" / "model.safetensors").write_bytes(b"\xff" * 64)
    found = sampled(hub, "org/merge")
    assert found.returncode == 2
    assert "org/merge/model.safetensors: not a safetensors file: its header claims" in found.stderr
