"""Private parts of libraries: one file for each library, pinned by tests."""
