"""Files of weights from the web, kept in a cache, and gone on with where a connection was lost.

What is being received lies beside its final name as X.part, with the server's validator of that very content in
X.validator: a part is gone on with only where the server confirms it (RFC 9110, section 13.1.5), else from the start.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib import request
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit

from ssld.errors import BusyError, CheckpointError, RecipeError, StallError
from ssld.files import disk, move, reported, writable
from ssld.importing.pickles import shown
from ssld.journal import counting

TIMEOUT = 30.0
"""Seconds for a connection, and for each next byte."""
ATTEMPTS = 3
"""So many one after another that bring nothing end it."""
PAUSE = 1.0
"""Seconds before a second attempt, twice as many before a third."""
CHUNK = 2**18
_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")
_SHA256 = re.compile(r"sha256=([0-9a-f]{64})")
_MISSING = (403, 404, 410)
"""How servers say that there is no such file; object stores say 403 where it may not be known either."""


class MissingError(CheckpointError):
    """There is no such file on the server."""


def fetch(urls: Sequence[str], note: Callable[[str], None]) -> Path:
    """The file at the first of these http(s) addresses that has it, from the cache where it was fetched before.

    An address that ends in #sha256=… is checked against it. Raises RecipeError for what is no address, CheckpointError
    for an answer that is no such file, StallError where none comes, BusyError where another process fetches it.
    """
    for url in urls[:-1]:
        try:
            return _fetch(url, note)
        except MissingError as error:
            note(f"{error}; trying the other name")
    return _fetch(urls[-1], note)


def _fetch(url: str, note: Callable[[str], None]) -> Path:
    address, name, wanted = _parts(url)
    final = _cache() / hashlib.sha256(address.encode()).hexdigest()[:16] / name
    if final.is_file():
        note(f"{final} was downloaded before")
        _check(final, wanted, address)
        return final
    writable(final.parent)
    part = final.with_name(f"{name}.part")
    with _alone(part) as file:
        _complete(file, address, final)
        disk.fsync(part)
        _check(part, wanted, address)
        move(part, final)
        _validator_of(final).unlink(missing_ok=True)
    return final


def _parts(url: str) -> tuple[str, str, str | None]:
    """The address, the name of the file, and its sha256 where the address ends in one."""
    try:
        split = urlsplit(url)
        host = split.hostname
    except ValueError as error:
        raise RecipeError(f"expected an address of a file, got another: {error}") from error
    name = unquote(split.path).rpartition("/")[2]
    if (
        split.scheme not in ("http", "https")
        or not host
        or split.username
        or not re.fullmatch(r"\w[\w.+-]{0,200}", name)
    ):
        given = shown(f"{split.scheme}://{host or ''}{split.path}")
        raise RecipeError(f"expected http(s)://HOST/…/NAME, without a user or a password, got {given}")
    digest = _SHA256.fullmatch(split.fragment)
    if split.fragment and digest is None:
        raise RecipeError(f"expected nothing after # but sha256= and 64 digits, got {shown(split.fragment)}")
    return urlunsplit(split._replace(fragment="")), name, digest[1] if digest else None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssld" / "weights"


@contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    """The part, open for this process only. Raises BusyError."""
    with reported(part, 0):
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"{part} is being downloaded by another process; wait for it") from error
        try:
            yield file
        finally:
            # nothing came, so there is nothing to go on with
            if os.fstat(file.fileno()).st_size == 0:
                part.unlink(missing_ok=True)


def _complete(file: IO[bytes], address: str, final: Path) -> None:
    """Receive until the part is whole. Raises StallError after some attempts that brought nothing new."""
    most, failures, problem = os.fstat(file.fileno()).st_size, 0, ""
    with counting(f"downloading {final.name}, MiB") as progress:
        while failures < ATTEMPTS:
            time.sleep(PAUSE * failures)
            try:
                if _receive(file, address, final, progress):
                    return
                problem = "the connection ended before the file did"
            except HTTPError as error:
                problem = f"{error.code} {shown(str(error.reason))}"
                error.close()
                if error.code == 416:
                    file.truncate(0)
                elif error.code < 500:
                    kind = MissingError if error.code in _MISSING else CheckpointError
                    raise kind(f"cannot get {_public(address)}: {problem}; check the address in a browser") from error
            except (OSError, http.client.HTTPException) as error:
                problem = shown(str(error)) or type(error).__name__
            size = os.fstat(file.fileno()).st_size
            most, failures = max(most, size), 0 if size > most else failures + 1
    raise StallError(
        f"cannot get {_public(address)}: {problem}, {ATTEMPTS} times; what has come stays, so run the command again to "
        f"go on, or download the file otherwise and import it"
    )


def _receive(file: IO[bytes], address: str, final: Path, progress: Callable[[int, int], None]) -> bool:
    """Receive what is missing of the part, or all where the server does not go on; returns whether it is whole."""
    size, validator = os.fstat(file.fileno()).st_size, _validator_of(final)
    asked = request.Request(address, headers={"Accept-Encoding": "identity", "User-Agent": "ssld"})
    if size and validator.is_file() and (known := validator.read_text()):
        asked.add_header("Range", f"bytes={size}-")
        asked.add_header("If-Range", known)
    with _OPENER.open(asked, timeout=TIMEOUT) as response:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", "")) if response.status == 206 else None
        done = size if found and int(found[1]) == size else 0
        if response.status == 206 and not done:
            file.truncate(0)
            return False
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else None
        with reported(final, total or 0):
            file.truncate(done)
            file.seek(done)
            validator.write_text(_validator(response.headers))
        # what has come is written before more is waited for
        while chunk := response.read1(CHUNK):
            with reported(final, total or 0):
                # a file without a buffer may write less than it is given
                while chunk:
                    chunk = chunk[file.write(chunk) :]
            done = file.tell()
            progress(done >> 20, (total or done) >> 20)
    return total is None or done == total


def _validator(headers: Any) -> str:
    """What names just this content, for If-Range: a strong entity tag, else a date; "" where there is none."""
    tag: str = headers.get("ETag", "")
    found = tag if tag.startswith('"') else headers.get("Last-Modified", "")
    return found if found.isascii() else ""


def _validator_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.validator")


def _check(path: Path, wanted: str | None, address: str) -> None:
    """Raises CheckpointError, after the file was removed, where its sha256 is another."""
    if wanted is None:
        return
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wanted:
        disk.remove(path)
        raise CheckpointError(f"{_public(address)}: expected a file with sha256 {wanted}, got {got}; it was removed")


def _public(address: str) -> str:
    """An address in a message: what follows the question mark may be a key."""
    return shown(address.partition("?")[0])


class _Redirects(request.HTTPRedirectHandler):
    """Follows to http(s) only, and never from https to http."""

    def redirect_request(self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise HTTPError(req.full_url, code, f"which leads from {req.type} to {scheme}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> request.OpenerDirector:
    """Knows http and https, and no other scheme, which a server could lead to."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.UnknownHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


_OPENER = _opener()
