"""What runs where: placement arithmetic, cluster files, jobs."""
