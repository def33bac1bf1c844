"""Comparisons: fine-tuning methods side by side, each at its own best learning rate, with what chance alone would do."""
