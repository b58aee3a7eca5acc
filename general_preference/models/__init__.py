"""What is learned: score, losses, and the model behind them. Imports torch and transformers only."""
