"""Our methods against vectors recorded from reference implementations: `python -m tests.golden FOLDER [FILTER]`."""
