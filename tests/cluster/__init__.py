"""Jobs and clusters."""
