"""What is asked of tokenizers beside their tokens: chat templates and vocabularies."""
