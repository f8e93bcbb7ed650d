"""The task of causal language modeling."""
