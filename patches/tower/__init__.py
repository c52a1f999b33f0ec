"""What a vision tower can be asked for: attention, keys, merging between its layers."""
