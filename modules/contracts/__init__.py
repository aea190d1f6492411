"""The contracts between the packages: batches, trees, drafters, trainables. Read first."""
