"""What methods share: tokens and keys, searches, artifacts, presets, gradients, training."""
