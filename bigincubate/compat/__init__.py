"""Access to private parts of libraries: one module for each library, pinned by tests."""
