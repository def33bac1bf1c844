"""Adapters and models to the Hugging Face hub and back."""

from bonetune.hub.pull import Pulled, pull
from bonetune.hub.push import Pushed, push

__all__ = ["Pulled", "Pushed", "pull", "push"]
