"""Folders, hub ids, and what is said when neither works. The hub is played by a folder."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from pipeline.checkpoint import open_checkpoint
from pipeline.errors import InputError, UnsupportedError, UsageError
from tests.pipeline.checkpoint.files import edited

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands in for the hub: copies what the patterns allow and keeps a record."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str]
    ) -> str:
        self.calls.append({"repo_id": repo_id, "revision": revision})
        snapshot = self.cache / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    fake = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_hub_id_is_downloaded_at_one_commit(hub: Hub) -> None:
    checkpoint = open_checkpoint("owner/name", revision="main")
    assert checkpoint.revision == COMMIT
    assert checkpoint.source == "owner/name"
    assert [call["revision"] for call in hub.calls] == ["main", COMMIT]
    here = {path.name for path in checkpoint.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= here
    assert not [name for name in here if name.endswith((".py", ".bin"))]
    assert checkpoint.read("model.norm.weight").shape == (64,)


def test_pickles_are_downloaded_only_if_allowed(hub: Hub) -> None:
    assert (open_checkpoint("owner/name", allow_pickle=True).folder / "pytorch_model.bin").exists()


def test_weights_of_an_unknown_architecture_are_never_downloaded(hub: Hub) -> None:
    with edited(hub.repository) as config:
        config["model_type"] = "mamba"
    with pytest.raises(UnsupportedError):
        open_checkpoint("owner/name")
    assert not list(hub.cache.rglob("*.safetensors"))


def test_a_folder_wins_over_the_hub(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(hub.repository, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").revision is None
    assert hub.calls == []


def error_of(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # their constructors want a response of the HTTP library in use
    Exception.__init__(error, "details from the server")
    return error


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (errors.GatedRepoError, "licence"),
        (errors.RepositoryNotFoundError, "spelling"),
        (errors.RevisionNotFoundError, "branch"),
        (errors.LocalEntryNotFoundError, "offline"),
        (errors.HfHubHTTPError, "details from the server"),
        (errors.HFValidationError, "details from the server"),
        (ConnectionError, "details from the server"),
    ],
)
def test_failures_of_the_hub_say_what_to_do(
    kind: type[Exception], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error_of(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="owner/name") as caught:
        open_checkpoint("owner/name", revision="v1")
    assert named in str(caught.value)
    assert "v1" in caught.value.what
    assert caught.value.fix


def test_without_a_network_the_real_client_fails_with_a_fix() -> None:
    with pytest.raises(InputError, match="hub") as caught:
        open_checkpoint("nobody/nothing")
    assert "no folder of that name" in caught.value.why


@pytest.mark.parametrize(
    "source", ["nowhere", "/no/such/folder", "./a/b", "a/b/c", "~/nothing", ""]
)
def test_a_wrong_path_is_not_taken_for_a_hub_id(source: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(InputError) as caught:
        open_checkpoint(source) if source else open_checkpoint("no such")
    assert "the hub was not asked" in caught.value.why


def test_a_path_object_is_never_a_hub_id(monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(Path("owner/name"))


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        open_checkpoint(folder / "model.safetensors")


def test_a_name_that_no_system_allows_is_an_input_error() -> None:
    with pytest.raises(InputError):
        open_checkpoint("x" * 10_000)


def test_a_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(UsageError, match="revision"):
        open_checkpoint(folder, revision="main")
