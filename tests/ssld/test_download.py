"""Weights from the web: every way in which a server can fail, against a server that fails so."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from click.testing import CliRunner

from ssld import plugins
from ssld.cli import main
from ssld.errors import BusyError, CheckpointError, RecipeError, SsldError, StallError
from ssld.importing import conversion, download
from ssld.importing.published import locate, published

CONTENT = random.Random(0).randbytes(100_000)
TAG = '"one"'


class Answer(BaseHTTPRequestHandler):
    """Answers by the server's next word, or whole and with ranges where there is none left."""

    def do_GET(self) -> None:
        self.server.asked.append((self.headers.get("Range"), self.headers.get("If-Range")))
        word, *more = self.server.words.pop(0) if self.server.words else ("whole",)
        getattr(self, word)(*more)

    def head(self, code: int, **headers: Any) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def whole(self, upto: int | None = None, tag: str = TAG) -> None:
        """Part of what was asked for: `upto` bytes of the whole, of which the length says the truth."""
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked and self.headers["If-Range"] == tag else 0
        length = len(CONTENT) - start
        more = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
        self.head(206 if start else 200, Content_Length=length, ETag=tag, **more)
        self.wfile.write(CONTENT[start:upto])

    def deaf(self, upto: int | None = None) -> None:
        """Knows no ranges."""
        self.head(200, Content_Length=len(CONTENT), ETag=TAG)
        self.wfile.write(CONTENT[:upto])

    def elsewhere(self) -> None:
        """Another part than was asked for."""
        self.head(206, Content_Length=5, ETag=TAG, Content_Range=f"bytes 7-11/{len(CONTENT)}")
        self.wfile.write(CONTENT[7:12])

    def reset(self, upto: int) -> None:
        self.whole(upto)
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def stall(self, upto: int) -> None:
        self.whole(upto)
        self.wfile.flush()
        self.server.over.wait(60)

    def fail(self, code: int) -> None:
        self.head(code, Content_Length=0)

    def to(self, address: str) -> None:
        self.head(302, Location=address, Content_Length=0)

    def log_message(self, *words: Any) -> None:
        pass

    def finish(self) -> None:
        # the connection that was reset on purpose is closed
        if self.connection.fileno() >= 0:
            super().finish()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.words: list[tuple[Any, ...]] = []
        self.asked: list[tuple[str | None, str | None]] = []
        self.over = threading.Event()

    def handle_error(self, *words: Any) -> None:
        """The client hangs up on a server that stalls."""

    def expect(self, words: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
        """These answers. One that stalls is not waited for as long as one that is only slow."""
        self.words = list(words)
        if any(word == "stall" for word, *_ in words):
            monkeypatch.setattr(download, "TIMEOUT", 0.5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/a/net.pdparams"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_OPENER", without_proxy(monkeypatch))
    monkeypatch.setattr(download, "TIMEOUT", 20.0)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.over.set()
        made.shutdown()
        thread.join()


def without_proxy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(download.request, "getproxies", dict)
    return download._opener()


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("words", "ranges"),
    [
        ([], [None]),
        ([("whole", 40_000)], [None, "bytes=40000-"]),
        # what had come but was not read goes with the connection
        ([("reset", 40_000)], [None, ANY]),
        ([("stall", 40_000)], [None, "bytes=40000-"]),
        ([("fail", 503), ("fail", 500)], [None, None, None]),
        # each brings something, so that none of them is the third that brings nothing
        ([("whole", 10), ("whole", 20), ("whole", 30), ("whole", 40)], [None, *(f"bytes={n}0-" for n in range(1, 5))]),
        ([("whole", 40_000), ("deaf",)], [None, "bytes=40000-"]),
        ([("whole", 40_000), ("whole", None, '"two"')], [None, "bytes=40000-"]),
        ([("whole", 40_000), ("elsewhere",)], [None, "bytes=40000-", None]),
        ([("whole", 40_000), ("fail", 416)], [None, "bytes=40000-", None]),
        ([("to", "/b/other")], [None, None]),
    ],
    ids=["nothing", "short", "reset", "stall", "500", "ever so short", "deaf", "changed", "elsewhere", "416", "moved"],
)
def test_a_file_comes_whole_in_spite_of(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[tuple[Any, ...]],
    ranges: list[str | None],
) -> None:
    server.expect(words, monkeypatch)
    path = download.fetch([server.url], lambda text: None)
    assert path.read_bytes() == CONTENT
    assert [asked for asked, _ in server.asked] == ranges
    assert all(validator == TAG for asked, validator in server.asked if asked)
    assert kept(tmp_path) == ["net.pdparams"]


@pytest.mark.parametrize(
    ("words", "error", "part"),
    [
        ([("fail", 404)], CheckpointError, "404 Not Found"),
        ([("fail", 403)], CheckpointError, "403 Forbidden"),
        ([("fail", 500)] * 3, StallError, "500 Internal Server Error, 3 times"),
        ([("stall", 0)] * 3, StallError, "timed out, 3 times"),
        ([("whole", 0)] * 3, StallError, "the connection ended before the file did, 3 times"),
        ([("deaf", 500)] * 4, StallError, "the connection ended before the file did, 3 times"),
        ([("to", "/a/net.pdparams")] * 12, CheckpointError, "infinite loop"),
        ([("to", "file:///etc/passwd")], CheckpointError, "file:///etc/passwd"),
        ([("to", "ftp://127.0.0.1/net.pdparams")], CheckpointError, "which leads from http to ftp"),
    ],
    ids=["404", "403", "500", "stall", "short", "shorter", "loop", "file", "ftp"],
)
def test_what_does_not_come_is_said_with_its_address(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[tuple[Any, ...]],
    error: type[SsldError],
    part: str,
) -> None:
    server.expect(words, monkeypatch)
    with pytest.raises(error) as caught:
        download.fetch([f"{server.url}?key=secret"], lambda text: None)
    assert type(caught.value).exit_code == error.exit_code
    assert str(caught.value).startswith(f"cannot get {server.url}: ")
    assert part in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "net.pdparams" not in kept(tmp_path)
    assert all(path.stat().st_size for path in tmp_path.rglob("*.part"))


