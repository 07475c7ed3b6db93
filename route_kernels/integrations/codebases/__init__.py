"""One module for each codebase, with its `apply()` and `revert()`."""
