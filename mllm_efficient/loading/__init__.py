"""A model, its adapters, its processor, and the prompt that both expect."""
