"""Hooks between decoder layers."""
