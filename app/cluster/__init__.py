"""`prepare` on many machines, with datatrove's executors: tasks, their parts, one dataset."""
