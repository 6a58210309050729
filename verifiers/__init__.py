"""Text in, reward out: verifiers that need neither torch nor Ray, so that anyone can reuse them."""
