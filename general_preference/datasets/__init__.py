"""What is learned from: records, their sources, their tokens, and the batches in which responses share a prompt."""
