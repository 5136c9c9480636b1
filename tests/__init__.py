"""Tests mirror the tree; contracts/ tests every method and every benchmark alike."""
