"""Circuits: which latents carry a behaviour of a language model, and how faithfully."""
