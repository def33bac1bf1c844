"""Adapters from one format to another, with the proof that they stay the same."""

from bonetune.conversion.convert import convert
from bonetune.conversion.report import Conversion, Written

__all__ = ["Conversion", "Written", "convert"]
