"""What happens to one call, from its arguments to generation."""
