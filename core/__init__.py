import sys

__version__ = "0.2.0"
OTHER_NAME = "core" if __name__ == "gpt_checkpoints" else "gpt_checkpoints"
"""The other name of this package: one in a clone, one where it is installed."""

_other = sys.modules.get(OTHER_NAME)
if _other is not None and hasattr(_other, "OTHER_NAME"):
    raise ImportError(
        f"{OTHER_NAME} ({_other.__path__[0]}) and {__name__} ({__path__[0]}) are one package under two names, whose "
        "classes are not each other's: import one of them in a process, core in a clone's own scripts and "
        "gpt_checkpoints in everything else."
    )
