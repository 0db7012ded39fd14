"""Behaviours to find circuits of: one file for each task."""
