"""API keys: a TOML file of hashes, read again whenever it changes."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from server.errors import LaunchError

# vLLM configures handlers for its own logger only.
logger = logging.getLogger("vllm.focus_serve.keys")

ANYBODY = "anybody"
"""Who asks where no key is needed."""


class Key(BaseModel, extra="forbid", frozen=True):
    """One entry of the file, `NAME = {sha256 = "...", ...}`."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(default=None, ge=0)
    """None: the server's own limit holds; 0: none does."""
    tokens_per_minute: int | None = Field(default=None, ge=0)


KEYS = TypeAdapter(dict[str, Key])


class Keyring:
    """Knows whose key a request carries."""

    def __init__(self, file: Path | None, plain: Sequence[str] = ()) -> None:
        """Accept the keys of `file` and those in `plain`; if both are empty, nobody needs one.

        Raises:
            LaunchError: The file cannot be read or has a wrong entry.
        """
        self.required = bool(file or plain)
        self._file = file
        hashes = map(_hash, plain)
        self._plain = {hash_: (f"key{number}", Key(sha256=hash_)) for number, hash_ in enumerate(hashes)}
        self._keys: dict[str, tuple[str, Key]] = self._plain | (read_keys(file) if file else {})
        self._version = _version(file)

    def find(self, secret: str) -> tuple[str, Key] | None:
        """Return name and entry of the key `secret`, or None if there is none (any more)."""
        # A table look-up leaks timing of the hash alone, which tells nothing about a random key.
        self._reload()
        return self._keys.get(_hash(secret))

    def _reload(self) -> None:
        version = _version(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = self._plain | (read_keys(self._file) if self._file else {})
        except LaunchError as error:
            logger.error("The API keys from before stay valid: %s", error)
        else:
            logger.info("Read %d API keys from %s", len(self._keys), self._file)


def read_keys(file: Path) -> dict[str, tuple[str, Key]]:
    """Return hash -> name and entry.

    Raises:
        LaunchError: `file` cannot be read or has a wrong entry; every one is listed.
    """
    try:
        entries = KEYS.validate_python(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        # Neither the entry's value nor pydantic's own text is shown: somebody may have pasted a key.
        wrong = sorted({".".join(map(str, problem["loc"])) for problem in error.errors()})
        raise LaunchError(
            f"API key file {str(file)!r}: {', '.join(wrong)} is wrong; an entry is "
            'NAME = {sha256 = "64 hexadecimal digits", requests_per_minute = N, tokens_per_minute = N}, '
            "the numbers optional (focus-serve --make-key NAME makes one)"
        ) from None
    except (OSError, ValueError) as error:
        raise LaunchError(f"cannot read the API key file {str(file)!r}: {error}") from None
    return {key.sha256: (name, key) for name, key in entries.items()}


def make_key(name: str) -> tuple[str, str]:
    """Return a new key and its line for the file.

    Raises:
        LaunchError: `name` cannot be a name in the file.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise LaunchError(f"--make-key {name!r}: use letters, digits, - and _")
    key = "focus-" + secrets.token_urlsafe(32)
    return key, f'{name} = {{sha256 = "{_hash(key)}"}}'


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _version(file: Path | None) -> tuple[int, int, int] | None:
    try:
        status = file.stat() if file else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ino, status.st_size) if status else None
