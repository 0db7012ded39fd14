"""Training: K dictionaries from one LM pass, in Lightning."""
