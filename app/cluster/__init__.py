"""`prepare` on many machines, by datatrove's executors: tasks, their parts, one dataset."""
