"""Where cold pages are kept outside of the device: page files, and payloads of a codec in host memory or files."""
