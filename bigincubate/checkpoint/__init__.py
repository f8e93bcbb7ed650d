"""What is kept: resume checkpoints of a phase, and the artifacts that phases hand on."""
