"""Pictures and videos in, figures out."""
