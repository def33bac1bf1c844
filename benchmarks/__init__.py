"""Measurements. `python -m benchmarks` (or `make bench`) runs them all; nothing here is asserted by tests."""
