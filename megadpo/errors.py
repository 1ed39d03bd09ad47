"""Every error that megadpo raises on purpose, and the redaction that keeps secrets out of messages and log lines.

An error's message names the key, the value, the requirement and the remedy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_LINES_SHOWN = 50
_HIDDEN = "***"
# User name, password or token of a URL. Looked for where a word begins only, or a long word would take a square.
_LOGIN = re.compile(r"(?<![\w+.-])([\w+.-]*):(//?)([^/\s]+)@")
_KEY = r"(?:access|account|api|auth|encryption|private|secret|shared|signing|subscription)[_-]?key"
_SHAPES = (
    (
        re.compile(
            rf"(?i)([?&](?:[\w-]*(?:token|secret|password|signature|{_KEY})|(?:[\w-]*[_-])?sig|key)=)[^&\s'\"]+"
        ),
        rf"\1{_HIDDEN}",
    ),
    # Hugging Face's own: 34 letters of both cases, sometimes digits.
    (re.compile(r"\bhf_(?=[A-Z0-9]*[a-z])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{30,}"), _HIDDEN),
)
_NAMES = re.compile(rf"(?i)(^|_)(token|secret|credentials?|pass|passphrase|pat|{_KEY})$|(password|passwd)$")
_SHORTEST = 12
# Line ends and tabs stay; a terminal would act on the rest.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def listing(lines: Sequence[str]) -> str:
    """The lines one below the other, indented, for the end of a message; of more than 50 the rest is only counted."""
    shown = [*lines[:_LINES_SHOWN], *([f"and {len(lines) - _LINES_SHOWN} more"] if len(lines) > _LINES_SHOWN else [])]
    return "\n".join(f"  {line}" for line in shown)


class MegaDPOError(Exception):
    """Base of all errors that a user can act on; the command line prints the message without a traceback.

    Secrets in a message, as in a path or what a library says, are hidden.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class ConfigError(MegaDPOError):
    """Configuration that cannot be run: holds every violation found, not only the first."""

    def __init__(self, violations: str | Sequence[str]) -> None:
        self.violations = [redact(text) for text in ([violations] if isinstance(violations, str) else violations)]
        if len(self.violations) == 1:
            super().__init__(self.violations[0])
        else:
            lines = "\n".join(f"  {i}. {text}" for i, text in enumerate(self.violations, 1))
            super().__init__(f"{len(self.violations)} problems in the configuration:\n{lines}")


class DataError(MegaDPOError):
    """Preference data that cannot be used; the message starts with FILE:LINE where a line is known."""


class CheckpointError(MegaDPOError):
    """A training checkpoint that is missing, incomplete or belongs to another run."""


class CacheError(MegaDPOError):
    """Kept log-probs of a reference that can't be read, written or trusted."""


class ConversionError(MegaDPOError):
    """Hugging Face weights or a configuration that do not map to the model, named one by one."""


class Stopped(MegaDPOError):
    """A run that was told to stop, by a signal or its budget of hours, and has saved what updates it has made."""


class TrainingError(MegaDPOError):
    """A run whose numbers are known to be wrong (the ln 2 check, a non-finite loss) and that must not go on."""


def redact(text: str) -> str:
    """The text with *** for credentials and tokens of URLs, Hugging Face tokens, and secrets of the environment.

    The last are values of at least 12 characters of variables that are called something like HF_TOKEN or
    WANDB_API_KEY, but for numbers and places in the file system.
    """
    # One may begin like another.
    for _, value in sorted(_secrets(), key=lambda secret: -len(secret[1])):
        text = text.replace(value, _HIDDEN)
    text = _LOGIN.sub(_without_login, text)
    for shape, hidden in _SHAPES:
        text = shape.sub(hidden, text)
    return text


def secret_variables(text: str) -> list[str]:
    """Names of the environment's variables whose secret is in the text."""
    return [name for name, value in _secrets() if value in text]


def _secrets() -> list[tuple[str, str]]:
    return [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _NAMES.search(name) and not value.isdigit() and not _is_place(value)
    ]


def _is_place(value: str) -> bool:
    """Whether it names a file, or a place for one. A slash alone says nothing: keys in base64 have some."""
    directory = os.path.dirname(value)
    return (
        value.startswith(("./", "../", "~/"))
        or os.path.exists(value)
        or (directory not in ("", "/") and os.path.isdir(directory))
    )


def _without_login(match: re.Match[str]) -> str:
    scheme, slashes, login = match.groups()
    # A data set of the hub at a revision.
    if scheme.lower() == "hf" and ":" not in login:
        return match.group()
    return f"{scheme}:{slashes}{_HIDDEN}@"


def visible(text: str) -> str:
    """The text with a symbol in place of each control character but line ends and tabs."""
    return text.translate(_VISIBLE)
