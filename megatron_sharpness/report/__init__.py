"""What a finished or running training has measured: a table, curves, a page."""
