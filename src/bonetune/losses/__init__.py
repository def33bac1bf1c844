"""The training losses."""

from bonetune.losses.classification import classification_loss, is_labelled, label_loss
from bonetune.losses.completion import check_loss, completion_loss, example_losses
from bonetune.losses.segments import segmented_loss

__all__ = [
    "check_loss",
    "classification_loss",
    "completion_loss",
    "example_losses",
    "is_labelled",
    "label_loss",
    "segmented_loss",
]
