"""Text for language models: documents, tokenizers, and windows of tokens."""
