"""Training of projectors and routers: recipes, data, the trainer."""
