"""What a model is: the fields of each kind, their checks and defaults."""

from core.config.gpt import GPTConfig

__all__ = ["GPTConfig"]
