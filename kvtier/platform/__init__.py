"""What kvtier asks of the operating system: memory limits, folders, files, descriptors, forks."""
