"""The paper's experiment: tasks, training, and merges by mergekit. Needs the extra ``experiment``."""
