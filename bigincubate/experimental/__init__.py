"""Features that are not proven to pay off. See docs/experimental.md.

The rest of the package never imports this one: an experiment is switched on by its name in a recipe
(``package.module:attribute``) or by a command that imports it when it runs.
"""