def test_nobody_there_is_said_and_a_later_command_goes_on(server: Server, tmp_path: Path) -> None:
    server.words = [("whole", 40_000), *[("fail", 500)] * 3]
    with pytest.raises(StallError, match="what has come stays"):
        download.fetch([server.url], lambda text: None)
    assert kept(tmp_path) == ["net.pdparams.part", "net.pdparams.validator"]
    del server.asked[:]
    assert download.fetch([server.url], lambda text: None).read_bytes() == CONTENT
    assert server.asked == [("bytes=40000-", TAG)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/net.pdparams"
        with pytest.raises(StallError, match="refused"):
            download.fetch([nobody], lambda text: None)


def test_a_file_is_fetched_once_and_checked_against_its_digest(server: Server, tmp_path: Path) -> None:
    digest, other, said = hashlib.sha256(CONTENT).hexdigest(), "0" * 64, []
    with pytest.raises(CheckpointError, match=f"expected a file with sha256 {other}, got {digest}; it was removed"):
        download.fetch([f"{server.url}#sha256={other}"], said.append)
    assert "net.pdparams" not in kept(tmp_path)
    first = download.fetch([f"{server.url}#sha256={digest}"], said.append)
    again = download.fetch([server.url], said.append)
    assert (first, len(server.asked)) == (again, 2)
    assert said == [f"{first} was downloaded before"]
    elsewhere = download.fetch([server.url.replace("/a/", "/b/")], said.append)
    assert elsewhere != first


def test_only_a_name_that_is_not_there_is_looked_for_elsewhere(server: Server) -> None:
    said: list[str] = []
    server.words = [("fail", 404)]
    path = download.fetch([server.url, server.url.replace("net", "other")], said.append)
    assert path.name == "other.pdparams"
    assert said == [f"cannot get {server.url}: 404 Not Found; check the address in a browser; trying the other name"]


def test_of_two_processes_one_fetches(server: Server) -> None:
    began = threading.Thread(target=download.fetch, args=([server.url], lambda text: None))
    server.words = [("stall", 40_000)]
    began.start()
    while not server.asked:
        time.sleep(0.01)
    with pytest.raises(BusyError, match="is being downloaded by another process"):
        download.fetch([server.url], lambda text: None)
    server.over.set()
    began.join()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/a",
        "http:///a",
        "http://host/",
        "https://user:word@host/a",
        "http://[::1/a",
        "http://host/%2e%2e",
        "http://host/a#md5=0",
    ],
)
def test_what_is_no_address_of_a_file_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=r"^expected ") as caught:
        download.fetch([url], lambda text: None)
    assert "word@" not in str(caught.value)


# By name -------------------------------------------------------------------------------------------------------------


def test_each_network_here_has_an_address_and_only_those() -> None:
    here = {found.name for found in plugins.find("students") if found.distribution == "ssld"}
    assert {name for name in here if published(name) is None} == set()
    names = [*here, *(f"{name}_ssld" for name in here), "ResNet50_vd_ssld_v2", "Fix_ResNet50_vd_ssld_v2"]
    found = {name: where for name in names if (where := published(name))}
    assert {where.network for where in found.values()} == here
    urls = [url for where in found.values() for url in where.urls]
    assert len(set(urls)) == len(urls)
    assert not any(url.count("legendary_models") > 1 or "_ssld_ssld" in url for url in urls)
    assert published("ResNet200_vd_ssld") is None
    assert published("Alex") is None


def test_the_wsl_teacher_is_asked_for_under_both_of_its_names_and_its_licence_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("ssld.importing.published.fetch", lambda urls, note: asked.append(urls) or Path("x.pdparams"))
    found = locate("ResNeXt101_32x16d_wsl", said.append)
    assert (found.network, found.out) == ("ResNeXt101_32x16d_wsl", Path("ResNeXt101_32x16d_wsl.safetensors"))
    assert [url.rpartition("/")[2] for url in asked[0]] == [
        "ResNeXt101_32x16d_wsl_pretrained.pdparams",
        "ResNeXt101_32x16_wsl_pretrained.pdparams",
    ]
    assert "CC BY-NC 4.0" in said[0]
    Path("ResNet50_vd").touch()
    assert locate("ResNet50_vd", said.append).file == Path("ResNet50_vd")
    assert len(asked) == 1


def test_the_command_imports_what_an_address_holds(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given: list[Any] = []

    def convert(file: Path, out: Path, *words: Any, **options: Any) -> conversion.Imported:
        given.append((file.read_bytes(), out))
        return conversion.Imported(out, 3, {})

    monkeypatch.setattr(conversion, "convert", convert)
    result = CliRunner().invoke(main, ["import", server.url])
    assert result.exit_code == 0, result.output
    assert given == [(CONTENT, Path("net.safetensors"))]
    server.words = [("fail", 404)]
    result = CliRunner().invoke(main, ["import", server.url.replace("/a/", "/c/")])
    assert (result.exit_code, result.stdout) == (65, "")
    assert result.stderr.startswith("Error: cannot get http://127.0.0.1:")
