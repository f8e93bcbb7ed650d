"""The tasks of this package by name. This module imports nothing, so that a launcher can read it."""

TASKS = {
    "image_classification": "bigincubate.tasks.image_classification.task:ImageClassification",
    "causal_lm": "bigincubate.tasks.causal_lm.task:CausalLanguageModeling",
}
# large modules that a phase of a task imports in addition to the task's own
LIBRARIES = {"causal_lm": ("bigincubate.models.language.families", "transformers.modeling_utils")}


def modules_to_preload(name: str) -> tuple[str, ...]:
    """Return the modules that every phase of a task imports; none for a task from another package."""
    found = TASKS.get(name)
    return () if found is None else (found.partition(":")[0], *LIBRARIES.get(name, ()))
