"""Services of the operating system: memory limits, folders, files, descriptors, forks."""
