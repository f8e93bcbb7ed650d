"""Uses of private or undocumented parts of libraries, one file per library. Tests pin their behavior."""
