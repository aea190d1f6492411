"""Zero-shot tokenizer transfer: `python -m train.tokenizer_transfer`."""
