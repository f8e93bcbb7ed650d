"""Causal language models from transformers."""
