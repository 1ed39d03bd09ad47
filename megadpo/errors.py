"""Every error that megadpo raises on purpose. A message names the key, the value, the requirement and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from megadpo.redaction import redact

_LINES_SHOWN = 50


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
