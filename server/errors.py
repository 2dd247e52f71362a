"""What stops a server from starting."""

from __future__ import annotations


class LaunchError(Exception):
    """The server must not start; the message says what was wrong and what to do."""
