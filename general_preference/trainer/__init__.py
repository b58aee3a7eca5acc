"""How it learns: arguments, objectives, the engine, the loop, checkpoints and metrics."""
