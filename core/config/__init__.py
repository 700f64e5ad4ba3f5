"""What a model is: the fields of each kind, their checks and defaults."""

from .gpt import GPTConfig

__all__ = ["GPTConfig"]
