"""Whatever is put where a file of a source belongs: it is read, or refused at once."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from spikepatch.errors import BadTarget
from spikepatch.source.local import leads_out, local_path, opened, read_file, target_path, without_place


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as here:
        here.bind(f"{short}/s")  # a socket's name has some 100 bytes at most
        os.rename(f"{short}/s", path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("put", "why"),
    [
        (pipe, "it is a named pipe, and a file is read"),
        (bound_socket, "No such device or address"),  # what the system says of opening one
        (endless, "it is a device, and a file is read"),
        (Path.mkdir, "it is a folder"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: None, "No such file or directory"),
    ],
)
def test_what_is_no_file(put: object, why: str, tmp_path: Path) -> None:
    assert callable(put)
    put(tmp_path / "x")
    with pytest.raises(OSError, match=why) as caught:
        read_file(tmp_path / "x")
    assert caught.value.strerror == why


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_file(tmp_path / "x", within=tmp_path, limit=5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        read_file(tmp_path / "x", limit=4)


def test_links(tmp_path: Path) -> None:
    """Out of the folder, by a file or a folder on the way; but a snapshot of the Hub's cache has links to its blobs."""
    snapshot = tmp_path / "models--a--b/snapshots/1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/5678").write_bytes(b"blob")
    (tmp_path / "secret").write_bytes(b"secret")
    (snapshot / "config.json").symlink_to("../../blobs/5678")
    (snapshot / "other").symlink_to("../../../secret")
    (snapshot / "here").symlink_to("config.json")
    (snapshot / "up").symlink_to("../../..")
    assert read_file(snapshot / "config.json", within=snapshot) == b"blob"
    assert leads_out(snapshot / "other", snapshot) == tmp_path / "secret"
    for name in ("other", "up/secret"):
        with pytest.raises(OSError, match="a link that leads out of the folder"):
            opened(snapshot / name, within=snapshot)


def test_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/x") == target_path("~/x") == Path("/home/me/x")
    assert local_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    with pytest.raises(BadTarget, match="it is empty, as a variable is that is not set"):
        target_path("")


def test_what_is_written_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home/ada"))
    (tmp_path / "org/name").mkdir(parents=True)
    for source in ("org/name", "./org/name", f"{tmp_path}/org/name/", "~/../../org/name", "org/../org/name"):
        assert without_place(source) == "name"
    assert without_place("~/models/absent.toml") == "absent.toml"
    for kept in ("arch:gpt2", "gpt2", "other/name", "scaled-embed", "module:NAME", ""):
        assert without_place(kept) == kept
    (tmp_path / "org/link").symlink_to("name")
    assert without_place("org/link") == "name"
