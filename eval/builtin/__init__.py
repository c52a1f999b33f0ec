"""The embedded model and benchmark: a test instrument that runs offline, not evidence about large models."""
