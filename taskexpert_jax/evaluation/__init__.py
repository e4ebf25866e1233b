"""From a model and batches to metrics: inference, one pass over a set, what it found."""
