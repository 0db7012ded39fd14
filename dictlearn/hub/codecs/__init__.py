"""One file per format; each defines one `Codec`."""
