"""Features whose benefit is not proven. See docs/experimental.md.

The rest of the package does not import this package. An experiment is enabled by its name in a recipe
(``package.module:attribute``), or by a command that imports it when it runs.
"""
