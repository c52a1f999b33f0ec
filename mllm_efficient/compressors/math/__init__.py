"""Numerical helpers that several methods share."""
