"""Language models of bytes and words, trained from scratch at small scale."""
