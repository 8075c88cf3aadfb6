"""What a running turn tells of itself."""
