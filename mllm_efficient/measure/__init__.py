"""What a method costs and saves: FLOPs in closed form (``flops``), and the same counted on the real model (``counter``)."""
