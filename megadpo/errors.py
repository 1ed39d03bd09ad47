"""All errors that megadpo raises on purpose, and the redaction that keeps secrets out of messages and log lines.

An error's message names the key, the value, the requirement and the remedy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_LINES_SHOWN = 50
_HIDDEN = "***"
# User name, password or token of a URL. Only searched from the beginning of a word: from every letter of a long word
# the search would take quadratic time.
_URL_LOGIN = re.compile(r"(?<![\w+.-])([\w+.-]*):(//?)([^/\s]+)@")
_KEY = r"(?:access|account|api|auth|encryption|private|secret|shared|signing|subscription)[_-]?key"
_SECRET_PATTERNS = (
    (
        re.compile(
            rf"(?i)([?&](?:[\w-]*(?:token|secret|password|signature|{_KEY})|(?:[\w-]*[_-])?sig|key)=)[^&\s'\"]+"
        ),
        rf"\1{_HIDDEN}",
    ),
    # Hugging Face tokens: `hf_` and at least 30 letters of both cases and digits.
    (re.compile(r"\bhf_(?=[A-Z0-9]*[a-z])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{30,}"), _HIDDEN),
)
_SECRET_NAMES = re.compile(rf"(?i)(^|_)(token|secret|credentials?|pass|passphrase|pat|{_KEY})$|(password|passwd)$")
_MIN_SECRET_LENGTH = 12
# Control characters, on which a terminal would act, except line ends and tabs.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def listing(lines: Sequence[str]) -> str:
    """The lines one below the other, indented, for the end of a message; after the first 50 only their number."""
    shown = [*lines[:_LINES_SHOWN], *([f"and {len(lines) - _LINES_SHOWN} more"] if len(lines) > _LINES_SHOWN else [])]
    return "\n".join(f"  {line}" for line in shown)


class MegaDPOError(Exception):
    """Base of all errors that a user can act on; the command line prints the message without a traceback.

    Secrets in the message, for instance in a path or in a library's text, are hidden.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class ConfigError(MegaDPOError):
    """A configuration that cannot be run; `violations` holds all that were found, not only the first."""

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
    """Cached log-probs of a reference that can't be read, written or trusted."""


class ConversionError(MegaDPOError):
    """Hugging Face weights or a configuration that do not map to the model; the message names each one."""


class Stopped(MegaDPOError):
    """A run that was stopped by a signal or its budget of hours, after it saved the updates it had made."""


class TrainingError(MegaDPOError):
    """A run that must not continue because its numbers are wrong (the ln 2 check, a non-finite loss)."""


def redact(text: str) -> str:
    """Returns the text with *** for credentials in URLs, Hugging Face tokens, and secrets of the environment.

    Secrets of the environment are values of at least 12 characters, neither numbers nor paths, of variables with names
    like HF_TOKEN or WANDB_API_KEY.
    """
    # The longest first: one secret may begin with another.
    for _, value in sorted(_secrets(), key=lambda secret: -len(secret[1])):
        text = text.replace(value, _HIDDEN)
    text = _URL_LOGIN.sub(_without_login, text)
    for pattern, hidden in _SECRET_PATTERNS:
        text = pattern.sub(hidden, text)
    return text


def secret_variables(text: str) -> list[str]:
    """Names of the environment variables whose secret value is in the text."""
    return [name for name, value in _secrets() if value in text]


def _secrets() -> list[tuple[str, str]]:
    return [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= _MIN_SECRET_LENGTH
        and _SECRET_NAMES.search(name)
        and not value.isdigit()
        and not _is_path(value)
    ]


def _is_path(value: str) -> bool:
    """True for an existing path, or one in an existing directory. A slash alone is no sign: base64 keys have some."""
    directory = os.path.dirname(value)
    return (
        value.startswith(("./", "../", "~/"))
        or os.path.exists(value)
        or (directory not in ("", "/") and os.path.isdir(directory))
    )


def _without_login(match: re.Match[str]) -> str:
    scheme, slashes, login = match.groups()
    # hf://datasets/OWNER/NAME@REVISION names a data set, no login.
    if scheme.lower() == "hf" and ":" not in login:
        return match.group()
    return f"{scheme}:{slashes}{_HIDDEN}@"


def visible(text: str) -> str:
    """Returns the text with a symbol in place of each control character except line ends and tabs."""
    return text.translate(_VISIBLE)
