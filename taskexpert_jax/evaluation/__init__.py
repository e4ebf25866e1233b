"""Evaluation: inference, passes over a data set, and their results."""
