"""The errors recflow raises on purpose.

::

    RecflowError                    anything recflow reports in one sentence
    ├── PermanentError              a rerun cannot help: someone must change something first
    │   ├── ConfigError             a setting, run config or command-line value is wrong
    │   ├── SourceError             the input logs are missing, truncated or in another format
    │   ├── ContractError           a table does not have the columns, types or values it promises
    │   ├── LeakageError            a row would see its own future
    │   ├── HardwareError           no device, or not this one, has what a run takes
    │   ├── PromotionError          the model registry is not in the state that a change needs
    │   └── ArtifactError           a stored artifact is missing, incomplete or altered
    │       └── ParityError         two implementations of one model disagree
    └── TransientError              a rerun may help: network, disk pressure, a busy service

Messages name the file, line or key, the value seen, what is allowed, and the remedy, so that the
person reading the log can act without reading the code.
"""

from __future__ import annotations


class RecflowError(Exception):
    """Base of every error recflow raises on purpose; shown to users without a traceback."""


class PermanentError(RecflowError):
    """A rerun with the same input and configuration fails the same way."""


class ConfigError(PermanentError):
    """A setting or run configuration has an unknown key or an impossible value."""

    @classmethod
    def of(cls, key: str, value: object, allowed: str) -> ConfigError:
        """Build the standard sentence: the key, the value seen, and what is allowed."""
        return cls(f"{key} = {value!r} is not allowed; allowed: {allowed}")


class SourceError(PermanentError):
    """The input logs cannot be read as the format they were announced as."""


class ContractError(PermanentError):
    """A table breaks its contract (see :mod:`recflow.core.columns`)."""


class LeakageError(PermanentError):
    """An impression would be described or split with knowledge from its own future."""


class HardwareError(PermanentError):
    """A run takes more memory or time than the devices it may use have."""


class PromotionError(PermanentError):
    """The model that users get cannot be changed so: something else was decided meanwhile."""


class ArtifactError(PermanentError):
    """A stored artifact is missing, incomplete, altered, or of an unknown layout."""


class ParityError(ArtifactError):
    """An exported model does not reproduce the model it was exported from."""


class TransientError(RecflowError):
    """Something outside recflow failed; trying again may succeed."""
