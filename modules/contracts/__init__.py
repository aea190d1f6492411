"""What every part agrees on: batches, trees, drafters, trainables. Read first."""
