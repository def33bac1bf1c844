"""A merged model, and the proof that it is the adapted one."""

from bonetune.merging.certify import Certificate, Witness, certify, witness
from bonetune.merging.merge import MergeResult, merge

__all__ = ["Certificate", "MergeResult", "Witness", "certify", "merge", "witness"]
