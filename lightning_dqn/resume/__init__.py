"""What continues a run exactly, and what checks a checkpoint before any of it is used."""
