"""The machine: its device, its memory, its processes."""
