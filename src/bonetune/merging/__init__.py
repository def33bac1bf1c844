"""A merged model, and the proof that it is the adapted one."""

from bonetune.merging.merge import MergeResult, merge

__all__ = ["MergeResult", "merge"]
