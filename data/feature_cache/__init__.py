"""Target states on disk, so that the target runs once per text."""
