"""Short programs that show how to use the library beside others."""
