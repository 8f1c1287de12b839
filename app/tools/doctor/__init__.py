"""`doctor`: check a machine, and what a run needs, before money is spent."""
