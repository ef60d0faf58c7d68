"""What of an error may be told to whom. The operator has it whole, but for where this host keeps its files; who only dispatched
the job has its class and message, without paths and secrets.

These are patterns, so they find what looks like a path or a secret, and no more.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Final

_FILE: Final = re.compile(r'File "(/[^"\n]+)"')
_PATH: Final = re.compile(r"(?<![\w/.:~-])/(?:[\w.@+~-]+/)+([\w.@+~-]+)")
_CREDENTIALS: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@\"']*@", re.IGNORECASE)
_NAMED: Final = re.compile(
    r"\b((?:[\w-]*[_-])?(?:password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|signing[_-]?key|authorization))"
    r"(['\"]?\s*[=:]\s*)(?:(?:bearer|basic)\s+)?('[^']*'|\"[^\"]*\"|[^\s,;&'\")\]}]+)",
    re.IGNORECASE,
)


def shorten_paths(text: str, roots: Sequence[str] | None = None) -> str:
    """A traceback in which files are named as Python imports them: app/jobs.py, json/decoder.py.

    `roots`: where modules are found, None: as here. A file that is in none of them keeps its directory's name and its own.
    """
    known = sorted({root.rstrip("/") + "/" for root in (sys.path if roots is None else roots) if root.startswith("/")}, key=len)

    def shortened(match: re.Match[str]) -> str:
        path = match[1]
        for root in reversed(known):
            if path.startswith(root) and root != "/":
                return f'File "{path[len(root) :]}"'
        parts = path.rsplit("/", 2)
        return f'File "…/{"/".join(parts[1:])}"' if len(parts) == 3 and parts[0] else f'File "{path}"'

    return _FILE.sub(shortened, text)


def redacted(text: str) -> str:
    """`text` without absolute paths (but for what they end with), credentials in URLs, and values of what is named a secret."""
    text = _CREDENTIALS.sub(r"\1***@", text)
    text = _NAMED.sub(r"\1\2***", text)
    return _PATH.sub(r"…/\1", text)
