"""Chat templates and vocabularies of tokenizers."""
