"""Are our scores those of lm-evaluation-harness? `python -m tests.parity` runs both on the same items and models."""
