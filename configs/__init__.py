"""YAML recipes that ship with the package: ``configs/methods/divprune.yaml`` is a method and its settings."""
