"""labkit's tests; the folders mirror labkit/."""
