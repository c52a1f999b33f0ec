"""What a sweep says: rows, tables, plots, the recommendation, and one HTML page that opens offline."""
