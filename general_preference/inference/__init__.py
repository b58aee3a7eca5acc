"""How it is used: the pipeline for notebooks, ranking, and batch inference over files. Never imports the trainer."""
