"""Training one phase: the hooks that a recipe or an environment variable can put into the loop."""
